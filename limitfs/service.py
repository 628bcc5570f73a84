"""What the daemon tells its service manager: ready, alive, stopping; and how it logs to the journal.

The protocol is sd_notify(3): lines of `NAME=value` in a datagram to the socket that $NOTIFY_SOCKET names. Without
a service manager nothing is told.
"""

import contextlib
import faulthandler
import logging
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial

import trio

from limitfs.caller import Caller

log = logging.getLogger(__name__)

_HANGS = 1.7
"""Intervals without an answer until the daemon ends itself; at two the service manager would."""

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Manager:
    """The service manager that started this process, if one did.

    Args:
        environment: where it left its address, and the watchdog's time.

    Attributes:
        interval: seconds between signs of life that it should get; None: it wants none.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        # A name that begins with @ is in the abstract namespace.
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.interval = _half_of_the_watchdog(environment)

    def __bool__(self) -> bool:
        return bool(self._address)

    def tell(self, *lines: str) -> None:
        """Send `NAME=value` lines. That nobody takes them is logged, and no harm."""
        if not self:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.setblocking(False)
                out.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.warning("the service manager cannot be told %s: %s", lines[0], error.strerror)


def _half_of_the_watchdog(environment: Mapping[str, str]) -> float | None:
    pid, usec = environment.get("WATCHDOG_PID", ""), environment.get("WATCHDOG_USEC", "")
    if not usec.isdigit() or int(usec) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(usec) / 1_000_000 / 2


async def attend(mountpoint: str, status: Callable[[], str]) -> None:
    """Tell the service manager that the mount answers, and go on telling for as long as it does.

    The question takes the way of every client: through the kernel, the event loop and a handler. Whichever of them
    hangs, the sign of life fails to come. Then this process ends itself, saying where it hangs, before the service
    manager would: systemd may be a client, too (process 1 looks up the path of a path unit), and wait for us.

    Where there is nobody to tell, but a watchdog's time, the latter is all: `mounting.keep` starts another daemon.

    Args:
        mountpoint: what is asked.
        status: a line about the daemon, for people.
    """
    manager = Manager(os.environ)
    for name in _VARIABLES:
        # Not for what this process starts.
        os.environ.pop(name, None)
    if not manager and manager.interval is None:
        return
    ask = partial(_answer, mountpoint)
    with Caller() as caller:
        await caller.call(ask)
        try:
            # Before anybody relies on it, and not anew at once: for a moment between two there is none.
            _end_if_it_hangs(manager.interval)
            manager.tell("READY=1", f"STATUS={status()}")
            while manager.interval is not None:
                await trio.sleep(manager.interval)
                await caller.call(ask)
                manager.tell("WATCHDOG=1", f"STATUS={status()}")
                _end_if_it_hangs(manager.interval)
            await trio.sleep_forever()
        finally:
            faulthandler.cancel_dump_traceback_later()
            manager.tell("STOPPING=1")


def _end_if_it_hangs(interval: float | None) -> None:
    """Unless this is called again in time."""
    if interval is not None:
        # A thread of C: it needs neither the event loop nor the interpreter.
        faulthandler.dump_traceback_later(interval * _HANGS, exit=True)


def _answer(mountpoint: str) -> None:
    # statvfs(2) is never answered from a cache. What was unmounted has answered: the daemon is about to end.
    with contextlib.suppress(OSError):
        os.statvfs(mountpoint)


# --- the journal


def logs_to_journal() -> bool:
    """Whether standard error is a stream to the journal; see systemd.exec(5), $JOURNAL_STREAM."""
    try:
        there = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"


class JournalFormatter(logging.Formatter):
    """Each line begins with its priority, as sd-daemon(3) has it; time and name are the journal's to add."""

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).split("\n"))


_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))
