"""The largest file that a process has open for writing, on file systems of all kinds."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import PATIENCE, Helper, Mount
from limitfs.errors import Gone, Unsupported
from limitfs.resources import RESOURCES, files, procfs
from limitfs.resources.model import Limit, System

MakeHelper = Callable[..., Helper]
FILESIZE = RESOURCES["filesize"]
MIB = 1 << 20


def usage(helper: Helper) -> float:
    return FILESIZE.usage(procfs.identify(helper.pid))


def test_it_grows_with_the_file_and_goes_with_the_descriptor(helper: MakeHelper, tmp_path: Path) -> None:
    process = helper()
    assert usage(process) == 0
    process.do(f"f = os.open({str(tmp_path / 'file')!r}, os.O_WRONLY | os.O_CREAT)")
    assert usage(process) == 0
    process.do("os.write(f, b'x' * 1000)")
    assert usage(process) == 1000
    process.do(f"os.truncate(f, {5 * MIB})")  # a hole is part of the size
    assert usage(process) == 5 * MIB
    process.do("os.ftruncate(f, 7)")
    assert usage(process) == 7
    process.do("os.close(f)")
    assert usage(process) == 0


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ("os.O_RDONLY", 0),
        ("os.O_PATH", 0),
        ("os.O_WRONLY", MIB),
        ("os.O_RDWR", MIB),
        ("os.O_WRONLY | os.O_APPEND", MIB),
    ],
)
def test_only_what_is_open_for_writing(helper: MakeHelper, tmp_path: Path, flags: str, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    process = helper(f"f = os.open({str(path)!r}, {flags})")
    assert usage(process) == size


def test_the_largest_counts_alone(helper: MakeHelper, tmp_path: Path) -> None:
    process = helper()
    for size in (300, 5000, 40):
        process.do(f"held.append(open({str(tmp_path)!r} + '/{size}', 'wb')); held[-1].truncate({size})")
    assert usage(process) == 5000


def test_a_deleted_file_counts(helper: MakeHelper, tmp_path: Path) -> None:
    process = helper(f"f = open({str(tmp_path / 'a b')!r}, 'wb'); f.truncate(4096); os.unlink(f.name)")
    assert usage(process) == 4096


SHM = "f'/dev/shm/limitfs-{os.getpid()}'"


@pytest.mark.parametrize(
    "code",
    ["f = os.memfd_create('name')", f"f = os.open({SHM}, os.O_RDWR | os.O_CREAT); os.unlink({SHM})"],
    ids=["memfd", "shm"],
)
def test_a_file_in_memory_counts_as_the_limit_holds_for_it(helper: MakeHelper, code: str) -> None:
    process = helper(f"import resource, signal; {code}")
    process.do("os.write(f, b'x' * 5000)")
    assert usage(process) == 5000
    process.do(
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))"
    )
    assert FILESIZE.limit(procfs.identify(process.pid)) == Limit(6000, 6000)
    process.do("assert os.write(f, b'x' * 5000) == 1000")
    assert usage(process) == 6000 == FILESIZE.whole(procfs.identify(process.pid))


@pytest.mark.parametrize(
    "code",
    [
        "held = os.pipe()",
        "held = socket.socketpair()",
        "held = open('/dev/null', 'w')",
        "held = os.openpty()",
        "held = os.open('/tmp', os.O_RDONLY)",
    ],
)
def test_what_is_no_regular_file_has_no_size(helper: MakeHelper, code: str) -> None:
    assert usage(helper(code)) == 0


def test_a_mapping_alone_has_no_descriptor(helper: MakeHelper, tmp_path: Path) -> None:
    process = helper(f"f = open({str(tmp_path / 'file')!r}, 'w+b'); f.truncate({MIB})")
    process.do("libc = __import__('ctypes').CDLL(None)")
    process.do(f"assert libc.mmap(None, {MIB}, 3, 1, f.fileno(), 0) != -1; f.close()")
    assert usage(process) == 0


@given(st.lists(st.tuples(st.sampled_from("wra"), st.integers(0, 1 << 40)), max_size=8))
@settings(max_examples=40, deadline=None)
def test_agrees_with_psutil(opened: list[tuple[str, int]]) -> None:
    me = procfs.identify(os.getpid())
    before = FILESIZE.usage(me)
    held = []
    try:
        for mode, size in opened:
            held.append(os.memfd_create("x"))
            os.truncate(held[-1], size)
            if mode == "r":
                reader = os.open(f"/proc/self/fd/{held[-1]}", os.O_RDONLY)
                os.close(held.pop())
                held.append(reader)
        sizes = [size for mode, size in opened if mode != "r"]
        assert FILESIZE.usage(me) == max([before, *sizes])
    finally:
        for fd in held:
            os.close(fd)


def test_psutil_sees_the_same_files(helper: MakeHelper, tmp_path: Path) -> None:
    process = helper()
    for mode, size in (("wb", 100), ("ab", 900), ("r+b", 500), ("rb", 7000)):
        path = tmp_path / f"{size}"
        path.write_bytes(bytes(size))
        process.do(f"held.append(open({str(path)!r}, {mode!r})); mode = {mode!r}")
    seen = psutil.Process(process.pid).open_files()
    assert usage(process) == max(os.path.getsize(each.path) for each in seen if each.mode != "r") == 900


# File systems that do not answer


SERVER = """
import os, stat, sys, pyfuse3, trio

