"""Making a change visible to inotify.

The kernel raises inotify events only for what goes through the mount (see docs/architecture.md), so the daemon
touches its own files: utimensat(2) with a new mtime and no atime gives exactly one IN_MODIFY, on the file
and on its directory's watch, and no open or close. The call waits for our own request handlers, so it
is made by a thread that may do so (`limitfs.caller`), for one task, never by a handler.
"""

import ctypes
import logging
import os
from collections.abc import Callable
from functools import partial

import trio

from limitfs.caller import Caller

log = logging.getLogger(__name__)

Announce = Callable[[str, Callable[[], None] | None], None]
"""Has the file at a path below the mount point touched, and then something called."""

_AT_SYMLINK_NOFOLLOW = 0x100
_AT_FDCWD = -100
_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)
_TIMES = (_Timespec * 2)(_Timespec(0, _UTIME_OMIT), _Timespec(0, _UTIME_NOW))


def touch(path: str) -> int:
    """Set the mtime of `path` to now and leave its atime; gives 0 or the errno."""
    done = _libc.utimensat(_AT_FDCWD, os.fsencode(path), ctypes.byref(_TIMES), _AT_SYMLINK_NOFOLLOW)
    return 0 if done == 0 else ctypes.get_errno()


class Notifier:
    """Touches the files that were announced, each once a batch.

    Args:
        mountpoint: where the tree is mounted.
    """

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = mountpoint
        self._batch: dict[str, None] = {}
        self._then: list[Callable[[], None]] = []
        self._wake = trio.Event()

    def announce(self, path: str, then: Callable[[], None] | None = None) -> None:
        """Have the file at `path` (below the mount point) touched soon, and `then` called; never blocks."""
        self._batch[path] = None
        if then is not None:
            self._then.append(then)
        self._wake.set()

    async def run(self) -> None:
        """Serve for ever."""
        with Caller() as caller:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                batch, self._batch = self._batch, {}
                then, self._then = self._then, []
                refused: dict[str, int] = {}
                await caller.call(partial(self._touch_all, list(batch), refused))
                for path, error in refused.items():
                    # One that is no more is nobody's loss.
                    log.debug("touch %a: %s", path, os.strerror(error))
                for call in then:
                    call()

    def _touch_all(self, paths: list[str], refused: dict[str, int]) -> None:
        for path in paths:
            if error := touch(f"{self.mountpoint}/{path}"):
                refused[path] = error
