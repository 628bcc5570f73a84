"""Threads, and the lives of processes, heard by the scheduler's tracepoints."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cgroupkit import cgroup
from test_bpf_kit import Alarmed, links, loaded, settle

from conftest import EXCURSIONS
from kernelkit import Goer, Turned, want
from limitfs.hearing.births import Birth
from limitfs.hearing.bpf.layout import Kind
from limitfs.hearing.bpf.source import BpfTasks
from limitfs.resources import members, procfs
from limitfs.resources.model import Process, Processes
from limitfs.resources.tasks import Threads

THREADS = Threads()

MakeHelper = Callable[..., Any]


@pytest.fixture
def source(reactor: Turned) -> Iterator[BpfTasks]:
    with loaded(BpfTasks, reactor) as source:
        yield source


def test_every_excursion_counts(reactor: Turned, source: BpfTasks, helper: MakeHelper) -> None:
    # join() returns before the thread has ended for the kernel.
    child = helper(
        "def excursion():\n"
        "    threading.Thread(target=int).start()\n"
        "    while len(os.listdir('/proc/self/task')) > 1: pass"
    )
    heard = Alarmed(level=2)
    armed = source.arm(want(THREADS, procfs.identify(child.pid), ">= 2"), heard)
    child.do(f"for _ in range({EXCURSIONS}): excursion()")
    settle(reactor)
    armed.disarm()
    assert heard.total == EXCURSIONS
    assert heard.values()[-1] == 1


def test_below_is_silent_and_wakes_nobody(reactor: Turned, source: BpfTasks, helper: MakeHelper) -> None:
    child = helper()
    heard = Alarmed()
    armed = source.arm(want(THREADS, procfs.identify(child.pid), ">= 1000"), heard)
    settle(reactor)
    child.do("for _ in range(100): threading.Thread(target=int).start()")
    quiet = reactor.quiet(0.2)
    armed.disarm()
    assert quiet == 0
    assert heard.values() == [1]


def test_short_lives_below_are_silent(reactor: Turned, source: BpfTasks, helper: MakeHelper) -> None:
    child = helper()
    heard = Alarmed(level=3000)
    armed = source.arm(want(THREADS, Processes(), ">= 3000", each=True), heard)
    known = {member for member, _value in heard.readings}
    child.do("for _ in range(100): os.waitpid(os.fork() or os._exit(0), 0)")
    settle(reactor)
    armed.disarm()
    assert set(heard.ended) <= known
    assert heard.total == 0


def test_lives(reactor: Turned, source: BpfTasks) -> None:
    births: list[Birth] = []
    end = source.births(births.append)
    child = subprocess.Popen([sys.executable, "-S", "-c", "import os; m = bytearray(64 << 20); os._exit(3)"])
    child.wait()
    reactor.until(lambda: any(b.kind == "exit" and b.pid == child.pid for b in births))
    end()
    end()
    fork, exec_, exit_ = (b for b in births if b.pid == child.pid)
    assert (fork.kind, exec_.kind, exit_.kind) == ("fork", "exec", "exit")
    assert (fork.ppid, fork.uid, fork.status, fork.peak) == (os.getpid(), os.getuid(), None, None)
    assert (exec_.ppid, exit_.ppid) == (os.getpid(), os.getpid())
    assert exit_.status is not None
    assert os.waitstatus_to_exitcode(exit_.status) == 3
    assert exit_.peak is not None
    assert 64 << 20 <= exit_.peak < 1 << 30
    assert exit_.comm is not None
    assert exit_.comm.startswith("python")
    assert fork.time_ns < exec_.time_ns < exit_.time_ns


# Far quicker than fork(2), which an emulated machine takes a tenth of a second for.
SPAWN = """
def spawn():
    try:
        os.posix_spawn("/nonexistent", ["nonexistent"], {})
    except FileNotFoundError:
        pass
