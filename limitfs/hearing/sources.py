"""All ways of hearing there are, best first."""

from collections.abc import Callable

from limitfs.errors import Quota
from limitfs.hearing.births import Birth, ConnectorBirths
from limitfs.hearing.bpf.source import BpfFds, BpfRss, BpfTasks
from limitfs.hearing.cgroupclock import CgroupClockSource
from limitfs.hearing.connector import Connector
from limitfs.hearing.counting import ConnectorSource
from limitfs.hearing.cpus import Cpus
from limitfs.hearing.cputimer import CpuTimers, CpuTimerSource, block_signal
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.eachpartition import EachPartition
from limitfs.hearing.edges import Edges
from limitfs.hearing.membership import Membership, Moves
from limitfs.hearing.memcg import MemcgSource
from limitfs.hearing.partitions import Directories, Removals
from limitfs.hearing.psi import PsiSource
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.sampling import PeakSource, SamplingSource
from limitfs.hearing.source import Refused, Source
from limitfs.hearing.taskclock import TaskClockSource
from limitfs.resources import procfs
from limitfs.resources.model import Partition, Process, Target, Thread, Threads


class Hearing:
    """Makes the sources, which share what they stand on, for one reactor.

    Attributes:
        sources: best first; the last hears everything.
        connector: the kernel's record of processes.
        deaths: the ends of single processes.
        directories: where partitions are seen to come and go.
        membership: who belongs to a partition or group.
        moves: tells who comes to belong to another partition.
        edges: descriptors that tell an event once, for PSI triggers.
    """

    def __init__(self, reactor: Reactor) -> None:
        self.deaths = Deaths(reactor)
        self.directories = Directories(reactor)
        self._removals = Removals(self.directories)
        self.edges = Edges(reactor)
        self.connector = Connector(reactor)
        timers = CpuTimers(reactor)
        looking = PeakSource(reactor), SamplingSource(reactor)
        each = EachPartition(self.directories, *looking)
        self._tasks = BpfTasks(reactor, each=each)
        self._hooks = (BpfFds(reactor, each=each), BpfRss(reactor), self._tasks)
        self.moves: Moves = self._tasks.moves
        self.membership = Membership(reactor, self.connector, self.deaths, self.moves)
        self.sources: tuple[Source, ...] = (
            *self._hooks,
            CpuTimerSource(reactor, timers, self.deaths, self.membership),
            TaskClockSource(reactor, self.edges, self.connector),
            CgroupClockSource(reactor, self.edges, Cpus(reactor), self._removals, each),
            PsiSource(reactor, self.edges, each),
            ConnectorSource(reactor, self.connector, self.deaths, self.membership),
            MemcgSource(reactor, each),
            *looking,
        )

    @staticmethod
    def prepare() -> None:
        """What must be done before any thread starts."""
        block_signal()

    def births(self, callback: Callable[[Birth], None]) -> Callable[[], None]:
        """Call back for each fork, exec and exit of a process from now on; returns what ends that.

        Raises:
            Refused: nothing here tells of processes.
        """
        try:
            return self._tasks.births(callback)
        except Refused:
            return ConnectorBirths(self.connector, callback).close

    @property
    def full(self) -> int:
        """How often the kernel's hooks had no room for a crossing or a share."""
        return sum(hooks.engine.full for hooks in self._hooks)

    def close(self) -> None:
        """Unload the kernel's hooks; everything must be disarmed."""
        for hooks in self._hooks:
            hooks.close()

    def watch_death(self, target: Target, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when the process that `target` is part of has ended, or the partition was removed.

        Returns what cancels that.

        Raises:
            Gone: it has ended.
            Quota: the daemon may open no more files.
        """
        try:
            if isinstance(target, Partition):
                return self._removals.watch(target, callback)
            return self.deaths.watch(_process_of(target), callback).cancel
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
