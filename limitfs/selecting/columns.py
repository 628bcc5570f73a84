"""What a condition can ask of a process: the columns, and a row that reads each of them when it is needed."""

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from limitfs.errors import Unsupported
from limitfs.resources import RESOURCES, cgroups, procfs
from limitfs.resources.model import Level, Process, Resource

Value = str | float


class Kind(enum.Enum):
    """What the values of a column are, and so with what they can be compared."""

    NUMBER = "a number"
    USER = "a user, by number or by name in /etc/passwd"
    TEXT = "text"
    STATE = "a state, one of R S D T t I Z"
    TIME = 'a time in UTC, as "2026-11-20T23:59:01Z"'
    AMOUNT = "an amount"


OPS: Mapping[Kind, tuple[str, ...]] = {
    Kind.NUMBER: ("==", "!=", "<", "<=", ">", ">="),
    Kind.USER: ("==", "!=", "<", "<=", ">", ">="),
    Kind.TEXT: ("==", "!=", "~"),
    Kind.STATE: ("==", "!="),
    # Not "==": the start is known in clock ticks after boot only, and the clock can be set.
    Kind.TIME: ("<", "<=", ">", ">="),
    Kind.AMOUNT: ("==", "!=", "<", "<=", ">", ">="),
}
"""The comparisons that make sense."""


@dataclass(frozen=True, slots=True)
class Column:
    """One thing that is known of every process.

    Attributes:
        kind: of its values.
        cost: 0 where the line of /proc/PID/stat that is read in any case tells it, 1 for another file or two, 2
            for what is measured. The cheap ones are compared first.
        told: whether the kernel tells of every change; else one has to look again and again.
        resource: of an amount.
    """

    name: str
    kind: Kind
    cost: int
    told: bool
    resource: Resource | None = None


def _columns() -> list[Column]:
    described = [
        Column("pid", Kind.NUMBER, 0, True),
        Column("ppid", Kind.NUMBER, 0, False),
        Column("comm", Kind.TEXT, 0, True),
        Column("state", Kind.STATE, 0, False),
        Column("start", Kind.TIME, 0, True),
        Column("uid", Kind.USER, 1, True),
        Column("exe", Kind.TEXT, 1, True),
        Column("partition", Kind.TEXT, 1, False),
    ]
    measured = [each for each in RESOURCES.values() if Level.PROCESS in each.levels]
    return described + [Column(each.name, Kind.AMOUNT, 2, False, each) for each in measured]


OF_PROCESSES: Mapping[str, Column] = {column.name: column for column in _columns()}
"""The columns of a process by name: who it is, then every resource that is measured for one."""


class Look:
    """One look at many rows: what a resource reads for all of them together, it reads once."""

    def __init__(self) -> None:
        self._resources: dict[str, Resource] = {}

    def through(self, resource: Resource) -> Resource:
        """The resource, as it is to be asked in this look."""
        return self._resources.setdefault(resource.name, resource.look())


class Row:
    """One process, of which each column is read when it is first asked for, and once.

    Args:
        process: whose row it is.
        stat: its line of /proc/PID/stat, where that was just read.
        look: shared by the rows that are read at once.
    """

    __slots__ = ("_look", "_owner", "_stat", "_values", "process")

    def __init__(self, process: Process, stat: procfs.Stat | None = None, look: Look | None = None) -> None:
        self.process = process
        self._look = look or Look()
        self._stat = stat
        self._values: dict[str, Value | None] = {}
        self._owner: int | None = None

    @property
    def stat(self) -> procfs.Stat:
        """What the kernel says of it. Raises Gone."""
        self.check()
        assert self._stat is not None
        return self._stat

    def check(self) -> None:
        """Make sure that the row is of that process, and not of the next one with its number. Raises Gone."""
        if self._stat is None:
            self._stat = procfs.verify(self.process)

    @property
    def owner(self) -> int:
        """Who may look closely at it, see limitfs.resources.who. Raises Gone."""
        if self._owner is None:
            self._owner = procfs.reading(self.process, procfs.owner)[0]
        return self._owner

    def value(self, column: Column) -> Value | None:
        """The value of a column; None where it cannot be told just now. Text is "" where there is none.

        Raises:
            Gone: the process ended.
        """
        if column.name not in self._values:
            try:
                self._values[column.name] = self._read(column)
            except Unsupported:
                self._values[column.name] = None
        return self._values[column.name]

    def whole(self, resource: Resource) -> float | None:
        """What 100 % of a resource is for the process; None where nothing bounds it. Raises Gone."""
        try:
            whole = resource.whole(self.process)
        except Unsupported:
            return None
        return whole if math.isfinite(whole) else None

    def _read(self, column: Column) -> Value:
        if column.resource is not None:
            return self._look.through(column.resource).usage(self.process)
        return _READERS[column.name](self)


def _partition(pid: int) -> str:
    return cgroups.of(pid) or ""


_READERS: Mapping[str, Callable[[Row], Value]] = {
    "pid": lambda row: row.process.pid,
    "ppid": lambda row: row.stat.ppid,
    "comm": lambda row: row.stat.comm,
    "state": lambda row: row.stat.state,
    "start": lambda row: procfs.started(row.process),
    "uid": lambda row: procfs.reading(row.process, procfs.effective_user),
    "exe": lambda row: procfs.reading(row.process, procfs.exe),
    "partition": lambda row: procfs.reading(row.process, _partition),
}