"""


def test_lives_after_a_loss(reactor: Turned, source: BpfTasks, helper: MakeHelper) -> None:
    """A reader who does not come while the ring fills is told so, then again what comes after."""
    births: list[Birth] = []
    end = source.births(births.append)
    child = helper(SPAWN)
    count = 2048  # two records each, of which the ring holds some 3,200
    child.do(f"for _ in range({count}): spawn()")
    reactor.until(lambda: any(b.kind == "lost" for b in births))
    told = len(births)
    child.do("spawn()")
    reactor.until(lambda: any(b.kind == "exit" for b in births[told:]))
    end()
    assert 0 < sum(b.ppid == child.pid and b.kind == "fork" for b in births) < count


PORTION = 100
"""Processes whose records the ring holds, with those of whoever else is born and dies meanwhile."""


def test_who_ends_with_many_threads_is_told_once(
    reactor: Turned, source: BpfTasks, goer: Callable[[str], Goer]
) -> None:
    """Several of them may find that none is left."""
    births: list[Birth] = []
    end = source.births(births.append)
    child = goer("threads")
    born: list[int] = []
    for _ in range(EXCURSIONS // 4 // PORTION):
        born += child.go(PORTION)
        settle(reactor)
    reactor.until(lambda: any(b.kind == "exit" and b.pid == born[-1] for b in births))
    settle(reactor)
    end()
    exits = [b for b in births if b.kind == "exit" and b.ppid == child.pid]
    told = Counter(b.pid for b in exits)
    assert {pid: told[pid] for pid in born} == dict.fromkeys(born, 1)
    assert {os.waitstatus_to_exitcode(b.status) for b in exits if b.status is not None} == {7}
    assert all(b.peak for b in exits)


def test_a_thread_that_ends_is_no_death(reactor: Turned, source: BpfTasks, helper: MakeHelper) -> None:
    child = helper()
    births: list[Birth] = []
    end = source.births(births.append)
    child.do("for _ in range(100): threading.Thread(target=int).start()")
    settle(reactor)
    end()
    assert [b for b in births if b.pid == child.pid] == []


def test_moves(reactor: Turned, source: BpfTasks, helper: MakeHelper) -> None:
    moved: list[Process] = []
    end = source.moves(moved.append, lambda: None)
    child = helper()
    with cgroup() as group:
        group.take(child.pid)
        reactor.until(lambda: moved == [procfs.identify(child.pid)])
        end()
    settle(reactor)
    assert len(moved) == 1


def test_who_stays_is_not_told_as_moved(reactor: Turned, source: BpfTasks, helper: MakeHelper) -> None:
    moved: list[Process] = []
    end = source.moves(moved.append, lambda: None)
    helper().do("os.waitpid(os.fork() or os._exit(0), 0)")
    settle(reactor)
    end()
    assert moved == []


def test_sum_follows(reactor: Turned, source: BpfTasks, helper: MakeHelper) -> None:
    """The kernel's running total is that of /proc, whatever else the machine does meanwhile."""

    def agrees() -> bool:
        before = source.engine.total(Kind.THREADS)
        truth = members.usage(THREADS, Processes())
        return before == truth == source.engine.total(Kind.THREADS)

    heard = Alarmed()
    armed = source.arm(want(THREADS, Processes(), "change"), heard)
    try:
        reactor.until(agrees)
        child = helper()
        child.do("stop = threading.Event(); [threading.Thread(target=stop.wait).start() for _ in range(200)]")
        reactor.until(agrees)
        settle(reactor)
        assert heard.values()[-1] >= 200
        child.do("stop.set()")
        child.end()
        reactor.until(agrees)
    finally:
        armed.disarm()


def test_disarmed_leaves_no_hook(reactor: Turned, source: BpfTasks) -> None:
    assert links() == 0
    armed = source.arm(want(THREADS, procfs.identify(os.getpid()), ">= 10000"), Alarmed())
    assert links() > 0
    armed.disarm()
    reactor.until(lambda: links() == 0)
