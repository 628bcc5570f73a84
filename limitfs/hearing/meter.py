"""From a clock of CPU seconds that can wake us to readings of `cputime` and `cpu`.

Which clock that is (a POSIX CPU timer of a process, a perf event of a thread) is the affair of the sources. A
meter sets it so that an idle member costs nothing: it rings after so much has been consumed, never because
time went by. Only while a rate is in alarm, the meter looks at intervals, to hear the end of it.
"""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from limitfs.errors import Gone, LimitsError
from limitfs.hearing.reactor import Reactor, Timer
from limitfs.hearing.source import Guarantee, Listener, Refused, Want
from limitfs.hearing.window import RateWindow
from limitfs.resources.model import Measured

log = logging.getLogger(__name__)

Callback = Callable[[], None]

NAMES = frozenset({"cpu", "cputime"})
"""The resources that are metered."""

LOOKS_IN_ALARM = 4
"""Per window, until the rate is clear again."""

SHORTEST_PERIOD = 0.05
"""Seconds between two looks in alarm, however short the window."""

_SOONEST = 0.0001
"""CPU seconds ahead that a clock is set at least."""


class Clock(Protocol):
    """The CPU time of one process or thread."""

    def now(self) -> float:
        """Seconds consumed so far. Raises Gone."""

    def ring_at(self, seconds: float) -> None:
        """Call back when so much has been consumed in all, or soon after; replaces what was set. Raises Gone."""

    def rest(self) -> None:
        """Do not call back until set again. Raises Gone."""

    def close(self) -> None:
        """Free it; may be called twice."""


OpenClock = Callable[[Measured, Callback], Clock]
"""Opens the clock of a member, which makes the call when it rings; raises Gone, Refused."""


class Meter(ABC):
    """One member that is metered."""

    def __init__(self, want: Want, listener: Listener, member: Measured, open_clock: OpenClock) -> None:
        self.member = member
        self.closed = False
        self._want = want
        self._listener = listener
        self._clock = open_clock(member, self._ring)

    def start(self) -> None:
        """Report a first reading, and set the clock. Raises as `Clock.now`, `Want.levels`."""
        self._look()

    def finish(self) -> None:
        """The member has ended: report its last value if the kernel still knows it, then its end."""
        if self.closed:
            return
        with contextlib.suppress(LimitsError):
            self._last_look()
        if not self.closed:
            self.close()
            self._listener.gone(self.member)

    def close(self) -> None:
        """Free the clock; may be called twice."""
        self.closed = True
        self._clock.close()

    def _ring(self) -> None:
        if self.closed:
            return
        try:
            self._look()
        except LimitsError as error:
            # Its end, if it is that, is told by who watches for it; a limit that is no more cannot be passed.
            log.debug("%s of %s: %s", self._want.resource.name, self.member, error)

    @abstractmethod
    def _look(self) -> None:
        """Read, report, and set the clock anew."""

    @abstractmethod
    def _last_look(self) -> None:
        """Read and report."""


class TotalMeter(Meter):
    """CPU seconds consumed so far: rings once, at the level."""

    def _look(self) -> None:
        total = self._clock.now()
        self._listener.reading(self.member, total)
        if self.closed:
            return  # the listener had enough (once)
        level, _clear = self._want.levels(self.member)
        if self._want.condition.beyond(total, level):
            self._clock.rest()
        else:
            self._clock.ring_at(max(level, total + _SOONEST))

    def _last_look(self) -> None:
        self._listener.reading(self.member, self._clock.now())


