"""The record of births: fork, exec and exit of every process, with who it was.

Where the kernel's hooks work they tell all of it (limitfs/hearing/bpf); elsewhere the proc connector tells
numbers, and the rest is read from /proc.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from limitfs.errors import LimitsError
from limitfs.hearing.connector import Connector, Event, Exec, Exit, Fork, Kind, Lost
from limitfs.resources import procfs


class Birth(NamedTuple):
    """One line of `births`; None for what nobody can tell any more."""

    kind: str
    """fork, exec, exit, or lost."""
    time_ns: int
    """CLOCK_MONOTONIC."""
    pid: int | None
    ppid: int | None
    comm: str | None
    uid: int | None
    """The real one."""
    status: int | None = None
    """Of an exit, as wait(2) gives it."""
    peak: int | None = None
    """Of an exit: the most resident memory it had, in bytes; the connector does not know."""


def birth_lost() -> Birth:
    """What is told where records were lost."""
    return Birth("lost", time.monotonic_ns(), None, None, None, None)


class _Known(NamedTuple):
    """Who a process is, as far as known."""

    ppid: int | None = None
    comm: str | None = None
    uid: int | None = None

    def or_else(self, other: "_Known") -> "_Known":
        """What is not known here, from `other`."""
        return _Known(
            other.ppid if self.ppid is None else self.ppid,
            other.comm if self.comm is None else self.comm,
            other.uid if self.uid is None else self.uid,
        )


class ConnectorBirths:
    """Calls back with a record of every fork, exec and exit of a process, as far as the connector tells.

    The kernel tells numbers; names and users are read from /proc at once and kept until the exit. Of a process
    that is over before it can be looked at, the user is its parent's at the fork, and so is the name until exec.

    Raises:
        Refused: see `Connector.missing`.
    """

    def __init__(self, connector: Connector, callback: Callable[[Birth], None]) -> None:
        self._callback = callback
        self._known: dict[int, _Known] = {}
        self._subscription = connector.subscribe(self._hear, {Kind.FORK, Kind.EXEC, Kind.EXIT})

    def close(self) -> None:
        """Call back no more."""
        self._subscription.close()
        self._known.clear()

    def _hear(self, event: Event) -> None:
        match event:
            case Fork():
                parent = self._known.get(event.ppid) or _about(event.ppid)
                inherited = _Known(event.ppid, parent.comm, parent.uid)
                self._tell("fork", event.time_ns, event.pid, _about(event.pid).or_else(inherited))
            case Exec():
                before = self._known.get(event.pid, _Known())
                # The name before is not the name after.
                self._tell("exec", event.time_ns, event.pid, _about(event.pid).or_else(before._replace(comm=None)))
            case Exit():
                who = _about(event.pid).or_else(self._known.get(event.pid, _Known()))
                self._tell("exit", event.time_ns, event.pid, _Known(event.ppid or None).or_else(who), event.status)
                self._known.pop(event.pid, None)
            case Lost():
                self._known.clear()
                self._callback(birth_lost())

    def _tell(self, kind: str, time_ns: int, pid: int, who: _Known, status: int | None = None) -> None:
        self._known[pid] = who
        self._callback(Birth(kind, time_ns, pid, who.ppid, who.comm, who.uid, status))


def _about(pid: int) -> _Known:
    """Parent, name and real user, as far as they can still be read."""
    try:
        now = procfs.stat(pid)
        return _Known(now.ppid, now.comm, procfs.status(pid).uids[0])
    except (LimitsError, ValueError):
        return _Known()
