"""A plug-in for pytest in the guest: what the variant is, and away with the better ways to hook."""

import os

import pytest

VARIANT = os.environ["LIMITFS_VM_VARIANT"]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Here, as limitfs cannot be imported when plug-ins are."""
    del session
    from limitfs.hearing.bpf.engine import Hooks
    from limitfs.hearing.bpf.source import BpfFds

    def is_kprobe(way: Hooks) -> bool:
        return any("@" in program for some in way.needed for program in some)

    # Only for this process: a daemon takes the best way there is.
    if VARIANT == "kprobe":
        BpfFds._ways = tuple(way for way in BpfFds._ways if is_kprobe(way))
    elif VARIANT == "sysexit":
        BpfFds._ways = tuple(way for way in BpfFds._ways if way.name == "sys_exit")


def pytest_report_header() -> str:
    return f"Linux {os.uname().release}, {VARIANT}"
