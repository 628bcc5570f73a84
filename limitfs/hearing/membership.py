"""Which processes or threads there are, present and future: what every source that hears `each` stands on.

Births and ends come from the proc connector, the present from /proc; the two overlap, and are put together so
that each member is told once. The connector has no message for a process that moves to another partition: the
kernel's hooks tell that, and where they do not work, who is in a partition is looked at every few seconds.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Protocol

from limitfs.errors import Gone, LimitsError
from limitfs.hearing.connector import Connector, Event, Exec, Exit, Fork, Kind, Lost, Subscription
from limitfs.hearing.deaths import Death, Deaths
from limitfs.hearing.reactor import Reactor, Timer
from limitfs.hearing.source import Refused
from limitfs.resources import cgroups, procfs
from limitfs.resources.model import Group, Partition, Process, Processes, Target, Thread

log = logging.getLogger(__name__)

Callback = Callable[[], None]

Moves = Callable[[Callable[[Process], None], Callback], Callback]
"""Calls back (the first) with each process that belongs to another partition now, (the second) where some of
that was lost; returns what ends it. Raises Refused."""

LOOK = 2.0
"""Seconds between two looks at who is in a partition, where nothing tells who moves."""


def untold(moved: Callable[[Process], None], lost: Callback) -> Callback:
    """The `Moves` of nobody who could tell."""
    del moved, lost
    raise Refused("nothing tells who moves between partitions")


class Owner(Protocol):
    """Who keeps something for every process."""

    def born(self, member: Process, /) -> None:
        """It is there; raises Refused to stop while `start` runs."""

    def ended(self, member: Process, /) -> None:
        """It is no more."""

    def lost(self, count: int, /) -> None:
        """Messages were lost; `born` and `ended` bring everything up to date next."""


class ThreadOwner(Protocol):
    """Who keeps something for every thread of a process."""

    def born(self, member: Thread, /) -> None:
        """It is there; raises Refused to stop while `start` runs."""

    def ended(self, member: Thread, /) -> None:
        """It is no more."""

    def lost(self, count: int, /) -> None:
        """See `Owner`."""


class Membership:
    """Who belongs to a collection of processes: of the machine, of a partition, of a group."""

    def __init__(self, reactor: Reactor, connector: Connector, deaths: Deaths, moves: Moves = untold) -> None:
        self._connector = connector
        self._deaths = deaths
        self._residents = Residents(reactor, connector, deaths, moves)

    def follow(self, processes: Processes, owner: Owner) -> Callback:
        """Tell an owner of those that are there, then of those that come and go; returns what ends that.

        Raises:
            Refused: births cannot be heard; also what `Owner.born` raises.
            Gone: the partition was removed.
        """
        match processes.of:
            case Partition() as partition:
                return self._residents.follow(partition, owner)
            case Group() as group:
                return _follow_group(group, owner)
        members = ProcessMembers(self._connector, self._deaths, owner)
        members.start()
        return members.close

    def period(self, target: Target) -> float | None:
        """Seconds between two looks at who belongs there, of what is followed; None where all of it is told.

        A group knows that of itself.
        """
        of_partition = isinstance(target, Processes) and isinstance(target.of, Partition)
        return self._residents.period if of_partition else None


def _follow_group(group: Group, owner: Owner) -> Callback:
    refusals: list[Refused] = []

    def joined(process: Process) -> None:
        try:
            owner.born(process)
        except Refused as refusal:
            refusals.append(refusal)

    end = group.follow(joined, owner.ended)
    if refusals:
        end()
        raise refusals[0]
    return end


class ProcessMembers:
    """Tells an owner of every process: those that are there, then births and ends. Zombies have ended."""

    def __init__(self, connector: Connector, deaths: Deaths, owner: Owner) -> None:
        self._connector = connector
        self._deaths = deaths
        self._owner = owner
        self._known: dict[int, Process] = {}
        self._lingering: dict[int, Death] = {}
        self._closed = False
        self._subscription: Subscription | None = None

    def start(self) -> None:
        """Begin. Raises Refused, also what `Owner.born` raises."""
        # Subscribed first: who is born while we look around is told twice, not never.
        self._subscription = self._connector.subscribe(self._hear, {Kind.FORK, Kind.EXIT})
        try:
            self._look_around()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Tell no more; the owner may have had enough while he was told."""
        self._closed = True
        if self._subscription is not None:
            self._subscription.close()
        for death in self._lingering.values():
            death.cancel()
        self._lingering.clear()

    def find(self, pid: int) -> Process | None:
        """The process of that number, if it was told as born and has not ended."""
        return self._known.get(pid)

    def _hear(self, event: Event) -> None:
        match event:
            case Fork(pid=pid):
                self._born(pid)
            case Exit(pid=pid):
                self._leader_ended(pid)
            case Lost(messages=count):
                self._owner.lost(count)
                self._look_around()

    def _look_around(self) -> None:
        for pid in self._known.keys() - set(procfs.pids()):
            self._ended(pid)
        for pid in procfs.pids():
            self._born(pid)

    def _born(self, pid: int) -> None:
        try:
            now = procfs.stat(pid)
        except LimitsError:
            return
        process = Process(pid, now.start)
        known = self._known.get(pid)
        if known is not None and (known != process or now.zombie):
            self._ended(pid)
        elif known is not None:
            return
        if now.leader and not now.zombie and now.state != "X":
            self._known[pid] = process
            self._owner.born(process)
            if now.state == "Z":
                self._leader_ended(pid)

    def _leader_ended(self, pid: int) -> None:
        """Its first thread has; where others live on, the end of the last one is waited for."""
        process = self._known.get(pid)
        if process is None or pid in self._lingering or self._closed:
            return
        try:
            if procfs.verify(process).zombie:
                raise Gone("a zombie")
            self._lingering[pid] = self._deaths.watch(process, lambda: self._ended(pid))
        except (LimitsError, Refused):
            self._ended(pid)

    def _ended(self, pid: int) -> None:
        death = self._lingering.pop(pid, None)
        if death is not None:
            death.cancel()
        process = self._known.pop(pid, None)
        if process is not None:
            self._owner.ended(process)


