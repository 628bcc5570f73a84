"""A real boot: the package, systemd and a stock kernel, which takes minutes; see README.md."""

from pathlib import Path

import pytest
from test_vm import passes

BOOT = Path(__file__).with_name("boot")


@pytest.mark.vm
def test_boot(capfd: pytest.CaptureFixture[str]) -> None:
    passes([str(BOOT)], capfd)
