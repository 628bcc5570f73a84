"""CPU timers on other processes. Each sound has a silent twin."""

import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from kernelkit import Heard, Turned, begin, burn, want
from limitfs.errors import Gone
from limitfs.hearing import cputimer
from limitfs.hearing.connector import Connector
from limitfs.hearing.cputimer import CpuTimers, CpuTimerSource
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.membership import Membership
from limitfs.hearing.source import Refused
from limitfs.resources import procfs
from limitfs.resources.cpu import Cpu, Cputime
from limitfs.resources.memory import Memory
from limitfs.resources.model import Partition, Process, Processes, System, Thread

MakeHelper = Callable[..., Any]


@pytest.fixture
def timers(reactor: Turned) -> CpuTimers:
    return CpuTimers(reactor)


@pytest.fixture
def source(reactor: Turned, timers: CpuTimers) -> CpuTimerSource:
    deaths = Deaths(reactor)
    return CpuTimerSource(reactor, timers, deaths, Membership(reactor, Connector(reactor), deaths))


def used(child: Any) -> float:
    """Seconds of CPU time: a slow machine takes more than a tenth of one only to start."""
    return time.clock_gettime((~child.pid << 3) | 2)


# The timers


def test_a_busy_process_fires_at_its_level(reactor: Turned, timers: CpuTimers, helper: MakeHelper) -> None:
    child = helper()
    fired: list[float] = []
    level = used(child) + 0.3
    timer = timers.arm_at(procfs.identify(child.pid), level, lambda: fired.append(timer.now()))
    child.do(burn(0.55))  # the kernel looks at its tick, if the process runs then
    reactor.until(lambda: fired)
    assert level <= fired[0] < level + 0.3
    reactor.quiet(0.1)
    assert len(fired) == 1
    timer.close()
    timer.close()


def test_an_idle_process_does_not(reactor: Turned, timers: CpuTimers, helper: MakeHelper) -> None:
    child = helper()
    timer = timers.arm_at(procfs.identify(child.pid), 5.0, lambda: pytest.fail("it is idle"))
    assert reactor.quiet(0.5) == 0
    timer.close()


def test_set_again_it_fires_again(reactor: Turned, timers: CpuTimers, helper: MakeHelper) -> None:
    child = helper()
    fired: list[float] = []

    def ring() -> None:
        fired.append(timer.now())
        if len(fired) < 4:
            timer.set(fired[-1] + 0.05)

    timer = timers.arm_at(procfs.identify(child.pid), 0.1, ring)
    begin(child, burn(2.0))
    reactor.until(lambda: len(fired) == 4)
    assert all(later - earlier >= 0.05 for earlier, later in pairwise(fired))
    timer.close()


def test_what_was_passed_already_fires_at_once(reactor: Turned, timers: CpuTimers, helper: MakeHelper) -> None:
    child = helper(burn(0.05))
    fired: list[int] = []
    timer = timers.arm_at(procfs.identify(child.pid), 0.02, lambda: fired.append(1))
    reactor.until(lambda: fired)
    timer.close()


def test_closed_is_silent(reactor: Turned, timers: CpuTimers, helper: MakeHelper) -> None:
    child = helper()
    timer = timers.arm_at(procfs.identify(child.pid), used(child) + 0.1, lambda: pytest.fail("it was closed"))
    other = timers.arm_at(procfs.identify(child.pid), 50.0, lambda: pytest.fail("far off"))
    timer.close()
    child.do(burn(0.2))
    assert reactor.quiet(0.2) == 0
    other.close()


def test_a_signal_that_was_on_its_way_finds_nobody(reactor: Turned, timers: CpuTimers, helper: MakeHelper) -> None:
    child = helper()
    process = procfs.identify(child.pid)
    timer = timers.arm_at(process, 0.1, lambda: pytest.fail("it was closed"))
    other = timers.arm_at(process, 50.0, lambda: pytest.fail("far off"))
    child.do(burn(0.2))
    timer.close()
    reactor.quiet(0.1)
    other.close()


