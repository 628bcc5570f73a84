"""All ways of hearing there are, best first."""

from collections.abc import Callable

from limitfs.errors import Quota
from limitfs.hearing.bpf.source import BpfFds, BpfRss, BpfTasks
from limitfs.hearing.connector import Connector
from limitfs.hearing.counting import ConnectorSource
from limitfs.hearing.cputimer import CpuTimers, CpuTimerSource, block_signal
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.edges import Edges
from limitfs.hearing.psi import PsiSource
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.sampling import PeakSource, SamplingSource
from limitfs.hearing.source import Refused, Source
from limitfs.hearing.taskclock import TaskClockSource
from limitfs.resources import procfs
from limitfs.resources.model import Process, Target, Thread, Threads


class Hearing:
    """Makes the sources, which share what they stand on, for one reactor.

    Attributes:
        sources: best first; the last hears everything.
        connector: the kernel's record of processes, for `births`.
        edges: descriptors that tell an event once, for PSI triggers.
    """

    def __init__(self, reactor: Reactor) -> None:
        self._deaths = Deaths(reactor)
        self.edges = Edges(reactor)
        self.connector = Connector(reactor)
        timers = CpuTimers(reactor)
        self.tasks = BpfTasks(reactor)
        self._hooks = (BpfFds(reactor), BpfRss(reactor), self.tasks)
        self.sources: tuple[Source, ...] = (
            *self._hooks,
            CpuTimerSource(reactor, timers, self._deaths, self.connector),
            TaskClockSource(reactor, self.edges, self.connector),
            PsiSource(reactor, self.edges),
            ConnectorSource(reactor, self.connector, self._deaths),
            PeakSource(reactor),
            SamplingSource(reactor),
        )

    @staticmethod
    def prepare() -> None:
        """What must be done before any thread starts."""
        block_signal()

    def close(self) -> None:
        """Unload the kernel's hooks; everything must be disarmed."""
        for hooks in self._hooks:
            hooks.close()

    def watch_death(self, target: Target, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when the process that `target` is part of has ended; returns what cancels that.

        Raises:
            Gone: it has ended.
            Quota: the daemon may open no more files.
        """
        try:
            return self._deaths.watch(_process_of(target), callback).cancel
        except Refused as refusal:
            raise Quota(
                f"the daemon cannot follow one more process: {refusal}", "raise its RLIMIT_NOFILE"
            ) from None


def _process_of(target: Target) -> Process:
    if isinstance(target, Thread):
        procfs.check(target)
        return procfs.identify(target.pid)
    if isinstance(target, Threads):
        return target.process
    assert isinstance(target, Process), f"{target} never ends"
    return target
