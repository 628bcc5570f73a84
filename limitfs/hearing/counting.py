"""Hearing how many processes and threads there are, by counting births and ends exactly."""

import contextlib
import itertools
import logging
import os
import time
from typing import ClassVar

from limitfs.errors import Gone, LimitsError
from limitfs.hearing.connector import Connector, Event, Exec, Exit, Fork, Kind, Lost
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.membership import Membership
from limitfs.hearing.reactor import Reactor, Timer
from limitfs.hearing.source import Armed, Guarantee, Listener, Refused, Want
from limitfs.resources import procfs
from limitfs.resources.model import Process, Processes, Resource, System, Target

log = logging.getLogger(__name__)


class Counted:
    """A want at work: a set of numbers, and what ends it."""

    source = "connector"

    def __init__(self) -> None:
        self.period: float | None = None
        self._undo = contextlib.ExitStack()
        self._disarmed = False

    @property
    def guarantee(self) -> Guarantee:
        """See `Armed.guarantee`."""
        return Guarantee.EXACT if self.period is None else Guarantee.SAMPLED

    def disarm(self) -> None:
        """Stop, and forget the numbers."""
        self._disarmed = True
        self._undo.close()


class _ThreadSet:
    """The threads of one process: a snapshot, and what was heard since. Raises Gone."""

    __slots__ = ("_taken_ns", "_tids")

    def __init__(self, pid: int) -> None:
        self._taken_ns = time.monotonic_ns()
        self._tids = set(procfs.tids(pid))

    def __len__(self) -> int:
        return len(self._tids)

    def hear(self, event: Fork | Exit) -> bool:
        """Take in an event; whether it was news."""
        # Older ones are in the snapshot. The first thread is counted until the process has ended.
        if event.time_ns < self._taken_ns or event.tid == event.pid:
            return False
        (self._tids.add if isinstance(event, Fork) else self._tids.discard)(event.tid)
        return True


class ProcessThreads(Counted):
    """How many threads one process has."""

    def __init__(self, connector: Connector, deaths: Deaths, process: Process, listener: Listener) -> None:
        super().__init__()
        self._process = process
        self._listener = listener
        try:
            self._undo.callback(deaths.watch(process, self._ended).cancel)
            kinds = {Kind.FORK, Kind.EXEC, Kind.EXIT}
            self._undo.callback(connector.subscribe(self._hear, kinds, pid=process.pid).close)
            self._take_snapshot()
        except BaseException:
            self.disarm()
            raise

    def _take_snapshot(self) -> None:
        self._threads = _ThreadSet(self._process.pid)
        procfs.check(self._process)
        self._report()

    def _hear(self, event: Event) -> None:
        match event:
            case Lost(messages=count):
                self._listener.lost(count)
                self._again()
            case Exec():
                self._again()
            case Fork() | Exit():
                if self._threads.hear(event):
                    self._report()

    def _again(self) -> None:
        if not self._disarmed:
            with contextlib.suppress(Gone):
                self._take_snapshot()

    def _report(self) -> None:
        if not self._disarmed:
            self._listener.reading(self._process, float(len(self._threads)))

    def _ended(self) -> None:
        self.disarm()
        self._listener.gone(self._process)


class Census(Counted):
    """How many processes, or threads, the machine has.

    As the kernel counts them, a zombie is one still, for it has a number. When its parent waits for it no
    message comes; so zombies are looked at again with every message, and some times without.

    Args:
        threads: count threads; else processes.
    """

    def __init__(
        self, reactor: Reactor, connector: Connector, threads: bool, target: Target, listener: Listener
    ) -> None:
        super().__init__()
        self._reactor = reactor
        self._threads = threads
        self._target = target
        self._listener = listener
        self._tids: dict[int, set[int]] = {}
        self._count = 0
        # In order of age, the youngest last.
        self._zombies: dict[int, None] = {}
        self._timer: Timer | None = None
        self._delay = 0.0
        self._taken_ns = 0
        kinds = {Kind.FORK, Kind.EXEC, Kind.EXIT} if threads else {Kind.FORK, Kind.EXIT}
        try:
            self._undo.callback(connector.subscribe(self._hear, kinds, threads=threads).close)
            self._take_snapshot()
        except BaseException:
            self.disarm()
            raise

    def disarm(self) -> None:
        """Stop, and forget the numbers."""
        super().disarm()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _take_snapshot(self) -> None:
        self._taken_ns = time.monotonic_ns()
        self._tids = {}
        for pid in procfs.pids():
            with contextlib.suppress(LimitsError):
                self._tids[pid] = set(procfs.tids(pid)) if self._threads else {pid}
        self._count = sum(map(len, self._tids.values()))
        self._zombies = {pid: None for pid in self._tids if _is_zombie(pid)}
        self._report()
        self._look_soon()

    def _hear(self, event: Event) -> None:
        if self._disarmed:
            return
        match event:
            case Lost(messages=count):
                self._listener.lost(count)
                if not self._disarmed:
                    self._take_snapshot()
                return
            case Fork():
                self._bury(_YOUNGEST)
                if event.time_ns >= self._taken_ns:
                    self._add(event.pid, event.tid)
            case Exec(pid=pid):
                self._count -= len(self._tids.get(pid, ()))
                self._tids[pid] = {pid}
                self._count += 1
            case Exit(tid=tid, pid=pid):
                if tid != pid:
                    self._discard(pid, tid)
                else:
                    self._zombies[pid] = None
                    self._bury(_YOUNGEST)
                    self._look_soon()
        self._report()

    def _add(self, pid: int, tid: int) -> None:
        tids = self._tids.setdefault(pid, set())
        if tid not in tids:
            tids.add(tid)
            self._count += 1
        if tid == pid:
            self._zombies.pop(pid, None)

    def _discard(self, pid: int, tid: int) -> None:
        tids = self._tids.get(pid)
        if tids is not None and tid in tids:
            tids.discard(tid)
            self._count -= 1

    def _bury(self, most: int) -> bool:
        """Take out those of the youngest zombies that somebody waited for; whether there were any."""
        gone = [pid for pid in itertools.islice(reversed(self._zombies), most) if not _exists(pid)]
        for pid in gone:
            del self._zombies[pid]
            self._count -= len(self._tids.pop(pid, ()))
        return bool(gone)

    def _report(self) -> None:
        if not self._disarmed:
            self._listener.reading(self._target, float(self._count))

    # Zombies

    def _look_soon(self) -> None:
        self._delay = _FIRST_DELAY
        if self._timer is None or self._timer.when > self._reactor.now() + _FIRST_DELAY:
            self._look_later()

    def _look_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # Nobody waits for some zombies, ever; those are left to the next message.
        if self._zombies and self._delay <= _LAST_DELAY and not self._disarmed:
            self._timer = self._reactor.call_at(self._reactor.now() + self._delay, self._look_at_zombies)

    def _look_at_zombies(self) -> None:
        self._timer = None
        if self._bury(len(self._zombies)):
            self._report()
        self._delay *= 2
        self._look_later()


