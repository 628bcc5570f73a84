"""Fixtures for every layer: a real mount, real processes, another user."""

import contextlib
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest_plugins = ["kernelkit"]

PATIENCE = float(os.environ.get("LIMITFS_PATIENCE", 30))
"""Seconds to wait for what must happen; a test that needs them fails. An emulated machine is slow."""

EXCURSIONS = int(os.environ.get("LIMITFS_EXCURSIONS", 10_000))
"""How often a threshold is reached and left, to miss none; a multiple of 4. An emulated machine takes fewer."""

NOBODY = 65534


@dataclass
class Mount:
    """A limitfs of our own."""

    root: Path
    daemon: subprocess.Popen[bytes]
    log: Path

    def __truediv__(self, path: str) -> Path:
        return self.root / path

    def write(self, path: str, text: str) -> None:
        """In one piece, as a shell's echo does it."""
        fd = os.open(self.root / path, os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(fd, text.encode() + b"\n")
        finally:
            os.close(fd)

    def read(self, path: str) -> str:
        return (self.root / path).read_text()

    def state(self, path: str) -> dict[str, str]:
        """A flat-keyed file."""
        return dict(line.split(" ", 1) for line in self.read(path).splitlines() if " " in line)

    def last_error(self) -> str:
        return self.read("last_error").splitlines()[-1]

    def wait_for(self, what: Callable[[], object]) -> None:
        """Until `what` is true."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.02)


def wait_mounted(root: Path, daemon: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (root / "features").exists():
        assert daemon.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@contextlib.contextmanager
def mounted(directory: Path, *options: str) -> Iterator[Mount]:
    """limitfs in the foreground; afterwards its log must be clean."""
    root = directory / "limits"
    root.mkdir()
    log = directory / "log"
    # What tests/vm takes the daemon's privileges with.
    command = shlex.split(os.environ.get("LIMITFS_TEST_DAEMON", ""))
    command += [sys.executable, "-m", "limitfs", "mount", str(root), "--foreground"]
    # The rules of this machine are none of the tests' business.
    command += ["-o", f"rules=none,state={directory / 'state'}"]
    for option in options:
        command += ["-o", option]
    with log.open("wb") as stderr:
        daemon = subprocess.Popen(command, stderr=stderr, stdin=subprocess.DEVNULL)
    try:
        wait_mounted(root, daemon, log)
        yield Mount(root, daemon, log)
    finally:
        subprocess.run(["umount", "-l", root], check=False, stderr=subprocess.DEVNULL)
        try:
            daemon.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
            raise
        finally:
            said = log.read_text()
            print(said)
    assert "Traceback" not in said
    assert "WARNING" not in said
    assert "ERROR" not in said


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """One mount for the tests of a module."""
    directory = tmp_path_factory.mktemp("mount")
    os.chmod(directory, 0o755)
    for parent in directory.parents:
        if str(parent).startswith("/tmp/"):
            os.chmod(parent, os.stat(parent).st_mode | 0o055)
    with mounted(directory) as mount:
        yield mount


class Helper:
    """A child process that does what it is told: the thing that is watched."""

    def __init__(self, code: str = "", uid: int = 0) -> None:
        program = f"import os, sys, socket, threading, time, mmap\nheld = []\n{code}\n"
        program += "print('ready', flush=True)\n"
        program += "for line in sys.stdin:\n    exec(line)\n    print('done', flush=True)\n"
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=uid or None,
        )
        self._expect(b"ready\n")

    @property
    def pid(self) -> int:
        return self.process.pid

    def do(self, code: str) -> None:
        """Run a line there, and wait until it is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(code.encode() + b"\n")
        self.process.stdin.flush()
        self._expect(b"done\n")

    def open_files(self, count: int) -> None:
        self.do(f"held += [os.open('/dev/null', os.O_RDONLY) for _ in range({count})]")

    def close_files(self, count: int) -> None:
        self.do(f"[os.close(held.pop()) for _ in range({count})]")

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _expect(self, line: bytes) -> None:
        assert self.process.stdout is not None
        got = self.process.stdout.readline()
        assert got == line, got


@pytest.fixture
def helper() -> Iterator[Callable[..., Helper]]:
    """Makes children; they end with the test."""
    made: list[Helper] = []

    def make(code: str = "", uid: int = 0) -> Helper:
        made.append(Helper(code, uid))
        return made[-1]

    yield make
    for child in made:
        child.end()


def poll_for(fd: int, seconds: float = PATIENCE, events: int = select.POLLPRI) -> int:
    """The events that a poll(2) of `fd` reports, 0 for none in time."""
    poller = select.poll()
    poller.register(fd, events)
    ready = poller.poll(seconds * 1000)
    return ready[0][1] if ready else 0


def lines_of(text: str) -> list[dict[str, str]]:
    """Event lines, taken apart."""
    from limitfs.watching.crossing import parse_line

    return [parse_line(line) for line in text.splitlines()]
