"""Who a process or thread is: what a crossing's line says besides numbers."""

from dataclasses import dataclass

from limitfs.errors import Gone, Unsupported
from limitfs.resources import cgroups, procfs
from limitfs.resources.model import Measured, Partition, Process, Processes, Target, Thread, Threads


@dataclass(frozen=True, slots=True)
class Who:
    """Process, thread, name, owner and cgroup of a member, as far as known."""

    pid: int | None = None
    tid: int | None = None
    comm: str | None = None
    uid: int | None = None
    partition: str | None = None


def owner(pid: int) -> int:
    """The uid that /proc/PID belongs to: the effective uid, or root where the process is not dumpable.

    That is whom proc(5) and ptrace(2) let look closely at the process; limitfs follows them.

    Raises:
        Gone: there is no such process.
    """
    return procfs.owner(pid)[0]


def describe(target: Target) -> Who:
    """What is known of `target` now; of one that has ended, its numbers or its path."""
    match target:
        case Thread(pid=pid, tid=tid):
            return _describe_task(pid, tid)
        case Process(pid=pid) | Threads(process=Process(pid=pid)):
            return _describe_task(pid, None)
        case (Partition() as partition) | Processes(of=Partition() as partition):
            return _describe_partition(partition)
    return Who()


def _describe_task(pid: int, tid: int | None) -> Who:
    try:
        return Who(pid, tid, procfs.comm(pid, tid), owner(pid), _partition(pid))
    except Gone:
        return Who(pid, tid)


def _partition(pid: int) -> str | None:
    try:
        return cgroups.of(pid)
    except Unsupported:
        return None


def _describe_partition(partition: Partition) -> Who:
    try:
        return Who(uid=cgroups.owner(partition), partition=partition.path)
    except Gone:
        return Who(partition=partition.path)


def started(target: Measured) -> float:
    """When `target` began to be, in seconds since the epoch by the clock as it is set now. Raises Gone."""
    return cgroups.born(target) if isinstance(target, Partition) else procfs.started(target)
