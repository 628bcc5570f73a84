"""Who may do what, tried as another user on his own processes and on root's."""

import contextlib
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mountkit import Other, other, private_mount, refused

from conftest import NOBODY, Helper, Mount, lines_of

Make = Callable[..., Helper]


@pytest.fixture(scope="module")
def nobody() -> Iterator[Other]:
    with other() as user:
        yield user


def mode_of(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_uid, stat.S_IMODE(about.st_mode)


def test_owners_and_modes(limits: Mount, helper: Make) -> None:
    mine, his = helper(), helper(uid=NOBODY)
    for child, uid in ((mine, 0), (his, NOBODY)):
        path = limits / f"process/{child.pid}"
        assert mode_of(path) == (uid, 0o755)
        assert mode_of(path / "thread") == (uid, 0o755)
        assert mode_of(path / f"thread/{child.pid}") == (uid, 0o755)
        assert mode_of(path / "fds") == (uid, 0o755)
        modes = {name: mode_of(path / "fds" / name) for name in os.listdir(path / "fds")}
        assert modes == {
            "usage": (uid, 0o444),
            "limit": (uid, 0o644),
            "peak": (uid, 0o444),
            "threshold": (uid, 0o644),
            "hearing": (uid, 0o644),
            "state": (uid, 0o444),
            "event": (uid, 0o600),
        }
    for name in ("README", "features", "last_error", "state", "event", "births"):
        assert mode_of(limits / name) == (0, 0o444)
    assert mode_of(limits / "system/memory/threshold") == (0, 0o644)
    assert mode_of(limits / "process/fds/event") == (0, 0o600)


def test_his_own(limits: Mount, helper: Make, nobody: Other) -> None:
    child = helper(uid=NOBODY)
    path = limits / f"process/{child.pid}/fds"
    nobody.ask(f"write('{path}/hearing', 'sampled')")
    nobody.ask(f"write('{path}/threshold', '>= 1')")
    assert nobody.ask(f"read('{path}/threshold')") == ">= 1\n"
    (line,) = lines_of(str(nobody.ask(f"read('{path}/event')")))
    assert line["uid"] == str(NOBODY)
    if refused(lambda: resource.prlimit(child.pid, resource.RLIMIT_NOFILE, (300, 300))):
        # Without CAP_SYS_RESOURCE the daemon cannot set limits of other users' processes.
        assert nobody.refused(f"write('{path}/limit', '100 200')") == "EACCES"
        assert "CAP_SYS_RESOURCE" in str(nobody.ask(f"read('{limits.root}/last_error')"))
    else:
        nobody.ask(f"write('{path}/limit', '100 200')")
        assert nobody.ask(f"read('{path}/limit')") == "100 200\n"
        assert nobody.refused(f"write('{path}/limit', '100 300')") == "EACCES"  # only root raises a hard limit
    nobody.ask(f"os.mkdir('{path}/warn')")
    nobody.ask(f"write('{path}/warn/threshold', '500')")
    assert mode_of(path / "warn/threshold") == (NOBODY, 0o644)
    nobody.ask(f"write('{path}/event', '500', os.O_RDWR)")
    nobody.ask(f"os.rmdir('{path}/warn')")


def test_others(limits: Mount, helper: Make, nobody: Other) -> None:
    directory = limits / f"process/{helper().pid}"
    path = directory / "fds"
    for name in ("usage", "limit", "state", "peak", "threshold", "hearing"):
        assert nobody.ask(f"read('{path}/{name}')")
    assert nobody.ask(f"read('{directory}/thread/fds/usage')") if (directory / "thread/fds").exists() else True
    for name in ("threshold", "limit", "hearing"):
        assert nobody.refused(f"write('{path}/{name}', '5')") == "EACCES"
        assert nobody.refused(f"os.truncate('{path}/{name}', 0)") == "EACCES"
        assert nobody.ask(f"os.access('{path}/{name}', os.W_OK)") is False
        assert nobody.ask(f"os.access('{path}/{name}', os.R_OK)") is True
    assert nobody.refused(f"read('{path}/event')") == "EACCES"
    assert nobody.refused(f"os.utime('{path}/event')") == "EACCES"
    assert nobody.refused(f"os.open('{path}/event', os.O_RDWR)") == "EACCES"
    assert nobody.refused(f"os.mkdir('{path}/warn')") == "EACCES"
    assert nobody.refused(f"write('{limits.root}/system/memory/threshold', '5%')") == "EACCES"
    assert nobody.refused(f"write('{limits.root}/process/fds/threshold', '5')") == "EACCES"
    assert nobody.refused(f"os.mkdir('{limits.root}/system/memory/warn')") == "EACCES"


def test_root_may_on_his(limits: Mount, helper: Make, nobody: Other) -> None:
    path = limits / f"process/{helper(uid=NOBODY).pid}/fds"
    (path / "threshold").write_text("500")
    assert refused(lambda: (path / "event").read_text()) == ""
    os.mkdir(path / "roots")
    # A watcher belongs to who made it, also on another's process.
    assert mode_of(path / "roots") == (0, 0o755)
    assert nobody.refused(f"write('{path}/roots/threshold', '5')") == "EACCES"
    assert nobody.refused(f"read('{path}/roots/event')") == "EACCES"
    assert nobody.refused(f"os.rmdir('{path}/roots')") == "EACCES"
    nobody.ask(f"os.mkdir('{path}/his')")
    os.rmdir(path / "his")
    os.rmdir(path / "roots")


def test_a_file_that_was_opened_before_is_asked_again(limits: Mount, tmp_path: Path) -> None:
    program = setuid_sleep(tmp_path)
    # He opens his own threshold, and becomes another program, with root's rights; a friend keeps the file.
    code = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1] + f'/process/{os.getpid()}/fds/threshold', os.O_WRONLY)\n"
        "if os.fork() == 0:\n"
        "    sys.stdin.readline()\n"
        "    try: print(os.write(fd, b'5'), flush=True)\n"
        "    except OSError as error: print(error.strerror, flush=True)\n"
        "    os._exit(0)\n"
        "os.execv(sys.argv[2], [sys.argv[2], '1000'])\n"
    )
    command = [sys.executable, "-S", "-c", code, limits.root, program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=NOBODY)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        limits.wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"Permission denied\n"
        assert limits.read(f"process/{process.pid}/fds/threshold") == "off\n"
    finally:
        process.kill()
        process.communicate()


