"""What can be measured, and on what: the words that every other room shares.

A *target* is what one path of the tree stands for. Four kinds are measured directly (`System`, `Partition`,
`Process`, `Thread`), three are collections (`Partitions`, `Processes`, `Threads`). The identity of a process or
thread is its number together with its start time (field 22 of proc_pid_stat(5)), that of a partition its path
together with the inode of its directory, so that a number or name used again is another target.
"""

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar, Self

from limitfs.errors import Unsupported


class Level(enum.StrEnum):
    """Where in the tree a resource is measured."""

    THREAD = "thread"
    PROCESS = "process"
    PARTITION = "partition"
    SYSTEM = "system"


class Unit(enum.StrEnum):
    """The base unit of a resource's numbers."""

    BYTES = "bytes"
    SECONDS = "seconds"
    PERCENT = "percent"
    COUNT = "count"


@dataclass(frozen=True, slots=True)
class System:
    """The whole machine."""

    level: ClassVar[Level] = Level.SYSTEM


@dataclass(frozen=True, slots=True)
class Partition:
    """One cgroup, with all below it.

    Attributes:
        path: from the root of the hierarchies, as the kernel writes it: "/a/b"; the root is "/".
        device, inode: of the directory that it is known by; see limitfs/resources/cgroups.py.
    """

    path: str
    device: int
    inode: int
    level: ClassVar[Level] = Level.PARTITION


@dataclass(frozen=True, slots=True)
class Process:
    """One process. `start`: clock ticks after boot, field 22 of /proc/PID/stat."""

    pid: int
    start: int
    level: ClassVar[Level] = Level.PROCESS


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread `tid` of process `pid`. `start` as for `Process`, of the thread itself."""

    pid: int
    tid: int
    start: int
    level: ClassVar[Level] = Level.THREAD


class Group(ABC):
    """Some processes, chosen by a condition; who they are changes. Two groups are never equal.

    Attributes:
        name: the directory's.
        number: never used twice while the daemon runs.
        all_users: whether it may hold everybody's processes, not just those of its owner.
    """

    name: str
    number: int
    all_users: bool = True

    @property
    def behind(self) -> bool:
        """Whether some who belong may not be known yet, as not all that decides is told by the kernel."""
        return False

    @property
    def period(self) -> float | None:
        """Seconds between two looks at who belongs; None where nothing is looked at."""
        return None

    @abstractmethod
    def processes(self) -> "Collection[Process]":
        """The members now."""

    @abstractmethod
    def follow(self, joined: "Callable[[Process], None]", left: "Callable[[Process], None]") -> Callable[[], None]:
        """Be told of members that come (those that are there: at once) and go; returns what ends that."""


@dataclass(frozen=True, slots=True)
class Partitions:
    """All partitions below the root, present and future."""

    level: ClassVar[Level] = Level.PARTITION


@dataclass(frozen=True, slots=True)
class Processes:
    """All processes, present and future; or those `of` a partition (with all below it), or of a group."""

    of: Partition | Group | None = None
    level: ClassVar[Level] = Level.PROCESS


@dataclass(frozen=True, slots=True)
class Threads:
    """All threads of one process, present and future."""

    process: Process
    level: ClassVar[Level] = Level.THREAD


Measured = System | Partition | Process | Thread
Several = Partitions | Processes | Threads
Target = Measured | Several


@dataclass(frozen=True, slots=True)
class Limit:
    """What the kernel enforces, in the resource's base unit; `math.inf` is written "max"."""

    soft: float = math.inf
    hard: float = math.inf


class Resource(ABC):
    """One thing that can be measured. Adding a resource is adding one subclass in one module here.

    Attributes:
        name: the directory's name.
        unit: of every number of this resource.
        levels: where it is measured.
        help: one line for the manual page.
        rlimit: the RLIMIT_* number behind `limit` at process level, or None.
        rate: True where the value is 100 × the growth of `counter` per second over a window (cpu, pressures).
        window: for a rate, the window in seconds where the condition names none ("per").
        summable: False where adding up members makes no sense (stack, pressures).
        peaks: the levels at which kernels keep a high-water mark; `peak` tells whether this one does.
        headcount: True where each process adds one, whatever it does: a group of processes has that too.
    """

    name: ClassVar[str]
    unit: ClassVar[Unit]
    levels: ClassVar[frozenset[Level]]
    help: ClassVar[str]
    rlimit: ClassVar[int | None] = None
    rate: ClassVar[bool] = False
    window: ClassVar[float] = 1.0
    summable: ClassVar[bool] = True
    peaks: ClassVar[frozenset[Level]] = frozenset()
    headcount: ClassVar[bool] = False

    @abstractmethod
    def usage(self, target: Measured) -> float:
        """The use of `target` now, in the base unit.

        Raises:
            Gone: the process or thread ended (also: its number now belongs to another one).
            Unsupported: this kernel does not tell.
        """

    @abstractmethod
    def limit(self, target: Measured) -> Limit:
        """What the kernel enforces on `target`; raises as `usage`."""

    def look(self) -> Self:
        """This resource, for one look at many members: what it reads for all of them together, it reads once."""
        return self

    def peak(self, target: Measured) -> float | None:  # noqa: ARG002
        """The kernel's own high-water mark of `target`, or None where it keeps none; raises as `usage`."""
        return None

    def store(self, target: Partition, limit: float, user: int) -> None:  # noqa: ARG002
        """Have the kernel enforce a limit on a partition, for a user; `math.inf`: none.

        May be called in any thread, and waits: with a limit on memory below what is in use, the kernel first
        reclaims what is too much.

        Raises:
            Unsupported: it has no such limit.
            Others: as limits.put.
        """
        self.check_storable()

    def check_storable(self) -> None:
        """Raises Unsupported where the kernel limits this for no partition: a resource without its own `store`."""
        if type(self).store is Resource.store:
            raise Unsupported(f"the kernel has no limit on {self.name} of a partition")

    def kept(self, target: Partition) -> bool:  # noqa: ARG002
        """Whether the kernel keeps one number for that partition; else its use is the sum of its processes'."""
        return False

    def whole(self, target: Measured) -> float:
        """What 100 % means in a condition: the soft limit, unless there is something better to compare with.

        `math.inf` where nothing bounds it: a percentage of that cannot be. Raises as `usage`.
        """
        return self.limit(target).soft

    def elsewhere(self, target: Measured) -> Unsupported:
        """The refusal for a target of a level where this is not measured."""
        return Unsupported(
            f"{self.name} is not measured for a {target.level}", f"it is for: {', '.join(sorted(self.levels))}"
        )

    def counter(self, target: Measured) -> float:  # noqa: ARG002
        """For a rate: the seconds consumed or stalled so far; raises as `usage`."""
        raise Unsupported(f"{self.name} is not a rate")
