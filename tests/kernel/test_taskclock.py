"""The task clock of single threads. Each sound has a silent twin."""

from collections.abc import Callable
from typing import Any

import pytest
import trio

from kernelkit import Heard, Turned, begin, burn, want
from limitfs.errors import Gone
from limitfs.hearing.connector import Connector
from limitfs.hearing.edges import Edges
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Refused
from limitfs.hearing.taskclock import TaskClock, TaskClockSource
from limitfs.resources import procfs
from limitfs.resources.cpu import Cpu, Cputime, consumed
from limitfs.resources.model import Process, System, Thread, Threads

MakeHelper = Callable[..., Any]

WORKER = """
import queue
jobs = queue.Queue()
def work():
    for job in iter(jobs.get, None):
        exec(job)
worker = threading.Thread(target=work)
worker.start()
"""


@pytest.fixture
def source(reactor: Turned) -> TaskClockSource:
    return TaskClockSource(reactor, Edges(reactor), Connector(reactor))


def threads_of(child: Any) -> tuple[Thread, Thread]:
    """The first, and the worker."""
    first, worker = sorted(procfs.tids(child.pid))
    return procfs.identify_thread(child.pid, first), procfs.identify_thread(child.pid, worker)


def test_it_works_here(source: TaskClockSource) -> None:
    assert source.missing() is None


def test_what_is_its_business(source: TaskClockSource) -> None:
    process = Process(1, 1)
    assert source.hears(Cpu(), Thread(1, 1, 1), each=False)
    assert source.hears(Cputime(), Threads(process), each=True)
    assert source.hears(Cputime(), process, each=True)
    assert not source.hears(Cputime(), process, each=False)
    assert not source.hears(Cputime(), Threads(process), each=False)
    assert not source.hears(Cputime(), System(), each=True)


def test_it_hears_no_less(source: TaskClockSource, heard: Heard, helper: MakeHelper) -> None:
    first, _worker = threads_of(helper(WORKER))
    with pytest.raises(Refused):
        source.arm(want(Cputime(), first, "< 5s"), heard)


def test_the_thread_that_works_is_heard_and_the_other_is_not(
    reactor: Turned, source: TaskClockSource, helper: MakeHelper
) -> None:
    child = helper(WORKER)
    first, worker = threads_of(child)
    idle, busy = Heard(), Heard()
    armed = [source.arm(want(Cputime(), who, "300ms"), to) for who, to in ((first, idle), (worker, busy))]
    begin(child, f"jobs.put({burn(0.4)!r})")
    reactor.until(lambda: busy.values()[-1] >= 0.3)
    reactor.quiet(0.3)
    assert busy.values()[-1] < 0.5
    assert len(busy.readings) == 2
    assert len(idle.readings) == 1
    for one in armed:
        one.disarm()
        one.disarm()


def test_cputime_already_beyond_is_told_at_once(
    reactor: Turned, source: TaskClockSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper(burn(0.1))
    armed = source.arm(want(Cputime(), procfs.identify_thread(child.pid, child.pid), "50ms"), heard)
    assert heard.values()[0] >= 0.05
    assert reactor.quiet(0.2) == 0
    armed.disarm()


def test_cpu_rings_in_a_burst_and_clears_after_it(
    reactor: Turned, source: TaskClockSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper(WORKER)
    _first, worker = threads_of(child)
    armed = source.arm(want(Cpu(), worker, "10% per 500ms"), heard)
    assert heard.values() == [0.0]
    begin(child, f"jobs.put({burn(1.0)!r})")
    reactor.until(lambda: heard.values()[-1] >= 10)
    reactor.until(lambda: consumed(worker) >= 1)  # on a busy machine it may come to a standstill in between
    reactor.until(lambda: heard.values()[-1] < 10)
    reactor.quiet(0.3)
    readings = len(heard.readings)
    assert reactor.quiet(1.0) == 0, "clear and idle: no tick"
    assert len(heard.readings) == readings
    armed.disarm()


def test_the_end_is_told_after_the_last_value(
    reactor: Turned, source: TaskClockSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper(WORKER)
    _first, worker = threads_of(child)
    armed = source.arm(want(Cputime(), worker, "50s"), heard)
    begin(child, f"jobs.put({burn(0.1)!r}); jobs.put(None)")
    reactor.until(lambda: heard.ended)
    assert heard.ended == [worker]
    assert heard.values()[-1] >= 0.1
    armed.disarm()


def test_executing_another_program_ends_no_clock(
    reactor: Turned, source: TaskClockSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper()
    armed = source.arm(want(Cputime(), procfs.identify_thread(child.pid, child.pid), "500ms"), heard)
    program = "import time\nwhile time.process_time() < 0.7: pass\ntime.sleep(100)"
    begin(child, f"os.execv(sys.executable, [sys.executable, '-S', '-c', {program!r}])")
    reactor.until(lambda: heard.values()[-1] >= 0.5)
    assert not heard.ended
    armed.disarm()


def test_each_thread_is_heard_from_its_birth(
    reactor: Turned, source: TaskClockSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper()
    process = procfs.identify(child.pid)
    armed = source.arm(want(Cputime(), Threads(process), "200ms", each=True), heard)
    child.do(f"exec({WORKER!r}, globals())")
    _first, worker = threads_of(child)
    begin(child, f"jobs.put({burn(0.3)!r}); jobs.put(None)")
    reactor.until(lambda: worker in heard.ended)
    assert heard.values(worker)[-1] >= 0.2
    assert len(heard.ended) == 1
    armed.disarm()


def test_a_thread_that_ended_is_gone(source: TaskClockSource, heard: Heard, helper: MakeHelper) -> None:
    child = helper(WORKER)
    _first, worker = threads_of(child)
    child.end()
    with pytest.raises(Gone):
        source.arm(want(Cputime(), worker, "1s"), heard)


def test_a_clock_counts_from_the_start_of_its_thread(reactor: Turned, helper: MakeHelper) -> None:
    child = helper(burn(0.1))
    clock = TaskClock(Edges(reactor), procfs.identify_thread(child.pid, child.pid), lambda: None, lambda: None)
    assert clock.now() >= 0.09
    child.do(burn(0.1))
    assert clock.now() >= 0.19
    clock.close()
    clock.close()


async def test_in_the_event_loop_no_event_is_taken_away(helper: MakeHelper) -> None:
    child = helper()
    reactor = Reactor()
    heard = Heard()
    source = TaskClockSource(reactor, Edges(reactor), Connector(reactor))
    armed = source.arm(want(Cputime(), procfs.identify_thread(child.pid, child.pid), "200ms"), heard)
    begin(child, burn(0.3))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        with trio.fail_after(30):
            while heard.values()[-1] < 0.2:
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    armed.disarm()
    reactor.close()
