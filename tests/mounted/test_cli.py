"""The command line on a mount of its own: what a user types, what comes back, and the exit codes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import PATIENCE, Helper, lines_of
from limitfs import mounting
from limitfs.errors import Gone
from limitfs.resources import procfs

Make = Callable[..., Helper]


def limitfs(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "limitfs", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 2, check=False)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """A daemon in the background, as `limitfs mount` leaves it."""
    at = tmp_path / "limits"
    at.mkdir()
    done = limitfs("mount", at, "-o", f"log={tmp_path / 'log'}")
    assert done.returncode == 0, done.stderr
    yield at
    subprocess.run(["umount", "-l", at], check=False, capture_output=True)


def test_mount_returns_when_the_mount_answers(mountpoint: Path) -> None:
    assert (mountpoint / "features").read_text().startswith("resource\t")
    again = limitfs("mount", mountpoint)
    assert again.returncode == 1
    assert "already mounted" in again.stderr


def test_of_many_who_mount_at_once_one_does(tmp_path: Path) -> None:
    at = tmp_path / "limits"
    at.mkdir()
    command = [sys.executable, "-m", "limitfs", "mount", str(at), "-o", f"log={tmp_path / 'log'}"]
    begun = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        ends = [(one.communicate(timeout=PATIENCE * 2)[1].partition("\n")[0], one.returncode) for one in begun]
        assert sorted(ends) == [("", 0), *[(f"limitfs: {at} is already mounted", 1)] * 3]
        assert len([mount for mount in mounting.limitfs_mounts() if mount.mountpoint == str(at)]) == 1
        assert (at / "features").read_text().startswith("resource\t")
    finally:
        while mounting.is_mounted(str(at)):
            subprocess.run(["umount", "-l", at], check=True)


def daemon_of(mountpoint: Path) -> int:
    """Its number; 0 where no daemon answers."""
    return int(mounting.facts(str(mountpoint)).get("pid", 0))


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def ended(pid: int) -> bool:
    try:
        return procfs.stat(pid).zombie
    except Gone:
        return True


def test_signals_between_a_crash_and_the_next_daemon(tmp_path: Path) -> None:
    at, pid_file = tmp_path / "limits", tmp_path / "pid"
    at.mkdir()
    options = f"rules=none,state={tmp_path / 'state'},log={tmp_path / 'log'}"
    try:
        done = limitfs("mount", at, "--respawn", "--pid-file", pid_file, "-o", options)
        assert done.returncode == 0, done.stderr
        keeper = int(pid_file.read_text())
        for number in (signal.SIGHUP, signal.SIGTERM):
            crashed = daemon_of(at)
            os.kill(crashed, signal.SIGKILL)
            # It has waited for it, and pauses now.
            wait_for(lambda pid=crashed: not Path(f"/proc/{pid}").exists())
            os.kill(keeper, number)
            if number == signal.SIGHUP:
                wait_for(lambda pid=crashed: daemon_of(at) not in (0, pid))
                assert pid_file.read_text() == f"{keeper}\n"
        wait_for(lambda: ended(keeper))
        assert not pid_file.exists()
        assert daemon_of(at) == 0
    finally:
        subprocess.run(["umount", "-l", at], check=False, capture_output=True)


def test_status_shows_the_mount_and_what_is_armed(mountpoint: Path, helper: Make) -> None:
    child = helper()
    (mountpoint / f"process/{child.pid}/fds/threshold").write_text("1000\n")
    done = limitfs("status", mountpoint)
    assert done.returncode == 0
    assert str(mountpoint) in done.stdout
    assert f"process/{child.pid}/fds clear >= 1000" in done.stdout


def test_umount_ends_the_daemon(mountpoint: Path) -> None:
    pid = int(dict(line.split(" ", 1) for line in (mountpoint / "state").read_text().splitlines())["pid"])
    done = limitfs("umount", mountpoint)
    assert done.returncode == 0, done.stderr
    assert not os.path.ismount(mountpoint)
    assert ended(pid)
    assert limitfs("umount", mountpoint).returncode == 1


def test_umount_says_who_keeps_it_busy(mountpoint: Path) -> None:
    with (mountpoint / "event").open():
        done = limitfs("umount", mountpoint)
        assert done.returncode == 1
        assert str(os.getpid()) in done.stderr
        assert "--lazy" in done.stderr
        assert limitfs("umount", "--lazy", mountpoint).returncode == 0


def test_unknown_option_is_named(tmp_path: Path) -> None:
    done = limitfs("mount", tmp_path, "-o", "frobnicate=3")
    assert done.returncode == 2
    assert "frobnicate" in done.stderr


def test_wait_prints_crossings_as_they_come(mountpoint: Path, helper: Make) -> None:
    child = helper()
    fds = mountpoint / f"process/{child.pid}/fds"
    (fds / "threshold").write_text(f"{child.fds() + 3}\n")
    command = [sys.executable, "-m", "limitfs", "wait", str(fds), "--count", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        # It prints what comes after it has begun: cross again until it has.
        deadline = time.monotonic() + PATIENCE
        while waiting.poll() is None:
            assert time.monotonic() < deadline
            child.open_files(3)
            time.sleep(0.2)
            child.close_files(3)
            time.sleep(0.2)
        (line,) = lines_of(waiting.stdout.read())
    assert waiting.returncode == 0
    assert line["path"] == f"process/{child.pid}/fds"


def test_wait_times_out(mountpoint: Path) -> None:
    done = limitfs("wait", mountpoint / "system/available/event", "--timeout", "0.5")
    assert done.returncode == 124
    assert done.stdout == ""
