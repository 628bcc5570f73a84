"""Calls for which the kernel takes milliseconds: it waits for all CPUs before it returns (synchronize_rcu).

One is nothing to wait for. Hundreds of them, for every partition of a machine, would stop the daemon for seconds.
"""

from collections import deque
from collections.abc import Callable

from limitfs.hearing.reactor import Reactor

Callback = Callable[[], None]


class Slowly:
    """Makes the first call at once, and the others one in each turn of the event loop, in their order."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._waiting: deque[Callback] = deque()
        self._resting = False

    def call(self, callback: Callback) -> None:
        """Call it, now or soon; what it raises goes to the caller only in the first case."""
        if self._resting:
            self._waiting.append(callback)
            return
        self._resting = True
        self._reactor.call_at(self._reactor.now(), self._next)
        callback()

    def _next(self) -> None:
        self._resting = False
        if self._waiting:
            self.call(self._waiting.popleft())
