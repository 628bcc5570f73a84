"""Programs that know nothing of limitfs, while processes are born and die all the time around them."""

import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mountkit import Storm, private_mount, refused

from conftest import PATIENCE, Helper, Mount, poll_for

Make = Callable[..., Helper]

GENEROUS = 600.0
"""Seconds after which a client hangs."""

ALARMING = ("Input/output error", "Function not implemented", "Traceback", "Stale", "Transport endpoint")


@pytest.fixture(scope="module", autouse=True)
def storm() -> Iterator[None]:
    with Storm():
        yield


def run(limits: Mount, command: str) -> str:
    """What a shell command says, in the mount point; it may complain of processes that ended, of nothing else."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=limits.root, capture_output=True, timeout=GENEROUS, check=False
    )
    complaints = done.stderr.decode(errors="replace")
    for word in ALARMING:
        assert word not in complaints
    assert limits.daemon.poll() is None
    return done.stdout.decode(errors="replace")


@pytest.fixture
def here(helper: Make) -> str:
    """A process of ours, which lives."""
    return f"process/{helper().pid}"


def test_find_and_cat(limits: Mount, here: str) -> None:
    found = run(limits, "find . -type f").splitlines()
    assert f"./{here}/fds/usage" in found
    assert any(f"./{here}/thread/" in name for name in found)
    assert "./system/memory/usage" in found
    assert "./README" in found
    text = run(limits, f"find system {here} README features state last_error event -type f | xargs cat")
    assert "crossing" in text or "limitfs" in text


def test_find_all_and_cat_all(limits: Mount) -> None:
    text = run(limits, "find . -path './process/*/thread/[0-9]*' -prune -o -type f -print0 | xargs -0 cat")
    assert text.count("threshold off") > 100


def test_grep(limits: Mount, here: str) -> None:
    assert f"{here}/fds/state:state off" in run(limits, f"grep -r 'state off' {here} system").splitlines()
    assert "fds" in run(limits, "grep -rl 'state off' process --include=state | head -500")


def test_tar(limits: Mount, here: str, tmp_path: Path) -> None:
    run(limits, f"tar cf {tmp_path}/all.tar system {here} README process/self")
    listed = subprocess.run(["tar", "tf", tmp_path / "all.tar"], capture_output=True, text=True, check=True).stdout
    assert f"{here}/fds/threshold" in listed.splitlines()
    assert "process/self" in listed.splitlines()


def test_cp(limits: Mount, here: str, tmp_path: Path) -> None:
    run(limits, f"cp -r {here} system README process/self {tmp_path}")
    pid = here.split("/")[1]
    assert (tmp_path / "README").read_text() == limits.read("README")
    assert (tmp_path / pid / "fds/threshold").read_text() == "off\n"
    assert (tmp_path / "system/memory/state").read_text() == limits.read("system/memory/state")
    run(limits, f"cp -a {here}/fds {tmp_path}/archived")
    assert (tmp_path / "archived/mode").exists() == (limits / here / "fds/mode").exists()


def test_rsync(limits: Mount, here: str, tmp_path: Path) -> None:
    run(limits, f"rsync -a {here} system {tmp_path}")
    assert (tmp_path / here.split("/")[1] / "fds/threshold").exists()
    assert (tmp_path / "system/memory").is_dir()


@pytest.mark.parametrize("command", ["df .", "df -i .", "df -a", "stat -f .", "stat .", "mountpoint ."])
def test_about_the_mount(limits: Mount, command: str) -> None:
    subprocess.run(command.split(), cwd=limits.root, check=True, capture_output=True, timeout=GENEROUS)
    run(limits, command)


def test_ls_and_du(limits: Mount, here: str) -> None:
    assert "self -> " in run(limits, "ls -lR process/[0-9]*/fds process/self; ls -l process")
    assert "threshold" in run(limits, f"ls -lR {here}")
    assert run(limits, "ls -la").count("\n") >= 9
    assert run(limits, f"du -s {here} system")


def test_walk(limits: Mount, here: str) -> None:
    errors: list[OSError] = []
    seen = 0
    for _directory, names, files in os.walk(limits.root, onerror=errors.append):
        seen += len(files)
        names[:] = [name for name in names if name != "thread"]
    assert seen > 500
    assert {error.errno for error in errors} <= {2, 3}
    del here


def test_listing_while_others_are_born(limits: Mount, here: str) -> None:
    """Every process that lives all the while is in every listing, once."""
    for _ in range(20):
        names = os.listdir(limits / "process")
        assert names.count(here.split("/")[1]) == 1
        assert len(set(names)) == len(names)


def test_a_shell_in_a_process_that_ends(limits: Mount, helper: Make) -> None:
    child = helper()
    directory = os.open(limits / f"process/{child.pid}/fds", os.O_RDONLY | os.O_DIRECTORY)
    try:
        child.end()
        limits.wait_for(lambda: not (limits / f"process/{child.pid}").exists())
        assert refused(lambda: os.stat("usage", dir_fd=directory)) in ("", "ESRCH", "ENOENT")
        os.listdir(directory)
    finally:
        os.close(directory)


# The end of a mount


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_and_unmounts(tmp_path: Path, helper: Make, number: signal.Signals) -> None:
    with private_mount(tmp_path) as limits:
        limits.write(f"process/{helper().pid}/fds/threshold", "500")
        limits.daemon.send_signal(number)
        assert limits.daemon.wait(PATIENCE) == 0
        assert not os.path.ismount(limits.root)
        assert os.listdir(limits.root) == []


def test_umount_while_a_reader_is_there(tmp_path: Path) -> None:
    with private_mount(tmp_path) as limits:
        with (limits / "README").open("rb") as file:
            assert subprocess.run(["umount", limits.root], stderr=subprocess.DEVNULL, check=False).returncode != 0
            assert file.read()
            assert limits.read("README")
        subprocess.run(["umount", limits.root], check=True)
        assert limits.daemon.wait(PATIENCE) == 0


def test_a_killed_daemon_ends_its_readers(tmp_path: Path) -> None:
    with private_mount(tmp_path) as limits:
        fd = os.open(limits / "event", os.O_RDONLY)
        woken: list[int] = []
        poller = threading.Thread(target=lambda: woken.append(poll_for(fd)), daemon=True)
        poller.start()
        limits.daemon.kill()
        limits.daemon.wait()
        assert refused(lambda: os.read(fd, 100)) in ("ENOTCONN", "ECONNABORTED")
        poller.join(PATIENCE)
        assert woken[0] & select.POLLERR
        # The kernel says it once more; the descriptor is closed all the same.
        assert refused(lambda: os.close(fd)) in ("", "ENOTCONN", "ECONNABORTED")
