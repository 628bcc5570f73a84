"""Pressure: the kernel's triggers on stall time.

A trigger is a pressure file opened, written to and polled for POLLPRI; see Documentation/accounting/psi.rst.
Without CAP_SYS_RESOURCE the kernel takes only windows that are multiples of 2 s, and looks every 2 s.
"""

import contextlib
import math
import os
import select
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from limitfs.errors import LimitsError
from limitfs.hearing.eachpartition import EachPartition
from limitfs.hearing.edges import Edges
from limitfs.hearing.reactor import Reactor, Timer
from limitfs.hearing.source import Armed, Guarantee, Listener, Refused, Want
from limitfs.hearing.window import RateWindow
from limitfs.resources.model import Measured, Partition, Partitions, Resource, System, Target
from limitfs.resources.pressure import CpuPressure, IoPressure, MemoryPressure, Pressure

Callback = Callable[[], None]

LONGEST = 10.0
"""Seconds: the longest window of a trigger."""

SHORTEST = 0.5
"""Seconds: the shortest."""

_UNPRIVILEGED_US = 2_000_000

LOOKS_IN_ALARM = 4
"""Per window, until the pressure is clear again."""


class PsiTrigger:
    """One trigger.

    Args:
        edges: where it is waited for.
        path: of the pressure file.
        kind: "some" or "full".
        stall_us: microseconds of stall at which it fires.
        window_us: microseconds in which they must come.
        callback: called when it fired, at most once per window, and when it `failed`.

    Raises:
        Refused: the kernel does not take it; the message says why.
    """

    def __init__(
        self, edges: Edges, path: str, kind: str, stall_us: int, window_us: int, callback: Callback
    ) -> None:
        self._undo = contextlib.ExitStack()
        try:
            self._fd = _open(path, kind, stall_us, window_us)
            self._undo.callback(edges.slowly.call, partial(os.close, self._fd))
            edges.add(self._fd, callback, select.EPOLLPRI)
            self._undo.callback(edges.remove, self._fd)
        except BaseException:
            self._undo.close()
            raise

    @property
    def failed(self) -> bool:
        """Whether what it watches is no more (a cgroup that was removed)."""
        poll = select.poll()
        poll.register(self._fd, 0)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Free it; may be called twice."""
        self._undo.close()


def _open(path: str, kind: str, stall_us: int, window_us: int) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    try:
        os.write(fd, f"{kind} {stall_us} {window_us}\0".encode())
    except OSError as error:
        os.close(fd)
        reason = f"{path}: {kind} {stall_us} {window_us}: {error.strerror}"
        if window_us % _UNPRIVILEGED_US:
            reason += " (without CAP_SYS_RESOURCE the window must be a multiple of 2 s)"
        raise Refused(reason) from error
    return fd


class Pressed:
    """One pressure at work: asleep until the trigger fires, then looking until it is clear again."""

    source = "psi"
    guarantee = Guarantee.EXACT
    period: float | None = None

    def __init__(self, reactor: Reactor, edges: Edges, want: Want, listener: Listener) -> None:
        assert isinstance(want.resource, Pressure)
        assert isinstance(want.target, System | Partition)
        self._reactor = reactor
        self._want = want
        self._listener = listener
        self._target: Measured = want.target
        self._length = want.condition.per or want.resource.window
        self._level = want.levels(want.target)[0]
        self._window = RateWindow(self._length, parallel=1.0)
        self._timer: Timer | None = None
        self._last_fired = 0.0
        self._disarmed = False
        # More than this in a longer window means as much in a window of this length within it.
        length = min(self._length, LONGEST)
        self._trigger = PsiTrigger(
            edges, want.resource.file(want.target), "some", *_microseconds(self._level, length), self._fired
        )
        try:
            self._first_look()
        except BaseException:
            self.disarm()
            raise

    def disarm(self) -> None:
        """Stop, and free the trigger."""
        self._disarmed = True
        self._trigger.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _first_look(self) -> None:
        resource, now = self._want.resource, self._reactor.now()
        if self._length == resource.window:
            # The kernel's own average over that time: what is pressed already is heard at once.
            before = resource.usage(self._target) / 100 * self._length
            self._window.add(now - self._length, resource.counter(self._target) - before)
        if self._want.condition.beyond(self._read(), self._level):
            self._last_fired = now
            self._look_again()

    def _fired(self) -> None:
        if self._disarmed:
            return
        if self._trigger.failed:
            self.disarm()
            self._listener.gone(self._target)
            return
        self._last_fired = self._reactor.now()
        if self._timer is not None:
            return  # we are looking anyway
        if self._length <= LONGEST:
            self._trust_the_kernel()
        else:
            self._read()
        self._look_again()

    def _trust_the_kernel(self) -> None:
        """Report at least the level: the kernel saw it, while we did not look and cannot know more."""
        now, total = self._last_fired, self._want.resource.counter(self._target)
        self._window.add(now, total)
        # Of "some stall >= the level" it says yes; a little more, so that "> level" rings too.
        value = max(math.nextafter(self._level, math.inf), self._window.percent(cautious=False))
        self._window = RateWindow(self._length, parallel=1.0)
        self._window.add(now - self._length, total - value / 100 * self._length)
        self._window.add(now, total)
        self._listener.reading(self._target, value)

    def _look_again(self) -> None:
        if not self._disarmed:
            when = self._reactor.now() + self._length / LOOKS_IN_ALARM
            self._timer = self._reactor.call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        try:
            value = self._read()
            level, clear = self._want.levels(self._target)
        except LimitsError:
            return
        quiet = self._reactor.now() - self._last_fired > self._length
        if not (quiet and self._want.condition.cleared(value, level, clear)):
            self._look_again()

    def _read(self) -> float:
        self._window.add(self._reactor.now(), self._want.resource.counter(self._target))
        value = self._window.percent(cautious=False)
        self._listener.reading(self._target, value)
        return value


def _microseconds(level: float, window: float) -> tuple[int, int]:
    """Stall and window of a trigger, for a level in percent."""
    stall = round(level / 100 * window * 1e6)
    length = round(window * 1e6)
    if window < SHORTEST:
        raise Refused(f"a trigger's window is {SHORTEST} s at least")
    if not 0 < stall <= length:
        raise Refused("a trigger's stall is more than nothing, and at most its window")
    return stall, length


class PsiSource:
    """Hears the pressures of the machine, of a partition and of each rise."""

    name: ClassVar[str] = "psi"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[str] = "the kernel looks ten times per window while something stalls"

    def __init__(self, reactor: Reactor, edges: Edges, each: EachPartition) -> None:
        self._reactor = reactor
        self._edges = edges
        self._each = each

    def missing(self) -> str | None:
        """None where a trigger with the default window is taken for some pressure."""
        reasons = []
        for resource in (CpuPressure, IoPressure, MemoryPressure):
            try:
                os.close(_open(resource.path, "some", 9_000_000, 10_000_000))
            except Refused as refusal:
                reasons.append(str(refusal))
            else:
                return None
        return reasons[0]

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """A pressure of the machine, of one partition or of each."""
        return isinstance(resource, Pressure) and isinstance(target, Partitions if each else System | Partition)

    def arm(self, want: Want, listener: Listener) -> Armed:
        """Write the trigger.

        Raises:
            Refused: the condition is not one of growth, or the kernel does not take such a trigger.
        """
        if not want.condition.upward:
            raise Refused("a trigger tells of rising pressure only")
        if want.each:
            return self._each.arm(self, want, listener)
        return Pressed(self._reactor, self._edges, want, listener)
