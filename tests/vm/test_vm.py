"""The kernel-facing tests under stock kernels, and a real boot; they take minutes each, see README.md."""

import collections
import os
import subprocess
import time
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run")
BOOT = Path(__file__).with_name("boot")
SKIPPED = 77

LAST_LINES = 150
"""Of a failed run."""

LATEST = float(os.environ.get("LIMITFS_VM_MINUTES", "inf")) * 60
"""Seconds after which no machine is begun any more."""

BEGUN = time.monotonic()

RUNS = subprocess.run([RUN, "--list"], capture_output=True, text=True, check=True).stdout.split()
MACHINES = [[str(RUN), run] for run in RUNS[:-1]] + [[str(BOOT)], [str(RUN), RUNS[-1]]]
"""What matters most first, as there may not be time for all."""


@pytest.mark.vm
@pytest.mark.parametrize("script", MACHINES, ids=lambda script: " ".join([Path(script[0]).name, *script[1:]]))
def test_machine(script: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Run it, and show what happens there as it happens."""
    if time.monotonic() - BEGUN > LATEST:
        pytest.skip(f"OUT OF TIME, NOT TESTED: {' '.join(script)} was not begun after {LATEST / 60:.0f} minutes")
    lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as command:
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
    if status == SKIPPED:
        pytest.skip(next((line for line in lines if "SKIPPED" in line), "no virtual machine").strip())
    assert status == 0, "".join(lines)