def setuid_sleep(directory: Path) -> Path:
    program = directory / "sleep"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    program.chmod(0o4755)
    for parent in directory.parents:
        if str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    directory.chmod(0o755)
    if os.statvfs(directory).f_flag & os.ST_NOSUID:
        pytest.skip("set-user-ID programs do nothing here")
    return program


@contextlib.contextmanager
def running(command: list[str | Path]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, user=NOBODY)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_setuid_child_is_not_his(limits: Mount, tmp_path: Path, nobody: Other) -> None:
    with running([setuid_sleep(tmp_path), "1000"]) as process:
        path = limits / f"process/{process.pid}/fds"
        limits.wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
        assert mode_of(path)[0] == 0
        assert nobody.refused(f"write('{path}/threshold', '5')") == "EACCES"
        assert nobody.refused(f"write('{path}/limit', '5')") == "EACCES"
        assert nobody.refused(f"read('{path}/event')") == "EACCES"


def test_a_process_that_may_not_be_traced_is_not_his(limits: Mount, helper: Make, nobody: Other) -> None:
    child = helper("import ctypes", uid=NOBODY)
    path = limits / f"process/{child.pid}/fds"
    nobody.ask(f"write('{path}/threshold', '500')")
    child.do("ctypes.CDLL(None).prctl(4, 0)")  # PR_SET_DUMPABLE
    assert nobody.refused(f"write('{path}/threshold', '600')") == "EACCES"
    assert nobody.refused(f"write('{path}/limit', '10 10')") == "EACCES"


