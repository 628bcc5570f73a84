"""What a service manager is told, and what the journal gets; see sd_notify(3) and sd-daemon(3)."""

import ctypes
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import PATIENCE, poll_for
from limitfs.service import JournalFormatter, Manager, logs_to_journal


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as here:
        here.bind(str(tmp_path / "notify"))
        here.settimeout(PATIENCE)
        yield here


def test_lines_arrive_in_one_datagram(manager: socket.socket) -> None:
    Manager({"NOTIFY_SOCKET": manager.getsockname()}).tell("READY=1", "STATUS=well, é")
    assert manager.recv(1000).decode() == "READY=1\nSTATUS=well, é"


def test_a_name_that_begins_with_at_is_abstract() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as here:
        here.bind(f"\0limitfs-test-{os.getpid()}")
        Manager({"NOTIFY_SOCKET": f"@limitfs-test-{os.getpid()}"}).tell("READY=1")
        assert poll_for(here.fileno(), events=select.POLLIN)
        assert here.recv(1000) == b"READY=1"


def test_without_a_manager_nothing_is_told() -> None:
    manager = Manager({})
    assert not manager
    assert manager.interval is None
    manager.tell("READY=1")


def test_one_that_is_gone_is_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Manager({"NOTIFY_SOCKET": str(tmp_path / "none")}).tell("READY=1")
    assert "cannot be told READY=1" in caplog.text


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_signs_of_life_come_twice_in_the_watchdogs_time(
    environment: dict[str, str], interval: float | None
) -> None:
    assert Manager(environment).interval == interval


class Daemon:
    """One that was started as a service manager starts it."""

    def __init__(self, root: Path, manager: socket.socket, **environment: str) -> None:
        command = [sys.executable, "-m", "limitfs", "mount", "--foreground", "--mkdir", str(root)]
        command += ["-o", "rules=none,state=none"]
        environment = {**os.environ, "NOTIFY_SOCKET": manager.getsockname(), **environment}
        self.root = root
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def end(self) -> str:
        """Terminate it; gives what it logged."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, said
        return said


def test_the_daemon_tells_when_it_answers_and_when_it_stops(tmp_path: Path, manager: socket.socket) -> None:
    daemon = Daemon(tmp_path / "limits", manager)
    try:
        assert manager.recv(1000).decode() == f"READY=1\nSTATUS={daemon.root} answers, 0 armed"
        (daemon.root / "system/fds/threshold").write_text("1000000000")
        environment = Path(f"/proc/{daemon.process.pid}/environ").read_text()
        assert "NOTIFY_SOCKET" in environment
    finally:
        said = daemon.end()
    assert manager.recv(1000) == b"STOPPING=1"
    assert said == ""
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(1000)


def test_signs_of_life_come_while_it_runs(tmp_path: Path, manager: socket.socket) -> None:
    daemon = Daemon(tmp_path / "limits", manager, WATCHDOG_USEC="1000000")
    try:
        assert manager.recv(1000).startswith(b"READY=1\n")
        assert manager.recv(1000).startswith(b"WATCHDOG=1\n")
        (daemon.root / "system/fds/threshold").write_text("1000000000")
        while b"1 armed" not in manager.recv(1000):
            pass
    finally:
        daemon.end()


PTRACE_ATTACH = 16


def test_when_it_hangs_it_ends_itself_and_says_where(tmp_path: Path, manager: socket.socket) -> None:
    daemon = Daemon(tmp_path / "limits", manager, WATCHDOG_USEC="1000000")
    assert manager.recv(1000).startswith(b"READY=1\n")
    # Stops the thread of the event loop, as SIGSTOP does it with all. The thread that asks it lives on.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    assert libc.ptrace(PTRACE_ATTACH, daemon.process.pid, None, None) == 0
    assert daemon.process.stderr is not None
    said = daemon.process.stderr.read()
    assert "Timeout" in said
    assert "most recent call first" in said
    assert "daemon.py" in said
    # The first wait tells of the stop.
    while not os.WIFEXITED(status := os.waitpid(daemon.process.pid, 0)[1]):
        pass
    daemon.process.returncode = os.waitstatus_to_exitcode(status)
    daemon.process.stderr.close()
    assert daemon.process.returncode == 1
    with pytest.raises(OSError, match="not connected"):
        os.listdir(daemon.root)
    subprocess.run(["umount", daemon.root], check=True)


def test_a_trace_shows_where_it_hangs(tmp_path: Path, manager: socket.socket) -> None:
    daemon = Daemon(tmp_path / "limits", manager)
    assert manager.recv(1000).startswith(b"READY=1\n")
    daemon.process.send_signal(signal.SIGABRT)
    _, said = daemon.process.communicate(timeout=PATIENCE)
    subprocess.run(["umount", "-l", daemon.root], check=True)
    assert daemon.process.returncode == -signal.SIGABRT
    assert "most recent call first" in said
    assert "daemon.py" in said


# --- the journal


def test_standard_error_is_the_journal_if_its_numbers_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    there = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{there.st_dev}:{there.st_ino}")
    assert logs_to_journal()
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    assert not logs_to_journal()
    monkeypatch.delenv("JOURNAL_STREAM")
    assert not logs_to_journal()


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 2)],
)
def test_every_line_has_its_priority(level: int, priority: int) -> None:
    record = logging.LogRecord("limitfs", level, __file__, 1, "one\ntwo %s", ("three",), None)
    assert JournalFormatter().format(record) == f"<{priority}>one\n<{priority}>two three"
