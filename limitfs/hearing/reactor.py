"""One epoll descriptor and one heap of timers, driven by one trio task.

Sources register descriptors and timers here and are called back from the event loop. With nothing registered
the loop sleeps for good: no tick. Callbacks run between awaits, so they are atomic with regard to each other
and to the request handlers; they must not block. See epoll(7).
"""

import heapq
import itertools
import logging
import math
import select
import time
from collections.abc import Callable

import trio

log = logging.getLogger(__name__)

Callback = Callable[[], None]


class Timer:
    """A call that is due at `when` (CLOCK_MONOTONIC seconds) unless cancelled."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Forget the call; harmless when it was made already."""
        self.callback = None


class Reactor:
    """Calls back when a descriptor is readable or a time has come.

    Args:
        clock: seconds, monotonic; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self.wakeups = 0
        self._epoll = select.epoll()
        self._readers: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._waiting: trio.CancelScope | None = None

    def add_reader(self, fd: int, callback: Callback, events: int = select.EPOLLIN) -> None:
        """Call `callback` whenever `fd` is ready (level-triggered)."""
        self._epoll.register(fd, events)
        self._readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        """Forget `fd`; call this before closing it."""
        if self._readers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_at(self, when: float, callback: Callback) -> Timer:
        """Call `callback` once at `when`, or soon after."""
        timer = Timer(when, callback)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        if self._waiting is not None:
            self._waiting.deadline = self._trio_deadline()
        return timer

    def next_time(self) -> float:
        """When the next timer is due; infinity where there is none."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else math.inf

    def pump(self, timeout: float = 0) -> None:
        """Make every call that is due, having waited up to `timeout` seconds for the first (for tests)."""
        wait = min(timeout, max(0.0, self.next_time() - self.now()))
        self._dispatch(self._epoll.poll(wait))

    async def run(self) -> None:
        """Serve for ever."""
        while True:
            with trio.CancelScope(deadline=self._trio_deadline()) as self._waiting:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            self._waiting = None
            self.wakeups += 1
            self._dispatch(self._epoll.poll(0))
            await trio.lowlevel.cancel_shielded_checkpoint()

    def close(self) -> None:
        """Close the epoll descriptor; what was registered stays open."""
        self._epoll.close()

    def _trio_deadline(self) -> float:
        return trio.current_time() + max(0.0, self.next_time() - self.now())

    def _dispatch(self, ready: list[tuple[int, int]]) -> None:
        for fd, _events in ready:
            callback = self._readers.get(fd)
            if callback is not None:
                self._call(callback)
        now = self.now()
        while self.next_time() <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                self._call(callback)

    def _call(self, callback: Callback) -> None:
        # One broken source must not silence the others.
        try:
            callback()
        except Exception:
            log.exception("a source failed")
