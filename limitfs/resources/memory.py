"""Memory: resident, shared, swapped, mapped, locked. All in bytes.

Process values come from proc_pid_statm(5) and proc_pid_status(5), those of the machine from proc_meminfo(5), those
of a partition from the memory controller (Documentation/admin-guide/cgroup-v2.rst), which charges a page to who
touched it first; where it has no memory controller, they are the sum over its processes. Kernel threads and
zombies have none: 0.
"""

import resource
from typing import ClassVar

from limitfs.resources import cgroups, limits, procfs
from limitfs.resources.cgroups import Knob
from limitfs.resources.model import Level, Limit, Measured, Partition, Process, Resource, System, Unit

_PROCESS = frozenset({Level.PROCESS})
_SYSTEM = frozenset({Level.SYSTEM})
_PARTITION = frozenset({Level.PARTITION})

USAGE = Knob("memory", "memory.current", "memory.usage_in_bytes")
SWAP = Knob("memory", "memory.swap.current", None)
MEMORY_AND_SWAP = Knob("memory", None, "memory.memsw.usage_in_bytes")
CONTROL = Knob("memory", None, "cgroup.event_control")
_MAX = Knob("memory", "memory.max", "memory.limit_in_bytes")
_PEAK = Knob("memory", "memory.peak", "memory.max_usage_in_bytes")
_SWAP_MAX = Knob("memory", "memory.swap.max", None)
_SWAP_PEAK = Knob("memory", "memory.swap.peak", None)
_STAT = Knob("memory", "memory.stat", "memory.stat")


def _status(target: Process, field: bytes) -> int:
    """A kB field of /proc/PID/status, in bytes."""
    return procfs.reading(target, procfs.status).size(field)


class Memory(Resource):
    """Memory in RAM. RLIMIT_RSS exists but Linux does not enforce it, so a process has no limit."""

    name = "memory"
    unit = Unit.BYTES
    levels = _PROCESS | _PARTITION | _SYSTEM
    help = "resident memory; partition: charged to it, limit: memory.max; system: total less available"
    peaks = _PROCESS | _PARTITION

    def kept(self, target: Partition) -> bool:
        return cgroups.has(target, USAGE)

    def usage(self, target: Measured) -> float:
        match target:
            case Partition():
                return cgroups.number(target, USAGE)
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
        if isinstance(target, Partition):
            return limits.of_partition(target, _MAX)
        return limits.enforced(self, target)

    def store(self, target: Partition, limit: float, user: int) -> None:
        """memory.max"""
        limits.store(target, _MAX, limit, user)

    def whole(self, target: Measured) -> float:
        """100 % is all memory of the machine, or what the partition may have where that is less."""
        total = procfs.meminfo().total
        return min(total, self.limit(target).soft)

    def peak(self, target: Measured) -> float | None:
        """VmHWM, since the process' last exec; of a partition, since it was made."""
        if isinstance(target, Partition):
            return cgroups.number(target, _PEAK) if cgroups.has(target, _PEAK) else None
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
    levels = _PROCESS | _PARTITION | _SYSTEM
    help = "memory swapped out; partition limit: memory.swap.max"
    peaks = _PARTITION

    def kept(self, target: Partition) -> bool:
        return cgroups.has(target, SWAP) or cgroups.has(target, MEMORY_AND_SWAP)

    def usage(self, target: Measured) -> float:
        match target:
            case Partition() if cgroups.has(target, MEMORY_AND_SWAP):
                # Version 1 counts both together. The two are read one after the other: never less than nothing.
                return max(0.0, cgroups.number(target, MEMORY_AND_SWAP) - cgroups.number(target, USAGE))
            case Partition():
                return cgroups.number(target, SWAP)
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
        if isinstance(target, Partition):
            return limits.of_partition(target, _SWAP_MAX)
        return limits.enforced(self, target)

    def store(self, target: Partition, limit: float, user: int) -> None:
        """memory.swap.max"""
        limits.store(target, _SWAP_MAX, limit, user)

    def peak(self, target: Measured) -> float | None:
        """Of a partition, since it was made (Linux 6.5)."""
        if isinstance(target, Partition) and cgroups.has(target, _SWAP_PEAK):
            return cgroups.number(target, _SWAP_PEAK)
        return None

    def whole(self, target: Measured) -> float:
        """100 % is all swap space of the machine, or what the partition may have where that is less."""
        total = procfs.meminfo().swap_total
        return min(total, self.limit(target).soft)


class Shared(Resource):
    """Shared memory in RAM: System V and POSIX segments, tmpfs files, shared anonymous mappings.

    Of a process: the pages that it has mapped and touched (RssShmem), so a sum over processes counts a page once
    for each. Of the machine: all such pages, mapped or not (Shmem); of a partition: those of them that are charged
    to it (shmem of memory.stat).
    """

    name = "shared"
    unit = Unit.BYTES
    levels = _PROCESS | _PARTITION | _SYSTEM
    help = "shared-memory pages in use"

    def kept(self, target: Partition) -> bool:
        return cgroups.has(target, _STAT)

    def usage(self, target: Measured) -> float:
        match target:
            case Partition():
                # Version 1 has both, the first one with what is below.
                return cgroups.field(target, _STAT, b"total_shmem", b"shmem")
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
    peaks = _PROCESS

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
