"""pidfds: the end of a process."""

import os
import resource
from collections.abc import Callable
from typing import Any

import pytest

from kernelkit import Turned, begin
from limitfs.errors import Gone
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.source import Refused
from limitfs.resources import procfs
from limitfs.resources.model import Process

MakeHelper = Callable[..., Any]


def test_the_end_is_told_once_to_each(reactor: Turned, deaths: Deaths, helper: MakeHelper) -> None:
    child = helper()
    process = procfs.identify(child.pid)
    told: list[str] = []
    deaths.watch(process, lambda: told.append("first"))
    deaths.watch(process, lambda: told.append("second"))
    assert len(deaths) == 1, "one descriptor for both"
    child.process.kill()
    reactor.until(lambda: told)
    reactor.quiet(0.1)
    assert told == ["first", "second"]
    assert len(deaths) == 0


def test_a_zombie_has_ended(reactor: Turned, deaths: Deaths, helper: MakeHelper) -> None:
    child = helper()
    process = procfs.identify(child.pid)
    told: list[int] = []
    deaths.watch(process, lambda: told.append(1))
    child.process.kill()  # and nobody waits
    reactor.until(lambda: told)
    assert procfs.stat(child.pid).zombie
    with pytest.raises(Gone):
        deaths.watch(process, lambda: None)


def test_a_process_lives_as_long_as_its_last_thread(reactor: Turned, deaths: Deaths, helper: MakeHelper) -> None:
    code = """
import ctypes
def stay():
    time.sleep(0.5)
    os._exit(0)
threading.Thread(target=stay).start()
"""
    child = helper(code)
    told: list[int] = []
    deaths.watch(procfs.identify(child.pid), lambda: told.append(1))
    # The first thread ends alone: exit(2), not exit_group(2).
    begin(child, "ctypes.CDLL(None).syscall({'x86_64': 60}.get(os.uname().machine, 93), 0)")
    reactor.until(lambda: procfs.stat(child.pid).state == "Z" or told)
    assert not told
    reactor.until(lambda: told)


def test_cancelled_is_silent(reactor: Turned, deaths: Deaths, helper: MakeHelper) -> None:
    child, other = helper(), helper()
    told: list[str] = []
    kept = deaths.watch(procfs.identify(other.pid), lambda: told.append("other"))
    death = deaths.watch(procfs.identify(child.pid), lambda: told.append("child"))
    death.cancel()
    death.cancel()
    assert len(deaths) == 1
    child.process.kill()
    other.process.kill()
    reactor.until(lambda: told)
    assert told == ["other"]
    kept.cancel()


def test_one_who_fails_silences_nobody(reactor: Turned, deaths: Deaths, helper: MakeHelper) -> None:
    child = helper()
    process = procfs.identify(child.pid)
    told: list[int] = []

    def fail() -> None:
        raise ValueError("broken")

    deaths.watch(process, fail)
    deaths.watch(process, lambda: told.append(1))
    child.process.kill()
    reactor.until(lambda: told)


def test_what_has_ended_is_gone(deaths: Deaths, helper: MakeHelper) -> None:
    child = helper()
    process = procfs.identify(child.pid)
    child.end()
    with pytest.raises(Gone):
        deaths.watch(process, lambda: None)


def test_a_number_used_again_is_another_process(deaths: Deaths, helper: MakeHelper) -> None:
    child = helper()
    with pytest.raises(Gone, match="has ended"):
        deaths.watch(Process(child.pid, procfs.identify(child.pid).start - 1), lambda: None)
    assert len(deaths) == 0


def test_without_descriptors_it_refuses(deaths: Deaths, helper: MakeHelper) -> None:
    process = procfs.identify(helper().pid)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest := os.dup(0))  # of those that are free; there may be gaps
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(Refused):
            deaths.watch(process, lambda: None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
