"""Partitions come and go, and are heard: the kernel's own cgroups, of every hierarchy that is here."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cgroupkit import Cgroup, cgroup, hierarchy_of, worker

from conftest import PATIENCE
from kernelkit import Heard, Turned, begin, burn, want
from limitfs.errors import Gone
from limitfs.hearing import cpus
from limitfs.hearing.cgroupclock import CgroupClockSource
from limitfs.hearing.cpus import Cpus
from limitfs.hearing.eachpartition import EachPartition
from limitfs.hearing.edges import Edges
from limitfs.hearing.partitions import Directories, PartitionMembers, Removals
from limitfs.hearing.psi import PsiSource
from limitfs.hearing.sampling import PeakSource, SamplingSource
from limitfs.hearing.source import Guarantee, Refused
from limitfs.resources import cgroups, procfs
from limitfs.resources.cpu import Cpu, Cputime, consumed, counted_in_unified
from limitfs.resources.fds import Fds
from limitfs.resources.memory import Memory
from limitfs.resources.model import Partition, Partitions, Process, Processes, System
from limitfs.resources.pressure import CpuPressure, MemoryPressure
from limitfs.resources.tasks import Threads

MakeHelper = Callable[..., Any]


@pytest.fixture
def directories(reactor: Turned) -> Directories:
    return Directories(reactor)


@pytest.fixture
def each(reactor: Turned, directories: Directories) -> EachPartition:
    return EachPartition(directories, PeakSource(reactor), SamplingSource(reactor))


@pytest.fixture
def psi(reactor: Turned, each: EachPartition) -> PsiSource:
    return PsiSource(reactor, Edges(reactor), each)


@pytest.fixture
def clock(reactor: Turned, directories: Directories, each: EachPartition) -> CgroupClockSource:
    source = CgroupClockSource(reactor, Edges(reactor), Cpus(reactor), Removals(directories), each)
    if (why := source.missing()) is not None:
        pytest.skip(why)
    return source


@dataclass
class Owner:
    """Remembers."""

    there: list[Partition] = field(default_factory=list)
    changes: list[Partition] = field(default_factory=list)
    ended: list[Partition] = field(default_factory=list)

    def appeared(self, partition: Partition) -> None:
        self.there.append(partition)

    def changed(self, partition: Partition) -> None:
        self.changes.append(partition)

    def removed(self, partition: Partition) -> None:
        self.ended.append(partition)

    def paths(self) -> list[str]:
        return [partition.path for partition in self.there]

    def ended_below(self, group: Cgroup) -> list[Partition]:
        """Other tests of this machine have partitions too."""
        return [partition for partition in self.ended if cgroups.within(partition.path, group.path)]


# Which there are


def test_members_come_and_go(reactor: Turned, directories: Directories, group: Cgroup) -> None:
    owner = Owner()
    before = group.below("before").partition
    members = PartitionMembers(directories, owner)
    members.start()
    assert {group.partition, before} <= set(owner.there)
    late = group.below("late")
    deeper = late.below("deeper")
    reactor.until(lambda: deeper.path in owner.paths())
    gone = [deeper.partition, late.partition]
    deeper.remove()
    late.remove()
    reactor.until(lambda: len(owner.ended_below(group)) == 2)
    assert owner.ended_below(group) == gone
    members.close()
    group.below("unheard")
    reactor.quiet(0.2)
    assert f"{group.path}/unheard" not in owner.paths()


def test_each_is_told_once(reactor: Turned, directories: Directories, group: Cgroup) -> None:
    owner = Owner()
    members = PartitionMembers(directories, owner)
    members.start()
    made = [group.below(f"{number}") for number in range(50)]
    made += [one.below("below") for one in made]
    reactor.until(lambda: {one.path for one in made} <= set(owner.paths()))
    reactor.quiet(0.3)
    assert len(set(owner.there)) == len(owner.there)
    for one in reversed(made):
        one.remove()
    reactor.until(lambda: len(owner.ended_below(group)) == len(made))
    assert not {partition.path for partition in owner.changes} & {one.path for one in made}
    members.close()


def test_a_path_used_again_is_heard_again(reactor: Turned, directories: Directories, group: Cgroup) -> None:
    """Two who listen, so that the directory was watched before it was made anew."""
    owners = [Owner(), Owner()]
    listening = [PartitionMembers(directories, owner) for owner in owners]
    below = group.below("again")
    for members in listening:
        members.start()
    below.remove()
    below.directory.mkdir()
    reactor.until(lambda: all(owner.paths().count(below.path) == 2 for owner in owners))
    deeper = below.below("deeper")
    reactor.until(lambda: all(deeper.path in owner.paths() for owner in owners))
    for owner in owners:
        assert [one.path for one in owner.ended_below(group)] == [below.path]
    for members in listening:
        members.close()


def test_the_same_path_in_another_hierarchy_is_a_change(
    reactor: Turned, directories: Directories, group: Cgroup
) -> None:
    hierarchy = hierarchy_of("memory")
    if hierarchy is None:
        pytest.skip("no hierarchy of version 1")
    owner = Owner()
    members = PartitionMembers(directories, owner)
    members.start()
    twin = Cgroup(hierarchy, group.path)
    twin.directory.mkdir()
    try:
        reactor.until(lambda: owner.changes.count(group.partition) == 1)
        below = twin.below("below")
        reactor.until(lambda: below.path in owner.paths())
    finally:
        twin.remove()
    reactor.until(lambda: owner.changes.count(group.partition) == 2)
    assert [one.path for one in owner.ended_below(group)] == [below.path]
    members.close()


def test_a_rename_is_an_end_and_a_beginning(reactor: Turned, directories: Directories) -> None:
    if hierarchy_of("memory") is None:
        pytest.skip("no hierarchy of version 1")
    with cgroup("memory") as group:
        owner = Owner()
        old = group.below("old")
        below = old.below("below")
        members = PartitionMembers(directories, owner)
        members.start()
        old.directory.rename(group.directory / "new")
        reactor.until(lambda: f"{group.path}/new/below" in owner.paths())
        assert {one.path for one in owner.ended_below(group)} == {old.path, below.path}
        members.close()


def test_a_removal_is_told_once(reactor: Turned, directories: Directories, group: Cgroup) -> None:
    told: list[str] = []
    one, other = group.below("one"), group.below("other")
    removals = Removals(directories)
    removals.watch(one.partition, lambda: told.append("one"))
    ends = [removals.watch(other.partition, lambda: told.append("other")) for _ in range(2)]
    partition = one.partition
    one.remove()
    group.below("more")
    reactor.until(lambda: told)
    reactor.quiet(0.2)
    assert told == ["one"]
    with pytest.raises(Gone):
        removals.watch(partition, lambda: told.append("never"))
    ends[0]()
    ends[0]()
    other.remove()
    reactor.until(lambda: len(told) == 2)
    assert told == ["one", "other"]


# Pressure


def test_pressure_of_a_partition_rings_and_its_neighbour_is_silent(
    reactor: Turned, psi: PsiSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    busy, calm = group.below("busy"), group.below("calm")
    worker(helper, calm)
    silent = Heard()
    armed = psi.arm(want(CpuPressure(), busy.partition, "> 30% per 2s"), heard)
    other = psi.arm(want(CpuPressure(), calm.partition, "> 30% per 2s"), silent)
    assert (armed.source, armed.guarantee) == ("psi", Guarantee.EXACT)
    for _ in range((os.cpu_count() or 1) + 2):
        begin(worker(helper, busy), burn(2))
    reactor.until(lambda: heard.values()[-1] > 30)
    assert {member for member, _value in heard.readings} == {busy.partition}
    assert len(silent.readings) == 1
    armed.disarm()
    other.disarm()


def test_pressure_of_a_removed_partition_is_gone(
    reactor: Turned, psi: PsiSource, group: Cgroup, heard: Heard
) -> None:
    below = group.below("below")
    partition = below.partition
    armed = psi.arm(want(CpuPressure(), partition, "> 90% per 2s"), heard)
    below.remove()
    reactor.until(lambda: heard.ended)
    assert heard.ended == [partition]
    armed.disarm()


def test_pressure_of_each_partition(
    reactor: Turned, psi: PsiSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    calm = group.below("calm")
    assert psi.hears(CpuPressure(), Partitions(), each=True)
    assert not psi.hears(CpuPressure(), Partitions(), each=False)
    armed = psi.arm(want(CpuPressure(), Partitions(), "> 40% per 2s", each=True), heard)
    assert (armed.source, armed.guarantee, armed.period) == ("psi", Guarantee.EXACT, None)
    late = group.below("late")
    reactor.until(lambda: heard.values(late.partition))
    for _ in range((os.cpu_count() or 1) + 2):
        begin(worker(helper, late), burn(2))
    reactor.until(lambda: heard.values(late.partition)[-1] > 40)
    assert heard.values(group.partition)[-1] > 0
    assert max(heard.values(calm.partition)) == 0
    partition = late.partition
    late.remove()
    reactor.until(lambda: partition in heard.ended)
    armed.disarm()
    armed.disarm()
    group.below("unheard")
    assert reactor.quiet(0.3) == 0


@pytest.mark.parametrize("text", ["< 5", "change", "50% per 100ms"])
def test_what_no_partition_is_heard_for_is_refused(psi: PsiSource, group: Cgroup, heard: Heard, text: str) -> None:
    group.below("one")
    with pytest.raises(Refused):
        psi.arm(want(CpuPressure(), Partitions(), text, each=True), heard)


# CPU time


def test_cpu_time_of_a_partition_rings_and_its_neighbour_is_silent(
    reactor: Turned, clock: CgroupClockSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    busy, calm = group.below("busy"), group.below("calm")
    child, other = worker(helper, busy.below("deeper")), worker(helper, calm)
    partition, silent = busy.partition, Heard()
    if not counted_in_unified(partition):
        pytest.skip("CPU time is not counted in the unified hierarchy")
    level = consumed(partition) + 0.3
    armed = clock.arm(want(Cputime(), partition, f"{level}s"), heard)
    twin = clock.arm(want(Cputime(), calm.partition, f"{consumed(calm.partition) + 0.3}s"), silent)
    assert (armed.source, armed.guarantee, armed.period) == ("cgroup-clock", Guarantee.EXACT, None)
    assert len(heard.readings) == len(silent.readings) == 1
    begin(other, burn(0.1))
    begin(child, burn(0.1))
    reactor.quiet(1)
    assert len(heard.readings) == 1
    begin(child, burn(0.4))
    reactor.until(lambda: len(heard.readings) == 2)
    assert level <= heard.values()[-1] < level + 0.25
    reactor.quiet(0.5)
    assert len(heard.readings) == 2, "it rings once"
    assert len(silent.readings) == 1
    armed.disarm()
    twin.disarm()


def test_many_in_parallel_consume_together(
    reactor: Turned, clock: CgroupClockSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    children = [worker(helper, group.below(f"{number}")) for number in range(4)]
    partition = group.partition
    if not counted_in_unified(partition):
        pytest.skip("CPU time is not counted in the unified hierarchy")
    level = consumed(partition) + 0.6
    armed = clock.arm(want(Cputime(), partition, f"> {level}s"), heard)
    for child in children:
        begin(child, burn(0.2))
    reactor.until(lambda: len(heard.readings) == 2)
    assert heard.values()[-1] >= level
    armed.disarm()


def test_cpu_use_of_a_partition_rings_and_clears(
    reactor: Turned, clock: CgroupClockSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    child = worker(helper, group)
    if not counted_in_unified(group.partition):
        pytest.skip("CPU time is not counted in the unified hierarchy")
    armed = clock.arm(want(Cpu(), group.partition, "20% per 1s"), heard)
    reactor.quiet(0.5)
    assert len(heard.readings) == 1
    begin(child, burn(0.6))
    reactor.until(lambda: heard.values()[-1] >= 20)
    reactor.until(lambda: heard.values()[-1] < 20)
    reactor.quiet(1.0)  # until nothing of it is in the window
    begin(child, burn(0.01))
    told = len(heard.readings)
    reactor.quiet(0.5)
    assert max(heard.values()[told:], default=0.0) < 20
    armed.disarm()


def test_the_clock_of_a_removed_partition(
    reactor: Turned, clock: CgroupClockSource, group: Cgroup, heard: Heard
) -> None:
    below = group.below("below")
    partition = below.partition
    if not counted_in_unified(partition):
        pytest.skip("CPU time is not counted in the unified hierarchy")
    armed = clock.arm(want(Cputime(), partition, "100s"), heard)
    below.remove()
    reactor.until(lambda: heard.ended)
    assert heard.ended == [partition]
    armed.disarm()
    with pytest.raises(Gone):
        clock.arm(want(Cputime(), partition, "100s"), heard)


def test_cpu_time_of_each_partition(
    reactor: Turned, clock: CgroupClockSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    calm = group.below("calm")
    if not counted_in_unified(calm.partition):
        pytest.skip("CPU time is not counted in the unified hierarchy")
    armed = clock.arm(want(Cputime(), Partitions(), "1s", each=True), heard)
    late = group.below("late")
    begin(worker(helper, late), burn(1.2))
    reactor.until(lambda: heard.values(late.partition) and heard.values(late.partition)[-1] >= 1)
    reactor.until(lambda: heard.values(group.partition)[-1] >= 1)
    assert heard.values(calm.partition) == [0.0]
    armed.disarm()


def test_a_partition_that_the_clock_refuses_is_sampled(
    reactor: Turned, clock: CgroupClockSource, heard: Heard, helper: MakeHelper
) -> None:
    if hierarchy_of("cpuacct") is None:
        pytest.skip("no hierarchy of version 1")
    with cgroup() as kept, cgroup("cpuacct") as other:
        assert counted_in_unified(kept.partition)
        with pytest.raises(Refused, match="not counted in the unified hierarchy"):
            clock.arm(want(Cputime(), other.partition, "1s"), heard)
        armed = clock.arm(want(Cputime(), Partitions(), "1s", each=True), heard)
        assert (armed.source, armed.guarantee) == ("cgroup-clock,sampled", Guarantee.SAMPLED)
        assert armed.period is not None
        begin(worker(helper, other), burn(1.2))
        reactor.until(lambda: heard.values(other.partition)[-1] >= 1)
        partition = other.partition
        other.remove()
        reactor.until(lambda: partition in heard.ended)
        armed.disarm()


def test_cpus_come_and_go(
    reactor: Turned, clock: CgroupClockSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    """The kernel says again what it says of a CPU that comes; none has to go for that."""
    event = Path("/sys/devices/system/cpu/cpu0/uevent")
    if not os.access(event, os.W_OK):
        pytest.skip("the kernel takes no events here")
    child = worker(helper, group)
    partition = group.partition
    if not counted_in_unified(partition):
        pytest.skip("CPU time is not counted in the unified hierarchy")
    told: list[str] = []
    online = Cpus(reactor)
    end = online.watch(lambda: told.append("cpu"))
    level = consumed(partition) + 0.2
    armed = clock.arm(want(Cputime(), partition, f"{level}s"), heard)
    event.write_text("change")
    reactor.quiet(0.2)
    assert not told
    event.write_text("online")
    reactor.until(lambda: told)
    begin(child, burn(0.3))
    reactor.until(lambda: heard.values()[-1] >= level)
    end()
    armed.disarm()


def test_lists_of_cpus() -> None:
    assert cpus.parse("0-3,8\n") == [0, 1, 2, 3, 8]
    assert cpus.parse("0\n") == [0]
    assert len(cpus.online()) == os.sysconf("SC_NPROCESSORS_ONLN")


# Two levels at once


def test_two_levels_do_not_disturb_each_other(
    reactor: Turned, clock: CgroupClockSource, group: Cgroup, helper: MakeHelper
) -> None:
    child = worker(helper, group.below("below"))
    targets = group.partition, cgroups.identify(f"{group.path}/below")
    if not counted_in_unified(targets[0]):
        pytest.skip("CPU time is not counted in the unified hierarchy")
    listeners = [Heard() for _ in range(4)]
    levels = [consumed(targets[0]) + extra for extra in (0.1, 0.2, 0.3, 100.0)]
    armed = [
        clock.arm(want(Cputime(), targets[index % 2], f"{level}s"), listener)
        for index, (level, listener) in enumerate(zip(levels, listeners, strict=True))
    ]
    begin(child, burn(0.5))
    reactor.until(lambda: [len(one.readings) for one in listeners] == [2, 2, 2, 1])
    for one in armed:
        one.disarm()


# By looking


def test_sampling_follows_partitions_that_come_and_go(
    reactor: Turned, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    armed = SamplingSource(reactor).arm(want(Fds(), Partitions(), "100000", each=True), heard)
    late = group.below("late")
    child = worker(helper, late)
    reactor.until(lambda: heard.values(late.partition))
    child.open_files(100)
    reactor.until(lambda: heard.values(late.partition)[-1] >= 100)
    assert heard.values(group.partition)[-1] >= 100
    partition = late.partition
    late.remove()
    reactor.until(lambda: partition in heard.ended)
    assert group.partition not in heard.ended
    armed.disarm()


def test_a_sum_of_a_removed_partition_is_gone(reactor: Turned, group: Cgroup, heard: Heard) -> None:
    below = group.below("below")
    target = Processes(below.partition)
    armed = SamplingSource(reactor).arm(want(Fds(), target, "100000"), heard)
    below.remove()
    reactor.until(lambda: heard.ended)
    assert heard.ended == [target]
    armed.disarm()


def test_a_sum_of_rates_counts_what_members_consumed_while_they_were_there(
    reactor: Turned, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    """One comes with much on its clock, one consumes and ends: neither makes a jump."""
    old, worked = helper(), worker(helper, group)
    old.do(burn(1.5))
    armed = SamplingSource(reactor).arm(want(Cpu(), Processes(group.partition), "1000% per 60s"), heard)
    group.take(old.pid)
    told = len(heard.readings)
    reactor.until(lambda: len(heard.readings) >= told + 2)
    assert max(heard.values()) < 1, "what it consumed elsewhere is not counted"
    begin(worked, burn(1))
    reactor.until(lambda: heard.values()[-1] >= 1.5)
    worked.end()
    told = len(heard.readings)
    reactor.until(lambda: len(heard.readings) > told)
    assert heard.values()[-1] >= 1.5, "what it consumed here still counts"
    armed.disarm()


def test_a_member_that_moves_in_has_consumed_nothing_here(
    reactor: Turned, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    old = helper()
    old.do(burn(1.5))
    process = procfs.identify(old.pid)
    armed = SamplingSource(reactor).arm(want(Cpu(), Processes(group.partition), "50% per 60s", each=True), heard)
    group.take(old.pid)
    reactor.until(lambda: heard.values(process))
    assert max(heard.values(process)) < 1
    begin(old, burn(1))
    reactor.until(lambda: heard.values(process)[-1] >= 1.5)
    armed.disarm()


# High-water marks


def test_where_marks_are_looked_at(reactor: Turned) -> None:
    source, somewhere = PeakSource(reactor), Partition("/", 0, 0)
    assert source.hears(Memory(), somewhere, each=False)
    assert source.hears(Memory(), Partitions(), each=True)
    assert source.hears(Memory(), Processes(somewhere), each=True)
    assert source.hears(Threads(), somewhere, each=False)
    assert not source.hears(Threads(), Process(1, 1), each=False)
    assert not source.hears(Threads(), Processes(), each=True)
    assert not source.hears(Memory(), Processes(somewhere), each=False)
    assert not source.hears(Memory(), System(), each=False)
    assert not source.hears(Fds(), somewhere, each=False)
    assert not source.hears(MemoryPressure(), Partitions(), each=True)


def spike_threads(child: Any, count: int) -> None:
    """So many threads more, for a moment."""
    child.do(
        f"e = threading.Event(); ts = [threading.Thread(target=e.wait) for _ in range({count})]; "
        "[t.start() for t in ts]; e.set(); [t.join() for t in ts]"
    )


@pytest.mark.parametrize("collected", [False, True])
def test_a_spike_between_two_looks_is_told_by_the_mark(
    reactor: Turned, heard: Heard, helper: MakeHelper, collected: bool
) -> None:
    with cgroup("pids") as group, cgroup("pids") as calm:
        if Threads().peak(group.partition) is None:
            pytest.skip("this kernel keeps no pids.peak")
        child = worker(helper, group)
        worker(helper, calm)
        target = Partitions() if collected else group.partition
        armed = PeakSource(reactor).arm(want(Threads(), target, "20", each=collected), heard)
        assert armed.source == "highwater"
        reactor.quiet(0.5)
        spike_threads(child, 30)
        reactor.until(lambda: max(heard.values(group.partition)) >= 20)
        spike, after = heard.values(group.partition)[-2:]
        assert spike >= 30 > after
        assert max(heard.values(calm.partition), default=0) < 20
        armed.disarm()


def test_a_mark_that_was_past_the_level_tells_nothing(reactor: Turned, heard: Heard, helper: MakeHelper) -> None:
    with cgroup("pids") as group:
        if Threads().peak(group.partition) is None:
            pytest.skip("this kernel keeps no pids.peak")
        spike_threads(worker(helper, group), 30)
        armed = PeakSource(reactor).arm(want(Threads(), group.partition, "20"), heard)
        assert armed.guarantee is Guarantee.SAMPLED
        armed.disarm()
        armed = PeakSource(reactor).arm(want(Threads(), group.partition, "50"), heard)
        assert armed.guarantee is Guarantee.PEAK
        armed.disarm()


def test_without_a_mark_it_is_refused(reactor: Turned, group: Cgroup, heard: Heard) -> None:
    partition = group.partition
    if Memory().peak(partition) is not None:
        pytest.skip("there is one")
    with pytest.raises(Refused, match="keeps no high-water mark"):
        PeakSource(reactor).arm(want(Memory(), partition, "1G"), heard)


def test_a_process_that_spikes_before_it_is_first_seen(
    reactor: Turned, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    target = Processes(group.partition)
    armed = PeakSource(reactor).arm(want(Memory(), target, "80M", each=True), heard)
    assert armed.guarantee is Guarantee.PEAK
    child = helper()
    child.do("m = mmap.mmap(-1, 100 << 20); m.write(bytes(100 << 20)); m.close()")
    group.take(child.pid)
    reactor.until(lambda: heard.readings, PATIENCE)
    assert max(heard.values()) >= 100 << 20
    assert heard.values()[-1] < 80 << 20
    assert armed.guarantee is Guarantee.PEAK
    armed.disarm()
