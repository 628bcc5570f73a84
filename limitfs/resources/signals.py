"""Queued signals."""

import resource
from typing import ClassVar

from limitfs.resources import limits, procfs
from limitfs.resources.model import Level, Limit, Measured, Process, Resource, Unit


class Signals(Resource):
    """Signals queued and not yet delivered, as RLIMIT_SIGPENDING counts them.

    The kernel counts by real user, not by process: all processes of one user show the same number (in one user
    namespace), and one of them can use up what the others may queue. POSIX timers hold one place each. Adding up
    makes no sense therefore. See SigQ in proc_pid_status(5), RLIMIT_SIGPENDING in getrlimit(2).
    """

    name = "signals"
    unit = Unit.COUNT
    levels = frozenset({Level.PROCESS})
    help = "signals queued for the process' user; limit: RLIMIT_SIGPENDING"
    rlimit: ClassVar[int | None] = resource.RLIMIT_SIGPENDING
    summable = False

    def usage(self, target: Measured) -> float:
        if not isinstance(target, Process):
            raise self.elsewhere(target)
        return procfs.reading(target, procfs.status).queued[0]

    def limit(self, target: Measured) -> Limit:
        return limits.enforced(self, target)
