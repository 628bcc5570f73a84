"""Which CPUs are online, and when that changes: the kernel's messages about devices.

The kernel sends a netlink message when a CPU goes online or offline; see Documentation/core-api/kobject.rst and
netlink(7), NETLINK_KOBJECT_UEVENT.
"""

import contextlib
import errno
import logging
import socket
from collections.abc import Callable

from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Refused

log = logging.getLogger(__name__)

Callback = Callable[[], None]

ONLINE = "/sys/devices/system/cpu/online"

_NETLINK_KOBJECT_UEVENT = 15
_FROM_KERNEL = 1
_MESSAGES = (b"online@/devices/system/cpu/", b"offline@/devices/system/cpu/")
_MOST = 8192
"""Bytes of a message, at most."""
_BATCH = 64
"""Messages per turn of the event loop; the rest wait for the next turn."""


def online() -> list[int]:
    """The numbers of the CPUs that are online. Raises OSError."""
    with open(ONLINE, encoding="ascii") as file:
        return parse(file.read())


def parse(text: str) -> list[int]:
    """A list of CPUs as the kernel writes it: "0-3,8"."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


class Cpus:
    """Tells of CPUs that come and go; the socket is open while somebody listens."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._socket: socket.socket | None = None
        self._told: dict[object, Callback] = {}

    def watch(self, callback: Callback) -> Callback:
        """Call `callback` when a CPU went online or offline; returns what ends that.

        Raises:
            Refused: the kernel allows no such socket.
        """
        if self._socket is None:
            self._open()
        key = object()
        self._told[key] = callback

        def end() -> None:
            if self._told.pop(key, None) is not None and not self._told:
                self._close()

        return end

    def _open(self) -> None:
        flags = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        try:
            made = socket.socket(socket.AF_NETLINK, flags, _NETLINK_KOBJECT_UEVENT)
        except OSError as error:
            raise Refused(f"the kernel's messages about devices: {error.strerror}") from error
        try:
            made.bind((0, _FROM_KERNEL))
            self._reactor.add_reader(made.fileno(), self._drain)
        except OSError as error:
            made.close()
            raise Refused(f"the kernel's messages about devices: {error.strerror}") from error
        self._socket = made

    def _close(self) -> None:
        if self._socket is not None:
            self._reactor.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _drain(self) -> None:
        if self._socket is not None and self._changed(self._socket):
            for callback in list(self._told.values()):
                try:
                    callback()
                except Exception:  # the others must hear it all the same
                    log.exception("told that a CPU came or went, somebody failed")

    def _changed(self, sock: socket.socket) -> bool:
        """Whether one of the messages that wait is about a CPU, or some were lost."""
        changed = False
        with contextlib.suppress(BlockingIOError):
            for _ in range(_BATCH):
                try:
                    message, (sender, _groups) = sock.recvfrom(_MOST)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    changed = True
                    continue
                changed |= sender == 0 and message.startswith(_MESSAGES)
        return changed
