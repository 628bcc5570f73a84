"""How many processes and threads there are."""

from limitfs.resources import limits, procfs
from limitfs.resources.model import Level, Limit, Measured, Process, Resource, System, Unit


class Threads(Resource):
    """Threads. RLIMIT_NPROC counts those of a user, not of a process, so a process has no limit.

    Of a process: num_threads of proc_pid_stat(5), 0 for a zombie. Of the machine: the total of proc_loadavg(5);
    limit: threads-max of proc_sys_kernel(5).
    """

    name = "threads"
    unit = Unit.COUNT
    levels = frozenset({Level.PROCESS, Level.SYSTEM})
    help = "threads; system limit: kernel.threads-max"

    def usage(self, target: Measured) -> float:
        match target:
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
        return limits.enforced(self, target)


class Processes(Resource):
    """Processes, zombies included as they take up a number; limit: pid_max of proc_sys_kernel(5).

    Threads take numbers from the same range, so the limit can be met earlier.
    """

    name = "processes"
    unit = Unit.COUNT
    levels = frozenset({Level.SYSTEM})
    help = "processes; limit: kernel.pid_max"

    def usage(self, target: Measured) -> float:
        if not isinstance(target, System):
            raise self.elsewhere(target)
        return len(procfs.pids())

    def limit(self, target: Measured) -> Limit:
        if not isinstance(target, System):
            raise self.elsewhere(target)
        most = procfs.sysctl("kernel/pid_max")
        return Limit(most, most)
