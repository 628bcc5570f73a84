"""Memory: resident, shared, swapped, mapped, locked. All in bytes.

Process values come from proc_pid_statm(5) and proc_pid_status(5), those of the machine from proc_meminfo(5).
Kernel threads and zombies have none: 0.
"""

import resource
from typing import ClassVar

from limitfs.resources import limits, procfs
from limitfs.resources.model import Level, Limit, Measured, Process, Resource, System, Unit

_PROCESS = frozenset({Level.PROCESS})
_SYSTEM = frozenset({Level.SYSTEM})


def _status(target: Process, field: bytes) -> int:
    """A kB field of /proc/PID/status, in bytes."""
    return procfs.reading(target, procfs.status).size(field)


class Memory(Resource):
    """Memory in RAM. RLIMIT_RSS exists but Linux does not enforce it, so a process has no limit."""

    name = "memory"
    unit = Unit.BYTES
    levels = _PROCESS | _SYSTEM
    help = "resident memory; system: total less available"

    def usage(self, target: Measured) -> float:
        match target:
            case Process():
                return procfs.reading(target, procfs.statm).resident
            case System():
                now = procfs.meminfo()
                return now.total - now.available
        raise self.elsewhere(target)

    def limit(self, target: Measured) -> Limit:
        if isinstance(target, System):
            total = procfs.meminfo().total
            return Limit(total, total)
        return limits.enforced(self, target)

    def whole(self, target: Measured) -> float:
        """100 % is all memory of the machine."""
        limits.check(self, target)
        return procfs.meminfo().total

    def peak(self, target: Measured) -> float | None:
        """VmHWM, since the process' last exec."""
        return _status(target, b"VmHWM") if isinstance(target, Process) else None


class Available(Resource):
    """What could be given to programs without swapping, by the kernel's estimate (MemAvailable)."""

    name = "available"
    unit = Unit.BYTES
    levels = _SYSTEM
    help = "memory that programs could still get without swapping"

    def usage(self, target: Measured) -> float:
        if not isinstance(target, System):
            raise self.elsewhere(target)
        return procfs.meminfo().available

    def limit(self, target: Measured) -> Limit:
        if not isinstance(target, System):
            raise self.elsewhere(target)
        total = procfs.meminfo().total
        return Limit(total, total)


class Swap(Resource):
    """Memory swapped out. Of a process: its anonymous memory; shared memory in swap is counted for no process."""

    name = "swap"
    unit = Unit.BYTES
    levels = _PROCESS | _SYSTEM
    help = "memory swapped out"

    def usage(self, target: Measured) -> float:
        match target:
            case Process():
                return _status(target, b"VmSwap")
            case System():
                now = procfs.meminfo()
                return now.swap_total - now.swap_free
        raise self.elsewhere(target)

    def limit(self, target: Measured) -> Limit:
        if isinstance(target, System):
            total = procfs.meminfo().swap_total
            return Limit(total, total)
        return limits.enforced(self, target)

    def whole(self, target: Measured) -> float:
        """100 % is all swap space of the machine."""
        limits.check(self, target)
        return procfs.meminfo().swap_total


class Shared(Resource):
    """Shared memory in RAM: System V and POSIX segments, tmpfs files, shared anonymous mappings.

    Of a process: the pages that it has mapped and touched (RssShmem), so a sum over processes counts a page once
    for each. Of the machine: all such pages, mapped or not (Shmem).
    """

    name = "shared"
    unit = Unit.BYTES
    levels = _PROCESS | _SYSTEM
    help = "shared-memory pages in use"

    def usage(self, target: Measured) -> float:
        match target:
            case Process():
                return _status(target, b"RssShmem")
            case System():
                return procfs.meminfo().shared
        raise self.elsewhere(target)

    def limit(self, target: Measured) -> Limit:
        return limits.enforced(self, target)

    def whole(self, target: Measured) -> float:
        """100 % is all memory of the machine."""
        limits.check(self, target)
        return procfs.meminfo().total


class Virtual(Resource):
    """Address space: all that is mapped, touched or not."""

    name = "virtual"
    unit = Unit.BYTES
    levels = _PROCESS
    help = "address space; limit: RLIMIT_AS"
    rlimit: ClassVar[int | None] = resource.RLIMIT_AS

    def usage(self, target: Measured) -> float:
        if not isinstance(target, Process):
            raise self.elsewhere(target)
        return procfs.reading(target, procfs.statm).virtual

    def limit(self, target: Measured) -> Limit:
        return limits.enforced(self, target)

    def peak(self, target: Measured) -> float | None:
        """VmPeak, since the process' last exec."""
        return _status(target, b"VmPeak") if isinstance(target, Process) else None


class Data(Resource):
    """Private writable mappings: data segment, heap, anonymous memory; not the stack."""

    name = "data"
    unit = Unit.BYTES
    levels = _PROCESS
    help = "data segment, heap and private writable mappings; limit: RLIMIT_DATA"
    rlimit: ClassVar[int | None] = resource.RLIMIT_DATA

    def usage(self, target: Measured) -> float:
        if not isinstance(target, Process):
            raise self.elsewhere(target)
        return _status(target, b"VmData")

    def limit(self, target: Measured) -> Limit:
        return limits.enforced(self, target)


class Locked(Resource):
    """Memory locked into RAM, see mlock(2)."""

    name = "locked"
    unit = Unit.BYTES
    levels = _PROCESS
    help = "memory locked into RAM; limit: RLIMIT_MEMLOCK"
    rlimit: ClassVar[int | None] = resource.RLIMIT_MEMLOCK

    def usage(self, target: Measured) -> float:
        if not isinstance(target, Process):
            raise self.elsewhere(target)
        return _status(target, b"VmLck")

    def limit(self, target: Measured) -> Limit:
        return limits.enforced(self, target)
