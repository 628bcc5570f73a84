"""Bad input: every errno of the contract, through a real mount, and what `last_error` says of it."""

import os
import select
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mountkit import Other, other, private_mount, refused

from conftest import NOBODY, Helper, Mount, poll_for

Make = Callable[..., Helper]


@pytest.fixture(scope="module")
def nobody() -> Iterator[Other]:
    with other() as user:
        yield user


def explained(limits: Mount, call: Callable[[], object], errno: str, *words: str) -> str:
    """`call` is refused with `errno`, and the newest line of `last_error` has `words`."""
    assert refused(call) == errno
    line = limits.last_error()
    for word in words:
        assert word in line
    return line


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "nothing was written"),
        ("many", "'many' at column 1"),
        (">= 200 claer 180", "'claer'"),
        ("200 clear", "the end"),
        ("5G", "'G'"),
        ("off 3", "nothing may follow"),
        ("200\n300", "300"),
        ("٢٠٠", "column 1"),
    ],
)
def test_einval(limits: Mount, helper: Make, text: str, wrong: str) -> None:
    path = f"process/{helper().pid}/fds/threshold"
    line = explained(limits, lambda: limits.write(path, text), "EINVAL", f"{path}:", wrong, ";")
    assert line.startswith(f"{path}: {text.strip()!a} ")
    assert limits.read(path) == "off\n"


@pytest.mark.parametrize("text", ["5x", "-5", "1 2 3", ""])
def test_einval_of_a_limit(limits: Mount, helper: Make, text: str) -> None:
    path = f"process/{helper().pid}/fds/limit"
    before = limits.read(path)
    explained(limits, lambda: limits.write(path, text), "EINVAL", path)
    assert limits.read(path) == before


def test_einval_of_mode_and_hearing(limits: Mount, helper: Make) -> None:
    explained(limits, lambda: limits.write("process/fds/mode", "every"), "EINVAL", "'every'", "each or sum")
    path = f"process/{helper().pid}/fds/hearing"
    explained(limits, lambda: limits.write(path, "loud"), "EINVAL", "'loud'", "auto, sampled")


@pytest.mark.parametrize("name", [".hidden", "(private)", "a\nb", "x" * 256, "\udcff"])
def test_einval_of_a_name(limits: Mount, helper: Make, name: str) -> None:
    directory = limits / f"process/{helper().pid}/fds"
    before = os.listdir(directory)
    explained(limits, lambda: os.mkdir(directory / name), "EINVAL")
    assert os.listdir(directory) == before


@pytest.mark.parametrize("name", ["warn", "two words", "größer", "x" * 255])
def test_names_that_are_good(limits: Mount, helper: Make, name: str) -> None:
    directory = limits / f"process/{helper().pid}/fds" / name
    os.mkdir(directory)
    assert (directory / "threshold").read_text() == "off\n"
    assert name in os.listdir(directory.parent)
    os.rmdir(directory)


@pytest.mark.parametrize("text", [">= 100000000T", "200 clear 300", "150%", "1G per 1s"])
def test_erange(limits: Mount, helper: Make, text: str) -> None:
    child = helper()
    path = f"process/{child.pid}/virtual/threshold"  # no limit is set, so no share of it can be
    limits.write(f"process/{child.pid}/virtual/limit", "max")
    explained(limits, lambda: limits.write(path, text), "ERANGE", path, text.split()[0])
    assert limits.read(path) == "off\n"


def test_erange_of_a_limit(limits: Mount, helper: Make) -> None:
    path = f"process/{helper().pid}/fds/limit"
    explained(
        limits, lambda: limits.write(path, "200 100"), "ERANGE", "soft limit 200 is above the hard limit 100"
    )


def test_eopnotsupp(limits: Mount, helper: Make) -> None:
    explained(limits, lambda: limits.write("system/memory/limit", "5G"), "EOPNOTSUPP", "system/memory/limit")
    explained(limits, lambda: limits.write("process/stack/mode", "sum"), "EOPNOTSUPP", "each")
    path = f"process/{helper().pid}/fds/threshold"
    explained(limits, lambda: limits.write(path, "unusual"), "EOPNOTSUPP", "unusual")


