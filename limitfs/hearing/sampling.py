"""Hearing by looking, where the kernel tells nothing better.

Every sampled want has a period of its own, between `SHORTEST` and `LONGEST`: half the time that the value
would need to reach its level at its present speed, short while it is near, and half as long again each time
nothing changed. Due times are rounded up to a common grid, so that many wants wake the daemon together.

Where the kernel keeps a high-water mark (VmHWM, VmPeak: proc_pid_status(5)), a spike between two samples is
still heard: the mark grew past the level. That is the guarantee "peak"; a mark that was past the level when the
watcher was armed can tell nothing below it, and then the guarantee is only "sampled".
"""

import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import ClassVar

from limitfs.errors import Gone, LimitsError, Unsupported
from limitfs.hearing.reactor import Reactor, Timer
from limitfs.hearing.source import Guarantee, Listener, Refused, Want
from limitfs.resources import members, procfs
from limitfs.resources.model import Measured, Partition, Partitions, Process, Processes, Resource, Target, Thread

log = logging.getLogger(__name__)

SHORTEST = 0.1
"""Seconds; a level that is about to be reached is looked at this often."""
LONGEST = 5.0
"""Seconds; a value that does not move is looked at this often."""
GRID = 0.05
"""Seconds; samples are due at multiples of this."""
NEAR = 0.1
"""A value within this share of its level is looked at once a second or more often."""


class Sampled:
    """One want, looked at again and again."""

    def __init__(self, source: str, reactor: Reactor, want: Want, listener: Listener, peaks: bool) -> None:
        self.source = source
        self.period: float | None = SHORTEST
        self._reactor = reactor
        self._want = want
        self._listener = listener
        self._timer: Timer | None = None
        self._values: dict[Target, float] = {}
        self._marked = peaks
        self._peaks: dict[Target, float] = {}
        # Members whose mark tells nothing: it was past the level before, or the kernel keeps none.
        self._blind: set[Target] = set()
        self._growth = _Growth(self._window())
        self._last = reactor.now()
        self._started = self._last
        # The last look, on the clock of births; 0: there was none.
        self._looked = 0.0
        self._disarmed = False
        self._failing = False
        self._look()

    @property
    def guarantee(self) -> Guarantee:
        """What the marks are good for, of all members."""
        return Guarantee.PEAK if self._marked and not self._blind else Guarantee.SAMPLED

    def disarm(self) -> None:
        """Stop looking."""
        self._disarmed = True
        self._stop_timer()
        self._values.clear()
        self._peaks.clear()

    def look_now(self) -> None:
        """Look at once: somebody was told that something happened."""
        if not self._disarmed:
            self._stop_timer()
            self._look()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # One look

    def _look(self) -> None:
        """Raises what nobody expected; only the first time, when it can be told to who arms."""
        self._timer = None
        now, uptime = self._reactor.now(), procfs.uptime()
        try:
            period = self._report(dict(self._read(now)), max(now - self._last, 1e-6))
            self._failing = False
        except Gone:
            self._listener.gone(self._want.target)
            return
        except Unsupported:
            period = LONGEST  # what cannot be told just now (a running thread's stack) may be told later
        except Exception:
            if not self._looked:
                raise
            period = LONGEST
            self._failed()
        self._last, self._looked = now, uptime
        if self._disarmed:
            return  # the listener had enough while it was told (once)
        self.period = period
        due = math.ceil((now + period) / GRID) * GRID
        self._timer = self._reactor.call_at(due, self._look)

    def _failed(self) -> None:
        """What nobody expected must not be the end of it: say once that a look is missing, and look again."""
        if not self._failing:
            self._failing = True
            log.exception("looking at %s of %s failed", self._want.resource.name, self._want.target)
            self._listener.lost(1)

    def _read(self, now: float) -> Iterator[tuple[Target, float]]:
        want = self._want
        if want.resource.rate:
            yield from self._rates(now)
        elif want.each:
            yield from members.usages(want.resource, want.target)
        else:
            yield want.target, members.usage(want.resource, want.target)

    def _report(self, values: dict[Target, float], elapsed: float) -> float:
        """Tell the listener all `values`; return the period that they call for."""
        period = self._calm_period()
        for member, value in values.items():
            # A member that ended, or that has no limit to take a percentage of, must not silence the others.
            with contextlib.suppress(LimitsError):
                period = min(period, self._report_one(member, value, elapsed))
        for member in self._values.keys() - values.keys():
            # A rate is silent until its window is full; that is not the end of its member.
            if self._want.each and not (self._want.resource.rate and member == self._want.target):
                del self._values[member]
                self._peaks.pop(member, None)
                self._blind.discard(member)
                self._listener.gone(member)
        return period

    def _report_one(self, member: Target, value: float, elapsed: float) -> float:
        level, _clear = self._want.levels(member)
        self._report_peak(member, value, level)
        before = self._values.get(member)
        self._values[member] = value
        self._listener.reading(member, value)
        if before is None or before == value:
            return LONGEST if before is not None else SHORTEST
        distance = abs(level - value)
        soon = distance / (abs(value - before) / elapsed) / 2
        near = 1.0 if distance <= NEAR * abs(level) else LONGEST
        return max(SHORTEST, min(soon, near, LONGEST))

    def _calm_period(self) -> float:
        window = self._window()
        longest = min(LONGEST, max(window / 4, SHORTEST)) if window else LONGEST
        return min(longest, (self.period or SHORTEST) * 1.5)

    # High-water marks

    def _report_peak(self, member: Target, value: float, level: float) -> None:
        if not self._marked:
            return
        beyond, before = self._want.condition.beyond, self._peaks.get(member)
        peak = _mark(self._want.resource, member)
        if peak is None:
            self._blind.add(member)
            return
        self._peaks[member] = peak
        spiked = beyond(peak, level) and not beyond(value, level)
        if before is None and spiked and not self._is_new(member):
            self._blind.add(member)  # that was before we looked, and hides what comes
            return
        if before is None or peak < before:  # it begins anew at exec
            self._blind.discard(member)
        if spiked and peak != before:
            self._listener.reading(member, peak)

    # Rates

    def _window(self) -> float:
        if not self._want.resource.rate:
            return 0.0
        return self._want.condition.per or self._want.resource.window

    def _rates(self, now: float) -> Iterator[tuple[Target, float]]:
        """Percent over the window that ends now, of each member or of all together."""
        want, growth = self._want, self._growth
        growth.add(now, members.counters(want.resource, want.target), self._is_new)
        if now - self._started < growth.window and not want.condition.upward:
            return  # "less than" cannot be known before a whole window has passed
        if want.each:
            yield from growth.each()
        else:
            yield want.target, growth.total()

    def _is_new(self, member: Target) -> bool:
        """Whether a member that was not there at the last look has begun since; else it moved here."""
        if not self._looked:
            return False
        return not isinstance(member, Process | Thread) or (member.start + 1) / procfs.TICKS > self._looked


