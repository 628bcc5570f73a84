"""Hearing by looking, where the kernel tells nothing better.

Every sampled want has a period of its own, between `SHORTEST` and `LONGEST`: half the time that the value
would need to reach its level at its present speed, short while it is near, and half as long again each time
nothing changed. Due times are rounded up to a common grid, so that many wants wake the daemon together.

Where the kernel keeps a high-water mark (VmHWM, VmPeak: proc_pid_status(5)), a spike between two samples is
still heard: the mark grew past the level. That is the guarantee "peak"; a mark that was past the level when the
watcher was armed can tell nothing below it, and then the guarantee is only "sampled".
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator
from typing import ClassVar

from limitfs.errors import Gone, LimitsError, Unsupported
from limitfs.hearing.reactor import Reactor, Timer
from limitfs.hearing.source import Guarantee, Listener, Refused, Want
from limitfs.resources import members
from limitfs.resources.model import Measured, Process, Processes, Resource, Target

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
        self.guarantee = Guarantee.PEAK if peaks else Guarantee.SAMPLED
        self._reactor = reactor
        self._want = want
        self._listener = listener
        self._timer: Timer | None = None
        self._values: dict[Target, float] = {}
        self._peaks: dict[Target, float] = {}
        self._marks: deque[tuple[float, dict[Measured, float]]] = deque()
        self._last = reactor.now()
        self._started = self._last
        self._disarmed = False
        self._look()

    def disarm(self) -> None:
        """Stop looking."""
        self._disarmed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._values.clear()
        self._peaks.clear()
        self._marks.clear()

    # One look

    def _look(self) -> None:
        self._timer = None
        now = self._reactor.now()
        try:
            period = self._report(dict(self._read(now)), max(now - self._last, 1e-6))
        except Gone:
            self._listener.gone(self._want.target)
            return
        except Unsupported:
            period = LONGEST  # what cannot be told just now (a running thread's stack) may be told later
        self._last = now
        if self._disarmed:
            return  # the listener had enough while it was told (once)
        self.period = period
        due = math.ceil((now + period) / GRID) * GRID
        self._timer = self._reactor.call_at(due, self._look)

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
                self._listener.gone(member)
        return period

    def _report_one(self, member: Target, value: float, elapsed: float) -> float:
        level, _clear = self._want.levels(member)  # type: ignore[arg-type]
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
        if self.guarantee is not Guarantee.PEAK and member not in self._peaks:
            return
        peak = self._want.resource.peak(member)  # type: ignore[arg-type]
        if peak is None:
            return
        before = self._peaks.get(member)
        self._peaks[member] = peak
        if before is None:
            if self._want.condition.beyond(peak, level) and not self._want.condition.beyond(value, level):
                self.guarantee = Guarantee.SAMPLED
        elif peak > before and not self._want.condition.beyond(value, level):
            self._listener.reading(member, peak)

    # Rates

    def _window(self) -> float:
        if not self._want.resource.rate:
            return 0.0
        return self._want.condition.per or self._want.resource.window

    def _rates(self, now: float) -> Iterator[tuple[Target, float]]:
        """Percent over the window that ends now, of each member or of all together."""
        want, window = self._want, self._window()
        counters = members.counters(want.resource, want.target)
        marks = self._marks
        marks.append((now, counters))
        while len(marks) > 2 and marks[1][0] <= now - window:
            marks.popleft()
        if now - self._started < window and not want.condition.upward:
            return  # "less than" cannot be known before a whole window has passed
        begun, first = marks[0]
        # A member that is new since then counts from zero.
        grown = {member: max(0.0, counter - first.get(member, 0.0)) for member, counter in counters.items()}
        span = max(window, now - begun) / 100
        if want.each:
            yield from ((member, seconds / span) for member, seconds in grown.items())
        else:
            yield want.target, sum(grown.values()) / span


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
        """Processes, one or each, where the resource has a mark; a sum has none."""
        kept = type(resource).peak is not Resource.peak
        return kept and isinstance(target, Processes if each else Process)

    def arm(self, want: Want, listener: Listener) -> Sampled:
        """As `SamplingSource.arm`; a condition that looks for low values or any change has no use of marks.

        Raises:
            Refused: such a condition.
        """
        if not want.condition.upward or want.condition.amount is None:
            raise Refused("a high-water mark tells of high values only")
        return Sampled(self.name, self._reactor, want, listener, peaks=True)
