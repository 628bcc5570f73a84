"""The handlers of requests, called without a mount."""

import dataclasses
import errno
import logging
import os
import select
from collections.abc import Callable, Iterator

import pyfuse3
import pytest
from opskit import Caller, Fields, Kernel, Listing, Waker, house, refused

from conftest import NOBODY, Helper
from limitfs.errors import Gone
from limitfs.resources import procfs
from limitfs.resources.model import Process
from limitfs.space import content
from limitfs.space.tree import ROOT_INODE

Make = Callable[..., Helper]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    with house(monkeypatch) as made:
        yield made


# Names that come and go


async def test_what_the_kernel_forgets_is_forgotten(kernel: Kernel) -> None:
    tree = kernel.daemon.tree
    assert len(tree) == 1
    for path in ("system/memory/usage", "process/fds", f"process/{os.getpid()}/thread/{os.getpid()}/cpu/state"):
        await kernel.walk(path)
        await kernel.walk(path)
    await kernel.list("process")
    await kernel.list("system/memory", room=2)
    assert len(tree) > 20
    await kernel.forget_all()
    assert len(tree) == 1


async def test_a_node_lives_as_long_as_one_reference(kernel: Kernel) -> None:
    first = await kernel.walk("system/memory")
    second = await kernel.walk("system/memory")
    assert first.st_ino == second.st_ino
    await kernel.ops.forget([(first.st_ino, 1)])
    assert (await kernel.ops.getattr(first.st_ino, Caller())).st_ino == first.st_ino
    await kernel.ops.forget([(first.st_ino, 1)])
    assert await refused(kernel.ops.getattr(first.st_ino, Caller())) == "ENOENT"


async def test_a_parent_is_kept_for_its_children(kernel: Kernel) -> None:
    await kernel.walk("system/memory/usage")
    parents = [ino for ino in kernel.known if kernel.daemon.tree.node(ino).name != "usage"]
    await kernel.ops.forget([(ino, kernel.known.pop(ino)) for ino in parents])
    assert len(kernel.daemon.tree) == 4
    await kernel.forget_all()
    assert len(kernel.daemon.tree) == 1


async def test_forgetting_too_much_does_no_harm(kernel: Kernel) -> None:
    await kernel.ops.forget([(ROOT_INODE, 99), (4711, 1)])
    found = await kernel.walk("system")
    await kernel.ops.forget([(found.st_ino, 99), (found.st_ino, 1)])
    assert await kernel.walk("system/memory/usage")


async def test_a_listing_that_is_cut_short_keeps_no_nodes(kernel: Kernel) -> None:
    handle = await kernel.ops.opendir(ROOT_INODE, Caller())
    listing = Listing(3)
    await kernel.ops.readdir(handle, 0, listing)
    await kernel.ops.releasedir(handle)
    assert len(kernel.daemon.tree) == 1 + 3
    await kernel.ops.forget([(ino, 1) for _name, ino, _offset in listing.entries])
    assert len(kernel.daemon.tree) == 1


