"""The one module that knows pyfuse3: requests of the kernel become calls, and what those raise becomes errno.

Handlers have no await in them, so each is atomic with regard to every other and to the sources' callbacks.
None ever waits: a read that blocked would make its reader unkillable, and pyfuse3 answers no interrupt. Only
`write` does, when it has done all but what the kernel may take long for.
"""

import errno
import functools
import inspect
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    PollHandle,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from limitfs.errors import Busy, Denied, Forbidden, Invalid, LimitsError
from limitfs.space import content
from limitfs.space.handles import OpenFile, open_file
from limitfs.space.house import House
from limitfs.space.table import Dir, Event, Link
from limitfs.space.tree import Node, Tree
from limitfs.space.users import OpenFiles

log = logging.getLogger(__name__)

FOR_EVER = 3600.0
"""Seconds the kernel may keep a name or attributes that do not change."""
BRIEFLY = 1.0
"""Seconds it may keep an owner, which a process can change; opening checks anew."""
SLOW_AT_ONCE = 16
"""Limits that one user may be waiting for the kernel to set."""

P = ParamSpec("P")
T = TypeVar("T")
Handler = Callable[Concatenate["Operations", P], T]


@overload
def _guarded(handler: Handler[P, Coroutine[Any, Any, T]]) -> Handler[P, Coroutine[Any, Any, T]]: ...
@overload
def _guarded(handler: Handler[P, T]) -> Handler[P, Coroutine[Any, Any, T]]: ...
def _guarded(handler: Handler[P, Any]) -> Handler[P, Coroutine[Any, Any, Any]]:
    """The wrapper around every handler: any exception but FUSEError would end the mount."""

    async def guarded(self: "Operations", /, *args: P.args, **kwargs: P.kwargs) -> Any:
        self.requests += 1
        try:
            answer = handler(self, *args, **kwargs)
            return await answer if inspect.iscoroutine(answer) else answer
        except LimitsError as error:
            raise FUSEError(error.errno) from error
        except FUSEError:
            raise
        except Exception:
            log.exception("%s failed", handler.__name__)
            raise FUSEError(errno.EIO) from None

    functools.update_wrapper(guarded, handler)
    return guarded


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