_Place = tuple[int, str]
"""A hierarchy (its device), and a path in it."""


class _Follower:
    """One who follows one partition. Raises Gone."""

    def __init__(self, partition: Partition, owner: Owner) -> None:
        self.partition = partition
        self.owner = owner
        self.place: _Place = cgroups.home(partition).device, partition.path
        self.members: dict[int, Process] = {}


class Residents:
    """Tells owners of the processes of partitions, with all below: births, ends, and moves.

    Attributes:
        period: seconds between two looks at all of them; None where the kernel tells who moves.
    """

    def __init__(self, reactor: Reactor, connector: Connector, deaths: Deaths, moves: Moves) -> None:
        self.period: float | None = None
        self._moves = moves
        self._end_moves: Callback | None = None
        self._reactor = reactor
        self._connector = connector
        self._deaths = deaths
        self._followers: dict[_Place, list[_Follower]] = {}
        self._following: dict[int, list[_Follower]] = {}
        self._everyone: ProcessMembers | None = None
        self._timer: Timer | None = None

    def follow(self, partition: Partition, owner: Owner) -> Callback:
        """See `Membership.follow`."""
        follower = _Follower(partition, owner)
        self._begin()
        self._followers.setdefault(follower.place, []).append(follower)
        try:
            self._look_at(follower)
        except BaseException:
            self._forget(follower)
            raise
        return lambda: self._forget(follower)

    # The owner of everyone

    def born(self, member: Process) -> None:
        """A process is there."""
        if self._followers:  # at first nobody follows yet, and then looks for himself
            self._settle(member)

    def ended(self, member: Process) -> None:
        """A process is no more."""
        for follower in list(self._following.get(member.pid, ())):
            self._leave(follower, member.pid)

    def lost(self, count: int) -> None:
        """Messages were lost."""
        for follower in self._all():
            follower.owner.lost(count)

    # Who follows

    def _begin(self) -> None:
        if self._everyone is None:
            everyone = ProcessMembers(self._connector, self._deaths, self)
            everyone.start()
            self._everyone = everyone
            self._begin_moves()

    def _begin_moves(self) -> None:
        """Before anybody is looked at, so that nobody slips through in between."""
        self.period = None
        try:
            self._end_moves = self._moves(self._moved, self._look_at_all)
        except Refused as refusal:
            log.info("who moves between partitions is looked for: %s", refusal)
            self.period = LOOK
            self._look_later()

    def _forget(self, follower: _Follower) -> None:
        there = self._followers.get(follower.place, [])
        if follower not in there:
            return
        there.remove(follower)
        if not there:
            del self._followers[follower.place]
        for pid in list(follower.members):
            self._take_out(follower, pid)
        if not self._followers and self._everyone is not None:
            self._everyone.close()
            self._everyone = None
            if self._end_moves is not None:
                self._end_moves()
                self._end_moves = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _all(self) -> list[_Follower]:
        return [follower for there in self._followers.values() for follower in there]

    # Who belongs

    def _moved(self, process: Process) -> None:
        """It belongs to another partition now."""
        if self._find(process.pid) == process:
            self._settle(process)

    def _find(self, pid: int) -> Process | None:
        """None for one that has just been born, which will be told, and for a zombie, which has ended."""
        return self._everyone.find(pid) if self._everyone is not None else None

    def _settle(self, process: Process) -> None:
        """Have a process where it belongs, and nowhere else."""
        try:
            here = [follower for place in _places(process.pid) for follower in self._followers.get(place, ())]
        except LimitsError:
            return  # it ended: that is told
        for follower in [one for one in self._following.get(process.pid, ()) if one not in here]:
            self._leave(follower, process.pid)
        for follower in here:
            self._join(follower, process)

    def _join(self, follower: _Follower, process: Process) -> None:
        forgotten = follower not in self._followers.get(follower.place, ())
        if process.pid in follower.members or forgotten:
            return
        follower.members[process.pid] = process
        self._following.setdefault(process.pid, []).append(follower)
        follower.owner.born(process)

    def _leave(self, follower: _Follower, pid: int) -> None:
        process = self._take_out(follower, pid)
        if process is not None:
            follower.owner.ended(process)

    def _take_out(self, follower: _Follower, pid: int) -> Process | None:
        process = follower.members.pop(pid, None)
        if process is not None:
            self._following[pid].remove(follower)
            if not self._following[pid]:
                del self._following[pid]
        return process

    def _look_later(self) -> None:
        self._timer = self._reactor.call_at(self._reactor.now() + LOOK, self._look_around)

    def _look_around(self) -> None:
        self._look_later()
        self._look_at_all()

    def _look_at_all(self) -> None:
        for follower in self._all():
            self._look_at(follower)

    def _look_at(self, follower: _Follower) -> None:
        """Compare with what the kernel lists."""
        try:
            listed = set(cgroups.pids(follower.partition))
        except LimitsError:
            listed = set()  # removed, so it is empty
        for pid in follower.members.keys() - listed:
            self._leave(follower, pid)
        for pid in listed - follower.members.keys():
            process = self._find(pid)
            if process is not None:
                self._join(follower, process)