async def test_a_number_used_again_is_another_inode(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.getpid()
    now = procfs.identify(pid)
    first = await kernel.walk(f"process/{pid}")
    assert (await kernel.walk(f"process/{pid}")).st_ino == first.st_ino
    usage = await kernel.open(f"process/{pid}/fds/usage")
    inside = kernel.daemon.tree.lookup(kernel.daemon.tree.node(first.st_ino), "fds", 0)
    assert await kernel.ops.read(usage, 0, 100)
    real = procfs.verify

    def another(target: Process) -> procfs.Stat:
        if target == now:
            raise Gone("its number was used again")
        return real(now if target.start == now.start + 1 else target)

    monkeypatch.setattr(procfs, "identify", lambda pid: Process(pid, now.start + 1))
    monkeypatch.setattr(procfs, "verify", another)
    second = await kernel.walk(f"process/{pid}")
    assert second.st_ino != first.st_ino
    assert (await kernel.walk(f"process/{pid}/fds")).st_ino != inside.ino
    assert kernel.daemon.tree.node(second.st_ino).place.target == Process(pid, now.start + 1)
    # The old path, held open, is that of the process that has ended.
    assert await refused(kernel.ops.read(usage, 0, 100)) == "ESRCH"
    await kernel.ops.release(usage)
    await kernel.forget_all()
    assert len(kernel.daemon.tree) in (1, 2)  # one was looked up behind the kernel's back


async def test_a_watcher_removed_and_made_again_is_another_inode(kernel: Kernel) -> None:
    directory = await kernel.walk("system/memory")
    made = await kernel.ops.mkdir(directory.st_ino, b"warn", 0o755, Caller())
    handle = await kernel.open("system/memory/warn/state")
    await kernel.ops.rmdir(directory.st_ino, b"warn", Caller())
    assert await refused(kernel.ops.lookup(directory.st_ino, b"warn", Caller())) == "ENOENT"
    assert await refused(kernel.ops.read(handle, 0, 100)) == "ESRCH"
    again = await kernel.ops.mkdir(directory.st_ino, b"warn", 0o755, Caller())
    assert again.st_ino != made.st_ino
    assert b"warn" in await kernel.list("system/memory")


# Whatever is raised


@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), KeyError(1), OSError(5, "x"), RecursionError(), MemoryError()]
)
async def test_an_exception_is_eio_and_told_in_the_log(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def broken(*_: object) -> str:
        raise error

    found = await kernel.walk("README")
    node = kernel.daemon.tree.node(found.st_ino)
    node.entry = dataclasses.replace(node.entry, read=broken)  # type: ignore[arg-type, type-var]
    handle = await kernel.open("README")
    with caplog.at_level(logging.ERROR):
        assert await refused(kernel.ops.read(handle, 0, 100)) == "EIO"
    assert "read failed" in caplog.text
    assert type(error).__name__ in caplog.text
    assert await kernel.read("features")
    del monkeypatch


HANDLERS = {
    "lookup": (ROOT_INODE, b"x"),
    "getattr": (ROOT_INODE,),
    "opendir": (ROOT_INODE,),
    "statfs": (),
    "open": (ROOT_INODE, 0),
    "readlink": (ROOT_INODE,),
    "mkdir": (ROOT_INODE, b"x", 0),
    "rmdir": (ROOT_INODE, b"x"),
    "unlink": (ROOT_INODE, b"x"),
    "access": (ROOT_INODE, 4),
}


@pytest.mark.parametrize("name", HANDLERS)
async def test_every_handler_is_wrapped(kernel: Kernel, caplog: pytest.LogCaptureFixture, name: str) -> None:
    kernel.ops._tree = None  # whatever it does now goes wrong
    if name == "statfs":
        kernel.ops._tree = 7
    with caplog.at_level(logging.ERROR):
        assert await refused(getattr(kernel.ops, name)(*HANDLERS[name], Caller())) == "EIO"
    assert f"{name} failed" in caplog.text


@pytest.mark.parametrize("request_", ["read", "release", "readdir", "releasedir", "write", "poll"])
async def test_a_handle_that_is_not_open(kernel: Kernel, request_: str) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "read": (77, 0, 10),
        "release": (77,),
        "readdir": (77, 0, Listing()),
        "releasedir": (77,),
        "write": (77, 0, b"x"),
        "poll": (ROOT_INODE, 77, None, Caller()),
    }
    assert await refused(getattr(kernel.ops, request_)(*arguments[request_])) == "EIO"


async def test_no_handler_of_the_kernel_is_left_out() -> None:
    """Each request that the tree has not is refused with a reason, never with ENOSYS."""
    from limitfs.space.fuse import Operations

    left_out = {
        name
        for name in vars(pyfuse3.Operations)
        if callable(getattr(pyfuse3.Operations, name))
        and name not in vars(Operations)
        and not name.startswith("_")
    }
    # The kernel has an answer of its own to these: no extended attributes, nothing to write back.
    assert left_out <= {
        "init", "stacktrace", "fsync", "fsyncdir", "flush",
        "setxattr", "getxattr", "listxattr", "removexattr", "ioctl",
    }  # fmt: skip


# Listings


async def test_a_listing_goes_on_where_it_stopped(kernel: Kernel) -> None:
    whole = await kernel.list("system")
    assert whole
    for room in (1, 2, 3, 100):
        assert await kernel.list("system", room) == whole
    assert len(set(whole)) == len(whole)


