"""A machine of our own, as far as files and mounts go: an overlay of this one that a test may change as it likes.

Its root directory, mounts and packages are its own; processes, kernel and network are those of this machine.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import PATIENCE

CHECKOUT = Path(__file__).resolve().parents[1]

# Mounted anew or bound, as an overlay shows only one filesystem. /run/systemd must not be there: it would say that
# systemd runs. Every user may open /dev/fuse, as on a Debian.
_SETUP = """
set -e
mount -t tmpfs tmpfs {scratch}
mkdir {scratch}/upper {scratch}/work {scratch}/root
mount -t overlay overlay -o lowerdir=/,upperdir={scratch}/upper,workdir={scratch}/work {scratch}/root
cd {scratch}/root
for place in proc sys dev; do mount --rbind /$place $place; done
mount -t tmpfs -o mode=755 tmpfs run
mknod {scratch}/fuse c 10 229
chmod 666 {scratch}/fuse
mount --bind {scratch}/fuse dev/fuse
for place in {bound}; do
    mkdir -p .$place
    mount --rbind $place .$place
done
echo ready
exec sleep infinity
"""


class Machine:
    """The overlay; commands run in it as root.

    Args:
        scratch: an empty directory.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        bound = shlex.join(str(path) for path in dict.fromkeys((CHECKOUT, Path(sys.prefix))))
        setup = _SETUP.format(scratch=shlex.quote(str(scratch)), bound=bound)
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", setup], stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            self.end()
            raise OSError("no overlay can be made here")

    def path(self, path: str) -> Path:
        """A file of it, as seen from outside; not for what is mounted in it."""
        return Path(f"/proc/{self._holder.pid}/root{self._scratch}/root{path}")

    def command(self, *command: str) -> list[str]:
        """What runs a command in it from outside."""
        root = f"/proc/{self._holder.pid}/cwd"
        inside = ["nsenter", f"--target={self._holder.pid}", "--mount", f"--root={root}", "--"]
        environment = [
            "env",
            "--chdir=/",
            "-i",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL=C.UTF-8",
        ]
        return [*inside, *environment, "HOME=/root", *command]

    def run(self, command: str, code: int = 0) -> str:
        """What a line of shell says, both ways; it must end with `code`."""
        done = subprocess.run(
            self.command("sh", "-c", command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"{command} ended with {done.returncode}, not {code}:\n{done.stdout}"
        return done.stdout

    def install(self) -> None:
        """The commands limitfs and mount.limitfs, of this checkout."""
        limitfs = self.path("/usr/local/bin/limitfs")
        limitfs.parent.mkdir(parents=True, exist_ok=True)
        limitfs.unlink(missing_ok=True)
        limitfs.write_text(f'#!/bin/sh\nPYTHONPATH={CHECKOUT} exec {sys.executable} -m limitfs "$@"\n')
        limitfs.chmod(0o755)
        for name in ("mount.limitfs", "mount.fuse.limitfs"):
            helper = self.path(f"/usr/sbin/{name}")
            helper.unlink(missing_ok=True)
            helper.write_bytes((CHECKOUT / "mount/mount.limitfs").read_bytes())
            helper.chmod(0o755)

    def limits(self) -> list[str]:
        """Where limitfs is mounted in it."""
        table = self.run("cat /proc/self/mounts")
        return [line.split()[1] for line in table.splitlines() if line.split()[2] == "fuse.limitfs"]

    def wait_for_none(self) -> None:
        """Until limitfs is mounted nowhere in it."""
        deadline = time.monotonic() + PATIENCE
        while self.limits():
            assert time.monotonic() < deadline, self.limits()
            time.sleep(0.05)

    def end(self) -> None:
        if self._holder.poll() is None:
            for _place in self.limits():
                self.run("umount -l -a -t fuse.limitfs")
            self._holder.send_signal(signal.SIGKILL)
        self._holder.wait()
        if self._holder.stdout is not None:
            self._holder.stdout.close()


@contextlib.contextmanager
def machine_at(scratch: Path) -> Iterator[Machine]:
    scratch.mkdir()
    machine = Machine(scratch)
    try:
        yield machine
    finally:
        machine.end()
        os.rmdir(scratch)
