"""CPU time, as a rate and as a sum."""

import math
import os
import resource
import time
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from limitfs.errors import Gone
from limitfs.resources import cgroups, limits, procfs
from limitfs.resources.cgroups import Knob
from limitfs.resources.model import Level, Limit, Measured, Partition, Process, Resource, System, Thread, Unit
from limitfs.resources.recent import Recent

_LEVELS = frozenset({Level.THREAD, Level.PROCESS, Level.PARTITION, Level.SYSTEM})
_STAT = Knob("cpuacct", "cpu.stat", None)
_CPUACCT = Knob("cpuacct", None, "cpuacct.usage")
_MAX = Knob("cpu", "cpu.max", None)
_QUOTA = Knob("cpu", None, "cpu.cfs_quota_us")
_PERIOD = Knob("cpu", None, "cpu.cfs_period_us")

_SHORTEST = 2 / procfs.TICKS
"""Seconds; over less, a counter that moves in ticks shows 0 or several hundred percent."""


def process_clock(pid: int) -> int:
    """The id of another process' CPU clock for clock_gettime(2) and timer_create(2).

    What clock_getcpuclockid(3) computes; Python has only the one for threads. 2 is CPUCLOCK_SCHED.
    """
    return (~pid << 3) | 2


def consumed(target: Measured) -> float:
    """CPU seconds that `target` has used so far, user and system.

    A process: its CPU clock, to the nanosecond, threads that ended included. A thread: what the scheduler
    accounted up to its last tick. The machine: all CPUs' time that was not idle, in ticks. A zombie: all that it
    used. A partition: cpu.stat, or cpuacct.usage of version 1, with those that ended in it or left it.

    Raises:
        Gone: the process or thread ended, the partition was removed.
    """
    match target:
        case Partition():
            return _consumed_in_partition(target)
        case System():
            return procfs.cpu_time()
        case Process(pid=pid):
            try:
                clock = time.clock_gettime(process_clock(pid))
            except OSError:  # gone, or a kernel without this clock: stat knows which
                return _ticks(procfs.verify(target))
            procfs.verify(target)
            return clock
        case Thread():
            return _consumed_by_thread(target)


def counted_in_unified(target: Partition) -> bool:
    """Whether the CPU time of a partition is that of its processes in the unified hierarchy."""
    return not cgroups.has(target, _CPUACCT) and cgroups.has(target, _STAT)


def _consumed_in_partition(target: Partition) -> float:
    if cgroups.has(target, _CPUACCT):
        return cgroups.number(target, _CPUACCT) / 1e9
    return cgroups.field(target, _STAT, b"usage_usec") / 1e6


def _consumed_by_thread(target: Thread) -> float:
    try:
        ran = procfs.runtime(target.pid, target.tid)
    except Gone:  # gone, or a kernel without scheduler statistics: stat knows which
        ran = 0
    now = procfs.verify(target)
    return ran / 1e9 if ran else _ticks(now)


def _ticks(now: procfs.Stat) -> float:
    return (now.utime + now.stime) / procfs.TICKS


class _Sample(NamedTuple):
    time: float
    counter: float
    rate: float


class Cpu(Resource):
    """CPU use: percent of one CPU, so a process with two busy threads uses 200.

    Args:
        clock: seconds since boot.
    """

    name = "cpu"
    unit = Unit.PERCENT
    levels = _LEVELS
    help = "CPU use, percent of one CPU"
    rate = True
    window = 1.0

    def __init__(self, clock: Callable[[], float] = procfs.uptime) -> None:
        self._clock = clock
        self._last: Recent[Measured, _Sample] = Recent()

    def usage(self, target: Measured) -> float:
        """Percent of one CPU since this was last asked about `target`; at first, since it started.

        Asked again within two clock ticks, it gives the same answer again.
        """
        try:
            counter = self.counter(target)
        except Gone:
            self._last.drop(target)
            raise
        now = self._clock()
        last = self._last.get(target)
        if last is None:
            rate = counter / max(now - _start(target), _SHORTEST)
        elif now - last.time < _SHORTEST:
            return last.rate
        else:
            rate = max(counter - last.counter, 0.0) / (now - last.time)
        self._last.put(target, _Sample(now, counter, 100 * rate))
        return 100 * rate

    def limit(self, target: Measured) -> Limit:
        """No thread gets more than one CPU, nothing more than all that are online; a partition: cpu.max."""
        limits.check(self, target)
        if isinstance(target, Partition):
            most = _quota(target)
            return Limit(most, most)
        most = 100.0 if isinstance(target, Thread) else 100.0 * (os.cpu_count() or 1)
        return Limit(most, most)

    def whole(self, target: Measured) -> float:
        """100 % is one CPU, whatever the target."""
        limits.check(self, target)
        return 100.0

    def kept(self, target: Partition) -> bool:
        return _kept(target)

    def store(self, target: Partition, limit: float, user: int) -> None:
        """cpu.max: so much of one CPU; the period stays."""
        if cgroups.has(target, _QUOTA):
            period = cgroups.number(target, _PERIOD)
            limits.put(target, _QUOTA, "-1" if math.isinf(limit) else f"{limit / 100 * period:.0f}", user)
        else:
            limits.put(target, _MAX, "max" if math.isinf(limit) else f"{limit / 100 * _period(target):.0f}", user)

    def counter(self, target: Measured) -> float:
        return consumed(target)


def _start(target: Measured) -> float:
    match target:
        case System():
            return 0.0
        case Partition():
            return max(0.0, cgroups.born(target) - time.time() + procfs.uptime())
    return target.start / procfs.TICKS


def _kept(target: Partition) -> bool:
    return cgroups.has(target, _CPUACCT) or cgroups.has(target, _STAT)


def _quota(target: Partition) -> float:
    """Percent of one CPU that a partition may use."""
    if cgroups.has(target, _QUOTA):
        return 100 * cgroups.number(target, _QUOTA) / cgroups.number(target, _PERIOD)
    if not cgroups.has(target, _MAX):
        return math.inf
    quota = cgroups.read(target, _MAX).split()[0]
    return math.inf if quota == b"max" else 100 * int(quota) / _period(target)


def _period(target: Partition) -> int:
    """Microseconds over which the kernel holds the quota."""
    return int(cgroups.read(target, _MAX).split()[1])


class Cputime(Resource):
    """CPU seconds used so far. Passing the soft RLIMIT_CPU brings SIGXCPU, the hard one SIGKILL; getrlimit(2)."""

    name = "cputime"
    unit = Unit.SECONDS
    levels = _LEVELS
    help = "CPU time used so far, in seconds; limit: RLIMIT_CPU"
    rlimit: ClassVar[int | None] = resource.RLIMIT_CPU

    def kept(self, target: Partition) -> bool:
        return _kept(target)

    def usage(self, target: Measured) -> float:
        return consumed(target)

    def limit(self, target: Measured) -> Limit:
        return limits.enforced(self, target)
