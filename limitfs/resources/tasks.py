"""How many processes and threads there are."""

from limitfs.resources import cgroups, limits, procfs
from limitfs.resources.cgroups import Knob
from limitfs.resources.model import Level, Limit, Measured, Partition, Process, Resource, System, Unit

_CURRENT = Knob("pids", "pids.current", "pids.current")
_MAX = Knob("pids", "pids.max", "pids.max")
_PEAK = Knob("pids", "pids.peak", "pids.peak")


class Threads(Resource):
    """Threads. RLIMIT_NPROC counts those of a user, not of a process, so a process has no limit.

    Of a process: num_threads of proc_pid_stat(5), 0 for a zombie. Of the machine: the total of proc_loadavg(5);
    limit: threads-max of proc_sys_kernel(5). Of a partition: pids.current (see cgroup-v2.rst), which counts
    zombies too, as pids.max does; where it has no pids controller, the sum over its processes.
    """

    name = "threads"
    unit = Unit.COUNT
    levels = frozenset({Level.PROCESS, Level.PARTITION, Level.SYSTEM})
    help = "threads; partition limit: pids.max; system limit: kernel.threads-max"
    peaks = frozenset({Level.PARTITION})

    def kept(self, target: Partition) -> bool:
        return cgroups.has(target, _CURRENT)

    def usage(self, target: Measured) -> float:
        match target:
            case Partition():
                return cgroups.number(target, _CURRENT)
            case Process():
                now = procfs.verify(target)
                return 0 if now.zombie else now.threads
            case System():
                return procfs.loadavg().total
        raise self.elsewhere(target)

    def limit(self, target: Measured) -> Limit:
        if isinstance(target, System):
            most = procfs.sysctl("kernel/threads-max")
            return Limit(most, most)
        if isinstance(target, Partition):
            return limits.of_partition(target, _MAX)
        return limits.enforced(self, target)

    def store(self, target: Partition, limit: float, user: int) -> None:
        """pids.max"""
        limits.store(target, _MAX, limit, user)

    def peak(self, target: Measured) -> float | None:
        """Of a partition, since it was made (Linux 6.6)."""
        if isinstance(target, Partition) and cgroups.has(target, _PEAK):
            return cgroups.number(target, _PEAK)
        return None


class Processes(Resource):
    """Processes, zombies included as they take up a number; limit: pid_max of proc_sys_kernel(5).

    Threads take numbers from the same range, so the limit can be met earlier. Of a partition: the processes that
    cgroup.procs lists, without zombies.
    """

    name = "processes"
    unit = Unit.COUNT
    levels = frozenset({Level.PARTITION, Level.SYSTEM})
    help = "processes; system limit: kernel.pid_max"
    headcount = True

    def usage(self, target: Measured) -> float:
        match target:
            case Process():
                procfs.check(target)
                return 1  # what it adds to a sum
            case System():
                return len(procfs.pids())
        raise self.elsewhere(target)

    def limit(self, target: Measured) -> Limit:
        if not isinstance(target, System):
            return limits.enforced(self, target)
        most = procfs.sysctl("kernel/pid_max")
        return Limit(most, most)