# hidepid


def test_hidepid_1_closes(tmp_path: Path, helper: Make) -> None:
    mine, his = helper(), helper(uid=NOBODY)
    with private_mount(tmp_path, "hidepid=1") as limits, other() as nobody:
        path = limits / f"process/{mine.pid}"
        assert str(mine.pid) in list(nobody.ask(f"os.listdir('{limits.root}/process')"))
        assert mode_of(path) == (0, 0o700)
        limits.read(f"process/{mine.pid}/fds/usage")
        for _ in range(2):  # once more after root has walked there, and the kernel knows the names
            assert nobody.refused(f"os.listdir('{path}')") == "EACCES"
            assert nobody.refused(f"os.listdir('{path}/fds')") == "EACCES"
            assert nobody.refused(f"read('{path}/fds/usage')") == "EACCES"
            assert nobody.refused(f"os.stat('{path}/fds/usage')") == "EACCES"
        assert nobody.ask(f"read('{limits.root}/process/{his.pid}/fds/usage')")
        top = str(nobody.ask(f"read('{limits.root}/process/fds/top')"))
        assert f" {his.pid} " in top
        assert f" {mine.pid} " not in top
        assert limits.read(f"process/{mine.pid}/fds/usage")


def test_hidepid_2_hides(tmp_path: Path, helper: Make) -> None:
    mine, his = helper(), helper(uid=NOBODY)
    with private_mount(tmp_path, "hidepid=2") as limits, other() as nobody:
        path = limits / f"process/{mine.pid}"
        limits.read(f"process/{mine.pid}/fds/usage")
        limits.write("process/fds/threshold", ">= 1")
        seen = list(nobody.ask(f"os.listdir('{limits.root}/process')"))
        assert str(his.pid) in seen
        assert str(mine.pid) not in seen
        assert nobody.refused(f"os.stat('{path}')") == "ENOENT"
        assert nobody.refused(f"read('{path}/fds/usage')") == "ENOENT"
        assert nobody.ask(f"read('{limits.root}/process/{his.pid}/fds/usage')")
        state = str(nobody.ask(f"read('{limits.root}/process/fds/state')"))
        assert f"member {his.pid} " in state
        assert f"member {mine.pid} " not in state
        assert f"member {mine.pid} " in limits.read("process/fds/state")
        assert str(mine.pid) in os.listdir(limits / "process")


def test_without_hidepid_all_is_seen(limits: Mount, helper: Make, nobody: Other) -> None:
    mine = helper()
    assert str(mine.pid) in list(nobody.ask(f"os.listdir('{limits.root}/process')"))
    assert nobody.ask(f"os.listdir('{limits.root}/process/{mine.pid}')")


# Quotas


def test_max_open(tmp_path: Path, helper: Make) -> None:
    child = helper(uid=NOBODY)
    with private_mount(tmp_path, "max_open=3") as limits, other() as nobody:
        path = f"{limits.root}/process/{child.pid}/fds/usage"
        open_one = f"globals().setdefault('kept', []).append(os.open('{path}', os.O_RDONLY))"
        for _ in range(3):
            nobody.ask(open_one)
        assert nobody.refused(open_one) == "EMFILE"
        assert refused(lambda: limits.read("README")) == ""
        nobody.ask("os.close(kept.pop())")
        limits.wait_for(lambda: nobody.refused(open_one) == "")


def test_no_one_else_enters_without_allow_other(tmp_path: Path) -> None:
    with private_mount(tmp_path, "noallow_other") as limits, other() as nobody:
        assert nobody.refused(f"os.listdir('{limits.root}')") == "EACCES"
        assert os.listdir(limits.root)
