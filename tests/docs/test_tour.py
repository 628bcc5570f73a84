"""The pages that are a tour, run as a reader would: their commands in one shell, on a real mount."""

import doctest
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from conftest import Mount

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MOUNT_POINT = "/limits"
PATIENCE = 120.0
"""Seconds for one command; none of them is timed."""


def steps(markdown: str) -> Iterator[tuple[str, str]]:
    """Every command of the console blocks, with the output that is shown below it."""
    for block in re.findall(r"^```console\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            yield command, output


class Shell:
    """One bash that runs commands one after the other, errors among the output."""

    def __init__(self, path: str = os.defpath, command: Sequence[str] = ("bash", "--norc", "--noprofile")) -> None:
        self.bash = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PATH": path, "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )

    def run(self, command: str) -> str:
        assert self.bash.stdin is not None
        # What is started in the background must not write where the answer is read.
        self.bash.stdin.write(f"{command}\nprintf '\\n%s\\n' END-OF-STEP\n".encode())
        self.bash.stdin.flush()
        return self._output(command)

    def _output(self, command: str) -> str:
        assert self.bash.stdout is not None
        output = b""
        deadline = time.monotonic() + PATIENCE
        while not output.endswith(b"\nEND-OF-STEP\n"):
            ready, _, _ = select.select([self.bash.stdout], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self.bash.stdout.fileno(), 1 << 16) if ready else b""
            assert chunk, f"{command!r} gave no end of output, only:\n{output.decode()}"
            output += chunk
        return output.removesuffix(b"\nEND-OF-STEP\n").decode()

    def end(self) -> None:
        os.killpg(self.bash.pid, signal.SIGKILL)
        self.bash.wait()
        for pipe in (self.bash.stdin, self.bash.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell that has the command limitfs of this checkout."""
    command = tmp_path / "limitfs"
    command.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m limitfs \"$@\"\n")
    command.chmod(0o755)
    shell = Shell(f"{tmp_path}:{os.environ['PATH']}")
    yield shell
    shell.end()


@pytest.mark.parametrize("page", ["README.md", "docs/each-or-sum.md"])
def test_the_tour(limits: Mount, shell: Shell, page: str) -> None:
    checker = doctest.OutputChecker()
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    tour = list(steps((ROOT / page).read_text(encoding="utf-8")))
    assert len(tour) > 20
    for command, shown in tour:
        got = shell.run(command.replace(MOUNT_POINT, str(limits.root)))
        want = shown.replace(MOUNT_POINT, str(limits.root))
        assert checker.check_output(want, got, flags), f"$ {command}\n{got}\n-- but {page} shows --\n{want}"


@pytest.mark.parametrize(
    "command",
    [
        "echo 5 > /limits/process/$!/fds/threshold",
        "inotifywait",
        "80% per 5s",
        "/limits/system/available/threshold",
        "mkdir",
        "limitfs wait",
    ],
)
def test_the_tour_has(command: str) -> None:
    assert any(command in done for done, _output in steps(README.read_text(encoding="utf-8")))


def test_an_output_that_differs_fails(shell: Shell) -> None:
    assert not doctest.OutputChecker().check_output("4\n", shell.run("echo 3"), doctest.ELLIPSIS)