class _Growth:
    """How much counters have grown over a sliding window, in percent of it.

    What a member had consumed before it came is not counted, what it consumed while it was there is, also when it
    has left or ended meanwhile.
    """

    def __init__(self, window: float) -> None:
        self.window = window
        self._counters: dict[Measured, float] = {}
        self._grown: dict[Measured, float] = {}
        self._sum = 0.0
        # When, the sum, and what each had consumed since it came.
        self._marks: deque[tuple[float, float, dict[Measured, float]]] = deque()

    def add(self, now: float, counters: dict[Measured, float], is_new: Callable[[Measured], bool]) -> None:
        """Take in the counters of all members; `is_new` tells of one that began at zero since the last time."""
        grown = {}
        for member, counter in counters.items():
            before = self._counters.get(member)
            if before is None:
                before = 0.0 if is_new(member) else counter
            more = max(0.0, counter - before)
            grown[member] = self._grown.get(member, 0.0) + more
            self._sum += more
        self._counters, self._grown = counters, grown
        self._marks.append((now, self._sum, grown))
        while len(self._marks) > 2 and self._marks[1][0] <= now - self.window:
            self._marks.popleft()

    def each(self) -> Iterator[tuple[Measured, float]]:
        """Of each member."""
        first = self._marks[0][2]
        for member, seconds in self._grown.items():
            yield member, (seconds - first.get(member, 0.0)) / self._span()

    def total(self) -> float:
        """Of all together."""
        return (self._sum - self._marks[0][1]) / self._span()

    def _span(self) -> float:
        return max(self.window, self._marks[-1][0] - self._marks[0][0]) / 100


class SamplingSource:
    """The source of last resort: hears everything, between samples nothing."""

    name: ClassVar[str] = "sampled"
    guarantee: ClassVar[Guarantee] = Guarantee.SAMPLED
    cost: ClassVar[str] = "the daemon reads every 0.1 to 5 s"

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor

    def missing(self) -> str | None:
        """Nothing: /proc is all that it needs."""
        return None

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """Everything."""
        del resource, target, each
        return True

    def arm(self, want: Want, listener: Listener) -> Sampled:
        """Look at once, then again and again.

        Raises:
            Gone: the target has ended.
            Impossible: the condition cannot be held against this target's limit.
        """
        return Sampled(self.name, self._reactor, want, listener, peaks=False)


class PeakSource(SamplingSource):
    """Samples what the kernel keeps a high-water mark of; only growth beyond the mark can be told from it."""

    name: ClassVar[str] = "highwater"
    guarantee: ClassVar[Guarantee] = Guarantee.PEAK

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """Processes and partitions, one or each, where there may be a mark; a sum has none."""
        kinds = Processes | Partitions if each else Process | Partition
        return isinstance(target, kinds) and target.level in resource.peaks

    def arm(self, want: Want, listener: Listener) -> Sampled:
        """As `SamplingSource.arm`; a condition that looks for low values or any change has no use of marks.

        Raises:
            Refused: such a condition; or this kernel keeps no mark there.
        """
        if not want.condition.upward:
            raise Refused("a high-water mark tells of high values only")
        if not _any_mark(want):
            raise Refused(f"the kernel keeps no high-water mark of {want.resource.name} here")
        return Sampled(self.name, self._reactor, want, listener, peaks=True)


def _any_mark(want: Want) -> bool:
    """Whether one member has a mark, or there are none yet."""
    candidates = list(members.members(want.target)) if want.each else [want.target]
    return not candidates or any(_mark(want.resource, candidate) is not None for candidate in candidates)


def _mark(resource: Resource, member: Target) -> float | None:
    """None also where it cannot be told, or the member has ended."""
    try:
        return resource.peak(member)  # type: ignore[arg-type]
    except (Gone, Unsupported):
        return None
