"""What the tests of a real mount share: another user who answers, event lines, inotify."""

import ast
import contextlib
import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from inotify_simple import INotify, flags

from conftest import NOBODY, PATIENCE, Mount, lines_of, mounted

Lines = list[dict[str, str]]


def events(limits: Mount, path: str) -> Lines:
    """The lines of an event file."""
    return lines_of(limits.read(f"{path}/event"))


def crossings(lines: Lines) -> list[str]:
    return [line["crossing"] for line in lines]


class Other:
    """Another user's shell, so to speak: evaluates expressions, and says what the kernel said."""

    CODE = """
import os, sys, errno, select
def write(path, text, flags=os.O_WRONLY):
    fd = os.open(path, flags)
    try:
        return os.write(fd, text.encode() if isinstance(text, str) else text)
    finally:
        os.close(fd)
def read(path):
    with open(path) as file:
        return file.read()
space = dict(globals())
for line in sys.stdin:
    try:
        answer = repr(eval(line, space))
    except OSError as error:
        answer = f"OSError({error.errno})"
    print(ascii(answer), flush=True)
"""

    def __init__(self, uid: int = NOBODY) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", self.CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=uid,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, expression: str) -> object:
        """Its value there.

        Raises:
            OSError: as it was raised there.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(expression, file=self.process.stdin, flush=True)
        answer = ast.literal_eval(self.process.stdout.readline())
        if match := re.fullmatch(r"OSError\((\d+)\)", answer):
            raise OSError(int(match[1]), os.strerror(int(match[1])))
        return ast.literal_eval(answer)

    def refused(self, expression: str) -> str:
        """The name of the errno that it gets; empty when it gets none."""
        return refused(lambda: self.ask(expression))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def other(uid: int = NOBODY) -> Iterator[Other]:
    made = Other(uid)
    try:
        yield made
    finally:
        made.end()


def refused(call: Callable[[], object]) -> str:
    """The name of the errno that `call` ends with; empty when with none."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0].replace("ENOTSUP", "EOPNOTSUPP")
    return ""


@contextlib.contextmanager
def private_mount(directory: Path, *options: str) -> Iterator[Mount]:
    """A mount of one test, that other users can reach."""
    for parent in (directory, *directory.parents):
        if str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    with mounted(directory, *options) as mount:
        yield mount


ALL_EVENTS = (
    flags.ACCESS | flags.MODIFY | flags.ATTRIB | flags.CLOSE_WRITE | flags.CLOSE_NOWRITE | flags.OPEN
    | flags.CREATE | flags.DELETE | flags.DELETE_SELF | flags.MOVED_FROM | flags.MOVED_TO
)  # fmt: skip


class Watching:
    """inotify on some paths."""

    def __init__(self, *paths: Path | str) -> None:
        self._inotify = INotify()
        self._paths = {self._inotify.add_watch(str(path), ALL_EVENTS): str(path) for path in paths}

    def __enter__(self) -> "Watching":
        return self

    def __exit__(self, *_: object) -> None:
        self._inotify.close()

    def next(self, seconds: float = PATIENCE, settle: float = 0.3) -> list[tuple[str, str, str]]:
        """What comes until it has been quiet for a moment: (path, name of the flag, file name)."""
        found = self._inotify.read(timeout=int(seconds * 1000))
        while more := self._inotify.read(timeout=int(settle * 1000)) if found else []:
            found += more
        return [
            (self._paths[event.wd], str(flag.name), event.name)
            for event in found
            for flag in flags.from_mask(event.mask)
        ]


class Storm:
    """A child that forks short-lived children all the time."""

    def __enter__(self) -> "Storm":
        code = "import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        code += "while os.getppid() != 1:\n    if os.fork() == 0:\n        os._exit(0)\n"
        self._process = subprocess.Popen([sys.executable, "-S", "-c", code])
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work` in so many threads; what one raises is raised."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 2)
        assert not thread.is_alive(), "it hangs"
    if failures:
        raise failures[0]