def test_many_timers_on_one_process(reactor: Turned, timers: CpuTimers, helper: MakeHelper) -> None:
    child = helper()
    process = procfs.identify(child.pid)
    fired: set[int] = set()
    made = [timers.arm_at(process, 0.15, partial(fired.add, number)) for number in range(300)]
    child.do(burn(0.6))  # the kernel fires 20 timers of a process per tick
    reactor.until(lambda: len(fired) == 300)
    for timer in made:
        timer.close()
    assert len(timers) == 0


def test_a_process_that_ended_is_gone(timers: CpuTimers, helper: MakeHelper) -> None:
    child = helper()
    process = procfs.identify(child.pid)
    timer = timers.arm_at(process, 50, lambda: None)
    child.end()
    with pytest.raises(Gone):
        timer.set(1)
    with pytest.raises(Gone):
        timer.now()
    timer.close()
    with pytest.raises(Gone):
        timers.arm_at(process, 1, lambda: None)
    assert len(timers) == 0


def test_a_number_used_again_is_another_process(timers: CpuTimers, helper: MakeHelper) -> None:
    child = helper()
    with pytest.raises(Gone, match="ended"):
        timers.arm_at(Process(child.pid, procfs.identify(child.pid).start - 1), 1, lambda: None)


def test_a_thread_that_the_signal_would_kill(
    timers: CpuTimers, helper: MakeHelper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cputimer, "SIGNAL", cputimer.SIGNAL + 1)  # which nobody blocks
    with pytest.raises(Refused, match="block_signal"):
        timers.arm_at(procfs.identify(helper().pid), 1, lambda: None)


def test_threads_inherit_the_block(timers: CpuTimers, helper: MakeHelper) -> None:
    thread = threading.Thread(target=threading.Event().wait, args=(0.5,))
    thread.start()
    timers.arm_at(procfs.identify(helper().pid), 50, lambda: None).close()
    thread.join()


# The source


def test_it_works_here(source: CpuTimerSource) -> None:
    assert source.missing() is None


def test_what_is_its_business(source: CpuTimerSource) -> None:
    process = Process(1, 1)
    assert source.hears(Cpu(), process, each=False)
    assert source.hears(Cputime(), Processes(), each=True)
    assert source.hears(Cputime(), Processes(Partition("/a", 1, 1)), each=True)
    assert not source.hears(Cpu(), System(), each=False)
    assert not source.hears(Cpu(), process, each=True)
    assert not source.hears(Cpu(), Thread(1, 1, 1), each=False)
    assert not source.hears(Memory(), process, each=False)


@pytest.mark.parametrize("text", ["< 5", "<= 5", "change"])
def test_it_hears_no_less(source: CpuTimerSource, heard: Heard, helper: MakeHelper, text: str) -> None:
    with pytest.raises(Refused):
        source.arm(want(Cputime(), procfs.identify(helper().pid), text), heard)


def test_a_kernel_thread_is_not_heard(source: CpuTimerSource, heard: Heard) -> None:
    for pid in procfs.pids():
        try:
            name = procfs.stat(pid).comm
        except Gone:
            continue
        if name.startswith("ksoftirqd/"):
            break
    with pytest.raises(Refused, match="kernel thread"):
        source.arm(want(Cpu(), procfs.identify(pid), "5"), heard)


def test_cputime_of_a_process(reactor: Turned, source: CpuTimerSource, heard: Heard, helper: MakeHelper) -> None:
    child = helper()
    process = procfs.identify(child.pid)
    level = round(used(child) + 0.3, 3)
    armed = source.arm(want(Cputime(), process, f"{level}s"), heard)
    assert [value < level for value in heard.values()] == [True], "the first reading is the present"
    child.do(burn(0.4))
    reactor.until(lambda: heard.values()[-1] >= level)
    assert len(heard.readings) == 2
    child.do(burn(0.2))
    assert reactor.quiet(0.2) == 0, "there is nothing more to hear"
    armed.disarm()
    armed.disarm()


