"""What can be measured, and on what: the words that every other room shares.

A *target* is what one path of the tree stands for. Three kinds are measured directly (`System`, `Process`,
`Thread`), two are collections (`Processes`, `Threads`). The identity of a process or thread is its number
together with its start time (field 22 of proc_pid_stat(5)), so that a number used again is another target.
"""

import enum
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

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


@dataclass(frozen=True, slots=True)
class Processes:
    """All processes, present and future."""

    level: ClassVar[Level] = Level.PROCESS


@dataclass(frozen=True, slots=True)
class Threads:
    """All threads of one process, present and future."""

    process: Process
    level: ClassVar[Level] = Level.THREAD


Measured = System | Process | Thread
Collection = Processes | Threads
Target = Measured | Collection


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
    """

    name: ClassVar[str]
    unit: ClassVar[Unit]
    levels: ClassVar[frozenset[Level]]
    help: ClassVar[str]
    rlimit: ClassVar[int | None] = None
    rate: ClassVar[bool] = False
    window: ClassVar[float] = 1.0
    summable: ClassVar[bool] = True

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

    def peak(self, target: Measured) -> float | None:  # noqa: ARG002
        """The kernel's own high-water mark of `target`, or None where it keeps none; raises as `usage`."""
        return None

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
