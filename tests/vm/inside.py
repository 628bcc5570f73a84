"""In the guest: that it is what the variant says, and that limitfs finds out. Run by `guest` alone."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_bpf_kit import objects
from variants import VARIANT

from conftest import Helper, Mount
from kernelkit import turned
from limitfs.hearing.bpf.source import BpfFds

Make = Callable[..., Helper]

HOOKED = VARIANT not in ("nobtf", "nocaps")
RELEASE = tuple(map(int, os.uname().release.split(".")[:2]))
DROPPED = ("CAP_SYS_ADMIN", "CAP_BPF", "CAP_PERFMON", "CAP_SYS_RESOURCE", "CAP_NET_ADMIN")


def doctor(limits: Mount) -> dict[str, str]:
    """Its verdicts by what was looked at, with the privileges of the daemon."""
    args = limits.daemon.args
    assert isinstance(args, list)
    command = [*args[: args.index(sys.executable)], sys.executable, "-m", "limitfs", "doctor"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[1]: line for line in said.splitlines()}


def feature(limits: Mount, resource: str) -> tuple[str, str]:
    """Source and guarantee for a single process."""
    (line,) = (
        line for line in limits.read("features").splitlines() if line.startswith(f"{resource}\tprocess/PID\tsum")
    )
    return tuple(line.split("\t")[3:5])  # type: ignore[return-value]


def test_the_machine_is_a_stock_one() -> None:
    controllers = set(Path("/sys/fs/cgroup/cgroup.controllers").read_text().split())
    assert {"cpu", "memory", "pids", "io"} <= controllers, "cgroup v2 alone"
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert capabilities
    assert int(capabilities[1], 16).bit_count() == int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1


@pytest.mark.skipif(not HOOKED, reason="no hooks here")
def test_descriptors_are_hooked_in_the_way_of_the_variant() -> None:
    with turned() as reactor:
        source = BpfFds(reactor, objects())
        assert source.missing() is None
        hooks = source.engine.hooks
        assert hooks is not None
        programs = {program for some in hooks.needed for program in some & source.engine._programs}
        source.close()
    kprobes = any("@" in program for program in programs)
    assert (hooks.name, kprobes) == {
        "stock": ("fd_install", False),
        "full": ("fd_install", False),
        "kprobe": ("fd_install", True),
        "sysexit": ("sys_exit", False),
    }[VARIANT]


@pytest.mark.skipif(VARIANT not in ("stock", "full"), reason="not stock")
def test_everything_is_heard_exactly(limits: Mount) -> None:
    for resource in ("fds", "memory", "shared", "swap", "threads", "cpu"):
        assert feature(limits, resource)[1] == "exact", resource
    missing = [line for line in limits.read("features").splitlines() if line.startswith("#")]
    assert [line.partition(":")[0] for line in missing] == ["# memcg"], "the memory controller is of version 2"
    # Before 6.2 it says that descriptors are counted slowly.
    assert not [line for what, line in doctor(limits).items() if not line.startswith("ok") and what != "kernel"]


@pytest.mark.skipif(HOOKED, reason="hooks work here")
def test_without_hooks_it_falls_back_and_says_why(limits: Mount) -> None:
    assert feature(limits, "fds") == ("sampled", "sampled")
    assert feature(limits, "memory")[1] != "exact"
    assert feature(limits, "cpu") == ("cpu-timer", "exact"), "needs no privilege"
    missing = [line for line in limits.read("features").splitlines() if line.startswith("# ")]
    said = doctor(limits)
    if VARIANT == "nobtf":
        assert any("CONFIG_DEBUG_INFO_BTF" in line for line in missing), missing
        assert said["/sys/kernel/btf/vmlinux"].startswith("warn")
        assert feature(limits, "threads") == ("connector", "exact")
    else:
        assert any("CAP_BPF" in line for line in missing), missing
        assert all(said[name].startswith("warn") for name in DROPPED)
        if RELEASE >= (6, 6):
            assert feature(limits, "threads") == ("connector", "exact"), "needs no privilege any more"
        else:
            assert feature(limits, "threads") == ("sampled", "sampled")
            assert any("CAP_NET_ADMIN" in line for line in missing), missing


@pytest.mark.skipif(HOOKED, reason="hooks work here")
def test_a_sampled_threshold_rings(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", str(child.fds() + 5))
    child.open_files(5)
    limits.wait_for(lambda: "crossing=alarm" in limits.read(f"{path}/event"))
    assert limits.state(f"{path}/state")["guarantee"] == "sampled"
