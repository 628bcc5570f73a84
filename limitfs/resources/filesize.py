"""Files that grow."""

import resource
import stat
from typing import ClassVar

from limitfs.resources import files, limits, procfs
from limitfs.resources.model import Level, Limit, Measured, Process, Resource, Unit


class Filesize(Resource):
    """The largest regular file that a process has open for writing.

    Deleted files count, and so do those in memory (memfd_create(2), /dev/shm): RLIMIT_FSIZE holds for them too. A
    write beyond it brings SIGXFSZ; getrlimit(2). Of a file on a server, and of one on a FUSE mount, it is the size
    that this machine knows: nobody is asked. A file that is only mapped has no descriptor, and does not count.
    """

    name = "filesize"
    unit = Unit.BYTES
    levels = frozenset({Level.PROCESS})
    help = "largest regular file open for writing; limit: RLIMIT_FSIZE"
    rlimit: ClassVar[int | None] = resource.RLIMIT_FSIZE
    summable = False

    def usage(self, target: Measured) -> float:
        if not isinstance(target, Process):
            raise self.elsewhere(target)
        return procfs.reading(target, _largest)

    def limit(self, target: Measured) -> Limit:
        return limits.enforced(self, target)


def _largest(pid: int) -> int:
    written = files.opened(pid, procfs.links(pid), files.WRITABLE)
    return max((file.size for file in written if _counts(file)), default=0)


def _counts(file: files.Open) -> bool:
    return stat.S_ISREG(file.mode) and not files.is_message_queue(file)