def test_esrch(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    names = ("threshold", "limit", "hearing")
    fds = [os.open(limits / path / name, os.O_RDWR) for name in names]
    event = os.open(limits / path / "event", os.O_RDWR)
    directory = os.open(limits / path, os.O_PATH)
    child.end()
    limits.wait_for(lambda: not (limits / path).exists())
    for fd, name in zip(fds, names, strict=True):
        explained(limits, lambda fd=fd: os.write(fd, b"5"), "ESRCH", f"{path}/{name}")
        os.close(fd)
    explained(limits, lambda: os.write(event, b"5"), "ESRCH", f"{path}/event")
    os.close(event)
    # Nor does a way in that was open before make a watcher of what has ended.
    for name in ("usage", "state", "event"):
        assert refused(lambda name=name: read_at(directory, name)) in ("ESRCH", "ENOENT")
    os.close(directory)


def read_at(directory: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def test_ebusy(limits: Mount, helper: Make) -> None:
    path = f"process/{helper().pid}/fds/event"
    fd = os.open(limits / path, os.O_RDWR)
    os.write(fd, b"500")
    explained(limits, lambda: os.write(fd, b"600"), "EBUSY", path, "'600'", "open the file again")
    os.close(fd)


def test_a_refused_private_condition_leaves_room_for_a_good_one(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds/event"
    fd = os.open(limits / path, os.O_RDWR)
    explained(limits, lambda: os.write(fd, b"off"), "EINVAL", "cannot be off")
    explained(limits, lambda: os.write(fd, b"rubbish"), "EINVAL", "'rubbish'")
    os.write(fd, b">= 1")
    assert poll_for(fd)
    assert b'watcher="(private)"' in os.read(fd, 4096)
    os.close(fd)


def test_eexist(limits: Mount, helper: Make) -> None:
    directory = limits / f"process/{helper().pid}/fds"
    os.mkdir(directory / "warn")
    for name in ("warn", "usage"):
        assert refused(lambda name=name: os.mkdir(directory / name)) == "EEXIST"
    assert refused(lambda: os.mkdir(limits / "system")) == "EEXIST"


def test_enospc(tmp_path: Path, helper: Make) -> None:
    child = helper(uid=NOBODY)
    with private_mount(tmp_path, "max_watchers=2") as limits, other() as nobody:
        fds = limits / f"process/{child.pid}/fds"
        nobody.ask(f"os.mkdir('{fds}/warn')")
        nobody.ask(f"write('{fds}/threshold', '500')")
        third = f"write('{fds.parent}/threads/threshold', '500')"
        assert nobody.refused(third) == "ENOSPC"
        said = str(nobody.ask(f"read('{limits / 'last_error'}')"))
        assert "has 2 watchers already" in said
        assert "max_watchers=N" in said
        assert nobody.refused(f"os.mkdir('{fds}/panic')") == "ENOSPC"
        assert nobody.refused(f"write('{fds}/event', '5', os.O_RDWR)") == "ENOSPC"
        # What one gives back, he may have again; and root has no quota.
        nobody.ask(f"write('{fds}/threshold', 'off')")
        assert nobody.refused(third) == ""
        for number in range(3):
            os.mkdir(fds / f"root{number}")


def test_e2big(limits: Mount, helper: Make) -> None:
    path = f"process/{helper().pid}/fds/threshold"

    def write(size: int) -> None:
        fd = os.open(limits / path, os.O_WRONLY)
        try:
            os.write(fd, b"700".ljust(size))
        finally:
            os.close(fd)

    write(4096)
    assert limits.read(path) == ">= 700\n"
    for size in (4097, 10_000, 1 << 20):
        line = explained(limits, lambda size=size: write(size), "E2BIG", path, "at most 4096")
        assert len(line) < 1000


def test_eacces(limits: Mount, helper: Make, nobody: Other) -> None:
    path = f"process/{helper().pid}/fds"
    for name in ("threshold", "limit", "hearing"):
        assert nobody.refused(f"write('{limits / path / name}', '5')") == "EACCES"
        said = str(nobody.ask(f"read('{limits / 'last_error'}')")).splitlines()[-1]
        assert said.startswith(f"{path}/{name}:")
        assert "it belongs to user 0" in said
        assert "its owner and root may" in said
    assert nobody.refused(f"read('{limits / path / 'event'}')") == "EACCES"
    assert nobody.refused(f"os.mkdir('{limits / path / 'warn'}')") == "EACCES"
    assert limits.read(f"{path}/threshold") == "off\n"


def test_what_nobody_can_write_root_cannot_either(limits: Mount, helper: Make) -> None:
    path = f"process/{helper().pid}/fds"
    for name in ("usage", "state", "peak"):
        explained(limits, lambda name=name: limits.write(f"{path}/{name}", "5"), "EACCES", f"{path}/{name}")


OPERATIONS: dict[str, Callable[[Path, Path], object]] = {
    "unlink": lambda there, _pid: os.unlink(there / "README"),
    "rename": lambda there, _pid: os.rename(there / "README", there / "LIESMICH"),
    "rename directory": lambda there, pid: os.rename(pid, there / "mine"),
    "create": lambda there, _pid: os.open(there / "new", os.O_CREAT | os.O_WRONLY),
    "create below": lambda _there, pid: os.open(pid / "fds/new", os.O_CREAT | os.O_WRONLY),
    "mkfifo": lambda there, _pid: os.mkfifo(there / "new"),
    "link": lambda there, _pid: os.link(there / "README", there / "new"),
    "symlink": lambda there, _pid: os.symlink("README", there / "new"),
    "chmod": lambda there, _pid: os.chmod(there / "README", 0o666),
    "chmod event": lambda _there, pid: os.chmod(pid / "fds/event", 0o666),
    "chown": lambda _there, pid: os.chown(pid / "fds/threshold", NOBODY, NOBODY),
    "mkdir": lambda there, _pid: os.mkdir(there / "new"),
    "mkdir process": lambda there, _pid: os.mkdir(there / "process/4194999"),
    "mkdir below": lambda _there, pid: os.mkdir(pid / "new"),
    "rmdir": lambda there, _pid: os.rmdir(there / "system"),
    "rmdir process": lambda _there, pid: os.rmdir(pid),
    "rmdir resource": lambda _there, pid: os.rmdir(pid / "fds"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_eperm(limits: Mount, helper: Make, name: str) -> None:
    directory = limits / f"process/{helper().pid}"
    explained(limits, lambda: OPERATIONS[name](limits.root, directory), "EPERM", ": ", "; ")
    assert sorted(os.listdir(limits.root)) == [
        "README", "births", "event", "features", "group", "last_error", "partition", "process", "rules", "state",
        "system",
    ]  # fmt: skip
    assert (limits / "README").stat().st_mode & 0o777 == 0o444


def test_enoent(limits: Mount) -> None:
    for name in (
        "nothing",
        "process/0",
        "process/4194999",
        "process/01",
        "process/-1",
        "system/stack",
        "process/x",
    ):
        assert refused(lambda name=name: os.stat(limits / name)) == "ENOENT"
    # An odd name in a path is no way to forge a line or to break one.
    assert refused(lambda: os.mkdir(limits / "a\nok\udcff")) == "EPERM"
    assert "'a\\nok\\udcff'" in limits.last_error()


def test_extended_attributes_and_the_like_are_politely_declined(limits: Mount) -> None:
    path = limits / "README"
    assert refused(lambda: os.setxattr(path, "user.x", b"1")) == "EOPNOTSUPP"
    assert refused(lambda: os.getxattr(path, "user.x")) in ("EOPNOTSUPP", "ENODATA")
    with path.open("rb") as file:
        assert refused(lambda: os.fsync(file.fileno())) == ""
        assert refused(lambda: os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)) == ""
    path = limits / "system/memory/threshold"
    with path.open("r+b") as file:
        assert refused(lambda: os.posix_fallocate(file.fileno(), 0, 10)) in ("EOPNOTSUPP", "EPERM", "EINVAL")


# What is said afterwards


def test_ok_after_a_success(tmp_path: Path, helper: Make) -> None:
    child = helper()
    with private_mount(tmp_path) as limits:
        path = f"process/{child.pid}/fds/threshold"
        assert limits.read("last_error") == "ok\n"
        assert refused(lambda: limits.write(path, "rubbish")) == "EINVAL"
        assert limits.last_error() != "ok"
        limits.write(path, "700")
        limits.write(path, "701")
        assert limits.read("last_error").splitlines()[1:] == ["ok"]
        for number in range(40):
            assert refused(lambda number=number: limits.write(path, f"rubbish{number}")) == "EINVAL"
        lines = limits.read("last_error").splitlines()
        assert len(lines) == 16
        assert "rubbish39" in lines[-1]
        # The same goes for mkdir and rmdir.
        os.mkdir(limits / f"process/{child.pid}/fds/warn")
        assert limits.last_error() == "ok"


def test_errors_are_each_users_own(limits: Mount, helper: Make, nobody: Other) -> None:
    path = limits / f"process/{helper().pid}/fds/threshold"
    assert refused(lambda: limits.write(str(path), "nonsense of root")) == "EINVAL"
    assert nobody.refused(f"write('{path}', 'secret')") == "EACCES"
    his = str(nobody.ask(f"read('{limits / 'last_error'}')"))
    assert "nonsense" not in his
    assert "belongs to user 0" in his
    assert "belongs to user 0" not in limits.last_error()


# What is written, and how


@pytest.mark.parametrize(
    "data",
    [b"\0", b"\xff\xfe\x00", b"200\xff", bytes(range(256)), os.urandom(4096), b"2\x0000", b"\x1b[31m200"],
)
def test_garbage_is_einval_and_told_in_printable_words(limits: Mount, helper: Make, data: bytes) -> None:
    path = f"process/{helper().pid}/fds/threshold"
    fd = os.open(limits / path, os.O_WRONLY)
    explained(limits, lambda: os.write(fd, data), "EINVAL", path)
    os.close(fd)
    assert limits.read("last_error").isascii()
    assert limits.last_error().isprintable()


@pytest.mark.parametrize("data", [b"700", b"700\n", b"700\0", b"  700 \t\n", b"700\n\0", b"\n700\n"])
def test_what_stands_around_a_command_is_dropped(limits: Mount, helper: Make, data: bytes) -> None:
    path = f"process/{helper().pid}/fds/threshold"
    fd = os.open(limits / path, os.O_WRONLY)
    assert os.write(fd, data) == len(data)
    os.close(fd)
    assert limits.read(path) == ">= 700\n"


@pytest.mark.parametrize(
    "line", ["echo 700 > $T", "echo 700 >> $T", "echo -n 700 > $T", "printf 700 >> $T", "echo 700 | tee $T",
             "echo 700 | dd of=$T status=none", "cp /dev/stdin $T <<< 700",
             "exec 3<>$T; echo 700 >&3; echo 700 >&3"]
)  # fmt: skip
def test_a_shells_ways_to_write(limits: Mount, helper: Make, line: str) -> None:
    path = limits / f"process/{helper().pid}/fds/threshold"
    subprocess.run(["bash", "-c", line], env={**os.environ, "T": str(path)}, check=True, stdout=subprocess.DEVNULL)
    assert path.read_text() == ">= 700\n"


def test_offsets_of_a_write_are_ignored(limits: Mount, helper: Make) -> None:
    path = limits / f"process/{helper().pid}/fds/threshold"
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"700", 1000)
    assert os.pread(fd, 100, 0) == b">= 700\n"
    # After a write the next read starts the answer, wherever the position is.
    os.write(fd, b"800")
    assert os.read(fd, 100) == b">= 800\n"
    assert os.read(fd, 100) == b""
    os.ftruncate(fd, 0)
    os.close(fd)
    assert path.read_text() == ">= 800\n"


def test_a_file_of_text_is_always_ready(limits: Mount) -> None:
    with (limits / "features").open("rb") as file:
        poller = select.poll()
        poller.register(file)
        assert poller.poll(0) == [(file.fileno(), select.POLLIN | select.POLLOUT)]
