"""Pressure triggers. Each sound has a silent twin."""

import os
import select
from collections.abc import Callable
from typing import Any

import pytest
import trio

from kernelkit import Heard, Turned, begin, burn, want
from limitfs.hearing.eachpartition import EachPartition
from limitfs.hearing.edges import Edges
from limitfs.hearing.partitions import Directories
from limitfs.hearing.psi import PsiSource, PsiTrigger
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.sampling import SamplingSource
from limitfs.hearing.source import Refused
from limitfs.resources.cpu import Cpu
from limitfs.resources.model import Process, System
from limitfs.resources.pressure import CpuPressure, MemoryPressure

MakeHelper = Callable[..., Any]

CPU = CpuPressure.path


@pytest.fixture
def edges(reactor: Turned) -> Edges:
    return Edges(reactor)


def source_of(reactor: Turned, edges: Edges) -> PsiSource:
    return PsiSource(reactor, edges, EachPartition(Directories(reactor), SamplingSource(reactor)))


def crowd(helper: MakeHelper, seconds: float) -> None:
    """More busy processes than CPUs."""
    children = [helper() for _ in range((os.cpu_count() or 1) + 2)]
    for child in children:
        begin(child, burn(seconds))


def test_a_trigger_is_taken_and_given_back(edges: Edges) -> None:
    trigger = PsiTrigger(edges, CPU, "some", 1_900_000, 2_000_000, lambda: None)
    assert not trigger.failed
    trigger.close()
    trigger.close()


def test_a_trigger_fires_when_there_are_more_busy_processes_than_cpus(
    reactor: Turned, edges: Edges, helper: MakeHelper
) -> None:
    fired: list[int] = []
    trigger = PsiTrigger(edges, CPU, "some", 50_000, 2_000_000, lambda: fired.append(1))
    silent = PsiTrigger(edges, MemoryPressure.path, "full", 2_000_000, 2_000_000, lambda: fired.append(2))
    crowd(helper, 3)
    reactor.until(lambda: fired)
    assert fired == [1]
    trigger.close()
    silent.close()


async def test_in_the_event_loop_no_event_is_taken_away(helper: MakeHelper) -> None:
    reactor = Reactor()
    fired: list[int] = []
    trigger = PsiTrigger(Edges(reactor), CPU, "some", 50_000, 2_000_000, lambda: fired.append(1))
    crowd(helper, 3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        with trio.fail_after(30):
            while not fired:
                await trio.sleep(0.05)
        nursery.cancel_scope.cancel()
    trigger.close()
    reactor.close()


@pytest.mark.parametrize(
    ("kind", "stall", "window"),
    [("some", 3_000_000, 2_000_000), ("some", 1, 0), ("none", 100_000, 2_000_000), ("some", 1, 20_000_000)],
)
def test_what_the_kernel_does_not_take_is_refused(edges: Edges, kind: str, stall: int, window: int) -> None:
    with pytest.raises(Refused, match=r"/proc/pressure/cpu: .*: Invalid argument"):
        PsiTrigger(edges, CPU, kind, stall, window, lambda: None)


def test_no_such_file_is_refused(edges: Edges) -> None:
    with pytest.raises(Refused, match="No such file"):
        PsiTrigger(edges, "/proc/pressure/none", "some", 1, 2_000_000, lambda: None)


def test_the_source_works_here(reactor: Turned, edges: Edges) -> None:
    assert source_of(reactor, edges).missing() is None


def test_what_is_its_business(reactor: Turned, edges: Edges) -> None:
    source = source_of(reactor, edges)
    assert source.hears(CpuPressure(), System(), each=False)
    assert not source.hears(CpuPressure(), Process(1, 1), each=False)
    assert not source.hears(Cpu(), System(), each=False)


@pytest.mark.parametrize("text", ["< 5", "change", "0%", "150%", "50% per 100ms"])
def test_what_no_trigger_can_tell_is_refused(reactor: Turned, edges: Edges, heard: Heard, text: str) -> None:
    with pytest.raises(Refused):
        source_of(reactor, edges).arm(want(CpuPressure(), System(), text), heard)


def test_pressure_rings_and_clears(reactor: Turned, edges: Edges, heard: Heard, helper: MakeHelper) -> None:
    armed = source_of(reactor, edges).arm(want(CpuPressure(), System(), "> 30% per 2s"), heard)
    assert len(heard.readings) == 1
    crowd(helper, 1.5)
    reactor.until(lambda: heard.values()[-1] > 30)
    # On a machine that is busy with other things too, it stays pressed, and the readings say so.
    reactor.until(lambda: heard.values()[-1] <= 30 or stays_pressed(heard))
    armed.disarm()
    armed.disarm()


def stays_pressed(heard: Heard) -> bool:
    return len(heard.readings) > 20 and CpuPressure().usage(System()) > 20


def test_without_pressure_it_sleeps(reactor: Turned, edges: Edges, heard: Heard) -> None:
    armed = source_of(reactor, edges).arm(want(MemoryPressure(), System(), "99% per 2s"), heard)
    assert reactor.quiet(3) == 0
    assert len(heard.readings) == 1
    armed.disarm()


def test_edges_end_with_their_last_descriptor(reactor: Turned, edges: Edges) -> None:
    told: list[int] = []
    one, other = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    edges.add(one, lambda: told.append(1), select.EPOLLIN)
    edges.add(other, lambda: told.append(2), select.EPOLLIN)
    os.eventfd_write(one, 1)
    reactor.until(lambda: told)
    edges.remove(one)
    os.eventfd_write(one, 1)
    os.eventfd_write(other, 1)
    reactor.until(lambda: 2 in told)
    assert told == [1, 2]
    edges.remove(other)
    edges.remove(other)
    os.close(one)
    os.close(other)
