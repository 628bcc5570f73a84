"""The CPU time of one partition: perf events on each CPU.

A software event cpu-clock counts the time for which tasks of a cgroup, or of one below, have one CPU, and
wakes whoever polls each time `sample_period` nanoseconds of it have passed; see perf_event_open(2),
PERF_FLAG_PID_CGROUP. The events are only the bell: what was consumed is read from cpu.stat when they ring.

Nobody knows on which CPUs the rest will be consumed. So each event is given its share of it, and when one rings,
all are given theirs of what is missing then. At the end that is a millisecond: so late is it for each CPU at most.
"""

import contextlib
import logging
import os
import select
from collections.abc import Callable
from typing import ClassVar

from limitfs.errors import Gone, LimitsError
from limitfs.hearing import cpus, syscalls
from limitfs.hearing.cpus import Cpus
from limitfs.hearing.eachpartition import EachPartition
from limitfs.hearing.edges import Edges
from limitfs.hearing.meter import NAMES, Clock, Metered, refuse_unheard
from limitfs.hearing.partitions import Removals
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Armed, Guarantee, Listener, Refused, Want
from limitfs.resources import cgroups
from limitfs.resources.cpu import consumed, counted_in_unified
from limitfs.resources.model import Measured, Partition, Partitions, Resource, Target

log = logging.getLogger(__name__)

Callback = Callable[[], None]

_NEVER = 1 << 62
"""Nanoseconds: a period that never ends."""

_SHORTEST = 1_000_000
"""Nanoseconds between two wake-ups of one event."""


class CgroupClock:
    """The CPU time of one partition, which can call back.

    Args:
        edges: where the events are waited for.
        online: who tells of CPUs that come and go.
        partition: whose.
        ring: called when it has consumed what was set.

    Raises:
        Gone: it was removed.
        Refused: the kernel or its settings do not allow it (perf_event_paranoid); or its CPU time is not counted
            in the unified hierarchy.
    """

    def __init__(self, edges: Edges, online: Cpus, partition: Partition, ring: Callback) -> None:
        self._edges = edges
        self._partition = partition
        self._ring = ring
        self._target: float | None = None
        self._events: dict[int, contextlib.ExitStack] = {}
        self._undo = contextlib.ExitStack()
        try:
            self._undo.callback(self._close_events)
            self._undo.callback(online.watch(self._cpus_changed))
            self._open()
        except BaseException:
            self.close()
            raise

    def now(self) -> float:
        """CPU seconds consumed, as cpu.stat has them: to the last tick. Raises Gone."""
        return consumed(self._partition)

    def ring_at(self, seconds: float) -> None:
        """Call back when `seconds` have been consumed in all. Raises Gone."""
        self._target = seconds
        self._set()

    def rest(self) -> None:
        """Do not call back. Raises Gone."""
        self._target = None
        self._set()

    def close(self) -> None:
        """Free it; may be called twice."""
        self._undo.close()

    def _open(self) -> None:
        if not counted_in_unified(self._partition):
            cgroups.check(self._partition)
            raise Refused("its CPU time is not counted in the unified hierarchy")
        try:
            directory = os.open(_directory(self._partition), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for cpu in cpus.online():
                    self._open_event(directory, cpu)
            finally:
                os.close(directory)
        except OSError as error:
            cgroups.check(self._partition)
            raise Refused(f"perf_event_open: {error.strerror} (see kernel.perf_event_paranoid)") from error

    def _open_event(self, directory: int, cpu: int) -> None:
        with contextlib.ExitStack() as undo:
            fd = syscalls.perf_cgroup_clock(directory, cpu, _NEVER)
            undo.callback(os.close, fd)
            undo.callback(syscalls.perf_unmap, syscalls.perf_map(fd))
            self._edges.add(fd, self._heard, select.EPOLLIN)
            undo.callback(self._edges.remove, fd)
            self._events[fd] = undo.pop_all()

    def _close_events(self) -> None:
        while self._events:
            self._events.popitem()[1].close()

    def _set(self) -> None:
        period = _NEVER
        if self._target is not None and self._events:
            missing = (self._target - self.now()) / len(self._events)
            period = max(_SHORTEST, round(missing * 1e9))
        try:
            for fd in self._events:
                syscalls.perf_set_period(fd, period)
        except OSError as error:
            raise Gone(f"partition {self._partition.path!a} was removed") from error

    def _heard(self) -> None:
        if self._target is None:
            return
        try:
            if self.now() < self._target:
                self._set()
                return
        except LimitsError as error:
            log.debug("%s: %s", self._partition, error)  # its removal is told by who watches for it
            return
        self._ring()

    def _cpus_changed(self) -> None:
        """An event ends when its CPU goes offline, and a CPU that comes has none."""
        self._close_events()
        try:
            self._open()
            self._set()
        except (LimitsError, Refused) as error:
            log.warning("the CPU time of %s is not heard: %s", self._partition, error)
        self._heard()  # what was consumed meanwhile


def _directory(partition: Partition) -> str:
    hierarchy = cgroups.unified()
    assert hierarchy is not None, "counted there"
    return hierarchy.directory(partition.path)


class CgroupClockSource:
    """Hears `cputime` and `cpu` of a partition, and of each; bounds as CpuTimerSource, and 1 ms for each CPU."""

    name: ClassVar[str] = "cgroup-clock"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[str] = "context switches into and out of the partition become slower"

    def __init__(
        self, reactor: Reactor, edges: Edges, online: Cpus, removals: Removals, each: EachPartition
    ) -> None:
        self._reactor = reactor
        self._edges = edges
        self._online = online
        self._removals = removals
        self._each = each

    def missing(self) -> str | None:
        """None where an event can be opened, for the root of the unified hierarchy."""
        hierarchy = cgroups.unified()
        if hierarchy is None:
            return "no unified hierarchy is mounted"
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(self._online.watch(lambda: None))
                directory = os.open(hierarchy.mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                undo.callback(os.close, directory)
                fd = syscalls.perf_cgroup_clock(directory, cpus.online()[0], _NEVER)
                undo.callback(os.close, fd)
                syscalls.perf_unmap(syscalls.perf_map(fd))
        except OSError as error:
            return (
                f"perf_event_open: {error.strerror}; needs CONFIG_CGROUP_PERF, "
                "and CAP_PERFMON or kernel.perf_event_paranoid <= 0"
            )
        except Refused as refusal:
            return str(refusal)
        return None

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """`cpu` and `cputime`, of one partition or of each."""
        return resource.name in NAMES and isinstance(target, Partitions if each else Partition)

    def arm(self, want: Want, listener: Listener) -> Armed:
        """Open the clock.

        Raises:
            Refused: the condition is not one of growth, the kernel allows no (more) events, or the CPU time is
                not counted in the unified hierarchy.
            Gone: the partition was removed.
        """
        refuse_unheard(want)
        if want.each:
            return self._each.arm(self, want, listener)
        armed = Metered(
            self.name, self._reactor, want, listener, self._open_clock, parallel=float(os.cpu_count() or 1)
        )
        return armed.begin(lambda armed: self._follow(want, armed))

    def _open_clock(self, member: Measured, ring: Callback) -> Clock:
        assert isinstance(member, Partition)
        return CgroupClock(self._edges, self._online, member, ring)

    def _follow(self, want: Want, armed: Metered) -> Callback:
        partition = want.target
        assert isinstance(partition, Partition)
        with contextlib.ExitStack() as undo:
            undo.callback(self._removals.watch(partition, lambda: armed.ended(partition)))
            armed.add(partition)
            return undo.pop_all().close
