"""Thresholds on partitions and groups, each or sum, heard by the same hooks as those on processes."""

import ctypes
import os
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from cgroupkit import Cgroup, cgroup
from test_bpf_kit import Alarmed, base_fds, links, loaded, settle

from conftest import EXCURSIONS
from kernelkit import Turned, begin, want
from limitfs.errors import Gone
from limitfs.hearing.bpf.layout import EVERY, STATES, Kind, Member, State
from limitfs.hearing.bpf.source import BpfFds, BpfRss, BpfTasks
from limitfs.hearing.source import Armed, Refused
from limitfs.resources import cgroups, members, procfs
from limitfs.resources.fds import Fds
from limitfs.resources.memory import Memory
from limitfs.resources.model import Group, Partition, Partitions, Process, Processes, Resource
from limitfs.resources.tasks import Processes as ProcessCount
from limitfs.resources.tasks import Threads

FDS, THREADS, PROCESSES, MEMORY = Fds(), Threads(), ProcessCount(), Memory()

MakeHelper = Callable[..., Any]


@dataclass
class Tree:
    """Cgroups of the unified hierarchy, below one of our own."""

    top: Cgroup

    def make(self, name: str) -> Partition:
        made = Cgroup(self.top.hierarchy, f"{self.top.path}/{name}")
        made.directory.mkdir()
        return cgroups.identify(made.path)

    def put(self, pid: int, partition: Partition | None) -> None:
        """Into a partition; None: into the root."""
        self.cgroup(partition).take(pid)

    def cgroup(self, partition: Partition | None) -> Cgroup:
        return Cgroup(self.top.hierarchy, partition.path if partition is not None else cgroups.ROOT)


class Chosen(Group):
    """A group whose members the test names."""

    def __init__(self, all_users: bool = True) -> None:
        self.name = "chosen"
        self.all_users = all_users
        self.number = random.randrange(1, 1 << 31)
        self._members: set[Process] = set()
        self._told: list[tuple[Callable[[Process], None], Callable[[Process], None]]] = []

    def processes(self) -> Collection[Process]:
        return self._members

    def follow(self, joined: Callable[[Process], None], left: Callable[[Process], None]) -> Callable[[], None]:
        told = (joined, left)
        self._told.append(told)
        for process in self._members:
            joined(process)
        return lambda: self._told.remove(told)

    def add(self, pid: int) -> Process:
        process = procfs.identify(pid)
        self._members.add(process)
        for joined, _left in tuple(self._told):
            joined(process)
        return process

    def remove(self, process: Process) -> None:
        self._members.discard(process)
        for _joined, left in tuple(self._told):
            left(process)


@pytest.fixture
def tree() -> Iterator[Tree]:
    if cgroups.unified() is None:
        pytest.skip("no unified hierarchy is mounted")
    with cgroup() as top:
        yield Tree(top)


@pytest.fixture
def source(reactor: Turned) -> Iterator[BpfFds]:
    with loaded(BpfFds, reactor) as source:
        yield source


@pytest.fixture
def tasks(reactor: Turned) -> Iterator[BpfTasks]:
    with loaded(BpfTasks, reactor) as source:
        yield source


def scope(partition: Partition) -> int:
    number = cgroups.unified_id(partition)
    assert number is not None
    return number


def count(partition: Partition, resource: Resource = FDS) -> int:
    """What they have now, from /proc."""
    return int(members.usage(resource, Processes(partition)))


def agrees(source: BpfFds | BpfTasks, kind: Kind, resource: Resource, *partitions: Partition) -> bool:
    """Whether the kernel's totals are what /proc adds up to."""
    return all(source.engine.total(kind, scope(one)) == count(one, resource) for one in partitions)


# Each


