"""Thresholds of the memory controller, version 1. Each sound has a silent twin."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cgroupkit import Cgroup, cgroup, worker

from kernelkit import Heard, Turned, begin, want
from limitfs.errors import Gone, Unsupported
from limitfs.hearing.eachpartition import EachArmed, EachPartition
from limitfs.hearing.memcg import MemcgSource, Signalled, Thresholds
from limitfs.hearing.partitions import Directories
from limitfs.hearing.sampling import SamplingSource
from limitfs.hearing.slowly import Slowly
from limitfs.hearing.source import Guarantee, Refused
from limitfs.resources import cgroups
from limitfs.resources.memory import Memory, Swap
from limitfs.resources.model import Partition, Partitions, Process, Processes, System, Target

MakeHelper = Callable[..., Any]

MIB = 1 << 20


@pytest.fixture
def source(reactor: Turned) -> MemcgSource:
    made = MemcgSource(reactor, EachPartition(Directories(reactor), SamplingSource(reactor)))
    if (why := made.missing()) is not None:
        pytest.skip(why)
    return made


@pytest.fixture
def group(source: MemcgSource) -> Iterator[Cgroup]:
    del source
    with cgroup("memory") as made:
        yield made


def take(size: int) -> str:
    return f"held.append(mmap.mmap(-1, {size})); [held[-1].write(bytes({MIB})) for _ in range({size // MIB})]"


GIVE = "held.pop().close()"


def test_what_is_its_business(source: MemcgSource) -> None:
    somewhere = Partition("/", 0, 0)
    assert source.hears(Memory(), somewhere, each=False)
    assert source.hears(Memory(), Partitions(), each=True)
    assert not source.hears(Memory(), Partitions(), each=False)
    assert not source.hears(Memory(), Processes(somewhere), each=True)
    assert not source.hears(Memory(), Process(1, 1), each=False)
    assert not source.hears(Memory(), System(), each=False)
    assert not source.hears(Swap(), somewhere, each=False)


@pytest.mark.parametrize("text", ["< 1M", "<= 1M", "change"])
def test_what_no_mark_can_tell_is_refused(source: MemcgSource, group: Cgroup, heard: Heard, text: str) -> None:
    for target, each in ((group.partition, False), (Partitions(), True)):
        with pytest.raises(Refused):
            source.arm(want(Memory(), target, text, each=each), heard)
    assert not heard.readings


def test_the_kernel_signals_both_ways(reactor: Turned, group: Cgroup, helper: MakeHelper) -> None:
    child = worker(helper, group)
    told: list[int] = []
    thresholds = Thresholds(reactor, group.partition, frozenset({50 * MIB}), lambda: told.append(1))
    silent = Thresholds(reactor, group.partition, frozenset({500 * MIB}), lambda: told.append(2))
    for expected in (1, 3):
        child.do(take(60 * MIB))
        reactor.until(lambda expected=expected: len(told) == expected)
        child.do(GIVE)
        reactor.until(lambda expected=expected: len(told) == expected + 1)
    assert told == [1] * 4
    thresholds.close()
    thresholds.close()
    child.do(take(60 * MIB))
    reactor.quiet(0.2)
    assert told == [1] * 4
    silent.close()


def test_it_rings_and_clears_and_its_neighbour_is_silent(
    reactor: Turned, source: MemcgSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    busy, calm = group.below("busy"), group.below("calm")
    child, silent = worker(helper, busy), Heard()
    worker(helper, calm)
    armed = source.arm(want(Memory(), busy.partition, "50M clear 30M"), heard)
    twin = source.arm(want(Memory(), calm.partition, "50M clear 30M"), silent)
    assert (armed.source, armed.guarantee) == ("memcg", Guarantee.PEAK)
    assert armed.period is not None
    reactor.quiet(0.5)
    child.do(take(60 * MIB))
    reactor.until(lambda: heard.values()[-1] >= 50 * MIB)
    child.do(GIVE)
    reactor.until(lambda: heard.values()[-1] <= 30 * MIB)
    assert max(silent.values()) < 50 * MIB
    armed.disarm()
    armed.disarm()
    twin.disarm()
    assert reactor.quiet(0.3) == 0


def test_a_spike_is_heard_though_it_is_over(
    reactor: Turned, source: MemcgSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    child = worker(helper, group)
    armed = source.arm(want(Memory(), group.partition, "50M"), heard)
    for size in (60, 80, 100):  # each higher than the mark that the one before left
        child.do(f"{take(size * MIB)}; {GIVE}")
        reactor.until(lambda size=size: max(heard.values()) >= size * MIB)
        reactor.until(lambda: heard.values()[-1] < 50 * MIB)
    armed.disarm()


def test_a_mark_that_was_past_the_level_is_owned_up_to(
    source: MemcgSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    child = worker(helper, group)
    child.do(f"{take(60 * MIB)}; {GIVE}")
    armed = source.arm(want(Memory(), group.partition, "50M"), heard)
    assert armed.guarantee is Guarantee.SAMPLED
    armed.disarm()
    armed = source.arm(want(Memory(), group.partition, "200M"), heard)
    assert armed.guarantee is Guarantee.PEAK
    armed.disarm()


def test_what_is_below_counts(reactor: Turned, source: MemcgSource, group: Cgroup, helper: MakeHelper) -> None:
    children = [worker(helper, group.below(name)) for name in "abc"]
    listeners = [Heard() for _ in range(3)]
    targets = [group.partition, *(cgroups.identify(f"{group.path}/{name}") for name in "ab")]
    armed = [
        source.arm(want(Memory(), target, "80M"), listener)
        for target, listener in zip(targets, listeners, strict=True)
    ]
    for child in children:
        child.do(take(40 * MIB))
    reactor.until(lambda: max(listeners[0].values()) >= 80 * MIB)
    for one in armed:
        one.disarm()
    assert max(listeners[1].values() + listeners[2].values()) < 80 * MIB


def test_thresholds_follow_a_limit(reactor: Turned, group: Cgroup, heard: Heard, helper: MakeHelper) -> None:
    child = worker(helper, group)
    level = [400 * MIB]

    def levels(member: Target) -> tuple[float, float]:
        assert member == group.partition
        return level[0], level[0]

    armed = Signalled(
        "memcg",
        reactor,
        Slowly(reactor),
        dataclasses.replace(want(Memory(), group.partition, "1"), levels=levels),
        heard,
    )
    before = armed._thresholds
    level[0] = 50 * MIB
    reactor.until(lambda: armed._thresholds is not before)
    child.do(take(60 * MIB))
    reactor.until(lambda: heard.values()[-1] >= 50 * MIB)
    armed.disarm()


def test_a_removed_partition_is_gone(reactor: Turned, source: MemcgSource, group: Cgroup, heard: Heard) -> None:
    below = group.below("below")
    partition = below.partition
    armed = source.arm(want(Memory(), partition, "1G"), heard)
    below.remove()
    reactor.until(lambda: heard.ended)
    assert heard.ended == [partition]
    armed.disarm()
    with pytest.raises(Gone):
        source.arm(want(Memory(), partition, "1G"), heard)


def test_a_partition_of_another_hierarchy_is_refused(source: MemcgSource, heard: Heard) -> None:
    with cgroup() as other:
        partition = other.partition
        with pytest.raises(Unsupported):
            Memory().usage(partition)
        with pytest.raises(Refused):
            source.arm(want(Memory(), partition, "1G"), heard)


def test_each_partition(
    reactor: Turned, source: MemcgSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    calm = group.below("calm")
    worker(helper, calm)
    armed = source.arm(want(Memory(), Partitions(), "50M clear 40M", each=True), heard)
    assert "memcg" in armed.source
    late = group.below("late")
    partition = late.partition
    child = worker(helper, late)
    reactor.until(lambda: heard.values(partition))
    child.do(take(60 * MIB))
    reactor.until(lambda: heard.values(partition)[-1] >= 50 * MIB)
    reactor.until(lambda: heard.values(group.partition)[-1] >= 50 * MIB)
    child.do(GIVE)
    reactor.until(lambda: heard.values(partition)[-1] <= 40 * MIB)
    assert max(heard.values(calm.partition)) < 50 * MIB
    child.end()
    late.remove()
    reactor.until(lambda: partition in heard.ended)
    assert group.partition not in heard.ended
    armed.disarm()
    group.below("unheard")
    assert reactor.quiet(0.3) == 0


def test_one_that_is_in_another_hierarchy_only_is_sampled_until_it_is_here_too(
    reactor: Turned, source: MemcgSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    with cgroup() as other:
        armed = source.arm(want(Memory(), Partitions(), "50M", each=True), heard)
        partition = other.partition
        assert (armed.source, armed.guarantee) == ("memcg,sampled", Guarantee.SAMPLED)
        assert isinstance(armed, EachArmed)
        assert armed._armed[partition].source == "sampled"
        child = worker(helper, other)
        reactor.until(lambda: heard.values(partition)[-1] > 0)
        begin(child, take(60 * MIB))
        reactor.until(lambda: heard.values(partition)[-1] >= 50 * MIB)
        twin = Cgroup(group.hierarchy, other.path)
        twin.directory.mkdir()
        try:
            reactor.until(lambda: heard.values(partition)[-1] < 50 * MIB)  # charged elsewhere
            assert armed._armed[partition].source == "memcg"
        finally:
            twin.remove()
        reactor.until(lambda: armed._armed[partition].source == "sampled")
        assert partition not in heard.ended
        armed.disarm()


def test_what_takes_long_is_done_one_by_one(reactor: Turned) -> None:
    slowly, done = Slowly(reactor), []
    for number in range(3):
        slowly.call(lambda number=number: done.append(number))
    assert done == [0]
    reactor.pump()
    assert done == [0, 1]
    reactor.until(lambda: done == [0, 1, 2])
    reactor.pump()
    slowly.call(lambda: done.append(3))
    assert done == [0, 1, 2, 3]