class OneFile(pyfuse3.Operations):
    async def getattr(self, inode, ctx=None):
        about = pyfuse3.EntryAttributes()
        about.st_ino = inode
        about.st_mode = stat.S_IFDIR | 0o777 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o666
        about.st_size = 8192
        about.attr_timeout = about.entry_timeout = 0
        return about

    async def lookup(self, parent, name, ctx=None):
        return await self.getattr(2)

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=1)

pyfuse3.init(OneFile(), sys.argv[1], set(pyfuse3.default_options))
print("ready", flush=True)
trio.run(pyfuse3.main)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A mount whose attributes the kernel asks for every time, and who serves it."""
    mount = tmp_path / "mount"
    mount.mkdir()
    with subprocess.Popen([sys.executable, "-c", SERVER, mount], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield mount, process
        subprocess.run(["umount", "-l", mount], check=True)
        process.send_signal(signal.SIGCONT)
        process.kill()


def test_a_file_system_that_hangs_is_not_waited_for(
    helper: MakeHelper, server: tuple[Path, subprocess.Popen[bytes]]
) -> None:
    mount, serving = server
    process = helper(f"f = os.open({str(mount / 'file')!r}, os.O_RDWR)")
    target = procfs.identify(process.pid)
    link = next(
        f"/proc/{process.pid}/fd/{fd}" for fd, name in procfs.links(process.pid).items() if "mount" in name
    )
    serving.send_signal(signal.SIGSTOP)
    with (
        ThreadPoolExecutor(1) as looking,
        subprocess.Popen([sys.executable, "-c", f"import os; os.stat({link!r})"]) as asking,
    ):
        try:
            with pytest.raises(subprocess.TimeoutExpired):  # whoever asks it, waits
                asking.wait(1)
            for name, expected in (("filesize", 8192), ("channels", 0), ("connections", 0)):
                assert looking.submit(RESOURCES[name].usage, target).result(PATIENCE) == expected
        finally:
            serving.send_signal(signal.SIGCONT)
        assert asking.wait(PATIENCE) == 0


def test_a_file_on_the_mount_that_is_asked(helper: MakeHelper, limits: Mount, tmp_path: Path) -> None:
    """The daemon would wait for itself."""
    process = helper(f"f = os.open({str(limits / 'system/memory/threshold')!r}, os.O_RDWR)")
    process.do(f"g = open({str(tmp_path / 'file')!r}, 'wb'); g.truncate(4096)")
    assert limits.read(f"process/{process.pid}/filesize/usage") == "4096\n"
    assert limits.read(f"process/{process.pid}/channels/usage") == "0\n"


def test_a_file_of_which_the_kernel_tells_nothing_is_left_out(
    helper: MakeHelper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = helper(f"f = open({str(tmp_path / 'file')!r}, 'wb'); f.truncate(4096)")
    assert usage(process) == 4096
    monkeypatch.setattr(files, "_statx", lambda _path: None)
    assert usage(process) == 0


# Who is not there


def test_gone(helper: MakeHelper) -> None:
    process = helper()
    target = procfs.identify(process.pid)
    process.end()
    for ask in (FILESIZE.usage, FILESIZE.limit):
        with pytest.raises(Gone):
            ask(target)


def test_only_processes_have_one() -> None:
    with pytest.raises(Unsupported, match="not measured for a system"):
        FILESIZE.usage(System())
    assert FILESIZE.rlimit == resource.RLIMIT_FSIZE
    assert not FILESIZE.summable
