"""The files that a process has open, looked at without waiting for whoever keeps them.

A file may be on a server that no longer answers, or on a FUSE mount: on our own, even. So its attributes are taken
as the kernel knows them (AT_STATX_DONT_SYNC in statx(2)), which is exactly for what lies on this machine, and for
what is written from it.
"""

import ctypes
import os
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from limitfs.resources import procfs

READABLE = 0o400
WRITABLE = 0o200
"""How a descriptor was opened; one opened with O_PATH is neither."""

_AT_FDCWD = -100
_DONT_WAIT = 0x4000 | 0x800
"""AT_STATX_DONT_SYNC, and AT_NO_AUTOMOUNT."""
_BASIC = 0x7FF
"""STATX_BASIC_STATS."""
_STATX = struct.Struct("=28xH2xQQQ80xII112x")
_MQUEUE_MAGIC = 0x19800202
_MQUEUE_SIZE = 80
"""st_size of every message queue."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_libc.statfs.argtypes = (ctypes.c_char_p, ctypes.c_void_p)


class Open(NamedTuple):
    """An open file: what statx(2) tells, `size` in bytes, `major` and `minor` of its device."""

    path: str
    """That leads to it, in /proc."""
    name: str
    """What it was opened as, as /proc tells it."""
    mode: int
    inode: int
    size: int
    blocks: int
    major: int
    minor: int

    @property
    def identity(self) -> tuple[int, int, int]:
        """The same for all who opened this file, by whatever name."""
        return self.major, self.minor, self.inode


def opened(pid: int, links: Mapping[int, str], access: int) -> Iterator[Open]:
    """Those of the descriptors `links` (see `procfs.links`) that are files with a name, opened for `access`.

    Without those that are closed meanwhile, and those whose file system tells nothing.
    """
    for fd, name in links.items():
        if not name.startswith("/"):
            continue
        path = f"{procfs.ROOT}/{pid}/fd/{fd}"
        try:
            fitting = os.lstat(path).st_mode & access
        except OSError:
            continue
        if fitting and (about := _statx(path)) is not None:
            yield Open(path, name, *about)


def _statx(path: str) -> tuple[int, int, int, int, int, int] | None:
    about = ctypes.create_string_buffer(_STATX.size)
    if _libc.statx(_AT_FDCWD, path.encode(), _DONT_WAIT, _BASIC, about) != 0:
        return None
    return _STATX.unpack(about)


def is_message_queue(file: Open) -> bool:
    """Whether this is a POSIX message queue, of whichever IPC namespace; mq_overview(7)."""
    # Only its file system tells, and asking a file system may take long: so only what looks like a queue is asked.
    alike = (file.size, file.blocks, file.major, file.name.count("/")) == (_MQUEUE_SIZE, 0, 0, 1)
    return alike and _file_system(file.path) == _MQUEUE_MAGIC


def _file_system(path: str) -> int:
    """f_type of statfs(2), the first word of its answer; 0 where it cannot be told."""
    about = (ctypes.c_long * 64)()
    return about[0] if _libc.statfs(path.encode(), about) == 0 else 0
