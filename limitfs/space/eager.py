"""Taking the next request without going round the event loop, when it is there already.

pyfuse3 waits for its descriptor by `trio.lowlevel.wait_readable`, which costs an epoll_ctl(2), an epoll_wait(2)
and a turn of the scheduler for every request: more than most requests themselves. Clients come with several
requests in a row (look up, open, read, close), so the next is usually there when one was answered, or a few
microseconds later. pyfuse3 lets its trio be replaced (its asyncio support does so); ours looks before it waits.

pyfuse3 keeps one task in reserve, which takes over when a handler waits. The lock between the two would cost a
turn of the scheduler for each request too; ours costs none where it is free.

Nothing is looked for while nobody asks: after `PATIENCE` without a request the daemon sleeps in trio as before.
"""

import select
import time
from types import TracebackType
from typing import Any

import pyfuse3
import trio

PATIENCE = 30e-6
"""Seconds that are spent looking for the next request before sleeping."""
IN_A_ROW = 16
"""Requests after which every other task gets its turn."""


class _Lowlevel:
    """`trio.lowlevel`, with a `wait_readable` that looks first."""

    def __init__(self) -> None:
        self._poll: dict[int, select.poll] = {}
        self._row = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Return at once when `fd` is readable now or very soon, else wait as trio does."""
        self._row += 1
        if self._row < IN_A_ROW and self._soon(fd):
            return
        self._row = 0
        await trio.lowlevel.wait_readable(fd)

    def _soon(self, fd: int) -> bool:
        poll = self._poll.get(fd)
        if poll is None:
            poll = self._poll[fd] = select.poll()
            poll.register(fd, select.POLLIN)
        until = time.perf_counter() + PATIENCE
        while not poll.poll(0):
            if time.perf_counter() > until:
                return False
        return True


class _Lock:
    """`trio.Lock`, that is not handed over: who is quickest has it, which is the task that just let it go.

    With fairness each request would be taken by the other task, after a turn of the scheduler.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
        self._held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = False
        self._waiting.unpark()


class _Trio:
    """`trio`, with the above."""

    Lock = _Lock

    def __init__(self) -> None:
        self.lowlevel = _Lowlevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def install() -> None:
    """Have pyfuse3 look before it waits."""
    vars(pyfuse3)["trio"] = _Trio()
