"""The kernel's own list of sockets, of one network namespace at a time: sock_diag(7).

The kernel answers in records of fixed layout, and whoever bound a name can write anything into it: unlike lines
of /proc/net/unix, a record cannot be forged by it. TCP lists the sockets of Multipath TCP too, under the inode
numbers that their processes have.

Raises OSError with the kernel's errno throughout: ENOENT where this kernel cannot list a protocol.
"""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

ESTABLISHED = 1
CLOSED = 7
LISTENING = 10
"""States of a socket, of any protocol, as the kernel numbers them for TCP."""

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_CLONE_NEWNET = 0x40000000
_BUFFER = 65_536
"""Bytes; the kernel fills at most 32 KiB at once."""

# linux/netlink.h, linux/inet_diag.h, linux/unix_diag.h
_NLMSG = struct.Struct("=IHHII")
_ERROR = struct.Struct("=i")
_INET_REQUEST = struct.Struct("=BBBxI48x")
_INET = struct.Struct("=BBxx2s2x16s16x4x8x4x4x4x4xI")
_UNIX_REQUEST = struct.Struct("=BxxxIII8x")
_UNIX = struct.Struct("=xBBxI8x")
_ATTRIBUTE = struct.Struct("=HH")
_SHOW_NAME_AND_PEER = 0x1 | 0x4
_NAME = 0
_PEER = 2

_libc = ctypes.CDLL(None, use_errno=True)


class Inet(NamedTuple):
    """A TCP or UDP socket. `inode` is 0 while no process has it: not accepted yet, or closed already."""

    family: int
    state: int
    port: bytes
    address: bytes
    """16 bytes; all 0 for any address."""
    inode: int


class Unix(NamedTuple):
    """A UNIX socket. `inode` as above; `name`: as bound, or as the socket that accepted it was; b"" for none."""

    type: int
    state: int
    inode: int
    name: bytes
    connected: bool


def states(*which: int) -> int:
    """The set of these states, as a request has it."""
    return sum(1 << state for state in which)


class SockDiag:
    """Lists the sockets of one network namespace: that of `namespace`, a descriptor of one, or our own."""

    def __init__(self, namespace: int | None = None) -> None:
        if namespace is None:
            self._socket = _open()
            return
        # Only the calling thread moves, and it ends here; the socket stays where it was made.
        with ThreadPoolExecutor(1) as elsewhere:
            self._socket = elsewhere.submit(_open_in, namespace).result()

    def __enter__(self) -> "SockDiag":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, what: BaseException | None, at: TracebackType | None
    ) -> None:
        self._socket.close()

    def inet(self, protocol: int, which: int) -> Iterator[Inet]:
        """The IPv4 and IPv6 sockets of a protocol that are in one of the states `which`."""
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                for answer, start, _end in self._dump(_INET_REQUEST.pack(family, protocol, 0, which)):
                    yield Inet._make(_INET.unpack_from(answer, start))
            except OSError as error:
                if family == socket.AF_INET or error.errno != errno.ENOENT:  # a kernel may be without IPv6
                    raise

    def unix(self, which: int) -> Iterator[Unix]:
        """The UNIX sockets that are in one of the states `which`."""
        for answer, start, end in self._dump(_UNIX_REQUEST.pack(socket.AF_UNIX, which, 0, _SHOW_NAME_AND_PEER)):
            kind, state, inode = _UNIX.unpack_from(answer, start)
            attributes = dict(_attributes(answer, start + _UNIX.size, end))
            yield Unix(kind, state, inode, attributes.get(_NAME, b""), _PEER in attributes)

    def _dump(self, request: bytes) -> Iterator[tuple[bytes, int, int]]:
        """Ask, and give every answer: where it begins and ends in what was received."""
        head = _NLMSG.pack(_NLMSG.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 0, 0)
        self._socket.send(head + request)
        while True:
            received = self._socket.recv(_BUFFER)
            at = 0
            while at < len(received):
                length, kind, _flags, _sequence, _port = _NLMSG.unpack_from(received, at)
                start = at + _NLMSG.size
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    failed = -_ERROR.unpack_from(received, start)[0]
                    if failed:
                        raise OSError(failed, f"sock_diag: {os.strerror(failed)}")
                    return
                yield received, start, at + length
                at += _aligned(length)


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG)


def _open_in(namespace: int) -> socket.socket:
    if _libc.setns(namespace, _CLONE_NEWNET) != 0:
        failed = ctypes.get_errno()
        raise OSError(failed, f"setns: {os.strerror(failed)}")
    return _open()


def _attributes(answer: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    while at < end:
        length, kind = _ATTRIBUTE.unpack_from(answer, at)
        yield kind, answer[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
