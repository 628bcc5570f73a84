"""Calls into the daemon's own mount.

A thread that calls into a mount waits for the answer, not to be killed once the daemon has taken the request; it
is freed when the last descriptor of that /dev/fuse is closed. A thread of the daemon itself shares its
descriptors: when the daemon is killed at that moment, the thread would keep /dev/fuse open by waiting for it, and
every hook with it, for ever. So such calls are made by a thread with a table of descriptors of its own, in which
there is only one, to tell that a call is done. See unshare(2), CLONE_FILES.
"""

import ctypes
import logging
import os
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import trio

log = logging.getLogger(__name__)

_CLONE_FILES = 0x400
_libc = ctypes.CDLL(None, use_errno=True)


class Caller:
    """A thread that calls into our own mount, for one task; it ends with the `with` block.

    What it is given to call must open nothing that is used elsewhere, log nothing, and raise nothing: it has no
    descriptors to do so with.
    """

    def __init__(self) -> None:
        self._done = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._alone = threading.Event()
        self._refused: OSError | None = None
        # As a daemon thread: one that waits for the mount holds up nobody.
        threading.Thread(target=self._run, name="limitfs-caller", daemon=True).start()
        # Our eventfd must be its eventfd.
        self._alone.wait()
        if self._refused is not None:
            log.warning(
                "calls into the mount share our descriptors (%s): after a SIGKILL it may have to be aborted",
                self._refused.strerror,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.put(None)
        # One that is shared may be written to yet, and its number must be nobody else's.
        if self._refused is None:
            os.close(self._done)

    async def call(self, what: Callable[[], None]) -> None:
        """Call `what` there, and return when that has returned. Of a cancelled one nobody learns the end."""
        self._calls.put(what)
        await trio.lowlevel.wait_readable(self._done)
        os.eventfd_read(self._done)

    def _run(self) -> None:
        try:
            _keep_only(self._done)
        except OSError as error:
            self._refused = error
        self._alone.set()
        while (what := self._calls.get()) is not None:
            what()
            os.eventfd_write(self._done, 1)


def _keep_only(fd: int) -> None:
    """Give this thread a table of its own, with no descriptor but one. Raises OSError."""
    if _libc.unshare(_CLONE_FILES) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.closerange(0, fd)
    # Not all numbers that there are: without close_range(2) each would be tried.
    os.closerange(fd + 1, max(int(name) for name in os.listdir("/proc/thread-self/fd")) + 1)