async def test_a_listing_is_one_snapshot(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = [os.getpid(), os.getppid()]
    monkeypatch.setattr(procfs, "pids", lambda: list(pids))
    process = await kernel.walk("process")
    handle = await kernel.ops.opendir(process.st_ino, Caller())
    first = Listing(2)
    await kernel.ops.readdir(handle, 0, first)
    pids.reverse()
    rest = Listing()
    await kernel.ops.readdir(handle, first.entries[-1][2], rest)
    names = [name for name, _, _ in first.entries + rest.entries]
    assert len(set(names)) == len(names)
    assert {str(pid).encode() for pid in pids} <= set(names)
    # rewinddir(3) looks again.
    pids.pop()
    again = Listing()
    await kernel.ops.readdir(handle, 0, again)
    assert len(again.entries) == len(names) - 1


async def test_who_ends_while_listed_is_left_out(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "pids", lambda: [os.getpid(), 4_194_999])
    names = await kernel.list("process")
    assert str(os.getpid()).encode() in names
    assert b"4194999" not in names


# Open files


async def test_a_poll_is_answered_and_only_the_newest_handle_kept(kernel: Kernel) -> None:
    path = "system/memory/event"
    handle = await kernel.open(path)
    ino = (await kernel.walk(path)).st_ino
    old, new = Waker(), Waker()
    assert await kernel.ops.poll(ino, handle, old, Caller()) == 0
    assert await kernel.ops.poll(ino, handle, new, Caller()) == 0
    await kernel.write("system/memory/threshold", b">= 1")
    assert (old.woken, new.woken) == (0, 1)
    await kernel.write("system/memory/threshold", b">= 2")
    assert (old.woken, new.woken) == (0, 1)  # dropped once notified
    assert await kernel.ops.poll(ino, handle, None, Caller()) == select.POLLIN | select.POLLPRI
    assert (await kernel.ops.read(handle, 0, 1 << 16)).count(b"\n") == 2
    assert await kernel.ops.poll(ino, handle, new, Caller()) == 0
    await kernel.ops.release(handle)
    await kernel.write("system/memory/threshold", b">= 3")
    assert new.woken == 1  # closed: nobody is told


async def test_a_handle_per_open_file(kernel: Kernel) -> None:
    handles = [await kernel.open("README") for _ in range(5)]
    assert len(set(handles)) == 5
    for handle in handles:
        assert await kernel.ops.read(handle, 0, 10) == (await kernel.read("README"))[:10]
        await kernel.ops.release(handle)


async def test_a_text_is_made_at_offset_0_and_then_read_on(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await kernel.open("README")
    first = await kernel.ops.read(handle, 0, 5)
    monkeypatch.setattr(content, "files", None)  # from here on it could not be made any more
    second = await kernel.ops.read(handle, 5, 5)
    assert len(first) == len(second) == 5
    assert await kernel.ops.read(handle, 1 << 20, 5) == b""


async def test_unused_event_files_leave_no_watcher(kernel: Kernel, helper: Make) -> None:
    child = helper()
    registry = kernel.daemon.house.registry
    for _ in range(3):
        assert await kernel.read(f"process/{child.pid}/fds/event") == b""
    assert list(registry) == []
    handle = await kernel.open(f"process/{child.pid}/fds/event", os.O_RDWR)
    assert await refused(kernel.ops.write(handle, 0, b"rubbish")) == "EINVAL"
    await kernel.ops.write(handle, 0, b"500")
    assert len(list(registry)) == 2
    await kernel.ops.release(handle)
    assert list(registry) == []


# Who


async def test_a_touch_sets_the_time_and_nothing_else(kernel: Kernel) -> None:
    before = await kernel.walk("event")
    wanted = pyfuse3.EntryAttributes()
    wanted.st_mtime_ns = before.st_mtime_ns + 10**9
    after = await kernel.ops.setattr(before.st_ino, wanted, Fields(update_mtime=True), None, Caller())
    assert after.st_mtime_ns == wanted.st_mtime_ns
    assert after.st_mode == before.st_mode
    assert (
        await refused(kernel.ops.setattr(before.st_ino, wanted, Fields(update_mtime=True), None, Caller(NOBODY)))
        == errno.errorcode[errno.EACCES]
    )
    for fields in (Fields(update_mode=True), Fields(update_uid=True), Fields(update_gid=True)):
        assert await refused(kernel.ops.setattr(before.st_ino, wanted, fields, None, Caller())) == "EPERM"


async def test_who_mounted_may_do_what_root_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    with house(monkeypatch) as kernel:
        await kernel.write("system/memory/threshold", b">= 1T", uid=1234)
        found = await kernel.walk("event")
        fields = Fields(update_mtime=True)
        assert await refused(kernel.ops.setattr(found.st_ino, found, fields, None, Caller(1234))) == ""
        assert await refused(kernel.write("system/memory/threshold", b"off", uid=NOBODY)) == "EACCES"


async def test_self_is_found_by_a_threads_number(kernel: Kernel) -> None:
    link = await kernel.walk("process/self")
    thread = os.getpid()
    assert await kernel.ops.readlink(link.st_ino, Caller(pid=thread)) == str(os.getpid()).encode()
    assert await refused(kernel.ops.readlink(link.st_ino, Caller(pid=0))) == "ENOENT"
    assert await refused(kernel.ops.readlink(ROOT_INODE, Caller())) == "EINVAL"


async def test_requests_are_counted(kernel: Kernel) -> None:
    before = kernel.ops.requests
    await kernel.ops.statfs(Caller())
    assert kernel.ops.requests == before + 1