def test_each_in_a_partition_and_below_but_not_outside(
    tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    upper, lower = tree.make("a"), tree.make("a/b")
    inside, below, outside = helper(), helper(), helper()
    tree.put(inside.pid, upper)
    tree.put(below.pid, lower)
    heard = Alarmed(level=300)
    armed = source.arm(want(FDS, Processes(upper), ">= 300", each=True), heard)
    for child in (inside, below, outside):
        child.open_files(300)
    settle(reactor)
    armed.disarm()
    assert heard.alarms == {procfs.identify(child.pid): 1 for child in (inside, below)}


def test_every_excursion_in_a_partition_counts(
    tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    """And one level higher none."""
    partition = tree.make("a")
    child = helper()
    tree.put(child.pid, partition)
    base = base_fds(child.pid)
    heard, above = Alarmed(level=base + 1), Alarmed(level=base + 2)
    armed = [
        source.arm(want(FDS, Processes(partition), f">= {int(one.level)}", each=True), one)
        for one in (heard, above)
    ]
    child.do(f"for _ in range({EXCURSIONS}): os.close(os.dup(0))")
    settle(reactor)
    for one in armed:
        one.disarm()
    assert heard.total == EXCURSIONS
    assert above.total == 0


def test_who_is_beyond_when_armed_or_when_coming_is_heard(
    tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    partition = tree.make("a")
    before, later, never = helper(), helper(), helper()
    for child in (before, later):
        child.open_files(300)
    tree.put(before.pid, partition)
    tree.put(never.pid, partition)
    heard = Alarmed(level=300)
    armed = source.arm(want(FDS, Processes(partition), ">= 300", each=True), heard)
    assert heard.alarms == {procfs.identify(before.pid): 1}
    tree.put(later.pid, partition)
    settle(reactor)
    armed.disarm()
    assert heard.alarms == {procfs.identify(child.pid): 1 for child in (before, later)}


def test_who_leaves_is_gone_and_heard_no_more(
    tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    upper, lower, other = tree.make("a"), tree.make("a/b"), tree.make("c")
    child, calm = helper(), helper()
    for one in (child, calm):
        tree.put(one.pid, upper)
    member = procfs.identify(child.pid)
    heard = Alarmed(level=300)
    armed = source.arm(want(FDS, Processes(upper), ">= 300", each=True), heard)
    child.open_files(300)
    tree.put(child.pid, lower)
    settle(reactor)
    assert heard.ended == []
    for one in (child, calm):
        tree.put(one.pid, other)
    settle(reactor)
    assert heard.ended == [member]
    child.close_files(300)
    child.open_files(300)
    settle(reactor)
    assert heard.alarms == {member: 1}
    told = len(heard.readings)
    tree.put(child.pid, lower)
    settle(reactor)
    armed.disarm()
    assert len(heard.readings) == told + 1


def test_the_end_of_a_member_is_told(tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    partition = tree.make("a")
    child, calm = helper(), helper()
    for one in (child, calm):
        tree.put(one.pid, partition)
    member = procfs.identify(child.pid)
    heard = Alarmed(level=300)
    armed = source.arm(want(FDS, Processes(partition), ">= 300", each=True), heard)
    child.open_files(300)
    calm.end()
    child.end()
    reactor.until(lambda: heard.ended)
    settle(reactor)
    armed.disarm()
    assert heard.ended == [member]


def test_memory_of_each_in_a_partition(tree: Tree, reactor: Turned, helper: MakeHelper) -> None:
    partition = tree.make("a")
    inside, outside = helper(), helper()
    tree.put(inside.pid, partition)
    with loaded(BpfRss, reactor) as rss:
        heard = Alarmed(level=200 << 20)
        armed = rss.arm(want(MEMORY, Processes(partition), ">= 200M", each=True), heard)
        for child in (inside, outside):
            child.do("held.append(bytearray(220 << 20))")
        settle(reactor)
        armed.disarm()
    assert heard.alarms == {procfs.identify(inside.pid): 1}


# Sums


@pytest.mark.parametrize("in_turn", [False, True])
def test_every_excursion_of_a_sum_counts(
    tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper, in_turn: bool
) -> None:
    """Spread over 8 processes; one level higher none, and none for who stands outside."""
    partition = tree.make("a")
    children = [helper() for _ in range(8)]
    outside = helper()
    for child in children:
        tree.put(child.pid, partition)
        child.open_files(random.randrange(20))
    base = count(partition)
    heard, above = Alarmed(level=base + 1), Alarmed(level=base + 2)
    armed = [source.arm(want(FDS, Processes(partition), f">= {int(one.level)}"), one) for one in (heard, above)]
    each = EXCURSIONS // 8
    for child in children if in_turn else children[:1]:
        child.do(f"for _ in range({each if in_turn else each * 8}): os.close(os.dup(0))")
    outside.do(f"for _ in range({each}): os.close(os.dup(0))")
    settle(reactor)
    assert agrees(source, Kind.FDS, FDS, partition)
    for one in armed:
        one.disarm()
    assert heard.total == each * 8
    assert heard.values()[-1] == base
    assert above.total == 0


def test_levels_at_once_do_not_disturb_each_other(
    tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    """Nested sums, the sum over all, each in one and the process itself, over one process."""
    upper, lower = tree.make("a"), tree.make("a/b")
    child, neighbour = helper(), helper()
    tree.put(child.pid, lower)
    tree.put(neighbour.pid, upper)
    base = base_fds(child.pid)
    places = [
        (Processes(upper), False, count(upper)),
        (Processes(lower), False, count(lower)),
        (Processes(lower), True, base),
        (procfs.identify(child.pid), False, base),
    ]
    listeners = [Alarmed(level=now + 1) for _target, _each, now in places]
    armed = [
        source.arm(want(FDS, target, f">= {now + 1}", each=each), heard)
        for (target, each, now), heard in zip(places, listeners, strict=True)
    ]
    everything = Alarmed()
    armed.append(source.arm(want(FDS, Processes(), ">= 100000000"), everything))
    child.do("for _ in range(100): os.close(os.dup(0))")
    neighbour.do("for _ in range(100): os.close(os.dup(0))")
    settle(reactor)
    assert agrees(source, Kind.FDS, FDS, upper, lower)
    armed[1].disarm()
    child.do("for _ in range(100): os.close(os.dup(0))")
    settle(reactor)
    for one in armed:
        one.disarm()
    assert [heard.total for heard in listeners] == [300, 100, 200, 200]
    assert len(everything.readings) == 1


def test_moves_keep_totals(tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    """While threads open and close; and a move within a scope changes nothing there."""
    upper, left, right = tree.make("a"), tree.make("a/l"), tree.make("a/r")
    still = helper()
    tree.put(still.pid, left)
    still.open_files(10)
    base = count(upper)
    heard = Alarmed(level=base + 1)
    armed = [source.arm(want(FDS, Processes(upper), f">= {base + 1}"), heard)]
    below = Alarmed()
    armed.append(source.arm(want(FDS, Processes(upper), f"< {base}"), below))
    for _ in range(200):
        tree.put(still.pid, right)
        tree.put(still.pid, left)
    settle(reactor)
    assert heard.total == 0
    assert below.values() == [base]
    busy = [
        helper(
            "def work():\n"
            "    for _ in range(2000): os.close(os.dup(0))\n"
            "def all():\n"
            "    threads = [threading.Thread(target=work) for _ in range(4)]\n"
            "    [t.start() for t in threads]; [t.join() for t in threads]"
        )
        for _ in range(4)
    ]
    for child in busy:
        begin(child, "all()")
    for _ in range(100):
        tree.put(random.choice(busy).pid, random.choice([upper, left, right, None]))
    for child in busy:
        child._expect(b"done\n")
    settle(reactor)
    assert agrees(source, Kind.FDS, FDS, upper, left, right)
    for one in armed:
        one.disarm()


def test_forks_execs_and_ends_keep_totals(
    tree: Tree, reactor: Turned, tasks: BpfTasks, source: BpfFds, helper: MakeHelper
) -> None:
    upper, lower = tree.make("a"), tree.make("a/b")
    storm = helper("def leaf(): os.execv('/bin/true', ['true'])")
    resting = helper()
    tree.put(storm.pid, lower)
    tree.put(resting.pid, upper)
    wanted = ((tasks, PROCESSES), (tasks, THREADS), (source, FDS))
    armed = [which.arm(want(what, Processes(upper), ">= 1000000"), Alarmed()) for which, what in wanted]
    storm.do("for _ in range(200): os.waitpid(os.fork() or os._exit(0), 0)")
    storm.do("for _ in range(50): os.waitpid(os.fork() or leaf(), 0)")
    storm.do("left = [os.fork() or time.sleep(1000) for _ in range(30)]")
    storm.do("stop = threading.Event(); [threading.Thread(target=stop.wait).start() for _ in range(20)]")
    begin(resting, "os.execv('/bin/sleep', ['sleep', '1000'])")
    reactor.until(lambda: tasks.engine.total(Kind.PROCESSES, scope(lower)) == 31)
    for partition in (upper, lower):
        reactor.until(lambda partition=partition: agrees(source, Kind.FDS, FDS, partition))  # type: ignore[misc]
        assert agrees(tasks, Kind.PROCESSES, PROCESSES, partition)
        assert agrees(tasks, Kind.THREADS, THREADS, partition)
    assert tasks.engine.total(Kind.PROCESSES, scope(upper)) == 32
    storm.do("[os.kill(pid, 9) for pid in left]; [os.waitpid(pid, 0) for pid in left]; stop.set()")
    reactor.until(lambda: agrees(tasks, Kind.THREADS, THREADS, upper, lower))
    assert agrees(tasks, Kind.PROCESSES, PROCESSES, upper, lower)
    for one in armed:
        one.disarm()


def test_born_into_another_cgroup(tree: Tree, reactor: Turned, tasks: BpfTasks, helper: MakeHelper) -> None:
    """CLONE_INTO_CGROUP, see clone(2)."""
    here, there = tree.make("a"), tree.make("b")
    child = helper(
        "import ctypes\n"
        "def into(fd):\n"
        "    arguments = (ctypes.c_uint64 * 11)(0x200000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, fd)\n"
        "    return ctypes.CDLL(None).syscall(435, arguments, 88)"
    )
    tree.put(child.pid, here)
    heard = {place: Alarmed(level=2) for place in (here, there)}
    armed = [tasks.arm(want(PROCESSES, Processes(place), ">= 2"), one) for place, one in heard.items()]
    child.do(f"fd = os.open({str(tree.cgroup(there).directory)!r}, os.O_DIRECTORY)")
    child.do("born = [into(fd) or os.read(0, 0) or time.sleep(1000) for _ in range(3)]")
    settle(reactor)
    assert agrees(tasks, Kind.PROCESSES, PROCESSES, here, there)
    assert tasks.engine.total(Kind.PROCESSES, scope(there)) == 3
    assert heard[here].total == 0
    assert heard[there].total == 1
    child.do("[os.kill(pid, 9) or os.waitpid(pid, 0) for pid in born]")
    settle(reactor)
    for one in armed:
        one.disarm()
    assert heard[there].values()[-1] == 1


def test_a_table_that_processes_share_counts_for_each(
    tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    """CLONE_FILES without CLONE_THREAD, see clone(2), while both open and close."""
    partition = tree.make("a")
    child = helper(
        "import ctypes\n"
        "def work(count):\n"
        "    for _ in range(count): os.close(os.dup(0))\n"
        "def share():\n"
        "    arguments = (ctypes.c_uint64 * 11)(0x400, 0, 0, 0, 17)\n"
        "    return ctypes.CDLL(None).syscall(435, arguments, 88) or work(20000) or time.sleep(1000)"
    )
    tree.put(child.pid, partition)
    armed = source.arm(want(FDS, Processes(partition), ">= 1000000"), Alarmed())
    child.do("born = share()")
    for _ in range(20):
        child.do("work(500)")
        assert len(cgroups.pids(partition)) == 2
    reactor.until(lambda: agrees(source, Kind.FDS, FDS, partition))
    child.open_files(10)
    reactor.until(lambda: agrees(source, Kind.FDS, FDS, partition))
    child.do("os.kill(born, 9); os.waitpid(born, 0)")
    reactor.until(lambda: agrees(source, Kind.FDS, FDS, partition))
    armed.disarm()


def test_zombies_do_not_count_as_processes(
    tree: Tree, reactor: Turned, tasks: BpfTasks, helper: MakeHelper
) -> None:
    partition = tree.make("a")
    child = helper()
    tree.put(child.pid, partition)
    armed = tasks.arm(want(PROCESSES, Processes(partition), ">= 100"), Alarmed())
    child.do("born = [os.fork() or os._exit(0) for _ in range(20)]")
    reactor.until(lambda: tasks.engine.total(Kind.PROCESSES, scope(partition)) == 1)
    child.do("[os.waitpid(pid, 0) for pid in born]")
    armed.disarm()


def test_a_removed_partition_is_gone(tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    partition, other = tree.make("a"), tree.make("b")
    child = helper()
    tree.put(child.pid, partition)
    heard, silent = Alarmed(level=10000), Alarmed(level=10000)
    armed = [
        source.arm(want(FDS, Processes(place), ">= 10000"), one)
        for place, one in ((partition, heard), (other, silent))
    ]
    tree.put(child.pid, None)
    tree.cgroup(partition).remove()
    settle(reactor)
    for one in armed:
        one.disarm()
    assert heard.ended == [Processes(partition)]
    assert silent.ended == []
    with pytest.raises((Refused, Gone)):
        source.arm(want(FDS, Processes(partition), ">= 10000"), heard)


# Each partition


def test_the_total_of_each_partition(tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    """50 cgroups, those that are there and those that are made later; two processes each, one calm cgroup."""
    early = [tree.make(f"early{number}") for number in range(25)]
    heard = Alarmed(level=600)
    armed = source.arm(want(FDS, Partitions(), ">= 600", each=True), heard)
    known = dict(heard.alarms)  # of other cgroups on this machine
    late = [tree.make(f"late{number}") for number in range(25)]
    children = [helper() for _ in range(4)]
    for place in (*early, *late[1:]):
        for child in children[:2]:
            tree.put(child.pid, place)
            child.open_files(300)
        for child in children[:2]:
            child.close_files(300)
    calm = children[2]
    tree.put(calm.pid, late[0])
    calm.open_files(300)
    settle(reactor)
    ours = {member: alarms for member, alarms in heard.alarms.items() if member not in known}
    top = cgroups.identify(os.path.dirname(early[0].path))
    assert {member: ours.get(member) for member in (*early, *late)} == {
        **dict.fromkeys((*early, *late[1:]), 1),
        late[0]: None,
    }
    assert ours[top] >= 1
    assert cgroups.root() not in heard.alarms
    armed.disarm()


def test_a_removed_partition_that_was_in_alarm_is_gone(
    tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    beyond, calm = tree.make("a"), tree.make("b")
    child = helper()
    heard = Alarmed(level=600)
    armed = source.arm(want(FDS, Partitions(), ">= 600", each=True), heard)
    tree.put(child.pid, calm)
    tree.put(child.pid, beyond)
    child.open_files(600)
    child.end()
    tree.cgroup(beyond).remove()
    tree.cgroup(calm).remove()
    settle(reactor)
    armed.disarm()
    assert beyond in heard.ended
    assert calm not in heard.ended
    assert heard.values(beyond)[-1] < 600


def test_less_in_each_partition(tree: Tree, reactor: Turned, tasks: BpfTasks, helper: MakeHelper) -> None:
    """An empty one is below from the beginning."""
    before, child = tree.make("a"), helper()
    tree.put(child.pid, before)
    heard = Alarmed()
    armed = tasks.arm(want(PROCESSES, Partitions(), "< 1", each=True), heard)
    after = tree.make("b")
    settle(reactor)
    assert heard.values(before) == []
    assert heard.values(after) == [0]
    tree.put(child.pid, after)
    settle(reactor)
    armed.disarm()
    assert heard.values(before) == [0]
    assert heard.values(after) == [0, 1]


# Groups


def test_each_in_a_group(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    group = Chosen()
    first, second, outside = helper(), helper(), helper()
    group.add(first.pid)
    heard = Alarmed(level=300)
    armed = source.arm(want(FDS, Processes(group), ">= 300", each=True), heard)
    for child in (first, second, outside):
        child.open_files(300)
    settle(reactor)
    assert heard.alarms == {procfs.identify(first.pid): 1}
    member = group.add(second.pid)
    settle(reactor)
    assert heard.alarms == {procfs.identify(first.pid): 1, member: 1}
    group.remove(member)
    settle(reactor)
    assert heard.ended == [member]
    second.close_files(300)
    second.open_files(300)
    settle(reactor)
    armed.disarm()
    assert heard.alarms[member] == 1


def test_sum_of_a_group(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    group, other = Chosen(), Chosen()
    children = [helper() for _ in range(3)]
    joined = [group.add(child.pid) for child in children]
    other.add(children[0].pid)
    base = sum(base_fds(child.pid) for child in children)
    heard, calm = Alarmed(level=base + 1), Alarmed(level=base + 1)
    armed = source.arm(want(FDS, Processes(group), f">= {base + 1}"), heard)
    small = source.arm(want(FDS, Processes(other), f">= {base + 1}"), calm)
    assert heard.values() == [base]
    for child in children:
        child.do("for _ in range(1000): os.close(os.dup(0))")
    settle(reactor)
    assert heard.total == 3000
    last = base_fds(children[2].pid)
    group.remove(joined[2])
    children[0].open_files(last)
    settle(reactor)
    assert heard.total == 3000
    children[1].open_files(1)
    settle(reactor)
    armed.disarm()
    small.disarm()
    assert heard.total == 3001
    assert calm.total == 0


def test_children_begin_in_the_groups_of_their_parent(
    reactor: Turned, tasks: BpfTasks, source: BpfFds, helper: MakeHelper
) -> None:
    """So the spike of one that lives for a moment is heard; who is then said not to belong counts no more."""
    group = Chosen()
    parent, stranger = helper(), helper()
    group.add(parent.pid)
    parent.open_files(300)
    heard, sums = Alarmed(level=300), Alarmed(level=2)
    armed = [
        source.arm(want(FDS, Processes(group), ">= 300", each=True), heard),
        tasks.arm(want(PROCESSES, Processes(group), ">= 2"), sums),
    ]
    for child in (stranger, parent):
        child.do("for _ in range(100): os.waitpid(os.fork() or os._exit(0), 0)")
    settle(reactor)
    assert heard.total == 101
    assert sums.total == 100
    parent.do("pid = os.fork() or time.sleep(1000); open(f'/dev/shm/{os.getpid()}', 'w').write(str(pid))")
    with open(f"/dev/shm/{parent.pid}") as told:
        born = procfs.identify(int(told.read()))
    os.unlink(told.name)
    settle(reactor)
    assert sums.total == 101
    assert tasks.engine.total(Kind.PROCESSES, 1 << 62 | group.number) == 2
    group.remove(born)
    settle(reactor)
    assert tasks.engine.total(Kind.PROCESSES, 1 << 62 | group.number) == 1
    assert heard.ended[-1] == born
    parent.do("os.kill(pid, 9); os.waitpid(pid, 0)")
    for one in armed:
        one.disarm()


def test_disarming_a_group_forgets_its_members(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    group = Chosen()
    child = helper()
    group.add(child.pid)
    listeners = [Alarmed(level=300) for _ in range(2)]
    armed = [source.arm(want(FDS, Processes(group), ">= 300", each=True), heard) for heard in listeners]
    armed[0].disarm()
    child.open_files(300)
    settle(reactor)
    armed[1].disarm()
    assert [heard.total for heard in listeners] == [0, 1]
    assert group._told == []
    assert source.engine._memberships().keys(Member) == []


def test_a_process_in_too_many_groups_is_refused(source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    groups = [Chosen() for _ in range(9)]
    for group in groups:
        group.add(child.pid)
    armed = [source.arm(want(FDS, Processes(group), ">= 300", each=True), Alarmed()) for group in groups[:8]]
    with pytest.raises(Refused):
        source.arm(want(FDS, Processes(groups[8]), ">= 300", each=True), Alarmed())
    for one in armed:
        one.disarm()


class Lapsing(Alarmed):
    """Disarms what lapsed, as the registry does."""

    armed: Armed

    def lapsed(self) -> None:
        super().lapsed()
        self.armed.disarm()


def arm_each(source: BpfFds, group: Chosen, level: int = 300) -> Lapsing:
    heard = Lapsing(level=level)
    heard.armed = source.arm(want(FDS, Processes(group), f">= {level}", each=True), heard)
    return heard


def test_who_comes_into_one_group_too_many_is_not_passed_over(
    reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    """Of the one group it is said that not all is heard; the others, and a twin in few groups, are heard."""
    child, twin = helper(), helper()
    groups = [Chosen() for _ in range(9)]
    heard = [arm_each(source, group) for group in groups]
    for group in groups:
        group.add(child.pid)
    groups[0].add(twin.pid)
    settle(reactor)
    assert [each.lapses for each in heard] == [0] * 8 + [1]
    assert [each.losses for each in heard] == [0] * 8 + [1]
    for one in (child, twin):
        one.open_files(300)
    settle(reactor)
    assert [each.total for each in heard] == [2] + [1] * 7 + [0]
    for each in heard:
        each.armed.disarm()
    assert source.engine._memberships().keys(Member) == []


def test_who_leaves_another_group_at_once_has_room(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    groups = [Chosen() for _ in range(9)]
    heard = [arm_each(source, group) for group in groups]
    for group in groups:
        process = group.add(child.pid)
    groups[0].remove(process)
    settle(reactor)
    child.open_files(300)
    settle(reactor)
    assert [each.lapses for each in heard] == [0] * 9
    assert [each.total for each in heard] == [0] + [1] * 8
    for each in heard:
        each.armed.disarm()


def test_a_group_for_all_users_comes_first(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    """One of a user's groups gives way, and says so; nobody gives way to a user's."""
    child = helper()
    users = [Chosen(all_users=False) for _ in range(8)]
    base = base_fds(child.pid)
    for group in users:
        group.add(child.pid)
    sums = Lapsing(level=base + 1)
    sums.armed = source.arm(want(FDS, Processes(users[0]), f">= {base + 1}"), sums)
    heard = [arm_each(source, group) for group in users[1:]]
    first, late = Chosen(), Chosen(all_users=False)
    process = first.add(child.pid)
    mine = arm_each(source, first)
    late.add(child.pid)
    with pytest.raises(Refused):
        arm_each(source, late)
    settle(reactor)
    assert [each.lapses for each in (sums, *heard)] == [1] + [0] * 7
    child.open_files(300)
    settle(reactor)
    assert mine.alarms == {process: 1}
    assert [each.total for each in (sums, *heard)] == [0] + [1] * 7
    assert mine.lapses == 0
    for each in (sums, mine, *heard):
        each.armed.disarm()
    assert source.engine._groups == {}


def test_the_share_of_who_gave_way_is_dropped(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    """While other totals are kept; theirs, and those of a twin who stays, are as they were."""
    child, twin = helper(), helper()
    users, other = [Chosen(all_users=False) for _ in range(8)], Chosen()
    for group in users:
        group.add(child.pid)
    other.add(twin.pid)
    heard = [Lapsing(level=1000) for _ in (*users, other)]
    for one, group in zip(heard, (*users, other), strict=True):
        one.armed = source.arm(want(FDS, Processes(group), ">= 1000"), one)
    first = Chosen()
    first.add(child.pid)
    mine = arm_each(source, first)
    settle(reactor)
    totals = [source.engine.total(Kind.FDS, 1 << 62 | group.number) for group in (*users, other)]
    assert totals == [0] + [base_fds(child.pid)] * 7 + [base_fds(twin.pid)]
    assert [one.lapses for one in heard] == [1] + [0] * 8
    assert not [one for one in heard if one.ended]
    for one in (mine, *heard):
        one.armed.disarm()


# The engine


def test_no_room_is_told_as_lost(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    base = base_fds(child.pid)
    heard = Alarmed(level=base + 1)
    armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {base + 1}"), heard)
    states = source.engine._states()
    for number in range(STATES):
        states.update(Member(watch=number, tgid=1, start=1), State())
    child.open_files(1)
    settle(reactor)
    assert heard.losses == 1
    assert source.engine.full == 1
    assert heard.total == 0
    for number in range(STATES):
        states.delete(Member(watch=number, tgid=1, start=1))
    child.open_files(1)
    settle(reactor)
    armed.disarm()
    assert heard.losses == 1
    assert heard.total == 1


def test_arming_again_finds_the_hooks_attached(reactor: Turned, source: BpfFds) -> None:
    def arm() -> None:
        source.arm(want(FDS, procfs.identify(os.getpid()), ">= 100000"), Alarmed()).disarm()

    assert links() == 0
    arm()
    attached = links()
    assert attached > 0
    for _ in range(20):
        arm()
        assert links() == attached
    reactor.until(lambda: links() == 0)
    arm()
    assert links() == attached


def test_arming_while_detaching(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    base = base_fds(child.pid)
    for _ in range(20):
        heard = Alarmed(level=base + 1)
        armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {base + 1}"), heard)
        child.do("os.close(os.dup(0))")
        settle(reactor)
        armed.disarm()
        assert heard.total == 1
        source.engine._detach()


def test_nothing_is_left_in_the_kernel(tree: Tree, source: BpfFds, helper: MakeHelper) -> None:
    group = Chosen()
    partition = tree.make("a")
    child = helper()
    tree.put(child.pid, partition)
    group.add(child.pid)
    armed = [
        source.arm(want(FDS, target, ">= 1", each=each), Alarmed(level=1))
        for target, each in (
            (Processes(), False),
            (Processes(), True),
            (Processes(partition), False),
            (Processes(partition), True),
            (Processes(group), False),
            (Processes(group), True),
            (Partitions(), True),
            (procfs.identify(child.pid), False),
        )
    ]
    assert source.engine.total(Kind.FDS, EVERY) > 0
    for one in armed:
        one.disarm()
    for name in ("configs", "states", "shares", "totals", "memberships"):
        found = source.engine._object.map(name)  # type: ignore[union-attr]
        assert found.keys(ctypes.c_uint64 * 3) == [], name
    assert source.engine.control.wide == 0
