"""Each process of a partition or of a group. Each sound has a silent twin."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from cgroupkit import Cgroup, cgroup, hierarchy_of
from test_bpf_kit import loaded

from kernelkit import Heard, Turned, begin, burn, want
from limitfs.hearing.bpf.source import BpfTasks
from limitfs.hearing.connector import Connector, missing
from limitfs.hearing.counting import ConnectorSource
from limitfs.hearing.cputimer import CpuTimers, CpuTimerSource
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.membership import LOOK, Membership
from limitfs.hearing.sampling import PeakSource
from limitfs.hearing.source import Refused
from limitfs.resources import cgroups, procfs, tasks
from limitfs.resources.cpu import Cputime
from limitfs.resources.memory import Memory
from limitfs.resources.model import Group, Partition, Process, Processes

MakeHelper = Callable[..., Any]

pytestmark = pytest.mark.skipif(missing() is not None, reason="the connector does not work here")


@pytest.fixture
def membership(reactor: Turned, connector: Connector, deaths: Deaths) -> Membership:
    return Membership(reactor, connector, deaths)


@pytest.fixture
def timers(reactor: Turned, deaths: Deaths, membership: Membership) -> CpuTimerSource:
    return CpuTimerSource(reactor, CpuTimers(reactor), deaths, membership)


@pytest.fixture
def counting(reactor: Turned, connector: Connector, deaths: Deaths, membership: Membership) -> ConnectorSource:
    return ConnectorSource(reactor, connector, deaths, membership)


@dataclass
class Owner:
    """Remembers who is there."""

    members: list[Process] = field(default_factory=list)
    births: int = 0
    losses: int = 0
    refuse: bool = False

    def born(self, member: Process) -> None:
        if self.refuse:
            raise Refused("enough")
        assert member not in self.members
        self.members.append(member)
        self.births += 1

    def ended(self, member: Process) -> None:
        self.members.remove(member)

    def lost(self, count: int) -> None:
        self.losses += count


class Teller:
    """Tells moves when a test wants it."""

    def __init__(self) -> None:
        self.moved: list[Callable[[Process], None]] = []
        self.lost: list[Callable[[], None]] = []

    def __call__(self, moved: Callable[[Process], None], lost: Callable[[], None]) -> Callable[[], None]:
        self.moved.append(moved)
        self.lost.append(lost)
        return lambda: self.moved.remove(moved)


class Chosen(Group):
    """A group whose members a test chooses."""

    def __init__(self, *members: Process) -> None:
        self.name, self.number = "chosen", 1
        self.members = list(members)
        self.followers: list[tuple[Callable[[Process], None], Callable[[Process], None]]] = []

    def processes(self) -> list[Process]:
        return self.members

    def follow(self, joined: Callable[[Process], None], left: Callable[[Process], None]) -> Callable[[], None]:
        follower = joined, left
        self.followers.append(follower)
        for member in self.members:
            joined(member)
        return lambda: self.followers.remove(follower)

    def join(self, member: Process) -> None:
        self.members.append(member)
        for joined, _left in self.followers:
            joined(member)

    def leave(self, member: Process) -> None:
        self.members.remove(member)
        for _joined, left in self.followers:
            left(member)


def identify(group: Cgroup) -> Partition:
    return cgroups.identify(group.path)


def worker(helper: MakeHelper, group: Cgroup) -> tuple[Any, Process]:
    child = helper()
    group.take(child.pid)
    return child, procfs.identify(child.pid)


def forked(child: Any) -> Process:
    """A child of a helper, which sleeps."""
    before = set(procfs.pids())
    child.do(_FORK)
    (pid,) = [pid for pid in set(procfs.pids()) - before if procfs.stat(pid).ppid == child.pid]
    return procfs.identify(pid)


_FORK = "exec('pid = os.fork()\\nif pid == 0:\\n    time.sleep(1000)\\n    os._exit(0)')"


# Who is in a partition


def test_births_and_ends(reactor: Turned, membership: Membership, group: Cgroup, helper: MakeHelper) -> None:
    parent, process = worker(helper, group.below("below"))
    helper()
    owner, other = Owner(), Owner()
    ends = [membership.follow(Processes(identify(group)), one) for one in (owner, other)]
    assert owner.members == [process]
    born = forked(parent)
    reactor.until(lambda: born in owner.members)
    assert owner.members == other.members == [process, born]
    os.kill(born.pid, signal.SIGKILL)
    reactor.until(lambda: owner.members == [process])
    ends[0]()
    ends[0]()
    again = forked(parent)
    reactor.until(lambda: again in other.members)
    assert again not in owner.members
    os.kill(again.pid, signal.SIGKILL)
    reactor.until(lambda: again not in other.members)
    ends[1]()
    assert reactor.quiet(0.2) == 0


def test_moves_are_seen(reactor: Turned, membership: Membership, group: Cgroup, helper: MakeHelper) -> None:
    here, there = group.below("here"), group.below("there")
    _child, process = worker(helper, there)
    owner, other, above = Owner(), Owner(), Owner()
    ends = [
        membership.follow(Processes(identify(one)), who)
        for one, who in ((here, owner), (there, other), (group, above))
    ]
    here.take(process.pid)
    reactor.until(lambda: process in owner.members)
    assert (other.members, above.members, above.births) == ([], [process], 1)
    there.take(process.pid)
    reactor.until(lambda: process in other.members)
    assert (owner.members, above.births) == ([], 1)
    assert membership.period(Processes(identify(here))) == LOOK
    for end in ends:
        end()


def test_moves_are_told(
    reactor: Turned, connector: Connector, deaths: Deaths, group: Cgroup, helper: MakeHelper
) -> None:
    """Where somebody tells them, nobody looks."""
    here, there = group.below("here"), group.below("there")
    _child, process = worker(helper, there)
    teller = Teller()
    membership = Membership(reactor, connector, deaths, teller)
    owner, other, above = Owner(), Owner(), Owner()
    ends = [
        membership.follow(Processes(identify(one)), who)
        for one, who in ((here, owner), (there, other), (group, above))
    ]
    assert membership.period(Processes(identify(here))) is None
    here.take(process.pid)
    (moved,) = teller.moved
    reactor.quiet(2 * LOOK)
    assert (owner.members, other.members, above.births) == ([], [process], 1)
    moved(process)
    moved(procfs.identify(os.getpid()))
    moved(Process(2**22, 1))
    assert (owner.members, other.members, above.births) == ([process], [], 1)
    there.take(process.pid)
    teller.lost[0]()
    assert (owner.members, other.members, above.births) == ([], [process], 1)
    for end in ends:
        end()
    assert not teller.moved


@pytest.mark.parametrize("hierarchy", [None, "pids"])
def test_moves_are_told_by_the_kernel(
    reactor: Turned, connector: Connector, deaths: Deaths, helper: MakeHelper, hierarchy: str | None
) -> None:
    if hierarchy and hierarchy_of(hierarchy) is None:
        pytest.skip("no hierarchy of version 1")
    with loaded(BpfTasks, reactor) as hooks, cgroup(hierarchy) as group:
        membership = Membership(reactor, connector, deaths, hooks.moves)
        process, owner = procfs.identify(helper().pid), Owner()
        end = membership.follow(Processes(identify(group)), owner)
        assert membership.period(Processes(identify(group))) is None
        group.take(process.pid)
        reactor.until(lambda: owner.members == [process])
        Cgroup(group.hierarchy, cgroups.ROOT).take(process.pid)
        reactor.until(lambda: owner.members == [])
        end()


def test_a_partition_of_version_1(reactor: Turned, membership: Membership, helper: MakeHelper) -> None:
    if hierarchy_of("pids") is None:
        pytest.skip("no hierarchy of version 1")
    with cgroup("pids") as group:
        parent, process = worker(helper, group)
        owner = Owner()
        end = membership.follow(Processes(identify(group)), owner)
        born = forked(parent)
        reactor.until(lambda: born in owner.members)
        assert owner.members == [process, born]
        os.kill(born.pid, signal.SIGKILL)
        end()


def test_a_removed_partition_is_empty(
    reactor: Turned, membership: Membership, group: Cgroup, helper: MakeHelper
) -> None:
    below = group.below("below")
    _child, process = worker(helper, below)
    owner = Owner()
    end = membership.follow(Processes(identify(below)), owner)
    assert owner.members == [process]
    below.remove()
    reactor.until(lambda: not owner.members)
    end()


def test_who_refuses_the_first_is_not_told_more(
    reactor: Turned, membership: Membership, group: Cgroup, helper: MakeHelper
) -> None:
    _child, process = worker(helper, group)
    for processes in (Processes(identify(group)), Processes(Chosen(process)), Processes()):
        with pytest.raises(Refused):
            membership.follow(processes, Owner(refuse=True))
    assert not reactor._readers


def test_a_group_tells_itself(membership: Membership, helper: MakeHelper) -> None:
    one, other = (procfs.identify(helper().pid) for _ in range(2))
    chosen, owner = Chosen(one), Owner()
    end = membership.follow(Processes(chosen), owner)
    assert owner.members == [one]
    chosen.join(other)
    chosen.leave(one)
    assert owner.members == [other]
    end()
    assert not chosen.followers


# The sources that stand on it


def test_cpu_time_of_each_in_a_partition(
    reactor: Turned, timers: CpuTimerSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    child, process = worker(helper, group)
    outside = helper()
    assert timers.hears(Cputime(), Processes(identify(group)), each=True)
    armed = timers.arm(want(Cputime(), Processes(identify(group)), "1s", each=True), heard)
    begin(outside, burn(1.2))
    begin(child, burn(1.2))
    reactor.until(lambda: heard.values(process)[-1] >= 1)
    late, moved = worker(helper, group.below("below"))
    reactor.until(lambda: heard.values(moved))
    begin(late, burn(1.2))
    reactor.until(lambda: heard.values(moved)[-1] >= 1)
    group.below("side")
    assert {member for member, _value in heard.readings} == {process, moved}
    late.end()
    reactor.until(lambda: heard.ended == [moved])
    armed.disarm()
    armed.disarm()


def test_cpu_time_of_each_in_a_group(
    reactor: Turned, timers: CpuTimerSource, heard: Heard, helper: MakeHelper
) -> None:
    child, outside = helper(), helper()
    process = procfs.identify(child.pid)
    chosen = Chosen(process)
    armed = timers.arm(want(Cputime(), Processes(chosen), "1s", each=True), heard)
    begin(outside, burn(1.2))
    begin(child, burn(1.2))
    reactor.until(lambda: heard.values(process)[-1] >= 1)
    chosen.leave(process)
    assert heard.ended == [process]
    assert {member for member, _value in heard.readings} == {process}
    armed.disarm()
    assert not chosen.followers


def test_threads_of_each_in_a_partition(
    reactor: Turned, counting: ConnectorSource, group: Cgroup, heard: Heard, helper: MakeHelper
) -> None:
    child, process = worker(helper, group)
    outside = helper()
    armed = counting.arm(want(tasks.Threads(), Processes(identify(group)), "5", each=True), heard)
    assert heard.readings == [(process, 1.0)]
    threads = "e = threading.Event(); [threading.Thread(target=e.wait, daemon=True).start() for _ in range(5)]"
    outside.do(threads)
    child.do(threads)
    reactor.until(lambda: heard.values(process)[-1] == 6)
    assert {member for member, _value in heard.readings} == {process}
    Cgroup(group.hierarchy, cgroups.ROOT).take(child.pid)
    reactor.until(lambda: heard.ended == [process])
    armed.disarm()


def test_threads_of_each_in_a_group(
    reactor: Turned, counting: ConnectorSource, heard: Heard, helper: MakeHelper
) -> None:
    child, outside = helper(), helper()
    process = procfs.identify(child.pid)
    armed = counting.arm(want(tasks.Threads(), Processes(Chosen(process)), "change", each=True), heard)
    for one in (outside, child):
        one.do("e = threading.Event(); t = threading.Thread(target=e.wait); t.start(); e.set(); t.join()")
    reactor.until(lambda: heard.values(process) == [1, 2, 1])
    assert {member for member, _value in heard.readings} == {process}
    armed.disarm()


def test_marks_of_each_in_a_group(reactor: Turned, heard: Heard, helper: MakeHelper) -> None:
    child, outside = helper(), helper()
    process = procfs.identify(child.pid)
    armed = PeakSource(reactor).arm(want(Memory(), Processes(Chosen(process)), "80M", each=True), heard)
    for one in (outside, child):
        one.do("m = mmap.mmap(-1, 100 << 20); m.write(bytes(100 << 20)); m.close()")
    reactor.until(lambda: max(heard.values(process)) >= 100 << 20)
    assert {member for member, _value in heard.readings} == {process}
    armed.disarm()
