"""Membership that is kept up to date: every change of a process is held against all groups that somebody follows.

Births, ends, programs, names and users are told by the proc connector. What changes without a message (parent,
state, use) is looked at again and again, but only of processes for which it decides: whoever is out of a group by
its name needs no second look until it has another name. Without a connector everything is looked at. A partition
is looked at too, where the kernel's hooks do not work, which tell of it at once.

Judging by patterns may be late, see limitfs/selecting/backlog.py.

Nothing is subscribed to and nothing runs while no group is followed.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from limitfs.errors import LimitsError
from limitfs.hearing.connector import Comm, Connector, Event, Exec, Gid, Kind, Lost, Subscription, Uid
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.membership import Moves, ProcessMembers
from limitfs.hearing.reactor import Reactor, Timer
from limitfs.hearing.sampling import GRID, SHORTEST
from limitfs.hearing.source import Refused
from limitfs.resources import procfs
from limitfs.resources.model import Process
from limitfs.selecting.backlog import Backlog
from limitfs.selecting.columns import Look, Row

log = logging.getLogger(__name__)

LONGEST = 1.0
"""Seconds; where nothing changes, the processes that matter are looked at this often."""
SHARE = 20
"""A look that took so long is not taken again before this many times as long has passed: 5 % of one CPU."""

_COLUMNS: dict[Kind, frozenset[str]] = {
    Kind.EXEC: frozenset({"comm", "exe", "uid", "owner"}),
    Kind.COMM: frozenset({"comm"}),
    Kind.UID: frozenset({"uid", "owner"}),
    Kind.GID: frozenset({"owner"}),
}
"""What can be otherwise after an event. Another user or group makes a process not dumpable, and so another's."""
_KINDS: dict[type[Event], Kind] = {Exec: Kind.EXEC, Comm: Kind.COMM, Uid: Kind.UID, Gid: Kind.GID}


class Follower(Protocol):
    """A group, as far as it is kept up to date here."""

    @property
    def asks(self) -> frozenset[str]:
        """The names of the columns that it depends on; "owner" where only one user's processes count."""

    @property
    def looks(self) -> bool:
        """Whether some of these change without the kernel telling."""

    @property
    def owner(self) -> int:
        """Whose it is."""

    @property
    def searches(self) -> bool:
        """Whether it has a pattern, so that judging may have to wait."""

    def hold(self, row: Row, newborn: bool = False) -> bool:
        """Take the process of `row` in or out; whether that changed anything. Never raises."""

    def open(self) -> Iterable[Process]:
        """Processes for which only what is not told decides."""

    def drop(self, process: Process) -> None:
        """It has ended."""


