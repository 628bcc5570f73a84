"""A daemon that ends and is started again at the same mount point, and what the kernel holds for it."""

import contextlib
import ctypes
import errno
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import PATIENCE, Mount


class Service(Mount):
    """limitfs in the foreground, started again whenever it is told; its log goes on.

    Args:
        directory: of this test; rules are read from `rules` in it.
        options: of the mount.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.rules = directory / "rules"
        self.rules.mkdir()
        self.kept = directory / "state"
        self.program = ["-m", "limitfs"]
        self._options = [f"rules={self.rules}", f"state={self.kept}", *options]
        root = directory / "limits"
        root.mkdir()
        super().__init__(root, None, directory / "log")  # type: ignore[arg-type]
        self.start()

    def start(self) -> None:
        """Mount, and wait until it answers."""
        self.launch()
        self.await_answer()

    def launch(self) -> None:
        """Begin to mount."""
        command = [sys.executable, *self.program, "mount", str(self.root), "--foreground", "-v"]
        command += ["-o", ",".join(self._options)]
        with self.log.open("ab") as stderr:
            self.daemon = subprocess.Popen(command, stderr=stderr, stdin=subprocess.DEVNULL)

    def await_answer(self) -> None:
        """Wait until what was begun last answers."""
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self.daemon.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self.state("state")["pid"] == str(self.daemon.pid)
        return False

    def kill(self) -> None:
        """As the kernel's out-of-memory killer does."""
        self.daemon.send_signal(signal.SIGKILL)
        try:
            assert self.daemon.wait(PATIENCE) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            # It waits for itself: nothing else would free this machine of it.
            subprocess.run(["umount", "-f", self.root], check=False)
            raise

    def stop_in(self, call: int) -> None:
        """Stop its event loop, SIGSTOP, while a thread of it is in a system call of that number."""
        tasks = Path(f"/proc/{self.daemon.pid}/task")
        deadline = time.monotonic() + PATIENCE
        while True:
            self.daemon.send_signal(signal.SIGSTOP)
            # waitid(2) would wait for all threads; one that waits for the mount does not stop.
            while (tasks / f"{self.daemon.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.001)
            if any(_is_in(task, call) for task in tasks.iterdir()):
                return
            self.daemon.send_signal(signal.SIGCONT)
            assert time.monotonic() < deadline, "it never is"
            time.sleep(random.uniform(0.001, 0.01))

    def restart(self) -> None:
        self.kill()
        self.start()

    def armed(self) -> dict[str, str]:
        """Threshold by path, of all that is armed."""
        lines = [line.split(" ", 3) for line in self.read("state").splitlines() if line.startswith("watcher ")]
        assert len(lines) == int(self.state("state")["armed"])
        return {path: threshold for _key, path, _state, threshold in lines}

    def end(self) -> None:
        """Unmount, whatever state it is in."""
        subprocess.run(["umount", "-l", self.root], check=False, stderr=subprocess.DEVNULL)
        try:
            self.daemon.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
            raise
        print(self.log.read_text())

    def said(self) -> str:
        """The log so far."""
        return self.log.read_text()


def _is_in(task: Path, call: int) -> bool:
    return (task / "syscall").read_text().split()[0] == str(call)


@contextlib.contextmanager
def service(directory: Path, *options: str) -> Iterator[Service]:
    """A service of one test; nothing of Python's must have got into its log."""
    made = Service(directory, *options)
    try:
        yield made
    finally:
        made.end()
    assert "Traceback" not in made.said()


# What the kernel holds

_BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]
_BY_ID = {"prog_id": 13, "map_id": 14, "link_id": 30}
"""Commands of bpf(2): BPF_PROG_GET_FD_BY_ID, BPF_MAP_GET_FD_BY_ID, BPF_LINK_GET_FD_BY_ID."""
_libc = ctypes.CDLL(None, use_errno=True)


def hooks_of(pid: int) -> set[tuple[str, int]]:
    """Programs, maps and links of BPF that a process has open, by kind and number."""
    found = set()
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            pairs = (line.split(":") for line in info.read_text().splitlines() if line.count(":") == 1)
            found |= {(key, int(value)) for key, value in pairs if key in _BY_ID}
    return found


def exists(hook: tuple[str, int]) -> bool:
    """Whether the kernel still has it."""
    kind, number = hook
    attributes = (ctypes.c_uint32 * 4)(number)
    fd = _libc.syscall(_BPF, _BY_ID[kind], ctypes.byref(attributes), ctypes.sizeof(attributes))
    if fd >= 0:
        os.close(fd)
        return True
    assert ctypes.get_errno() == errno.ENOENT, os.strerror(ctypes.get_errno())
    return False
