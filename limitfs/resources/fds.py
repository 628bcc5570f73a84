"""File descriptors."""

import resource
from typing import ClassVar

from limitfs.resources import limits, procfs
from limitfs.resources.model import Level, Limit, Measured, Process, Resource, System, Unit


class Fds(Resource):
    """Open file descriptors of a process; open file handles of the machine.

    These are different counts: descriptors that were dup'ed or inherited share a handle, and a handle can be
    open without a descriptor (mapped, or on its way through a socket). See proc_pid_fd(5), and file-nr in
    proc_sys_fs(5).
    """

    name = "fds"
    unit = Unit.COUNT
    levels = frozenset({Level.PROCESS, Level.PARTITION, Level.SYSTEM})
    help = "open file descriptors; limit: RLIMIT_NOFILE; system: open file handles"
    rlimit: ClassVar[int | None] = resource.RLIMIT_NOFILE

    def usage(self, target: Measured) -> float:
        match target:
            case Process():
                return procfs.reading(target, procfs.fds)
            case System():
                return procfs.file_nr().used
        raise self.elsewhere(target)

    def limit(self, target: Measured) -> Limit:
        if isinstance(target, System):
            most = procfs.file_nr().maximum
            return Limit(most, most)
        return limits.enforced(self, target)
