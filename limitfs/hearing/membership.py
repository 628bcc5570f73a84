"""Which processes or threads there are, present and future: what every source that hears `each` stands on.

Births and ends come from the proc connector, the present from /proc; the two overlap, and are put together so
that each member is told once.
"""

import logging
from typing import Protocol

from limitfs.errors import Gone, LimitsError
from limitfs.hearing.connector import Connector, Event, Exec, Exit, Fork, Kind, Lost, Subscription
from limitfs.hearing.deaths import Death, Deaths
from limitfs.hearing.source import Refused
from limitfs.resources import procfs
from limitfs.resources.model import Process, Thread

log = logging.getLogger(__name__)


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


class ProcessMembers:
    """Tells an owner of every process: those that are there, then births and ends. Zombies have ended."""

    def __init__(self, connector: Connector, deaths: Deaths, owner: Owner) -> None:
        self._connector = connector
        self._deaths = deaths
        self._owner = owner
        self._known: dict[int, Process] = {}
        self._lingering: dict[int, Death] = {}
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
        """Tell no more."""
        if self._subscription is not None:
            self._subscription.close()
        for death in self._lingering.values():
            death.cancel()
        self._lingering.clear()

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
        if process is None or pid in self._lingering:
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
