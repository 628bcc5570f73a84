"""Judging that takes its time: processes wait to be held against the groups of users who have spent their share.

A stranger can have many patterns, and many processes with long paths. Each user may have so much work done at
once, and so much a second; what is beyond that waits, and nobody else does. Between two turns of waiting work the
event loop serves everybody. Groups without patterns are cheap, and never wait.
"""

from collections.abc import Callable
from typing import Protocol

from limitfs.hearing.reactor import Reactor, Timer
from limitfs.resources.model import Process
from limitfs.selecting.columns import Row
from limitfs.selecting.pattern import Pattern

BURST = 4_000_000
"""Work at once, see limitfs/selecting/pattern.py: at most 35 ms, and as much again for the group that is begun."""
RATE = 20_000_000
"""Work a second: at most a sixth of a CPU."""
EACH = 1000
"""Work that it is to look at a process at all."""
QUANTUM = RATE // 20
"""Work that must have been earned before waiting is over."""


class Held(Protocol):
    """A group, as far as it can wait."""

    @property
    def owner(self) -> int:
        """Whose it is."""

    @property
    def searches(self) -> bool:
        """Whether it has a pattern."""

    def hold(self, row: Row, newborn: bool = False) -> bool:
        """Take the process of `row` in or out; whether that changed anything. Never raises."""


class Backlog:
    """Holds processes against groups, at once or when it is their owners' turn."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._owners: dict[int, _Owner] = {}

    def hold(self, group: Held, row: Row, newborn: bool) -> bool:
        """Hold `row` against `group`, now or later; whether that changed anything by now."""
        if not group.searches:
            return group.hold(row, newborn)
        owner = self._owners.get(group.owner)
        if owner is None:
            owner = self._owners[group.owner] = _Owner(self._reactor)
        return owner.hold(group, row, newborn)

    def has(self, group: Held) -> bool:
        """Whether processes wait to be held against `group`."""
        owner = self._owners.get(group.owner)
        return owner is not None and owner.waits(group)

    def forget(self, group: Held) -> None:
        """Nobody needs to be held against it any more."""
        if group.owner in self._owners:
            self._owners[group.owner].drop(lambda _process, waiting: waiting is group)

    def ended(self, process: Process) -> None:
        """Nobody needs to hold it any more."""
        for owner in self._owners.values():
            owner.ended(process)


class _Owner:
    """What one user has spent, and who waits for his groups."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._left: float = BURST
        self._since = reactor.now()
        self._waiting: dict[Process, dict[Held, bool]] = {}
        self._groups: dict[Held, int] = {}
        self._timer: Timer | None = None

    def hold(self, group: Held, row: Row, newborn: bool) -> bool:
        self._earn()
        if not self._waiting and self._left > 0:
            return self._spend(group, row, newborn)
        groups = self._waiting.setdefault(row.process, {})
        if group not in groups:
            self._groups[group] = self._groups.get(group, 0) + 1
        groups[group] = groups.get(group, False) or newborn
        self._wait()
        return False

    def waits(self, group: Held) -> bool:
        return group in self._groups

    def ended(self, process: Process) -> None:
        for group in self._waiting.pop(process, {}):
            self._count_out(group)

    def drop(self, which: Callable[[Process, Held], bool]) -> None:
        for process, groups in tuple(self._waiting.items()):
            for group in [group for group in groups if which(process, group)]:
                del groups[group]
                self._count_out(group)
            if not groups:
                del self._waiting[process]

    def _count_out(self, group: Held) -> None:
        self._groups[group] -= 1
        if not self._groups[group]:
            del self._groups[group]

    def _earn(self) -> None:
        now = self._reactor.now()
        self._left = min(BURST, self._left + (now - self._since) * RATE)
        self._since = now

    def _spend(self, group: Held, row: Row, newborn: bool) -> bool:
        before = Pattern.spent
        changed = group.hold(row, newborn)
        self._left -= EACH + Pattern.spent - before
        return changed

    def _wait(self) -> None:
        if self._timer is None and self._waiting:
            due = self._since + max(0.0, QUANTUM - self._left) / RATE
            self._timer = self._reactor.call_at(due, self._go_on)

    def _go_on(self) -> None:
        self._timer = None
        self._earn()
        while self._waiting and self._left > 0:
            process = next(iter(self._waiting))
            row = Row(process)
            while self._left > 0 and (groups := self._waiting.get(process)):
                group = next(iter(groups))
                newborn = groups.pop(group)
                self._count_out(group)
                self._spend(group, row, newborn)
            if process in self._waiting and not self._waiting[process]:
                del self._waiting[process]
        self._wait()
