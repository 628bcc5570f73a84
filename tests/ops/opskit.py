"""The request handlers without a mount: a daemon that nobody serves, and the kernel's side of its requests."""

import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyfuse3
import pytest

from limitfs.daemon import Daemon
from limitfs.options import Options
from limitfs.space.fuse import Operations
from limitfs.space.tree import ROOT_INODE


@dataclass
class Caller:
    """A RequestContext."""

    uid: int = 0
    gid: int = 0
    pid: int = 1
    umask: int = 0


@dataclass
class Fields:
    """SetattrFields."""

    update_atime: bool = False
    update_mtime: bool = False
    update_ctime: bool = False
    update_mode: bool = False
    update_uid: bool = False
    update_gid: bool = False
    update_size: bool = False


@dataclass
class Waker:
    """A PollHandle."""

    woken: int = 0

    def notify(self) -> None:
        self.woken += 1


@dataclass
class Listing:
    """A ReaddirToken with room for so many entries."""

    room: int = 1 << 30
    entries: list[tuple[bytes, int, int]] = field(default_factory=list)

    def reply(self, name: bytes, attributes: pyfuse3.EntryAttributes, offset: int) -> bool:
        if len(self.entries) >= self.room:
            return False
        self.entries.append((name, attributes.st_ino, offset))
        return True


class Kernel:
    """Asks as the kernel does, and remembers what it was told of."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.ops: Any = daemon.operations
        assert isinstance(self.ops, Operations)
        self.known: dict[int, int] = {}

    async def walk(self, path: str, uid: int = 0) -> pyfuse3.EntryAttributes:
        ino = ROOT_INODE
        attributes = await self.ops.getattr(ino, Caller(uid))
        for name in filter(None, path.split("/")):
            attributes = await self.ops.lookup(ino, name.encode(), Caller(uid))
            ino = attributes.st_ino
            self.known[ino] = self.known.get(ino, 0) + 1
        return attributes

    async def open(self, path: str, flags: int = 0, uid: int = 0) -> int:
        attributes = await self.walk(path, uid)
        info = await self.ops.open(attributes.st_ino, flags, Caller(uid))
        return int(info.fh)

    async def read(self, path: str, uid: int = 0) -> bytes:
        handle = await self.open(path, 0, uid)
        text = b""
        while piece := await self.ops.read(handle, len(text), 4096):
            text += piece
        await self.ops.release(handle)
        return text

    async def write(self, path: str, data: bytes, uid: int = 0) -> None:
        handle = await self.open(path, 1, uid)
        try:
            assert await self.ops.write(handle, 0, data) == len(data)
        finally:
            await self.ops.release(handle)

    async def list(self, path: str, room: int = 1 << 30, uid: int = 0) -> list[bytes]:
        attributes = await self.walk(path, uid)
        handle = await self.ops.opendir(attributes.st_ino, Caller(uid))
        names: list[bytes] = []
        offset = 0
        while True:
            listing = Listing(room)
            await self.ops.readdir(handle, offset, listing)
            if not listing.entries:
                break
            for name, ino, offset in listing.entries:  # noqa: B007
                self.known[ino] = self.known.get(ino, 0) + 1
                names.append(name)
        await self.ops.releasedir(handle)
        return names

    async def forget_all(self) -> None:
        await self.ops.forget(list(self.known.items()))
        self.known.clear()


async def refused(request: Awaitable[object]) -> str:
    """The name of the errno that a request is answered with; empty for none."""
    try:
        await request
    except pyfuse3.FUSEError as error:
        return errno.errorcode[error.errno].replace("ENOTSUP", "EOPNOTSUPP")
    return ""


@contextmanager
def house(monkeypatch: pytest.MonkeyPatch, *options: str) -> Iterator[Kernel]:
    def reply(token: Listing, name: bytes, attributes: pyfuse3.EntryAttributes, offset: int) -> bool:
        return token.reply(name, attributes, offset)

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    daemon = Daemon("/nowhere", Options.parse(list(options)))
    try:
        yield Kernel(daemon)
    finally:
        daemon.close()


MakeKernel = Callable[..., Kernel]
