"""The readers on real processes, with psutil as an independent witness."""

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from limitfs.errors import Gone, Unsupported
from limitfs.resources import RESOURCES, at, cpu, procfs
from limitfs.resources.cpu import Cpu
from limitfs.resources.model import Level, Process, System, Thread
from limitfs.resources.recent import Recent
from limitfs.resources.stack import Stack

Spawn = Callable[[str], subprocess.Popen[str]]

BUSY_LIFE = """
import mmap, os, threading, time
files = [open(os.devnull) for _ in range(20)]
pages = mmap.mmap(-1, 8 << 20)
pages.write(b"x" * (8 << 20))
kept = bytearray(b"x" * (32 << 20))
while time.process_time() < 0.2: pass
for _ in range(3): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print(flush=True)
time.sleep(60)
"""

FIRST_THREAD_ENDS = """
import ctypes, os, threading, time
kept = bytearray(b"x" * (16 << 20))
libc = ctypes.CDLL(None)
exit_thread = {"x86_64": 60}.get(os.uname().machine, 93)
def other():
    time.sleep(0.1)
    print(flush=True)
    time.sleep(60)
threading.Thread(target=other).start()
libc.syscall(exit_thread, 0)
"""


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start a Python program, and come back when it has printed its first line."""
    children = []

    def start(program: str) -> subprocess.Popen[str]:
        child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def child(spawn: Spawn) -> Process:
    return procfs.identify(spawn(BUSY_LIFE).pid)


def other_thread(process: Process) -> Thread:
    return procfs.identify_thread(process.pid, next(tid for tid in procfs.tids(process.pid) if tid != process.pid))


def test_agrees_with_psutil(child: Process) -> None:
    witness = psutil.Process(child.pid)
    memory = witness.memory_full_info()
    slack = 1 << 20  # the kernel's own counts are that rough
    assert RESOURCES["memory"].usage(child) == pytest.approx(memory.rss, abs=slack)
    assert RESOURCES["virtual"].usage(child) == memory.vms
    assert RESOURCES["swap"].usage(child) == pytest.approx(memory.swap, abs=slack)
    assert RESOURCES["threads"].usage(child) == witness.num_threads() == 4
    assert RESOURCES["fds"].usage(child) == witness.num_fds()
    times = witness.cpu_times()
    assert RESOURCES["cputime"].usage(child) == pytest.approx(times.user + times.system, abs=0.05)
    assert RESOURCES["fds"].limit(child) == RESOURCES["fds"].limit(procfs.identify(os.getpid()))
    assert procfs.started(child) == pytest.approx(witness.create_time(), abs=2)
    assert procfs.started(System()) == pytest.approx(psutil.boot_time(), abs=2)
    assert procfs.comm(child.pid) == witness.name()
    assert procfs.thread_group(other_thread(child).tid) == child.pid
    assert procfs.owner(child.pid) == (witness.uids().effective, witness.gids().effective)


def test_shared_counts_what_was_touched(child: Process) -> None:
    assert RESOURCES["shared"].usage(child) == pytest.approx(8 << 20, abs=1 << 20)


def test_peak_is_not_below_use(child: Process) -> None:
    for name in ("memory", "virtual"):
        peak = RESOURCES[name].peak(child)
        assert peak is not None
        assert peak >= RESOURCES[name].usage(child) - (1 << 20)


@pytest.mark.parametrize("name", [each.name for each in at(Level.PROCESS)])
def test_every_resource_of_a_process_answers(child: Process, name: str) -> None:
    resource = RESOURCES[name]
    assert resource.usage(child) >= 0
    assert resource.limit(child).soft <= resource.limit(child).hard
    assert resource.whole(child) >= 0


@pytest.mark.parametrize("name", [each.name for each in at(Level.THREAD)])
def test_every_resource_of_a_thread_answers(child: Process, name: str) -> None:
    for thread in (other_thread(child), procfs.identify_thread(child.pid, child.pid)):
        assert RESOURCES[name].usage(thread) >= 0
        assert RESOURCES[name].limit(thread).soft <= math.inf


@pytest.mark.parametrize("name", [each.name for each in at(Level.PROCESS)])
def test_a_process_that_ended_is_gone(spawn: Spawn, name: str) -> None:
    child = spawn("print(flush=True); input()")
    target = procfs.identify(child.pid)
    RESOURCES[name].usage(target)
    child.kill()
    child.wait()
    for ask in (RESOURCES[name].usage, RESOURCES[name].limit, RESOURCES[name].whole):
        with pytest.raises(Gone):
            ask(target)


@pytest.mark.parametrize("name", [each.name for each in at(Level.PROCESS)])
def test_another_start_time_is_another_process(name: str) -> None:
    mine = procfs.identify(os.getpid())
    for ask in (RESOURCES[name].usage, RESOURCES[name].limit, RESOURCES[name].whole):
        with pytest.raises(Gone):
            ask(Process(mine.pid, mine.start - 1))


@pytest.mark.parametrize("name", [each.name for each in at(Level.THREAD)])
def test_a_thread_that_ended_is_gone(name: str) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert thread.native_id is not None
    target = procfs.identify_thread(os.getpid(), thread.native_id)
    stop.set()
    thread.join()
    wait_until(lambda: target.tid not in procfs.tids(target.pid))
    with pytest.raises(Gone):
        RESOURCES[name].usage(target)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_zombie_exists_and_uses_nothing(spawn: Spawn) -> None:
    child = spawn("print(flush=True); input()")
    target = procfs.identify(child.pid)
    child.send_signal(9)
    wait_until(lambda: procfs.stat(child.pid).state == "Z")
    assert procfs.identify(child.pid) == target
    assert child.pid in procfs.pids()
    for name in ("memory", "swap", "shared", "virtual", "data", "locked", "stack", "fds", "threads"):
        assert RESOURCES[name].usage(target) == 0, name
    assert RESOURCES["cputime"].usage(target) > 0


def test_a_process_lives_on_without_its_first_thread(spawn: Spawn) -> None:
    target = procfs.identify(spawn(FIRST_THREAD_ENDS).pid)
    assert procfs.stat(target.pid).state == "Z"
    assert not procfs.stat(target.pid).zombie
    assert RESOURCES["memory"].usage(target) > 16 << 20
    assert RESOURCES["data"].usage(target) > 16 << 20
    assert RESOURCES["fds"].usage(target) >= 3


def test_kernel_threads_use_nothing() -> None:
    kthreadd = procfs.identify(2)
    if procfs.stat(2).comm != "kthreadd":
        pytest.skip("a PID namespace of its own")
    assert RESOURCES["memory"].usage(kthreadd) == 0
    assert RESOURCES["stack"].usage(kthreadd) == 0


def test_a_thread_number_is_no_process(child: Process) -> None:
    with pytest.raises(Gone):
        procfs.identify(other_thread(child).tid)


def test_cpu_at_first_since_the_start_then_since_the_last_read(child: Process) -> None:
    now = child.start / procfs.TICKS + 10
    resource = Cpu(lambda: now)
    used = resource.counter(child)
    assert resource.usage(child) == pytest.approx(100 * used / 10, rel=0.05)
    first = resource.usage(child)
    now += 0.001
    assert resource.usage(child) == first
    now += 10
    assert resource.usage(child) == pytest.approx(0, abs=0.5)


def test_cpu_of_a_busy_process_is_a_rate(spawn: Spawn) -> None:
    target = procfs.identify(spawn("print(flush=True)\nwhile True: pass").pid)
    resource = Cpu()
    resource.usage(target)
    time.sleep(0.3)
    assert 20 < resource.usage(target) < 110


def test_cpu_clock_and_ticks_agree(child: Process) -> None:
    now = procfs.stat(child.pid)
    assert cpu.consumed(child) == pytest.approx((now.utime + now.stime) / procfs.TICKS, abs=0.05)
    assert cpu.consumed(child) >= cpu.consumed(procfs.identify_thread(child.pid, child.pid)) > 0


def test_cpu_falls_back_to_ticks(child: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = cpu.consumed(child)
    monkeypatch.setattr(cpu, "process_clock", lambda _pid: 2**30)
    assert cpu.consumed(child) == pytest.approx(exact, abs=0.05)


def test_fds_without_a_trustworthy_size(child: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = procfs.fds(child.pid)
    monkeypatch.setattr(procfs, "_size_counts_fds", lambda: False)
    assert procfs.fds(child.pid) == counted


def test_stack_of_a_waiting_thread(child: Process) -> None:
    thread = other_thread(child)
    resource = Stack()
    try:
        used = resource.usage(thread)
    except Unsupported as error:
        pytest.skip(error.message)
    assert 0 < used <= resource.limit(thread).soft


def test_stack_of_a_running_thread_is_the_last_one_known(child: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = other_thread(child)
    resource = Stack()
    monkeypatch.setattr(procfs, "stack_pointer", lambda _pid, _tid: None)
    with pytest.raises(Unsupported, match="running"):
        resource.usage(thread)
    monkeypatch.setattr(procfs, "mapping", lambda _pid, _address: (0x1000, 0x9000))
    monkeypatch.setattr(procfs, "stack_pointer", lambda _pid, _tid: 0x8F00)
    assert resource.usage(thread) == 0x100
    monkeypatch.setattr(procfs, "stack_pointer", lambda _pid, _tid: None)
    assert resource.usage(thread) == 0x100
    assert resource.limit(thread).soft == 0x8000


def test_what_is_measured_elsewhere_is_refused(child: Process) -> None:
    thread = other_thread(child)
    for resource in RESOURCES.values():
        for target in (System(), child, thread):
            if target.level not in resource.levels:
                for ask in (resource.usage, resource.limit, resource.whole):
                    if (resource.name, target, ask) == ("processes", child, resource.usage):
                        continue  # a process adds one to the sum over its partition
                    with pytest.raises(Unsupported):
                        ask(target)


def test_a_process_counts_for_one(child: Process) -> None:
    assert RESOURCES["processes"].usage(child) == 1
    with pytest.raises(Gone):
        RESOURCES["processes"].usage(Process(child.pid, child.start + 1))


def test_recent_forgets_the_oldest() -> None:
    recent: Recent[int, int] = Recent(2)
    for key in (1, 2, 1, 3):
        recent.put(key, key)
    assert (recent.get(1), recent.get(2), recent.get(3), len(recent)) == (1, None, 3, 2)
    recent.drop(1)
    recent.drop(1)
    assert recent.get(1) is None


def test_a_thousand_identities_fit_a_listing() -> None:
    """`ls` of 1,000 processes has 100 ms; identities may take a quarter (here thrice that, for slow machines)."""
    mine = os.getpid()
    best = min(timed(lambda: [procfs.identify(mine) for _ in range(1000)]) for _ in range(5))
    assert best < 0.075


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