def test_cputime_already_beyond_is_told_at_once(
    reactor: Turned, source: CpuTimerSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper(burn(0.1))
    armed = source.arm(want(Cputime(), procfs.identify(child.pid), "50ms"), heard)
    assert heard.values()[0] >= 0.1
    assert reactor.quiet(0.2) == 0
    armed.disarm()


def test_the_last_tick_is_read_from_the_zombie(
    reactor: Turned, source: CpuTimerSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper()
    process = procfs.identify(child.pid)
    armed = source.arm(want(Cputime(), process, "50s"), heard)
    child.do(burn(0.1))
    child.process.kill()
    reactor.until(lambda: heard.ended)
    assert heard.ended == [process]
    assert heard.values()[-1] >= 0.1
    armed.disarm()


def test_cpu_rings_in_a_burst_and_clears_after_it(
    reactor: Turned, source: CpuTimerSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper()
    armed = source.arm(want(Cpu(), procfs.identify(child.pid), "10% per 500ms"), heard)
    assert heard.values() == [0.0]
    begin(child, burn(1.0))
    reactor.until(lambda: heard.values()[-1] >= 10)
    assert child.process.stdout is not None
    child.process.stdout.readline()  # the burst is over
    reactor.until(lambda: heard.values()[-1] < 10)
    reactor.quiet(0.1)
    readings = len(heard.readings)
    assert reactor.quiet(1.0) == 0, "clear and idle: no tick"
    assert len(heard.readings) == readings
    armed.disarm()


def test_cpu_of_an_idle_process_is_silent(
    reactor: Turned, source: CpuTimerSource, heard: Heard, helper: MakeHelper
) -> None:
    armed = source.arm(want(Cpu(), procfs.identify(helper().pid), "50%"), heard)
    assert reactor.quiet(1.0) == 0
    assert heard.values() == [0.0]
    armed.disarm()


def test_cpu_below_the_level_does_not_ring(
    reactor: Turned, source: CpuTimerSource, heard: Heard, helper: MakeHelper
) -> None:
    # One busy thread never gets near 300 % of a CPU.
    child = helper(f"threading.Thread(target=lambda: {burn(1.0)}, daemon=True).start()")
    armed = source.arm(want(Cpu(), procfs.identify(child.pid), "300% per 200ms"), heard)
    reactor.quiet(1.2)
    assert max(heard.values()) < 300
    assert len(heard.readings) <= 1 + 1.0 / (3 * 0.2 / 32) + 1
    armed.disarm()


def beyond(heard: Heard, member: Process, value: float) -> bool:
    return heard.values(member)[-1] >= value


def test_each_process_is_heard_from_its_birth(
    reactor: Turned, source: CpuTimerSource, heard: Heard, helper: MakeHelper
) -> None:
    old, idle = helper(), helper()
    level = round(2 * used(idle) + 0.2, 3)
    armed = source.arm(want(Cputime(), Processes(), f"{level}s", each=True), heard)
    young = helper()
    known: dict[int, Process] = {}

    def all_are_known() -> bool:
        known.update({member.pid: member for member, _ in heard.readings if isinstance(member, Process)})
        return {old.pid, idle.pid, young.pid} <= known.keys()

    reactor.until(all_are_known)
    for child in (old, young):
        child.do(burn(level + 0.1))
        member = known[child.pid]
        reactor.until(partial(beyond, heard, member, level))
    assert max(heard.values(known[idle.pid])) < level
    young.end()
    reactor.until(lambda: known[young.pid] in heard.ended)
    armed.disarm()


def test_one_timer_less_than_needed_is_refused(
    source: CpuTimerSource, timers: CpuTimers, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_args: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("limitfs.hearing.syscalls.timer_create", none_left)
    with pytest.raises(Refused, match="RLIMIT_SIGPENDING"):
        source.arm(want(Cputime(), Processes(), "200s", each=True), heard)
    assert len(timers) == 0