def _places(pid: int) -> Iterator[_Place]:
    """Where a process belongs, and all that this is below. Raises Gone."""
    for hierarchy, path in cgroups.places(pid):
        yield hierarchy.device, path
        while path != cgroups.ROOT:
            path = path.rpartition("/")[0] or cgroups.ROOT
            yield hierarchy.device, path


class ThreadMembers:
    """Tells an owner of every thread of one process: those that are there, then births and ends."""

    def __init__(self, connector: Connector, process: Process, owner: ThreadOwner) -> None:
        self._connector = connector
        self._process = process
        self._owner = owner
        self._known: dict[int, Thread] = {}
        self._subscription: Subscription | None = None

    def start(self) -> None:
        """Begin. Raises Gone, Refused, also what `ThreadOwner.born` raises."""
        kinds = {Kind.FORK, Kind.EXEC, Kind.EXIT}
        self._subscription = self._connector.subscribe(self._hear, kinds, pid=self._process.pid)
        try:
            procfs.check(self._process)
            self._look_around()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Tell no more."""
        if self._subscription is not None:
            self._subscription.close()

    def _hear(self, event: Event) -> None:
        match event:
            case Fork(tid=tid):
                self._born(tid)
            case Exit(tid=tid):
                self._ended(tid)
            case Exec():  # the thread that executes takes the number of the first one
                self._look_around()
            case Lost(messages=count):
                self._owner.lost(count)
                self._look_around()

    def _look_around(self) -> None:
        try:
            there = procfs.tids(self._process.pid)
        except LimitsError:
            there = []
        for tid in self._known.keys() - set(there):
            self._ended(tid)
        for tid in there:
            self._born(tid)

    def _born(self, tid: int) -> None:
        try:
            now = procfs.stat(self._process.pid, tid)
        except LimitsError:
            return
        thread = Thread(self._process.pid, tid, now.start)
        if self._known.get(tid) == thread or now.state in "ZX":
            return
        self._ended(tid)
        self._known[tid] = thread
        self._owner.born(thread)

    def _ended(self, tid: int) -> None:
        thread = self._known.pop(tid, None)
        if thread is not None:
            self._owner.ended(thread)