class Live:
    """Keeps groups up to date.

    Attributes:
        period: seconds between two looks; None where the kernel tells everything that matters.
        sampled: whether births and names, too, are looked for, as there is no connector.
    """

    def __init__(self, reactor: Reactor, connector: Connector, deaths: Deaths, moves: Moves) -> None:
        self._moves = moves
        self._end_moves: Callable[[], None] | None = None
        self._reactor = reactor
        self._connector = connector
        self._deaths = deaths
        self._groups: dict[Follower, None] = {}
        self._processes: dict[int, Process] = {}
        self._births: ProcessMembers | None = None
        self._changes: Subscription | None = None
        self._timer: Timer | None = None
        self._newborn = False
        self._look_shared: Look | None = None
        self._backlog = Backlog(reactor)
        self.period: float | None = None
        self.sampled = False

    def __contains__(self, group: Follower) -> bool:
        return group in self._groups

    def add(self, group: Follower) -> None:
        """Keep `group` up to date from now on, with all that are there already; or after it asks otherwise."""
        self._groups[group] = None
        self._subscribe()
        self._subscribe_moves()
        if self._births is None and not self.sampled:
            self._begin()
        else:
            self._judge_all((group,))
        self._schedule(SHORTEST)

    def remove(self, group: Follower) -> None:
        """Keep it no more; harmless when it is not."""
        self._backlog.forget(group)
        if self._groups.pop(group, 0) is None:
            self._subscribe()
            self._subscribe_moves()
            if not self._groups:
                self._end()
            self._schedule(self.period)

    def late(self, group: Follower) -> bool:
        """Whether processes wait to be held against `group`."""
        return self._backlog.has(group)

    @property
    def told(self) -> frozenset[str]:
        """Columns of which hooks tell every change, though the connector tells none."""
        return frozenset() if self._end_moves is None else frozenset({"partition"})

    # What the kernel tells: `Owner` of limitfs/hearing/membership.py

    def born(self, process: Process) -> None:
        """Hold a process, new or there already, against every group."""
        self._processes[process.pid] = process
        self._judge(process, self._groups, self._newborn, self._look_shared)

    def ended(self, process: Process) -> None:
        """It is in no group any more."""
        if self._processes.get(process.pid) == process:
            del self._processes[process.pid]
        self._backlog.ended(process)
        for group in tuple(self._groups):
            group.drop(process)

    def lost(self, count: int) -> None:
        """Messages were lost: whatever is known may be otherwise by now."""
        del count
        self._judge_all(tuple(self._groups))

    def _changed(self, event: Event) -> None:
        if isinstance(event, Lost):
            return  # `lost` hears it too
        process = self._processes.get(event.pid)
        if process is not None:
            columns = _COLUMNS[_KINDS[type(event)]]
            self._judge(process, [group for group in self._groups if group.asks & columns])

    def _moved(self, process: Process) -> None:
        if self._processes.get(process.pid) == process:
            self._judge(process, self._asking_partition())

    def _asking_partition(self) -> list[Follower]:
        return [group for group in self._groups if "partition" in group.asks]

    # Beginning and ending

    def _begin(self) -> None:
        self._look_shared = Look()
        self._births = births = ProcessMembers(self._connector, self._deaths, self)
        try:
            births.start()
        except Refused as refusal:
            log.info("groups are looked for: %s", refusal)
            self._births, self.sampled = None, True
            self._look_around()
        self._newborn, self._look_shared = True, None
        if not self._groups:  # who was told of a member had enough
            self._end()

    def _end(self) -> None:
        if self._births is not None:
            self._births.close()
            self._births = None
        self._newborn = self.sampled = False
        self._processes.clear()

    def _subscribe(self) -> None:
        """Hear what the groups depend on; before anybody is looked at, so that nothing is missed in between."""
        asked = frozenset().union(*(group.asks for group in self._groups))
        kinds = frozenset(kind for kind, columns in _COLUMNS.items() if columns & asked)
        before = self._changes
        if before is not None and before.kinds == kinds:
            return
        self._changes = None
        if kinds and not self.sampled:
            # Where it is refused, `_begin` is refused too, and goes to look.
            with contextlib.suppress(Refused):
                self._changes = self._connector.subscribe(self._changed, kinds)
        if before is not None:
            before.close()

    def _subscribe_moves(self) -> None:
        """Likewise; where it is refused, a partition is looked at as everything that nobody tells."""
        wanted = bool(self._asking_partition())
        if wanted and self._end_moves is None:
            with contextlib.suppress(Refused):
                self._end_moves = self._moves(self._moved, lambda: self._judge_all(self._asking_partition()))
        elif not wanted and self._end_moves is not None:
            self._end_moves()
            self._end_moves = None

    # Judging

    def _judge_all(self, groups: Iterable[Follower]) -> None:
        look = Look()
        for process in tuple(self._processes.values()):
            self._judge(process, groups, look=look)

    def _judge(
        self, process: Process, groups: Iterable[Follower], newborn: bool = False, look: Look | None = None
    ) -> bool:
        """Hold one process against groups, and read each of its columns once for all of them."""
        row, changed = Row(process, look=look), False
        for group in tuple(groups):
            changed |= self._backlog.hold(group, row, newborn)
        return changed

    # Looking

    def _schedule(self, period: float | None) -> None:
        """Look in `period` seconds, if that makes sense."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        needed = self._groups and (self.sampled or any(group.looks for group in self._groups))
        self.period = (period or SHORTEST) if needed else None
        if self.period is not None:
            due = math.ceil((self._reactor.now() + self.period) / GRID) * GRID
            self._timer = self._reactor.call_at(due, self._look)

    def _look(self) -> None:
        self._timer = None
        begun = self._reactor.now()
        changed = self._look_around() if self.sampled else self._look_at_open()
        cost = self._reactor.now() - begun
        calm = SHORTEST if changed else min((self.period or SHORTEST) * 1.5, LONGEST)
        self._schedule(max(calm, SHARE * cost))

    def _look_at_open(self) -> bool:
        deciding: dict[Process, list[Follower]] = {}
        for group in self._groups:
            for process in group.open():
                deciding.setdefault(process, []).append(group)
        look = Look()
        changes = [self._judge(process, groups, look=look) for process, groups in deciding.items()]
        return any(changes)

    def _look_around(self) -> bool:
        """All processes, as /proc has them now."""
        changed = False
        there, look = dict(present()), Look()
        for process in set(self._processes.values()) - there.keys():
            self.ended(process)
            changed = True
        for process, stat in there.items():
            self._processes[process.pid] = process
            row = Row(process, stat, look)
            for group in tuple(self._groups):
                changed |= self._backlog.hold(group, row, False)
        return changed


def present() -> Iterator[tuple[Process, procfs.Stat]]:
    """Every process that has not ended, with what the kernel says of it."""
    for pid in procfs.pids():
        try:
            now = procfs.stat(pid)
        except LimitsError:
            continue
        if now.leader and not now.zombie and now.state != "X":
            yield Process(pid, now.start), now