class RateMeter(Meter):
    """CPU use in percent of one CPU over a sliding window.

    Args:
        parallel: seconds that can be consumed in one second.
    """

    def __init__(
        self,
        want: Want,
        listener: Listener,
        member: Measured,
        open_clock: OpenClock,
        reactor: Reactor,
        parallel: float,
    ) -> None:
        super().__init__(want, listener, member, open_clock)
        self._reactor = reactor
        self._length = want.condition.per or want.resource.window
        self._window = RateWindow(self._length, parallel)
        self._timer: Timer | None = None

    def close(self) -> None:
        super().close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        if self._timer is not None:
            return  # a signal that was on its way; the end of the alarm is waited for already
        value = self._read(cautious=True)
        if self.closed:
            return
        level, _clear = self._want.levels(self.member)
        if self._want.condition.beyond(value, level):
            self._clock.rest()
            self._look_again()
        else:
            self._clock.ring_at(self._window.next_look(level))

    def _last_look(self) -> None:
        self._read(cautious=True)

    def _look_again(self) -> None:
        period = max(self._length / LOOKS_IN_ALARM, SHORTEST_PERIOD)
        self._timer = self._reactor.call_at(self._reactor.now() + period, self._look_for_clear)

    def _look_for_clear(self) -> None:
        self._timer = None
        try:
            value = self._read(cautious=False)
            level, clear = self._want.levels(self.member)
        except LimitsError as error:
            log.debug("%s of %s: %s", self._want.resource.name, self.member, error)
            return
        if self.closed:
            return
        if not self._want.condition.cleared(value, level, clear):
            self._look_again()
            return
        with contextlib.suppress(Gone):
            self._clock.ring_at(self._window.next_look(level))

    def _read(self, cautious: bool) -> float:
        self._window.add(self._reactor.now(), self._clock.now())
        value = self._window.percent(cautious)
        self._listener.reading(self.member, value)
        return value


def refuse_unheard(want: Want) -> None:
    """Raise Refused for conditions that no growth can meet: `<`, `<=`, `change`."""
    if not want.condition.upward:
        raise Refused("a clock that rings when something is consumed cannot tell of less, nor of every change")


class Metered:
    """A want at work: the meters of its members.

    Attributes:
        period: of looking who belongs to the target, where nothing tells that.
    """

    def __init__(
        self, source: str, reactor: Reactor, want: Want, listener: Listener, open_clock: OpenClock, parallel: float
    ) -> None:
        self.period: float | None = None
        self.source = source
        self._reactor = reactor
        self._want = want
        self._listener = listener
        self._open_clock = open_clock
        self._parallel = parallel
        self._meters: dict[Measured, Meter] = {}
        self._cleanup = contextlib.ExitStack()
        self._started = False

    def begin(self, follow: Callable[["Metered"], Callback]) -> "Metered":
        """Start; `follow` has members born and ended, and returns what stops that. Raises Gone, Refused."""
        try:
            self._cleanup.callback(follow(self))
        except BaseException:
            self.disarm()
            raise
        self._started = True
        return self

    @property
    def guarantee(self) -> Guarantee:
        """See `Armed.guarantee`."""
        return Guarantee.EXACT if self.period is None else Guarantee.SAMPLED

    def disarm(self) -> None:
        """Stop, and free all clocks."""
        self._cleanup.close()
        meters, self._meters = self._meters, {}
        for meter in meters.values():
            meter.close()

    def add(self, member: Measured) -> None:
        """Meter `member`, the target itself. Raises Gone, Refused, and as `Want.levels`."""
        meter = self._meters[member] = self._new(member)
        meter.start()

    # Members of a collection

    def born(self, member: Measured) -> None:
        """Meter `member`, one of many. Raises Refused, but only while arming."""
        try:
            self.add(member)
        except LimitsError:
            self._drop(member)  # it ended, or its limit admits no such level
        except Refused as refusal:
            self._drop(member)
            if not self._started:
                raise
            log.warning("%s: %s is not heard: %s", self.source, member, refusal)
            self._listener.lost(1)

    def ended(self, member: Measured) -> None:
        """`member` has ended."""
        meter = self._meters.pop(member, None)
        if meter is not None:
            meter.finish()

    def lost(self, count: int) -> None:
        """Births or deaths were missed; those who are there now are told next."""
        self._listener.lost(count)

    def _drop(self, member: Measured) -> None:
        meter = self._meters.pop(member, None)
        if meter is not None:
            meter.close()

    def _new(self, member: Measured) -> Meter:
        if self._want.resource.rate:
            return RateMeter(self._want, self._listener, member, self._open_clock, self._reactor, self._parallel)
        return TotalMeter(self._want, self._listener, member, self._open_clock)
