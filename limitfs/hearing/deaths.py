"""When a process ends: one pidfd per watched process, however many want to know.

A pidfd becomes readable when the last thread of the process has exited, before anybody has waited for it: a
zombie has ended. See pidfd_open(2).
"""

import errno
import logging
import os
import select
from collections.abc import Callable

from limitfs.errors import Gone
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Refused
from limitfs.resources import procfs
from limitfs.resources.model import Process

log = logging.getLogger(__name__)

Callback = Callable[[], None]


class Death:
    """One who waits for the end of a process."""

    __slots__ = ("_callback", "_deaths", "_process")

    def __init__(self, deaths: "Deaths", process: Process, callback: Callback) -> None:
        self._deaths = deaths
        self._process = process
        self._callback: Callback | None = callback

    def cancel(self) -> None:
        """Wait no more; harmless when called twice or after the end."""
        self._callback = None
        self._deaths._forget(self._process, self)

    def _tell(self) -> None:
        callback, self._callback = self._callback, None
        if callback is None:
            return
        try:
            callback()
        except Exception:  # the others who wait must hear it all the same
            log.exception("told of the end of %s, somebody failed", self._process)


class _Watched:
    __slots__ = ("fd", "waiting")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.waiting: dict[Death, None] = {}


class Deaths:
    """The processes whose end somebody waits for."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._watched: dict[Process, _Watched] = {}

    def watch(self, process: Process, callback: Callback) -> Death:
        """Call `callback` once, from the event loop, when `process` has ended.

        Raises:
            Gone: it has ended already, or its number is now another process'.
            Refused: no descriptor is left, or the kernel has no pidfds (before 5.3).
        """
        watched = self._watched.get(process)
        if watched is None:
            watched = self._watched[process] = self._open(process)
        death = Death(self, process, callback)
        watched.waiting[death] = None
        return death

    def __len__(self) -> int:
        """How many processes are watched; each is one descriptor."""
        return len(self._watched)

    def _open(self, process: Process) -> _Watched:
        fd = _pidfd(process.pid)
        try:
            # The descriptor pins whoever had the number when it was opened: check who that is.
            _check(process, fd)
            self._reactor.add_reader(fd, lambda: self._ended(process))
        except OSError as error:
            os.close(fd)
            raise Refused(f"following process {process.pid}: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise
        return _Watched(fd)

    def _ended(self, process: Process) -> None:
        watched = self._watched.get(process)
        # A number of a descriptor is used again at once: what was ready may be its predecessor.
        if watched is None or not _readable(watched.fd):
            return
        self._close(process)
        for death in list(watched.waiting):
            death._tell()

    def _forget(self, process: Process, death: Death) -> None:
        watched = self._watched.get(process)
        if watched is None:
            return
        watched.waiting.pop(death, None)
        if not watched.waiting:
            self._close(process)

    def _close(self, process: Process) -> None:
        watched = self._watched.pop(process)
        self._reactor.remove_reader(watched.fd)
        os.close(watched.fd)


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):
            raise Gone(f"process {pid} has ended") from error
        raise Refused(f"pidfd_open: {error.strerror}") from error


def _check(process: Process, fd: int) -> None:
    procfs.check(process)
    if _readable(fd):
        raise Gone(f"process {process.pid} has ended")


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
