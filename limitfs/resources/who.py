"""Who a process or thread is: what a crossing's line says besides numbers."""

from dataclasses import dataclass

from limitfs.errors import Gone
from limitfs.resources import procfs
from limitfs.resources.model import Process, Target, Thread, Threads


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
    """What is known of `target` now; of one that has ended, its numbers."""
    if isinstance(target, Thread):
        pid, tid = target.pid, target.tid
    elif isinstance(target, Process | Threads):
        process = target.process if isinstance(target, Threads) else target
        pid, tid = process.pid, None
    else:
        return Who()
    try:
        return Who(pid, tid, procfs.comm(pid, tid), owner(pid), procfs.cgroup(pid))
    except Gone:
        return Who(pid, tid)
