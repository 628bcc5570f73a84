"""The kernel-facing tests under stock kernels. Minutes, run by `-m vm`; see README.md."""

import collections
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run")
SKIPPED = 77

LAST_LINES = 150
"""Of a failed run."""

RUNS = subprocess.run([RUN, "--list"], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.vm
@pytest.mark.parametrize("run", RUNS)
def test_under(run: str, capfd: pytest.CaptureFixture[str]) -> None:
    passes([str(RUN), run], capfd)


def passes(script: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Run it, and show what happens there as it happens."""
    lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
    command = subprocess.Popen(
        script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert command.stdout is not None
    try:
        with capfd.disabled():
            print()
            for line in command.stdout:
                print(f"  {line}", end="", flush=True)
                lines.append(line)
        status = command.wait()
    finally:
        command.terminate()
        command.wait()
    if status == SKIPPED:
        pytest.skip(next((line for line in lines if "SKIPPED" in line), "no virtual machine").strip())
    assert status == 0, "".join(lines)