class Operations(pyfuse3.Operations):
    """Translates FUSE requests.

    Attributes:
        requests: how many came so far.
    """

    enable_writeback_cache = False
    supports_dot_lookup = False

    def __init__(self, tree: Tree, house: House) -> None:
        super().__init__()
        self.requests = 0
        self._tree = tree
        self._house = house
        self._files: dict[int, tuple[OpenFile, Node, int]] = {}
        self._listings: dict[int, tuple[Node, list[str], int]] = {}
        self._open_files = OpenFiles(house.options.max_open)
        self._next_handle = 0
        self._slow: Counter[int] = Counter()
        self._threads = trio.CapacityLimiter(math.inf)
        # Who mounted may do what root may: the daemon cannot do more than he can.
        self._masters = frozenset((0, os.geteuid()))

    def _user(self, ctx: RequestContext) -> int:
        """The caller's uid, and root's for who may do what root may."""
        return 0 if ctx.uid in self._masters else ctx.uid

    @property
    def open_files(self) -> int:
        """How many files clients have open."""
        return len(self._files)

    # Names and attributes

    @_guarded
    def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        parent = self._tree.node(parent_inode)
        self._enter(parent, self._user(ctx))
        if name == b".":
            node = parent
        elif name == b"..":
            node = parent.parent or parent
        else:
            node = self._tree.lookup(parent, _text(name), self._user(ctx))
        attributes = self._attributes(node, self._user(ctx))
        node.lookups += 1
        return attributes

    @_guarded
    def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        node = self._tree.node(inode)
        self._reach(node, self._user(ctx))
        return self._attributes(node, self._user(ctx))

    @_guarded
    def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Truncation does nothing; a new mtime is how the daemon makes inotify see an event."""
        node = self._tree.node(inode)
        with self._explained(node, self._user(ctx), None):
            self._reach(node, self._user(ctx))
            if fields.update_mode or fields.update_uid or fields.update_gid:
                raise Forbidden("mode and owner are those of the target", "they follow the process")
            if fields.update_size and fh is None:
                self._permit(node, self._user(ctx), os.O_WRONLY)
            self._own(node, self._user(ctx))
        if fields.update_mtime:
            node.mtime_ns = attr.st_mtime_ns
        return self._attributes(node, self._user(ctx))

    @_guarded
    def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, lookups in inode_list:
            self._tree.forget(inode, lookups)

    @_guarded
    def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        node = self._tree.node(inode)
        if not isinstance(node.entry, Link):
            raise Invalid(f"{node.place.path} is no link")
        return FileNameT(os.fsencode(node.entry.read(node.place, self._house, ctx.pid)))

    @_guarded
    def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        node = self._tree.node(inode)
        self._reach(node, self._user(ctx))
        return self._rights(node, self._user(ctx)) & mode == mode

    def _attributes(self, node: Node, user: int) -> EntryAttributes:
        attributes = EntryAttributes()
        attributes.st_ino = node.ino
        attributes.st_mode = node.kind | self._mode(node)
        attributes.st_nlink = 2 if isinstance(node.entry, Dir) else 1
        attributes.st_uid = self._tree.owner(node)
        attributes.st_gid = 0
        attributes.st_size = self._size(node, user)
        attributes.st_mtime_ns = attributes.st_ctime_ns = attributes.st_atime_ns = node.mtime_ns
        attributes.entry_timeout = FOR_EVER if node.lasting else 0
        attributes.attr_timeout = 0 if isinstance(node.entry, Event) else BRIEFLY
        return attributes

    def _mode(self, node: Node) -> int:
        mode = node.entry.mode
        hidden = self._house.options.hidepid >= 1 and node.family is not None and node.family.label == "PID"
        return mode & 0o700 if hidden else mode

    def _size(self, node: Node, user: int) -> int:
        if not isinstance(node.entry, Event):
            return 0
        if node.entry.kind == "all":
            return self._house.delivery.all.size(user)
        if node.entry.kind == "births":
            return self._house.births.size(user)
        return self._house.delivery.size(content.known(node.place, self._house))

    # Rights

    def _rights(self, node: Node, user: int) -> int:
        """The rwx bits that a user has on a node."""
        mode = self._mode(node)
        if user == 0:
            # Root may do all that anybody may; what no one can write stays read-only, as in kernfs.
            return (mode | mode >> 3 | mode >> 6) & 7
        return (mode >> 6 if self._tree.owner(node) == user else mode) & 7

    def _permit(self, node: Node, user: int, flags: int) -> None:
        """Raises Denied."""
        wanted = {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK, os.O_RDWR: os.R_OK | os.W_OK}[flags & os.O_ACCMODE]
        if self._rights(node, user) & wanted == wanted:
            return
        owner = self._tree.owner(node)
        if user == owner or user == 0:
            raise Denied("this file cannot be written" if wanted & os.W_OK else "this file cannot be read")
        raise Denied(f"it belongs to user {owner}", "its owner and root may")

    def _enter(self, node: Node, user: int) -> None:
        """Raises Denied where the way into a directory is closed."""
        self._reach(node, user)
        if not self._rights(node, user) & os.X_OK:
            raise Denied(f"{node.place.path} is closed to user {user} (hidepid)")

    def _reach(self, node: Node, user: int) -> None:
        """The same for the way to a node: the kernel keeps names that another user looked up."""
        while self._house.options.hidepid and user != 0 and node.parent is not None:
            node = node.parent
            if not self._rights(node, user) & os.X_OK:
                raise Denied(f"{node.place.path} is closed to user {user} (hidepid)")

    def _explained(self, node: Node, user: int, written: bytes | None, name: str | None = None) -> "_Explained":
        path = node.path if name is None else node.place.at(name).path
        return _Explained(self._house, user, path, written)

    # Files

    @_guarded
    def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        node = self._tree.node(inode)
        with self._explained(node, self._user(ctx), None):
            self._reach(node, self._user(ctx))
            self._permit(node, self._user(ctx), flags)
            self._open_files.opened(self._user(ctx))
            try:
                opened = open_file(node, self._house, self._user(ctx))
            except BaseException:
                self._open_files.closed(self._user(ctx))
                raise
        handle = self._handle()
        self._files[handle] = opened, node, self._user(ctx)
        # Direct I/O: sizes are not known before the read, and no page may be served twice.
        return FileInfo(fh=FileHandleT(handle), direct_io=True, keep_cache=False)

    def _handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    @_guarded
    def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        return self._files[fh][0].read(off, size)

    @_guarded
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        del off
        opened, node, user = self._files[fh]
        with self._explained(node, user, buf):
            # The owner may have changed since the file was opened: a setuid program must not be armed by an
            # old descriptor. One command that is allowed is then told to be good.
            self._permit(node, user, os.O_WRONLY)
            slow = opened.write(buf)
            if slow is not None:
                await self._take_time(slow, user)
            self._house.last_errors.accepted(user)
        return len(buf)

    async def _take_time(self, slow: content.Slow, user: int) -> None:
        """Make a call that the kernel may hold up, while others are served; what they changed, `then` looks at.

        Raises:
            Busy: many others of this user are held up.
            LimitsError: as the call.
        """
        if self._slow[user] >= SLOW_AT_ONCE:
            raise Busy(f"{SLOW_AT_ONCE} limits of user {user} are being set", "wait for one of them")
        self._slow[user] += 1
        try:
            # A thread that hangs in the kernel shall not keep the daemon from ending.
            await trio.to_thread.run_sync(slow.call, abandon_on_cancel=True, limiter=self._threads)
        finally:
            self._slow[user] -= 1
            if not self._slow[user]:
                del self._slow[user]
        slow.then()

    @_guarded
    def poll(self, inode: InodeT, fh: FileHandleT, poll_handle: PollHandle | None, ctx: RequestContext) -> int:
        return self._files[fh][0].poll(poll_handle)

    @_guarded
    def release(self, fh: FileHandleT) -> None:
        opened, _node, user = self._files.pop(fh)
        self._open_files.closed(user)
        opened.close()

    # Directories

    @_guarded
    def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        node = self._tree.node(inode)
        self._reach(node, self._user(ctx))
        if not self._rights(node, self._user(ctx)) & os.R_OK:
            raise Denied(f"{node.place.path} is closed to user {self._user(ctx)} (hidepid)")
        handle = self._handle()
        self._listings[handle] = node, list(self._tree.names(node, self._user(ctx))), self._user(ctx)
        return FileHandleT(handle)

    @_guarded
    def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        node, names, user = self._listings[fh]
        if start_id == 0:
            names[:] = self._tree.names(node, user)  # rewinddir(3) looks again
        for index in range(start_id, len(names)):
            try:
                child = self._tree.lookup(node, names[index], user)
                attributes = self._attributes(child, user)
            except LimitsError:
                continue  # it ended while we listed
            if not pyfuse3.readdir_reply(
                token, names[index].encode(errors="surrogateescape"), attributes, index + 1
            ):
                self._tree.prune(child)  # the kernel was not told of it
                break
            child.lookups += 1

    @_guarded
    def releasedir(self, fh: FileHandleT) -> None:
        del self._listings[fh]

    @_guarded
    def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        parent = self._tree.node(parent_inode)
        with self._explained(parent, self._user(ctx), None, _text(name)):
            self._tree.maker(parent)
            if not self._rights(parent, self._user(ctx)) & os.W_OK:
                self._own(parent, self._user(ctx))
            self._tree.make(parent, _text(name), self._user(ctx))
            self._house.last_errors.accepted(self._user(ctx))
        node = self._tree.lookup(parent, _text(name), self._user(ctx))
        node.lookups += 1
        return self._attributes(node, self._user(ctx))

    @_guarded
    def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        parent = self._tree.node(parent_inode)
        with self._explained(parent, self._user(ctx), None, _text(name)):
            self._tree.remove(parent, _text(name), self._user(ctx))
            self._house.last_errors.accepted(self._user(ctx))

    def _own(self, node: Node, user: int) -> None:
        owner = self._tree.owner(node)
        if user != owner and user != 0:
            raise Denied(f"it belongs to user {owner}", "its owner and root may")

    @_guarded
    def statfs(self, ctx: RequestContext) -> StatvfsData:
        data = StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = 255
        data.f_files = len(self._tree)
        return data

    # What the fixed tree has not

    def _forbid(self, parent_inode: InodeT, name: FileNameT, user: int, what: str) -> None:
        parent = self._tree.node(parent_inode)
        with self._explained(parent, user, None, _text(name)):
            raise Forbidden(f"{what} is not possible here", "the tree is fixed; see README")

    @_guarded
    def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        self._forbid(parent_inode, name, self._user(ctx), "creating a file")
        raise FUSEError(errno.EPERM)

    @_guarded
    def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        self._forbid(parent_inode, name, self._user(ctx), "creating a file")
        raise FUSEError(errno.EPERM)

    @_guarded
    def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        self._forbid(parent_inode, name, self._user(ctx), "creating a link")
        raise FUSEError(errno.EPERM)

    @_guarded
    def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        self._forbid(new_parent_inode, new_name, self._user(ctx), "creating a link")
        raise FUSEError(errno.EPERM)

    @_guarded
    def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        self._forbid(parent_inode_old, name_old, self._user(ctx), "renaming")

    @_guarded
    def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        self._forbid(parent_inode, name, self._user(ctx), "removing a file")


class _Explained:
    """Notes in `last_error` why what stands below it was refused."""

    def __init__(self, house: House, user: int, path: str, written: bytes | None) -> None:
        self._house = house
        self._user = user
        self._path = path
        self._written = written

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, FUSEError):
            if not isinstance(error, LimitsError):
                error = LimitsError(f"it failed: {type(error).__name__}", "the log tells more")
            written = (
                None if self._written is None else self._written[:4096].decode(errors="backslashreplace").strip()
            )
            self._house.last_errors.refused(self._user, self._path, written, error)
