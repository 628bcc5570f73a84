"""Descriptors that tell an event once only: PSI triggers and perf events.

Their poll function takes the event away. The reactor's epoll descriptor is itself waited for by another one,
which polls through it; so the event is gone before the reactor asks (heard: none of a hundred). These
descriptors therefore have an epoll of their own, on which a thread sleeps that does nothing else and hands
over what came. There is no thread while there is no such descriptor.
"""

import os
import select
import threading
from collections import deque
from collections.abc import Callable

from limitfs.hearing import syscalls
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.slowly import Slowly

Callback = Callable[[], None]


class Edges:
    """Calls back from the reactor after every event of a descriptor.

    A callback may come once too often, when the number of a closed descriptor is used again: look, do not
    count.

    Attributes:
        slowly: for descriptors that take long to close.
    """

    def __init__(self, reactor: Reactor) -> None:
        self.slowly = Slowly(reactor)
        self._reactor = reactor
        self._callbacks: dict[int, Callback] = {}
        self._listener: _Listener | None = None

    def add(self, fd: int, callback: Callback, events: int) -> None:
        """Call `callback` after each of `events`, errors and hang-ups of `fd`."""
        if self._listener is None:
            self._listener = _Listener()
            self._reactor.add_reader(self._listener.heard, self._drain)
        self._listener.epoll.register(fd, events | select.EPOLLET)
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        """Forget `fd`; call this before closing it."""
        if self._listener is None or self._callbacks.pop(fd, None) is None:
            return
        self._listener.epoll.unregister(fd)
        if not self._callbacks:
            listener, self._listener = self._listener, None
            self._reactor.remove_reader(listener.heard)
            listener.close()

    def _drain(self) -> None:
        if self._listener is None:
            return
        for fd in self._listener.take():
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()


class _Listener:
    """The thread, its epoll descriptor, and the queue to the reactor."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.heard = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ready: deque[int] = deque()
        self.epoll.register(self._stop, select.EPOLLIN)
        self._thread = threading.Thread(target=self._listen, name="limitfs-edges", daemon=True)
        self._thread.start()

    def take(self) -> list[int]:
        """The descriptors that had an event, each once."""
        try:
            os.eventfd_read(self.heard)
        except BlockingIOError:
            return []
        ready = dict.fromkeys(self._ready.popleft() for _ in range(len(self._ready)))
        return list(ready)

    def close(self) -> None:
        """End the thread: it only ever sleeps in epoll_wait(2), so this does not wait for anything."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self.epoll.close()
        os.close(self.heard)
        os.close(self._stop)

    def _listen(self) -> None:
        syscalls.block_all_signals()
        while True:
            fds = [fd for fd, _events in self.epoll.poll()]
            if self._stop in fds:
                return
            self._ready.extend(fds)
            os.eventfd_write(self.heard, 1)