_FIRST_DELAY = 0.005
_LAST_DELAY = 5.0
"""Seconds until zombies are looked at again; doubled each time."""

_YOUNGEST = 16
"""Zombies that are looked at with every message."""


def _is_zombie(pid: int) -> bool:
    try:
        return procfs.stat(pid).zombie
    except LimitsError:
        return True  # reaped, or about to be: `_bury` finds out


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class EachThreads(Counted):
    """How many threads each of some processes has."""

    def __init__(
        self, connector: Connector, membership: Membership, processes: Processes, listener: Listener
    ) -> None:
        super().__init__()
        self._listener = listener
        self._processes: dict[int, tuple[Process, _ThreadSet]] = {}
        try:
            kinds = {Kind.FORK, Kind.EXEC, Kind.EXIT}
            self._undo.callback(connector.subscribe(self._hear, kinds, threads=True).close)
            self._undo.callback(membership.follow(processes, self))
            self.period = membership.period(processes)
        except BaseException:
            self.disarm()
            raise

    def born(self, member: Process) -> None:
        """A process is there."""
        with contextlib.suppress(LimitsError):
            self._processes[member.pid] = member, _ThreadSet(member.pid)
            self._report(member.pid)

    def ended(self, member: Process) -> None:
        """A process is no more."""
        if self._processes.pop(member.pid, None) is not None and not self._disarmed:
            self._listener.gone(member)

    def lost(self, count: int) -> None:
        """Whoever is known already is counted anew; the others are born next."""
        self._listener.lost(count)
        for process, _threads in list(self._processes.values()):
            self.born(process)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Lost) or event.pid not in self._processes:
            return  # `lost` and `born` are called too
        process, threads = self._processes[event.pid]
        if isinstance(event, Exec):
            self.born(process)
        elif isinstance(event, Fork | Exit) and threads.hear(event):
            self._report(event.pid)

    def _report(self, pid: int) -> None:
        if not self._disarmed:
            process, threads = self._processes[pid]
            self._listener.reading(process, float(len(threads)))


class ConnectorSource:
    """Hears `threads` of a process, of each of some and of the machine, and `processes`: also every change."""

    name: ClassVar[str] = "connector"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[str] = "a message for each birth and death that somebody wants to hear"

    def __init__(self, reactor: Reactor, connector: Connector, deaths: Deaths, membership: Membership) -> None:
        self._reactor = reactor
        self._connector = connector
        self._deaths = deaths
        self._membership = membership

    def missing(self) -> str | None:
        """See `Connector.missing`."""
        return self._connector.missing()

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """`processes` of the machine; `threads` of the machine, of a process and of each of some."""
        if resource.name == "processes":
            return isinstance(target, System) and not each
        if resource.name != "threads":
            return False
        return isinstance(target, Processes if each else System | Process)

    def arm(self, want: Want, listener: Listener) -> Armed:
        """Take a snapshot, and count on from there. Raises Refused, Gone."""
        match want.target:
            case Processes() as processes:
                return EachThreads(self._connector, self._membership, processes, listener)
            case Process() as process:
                return ProcessThreads(self._connector, self._deaths, process, listener)
            case System() as system:
                threads = want.resource.name == "threads"
                return Census(self._reactor, self._connector, threads, system, listener)
        raise Refused("a process, or the machine")
