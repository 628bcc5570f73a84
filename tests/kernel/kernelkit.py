"""Sources against the real kernel: a reactor that is turned by hand, and a listener that remembers.

A plug-in of pytest, for its fixtures: see pytest_plugins in conftest.py.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cgroupkit import Cgroup, cgroup

from conftest import PATIENCE
from limitfs.hearing.connector import Connector
from limitfs.hearing.cputimer import block_signal
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Want, Witness
from limitfs.resources import members
from limitfs.resources.model import Measured, Resource, Target
from limitfs.watching.condition import parse

# Before any thread is started: the timers' signal kills who does not block it.
block_signal()


@dataclass
class Heard:
    """A listener."""

    readings: list[tuple[Target, float]] = field(default_factory=list)
    ended: list[Target] = field(default_factory=list)
    losses: int = 0
    lapses: int = 0
    peaks: dict[Target, float] = field(default_factory=dict)

    def reading(self, member: Target, value: float) -> None:
        self.readings.append((member, value))

    def gone(self, member: Target, peak: float | None = None) -> None:
        self.ended.append(member)
        if peak is not None:
            self.peaks[member] = peak

    def witnessed(self, member: Target, witness: Witness) -> None:
        """Of no interest here."""

    def missed(self, member: Target, alarms: int) -> None:
        """None of these sources says that."""
        raise AssertionError((member, alarms))

    def lost(self, count: int) -> None:
        self.losses += count

    def lapsed(self) -> None:
        self.lapses += 1

    def values(self, member: Target | None = None) -> list[float]:
        return [value for who, value in self.readings if member in (None, who)]


class Turned(Reactor):
    """A reactor that a test turns."""

    def until(self, what: Callable[[], object], seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, "it did not happen"
            self.pump(0.1)

    def quiet(self, seconds: float) -> int:
        """Turn for so long; how often there was anything to do."""
        turns = 0
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            turns += bool(self._epoll.poll(min(left, max(0.0, self.next_time() - self.now()))))
            self.pump(0)
        return turns


@contextlib.contextmanager
def turned() -> Iterator[Turned]:
    """A reactor; afterwards nothing may be registered, and no descriptor left open."""
    before = set(os.listdir("/proc/self/fd"))
    reactor = Turned()
    yield reactor
    while reactor.next_time() <= reactor.now():
        reactor.pump()  # what is done slowly
    assert not reactor._readers, "a descriptor is still registered"
    reactor.close()
    left = {
        fd for fd in os.listdir("/proc/self/fd") if fd not in before and os.path.lexists(f"/proc/self/fd/{fd}")
    }
    assert not {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in left - helpers_pipes(left)}


@pytest.fixture
def reactor() -> Iterator[Turned]:
    with turned() as made:
        yield made


@pytest.fixture
def connector(reactor: Turned) -> Connector:
    return Connector(reactor)


@pytest.fixture
def deaths(reactor: Turned) -> Deaths:
    return Deaths(reactor)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """A cgroup of the unified hierarchy."""
    with cgroup() as made:
        yield made


def helpers_pipes(fds: set[str]) -> set[str]:
    """Those of the children that a test made, which live until its end."""
    return {fd for fd in fds if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")}


def want(resource: Resource, target: Target, text: str, each: bool = False) -> Want:
    """As `watching` makes it."""
    condition = parse(text, resource.unit, resource.rate)
    assert condition is not None

    def levels(member: Measured) -> tuple[float, float]:
        return condition.levels(members.whole(resource, member))

    return Want(resource, target, each, condition, levels)


def burn(seconds: float) -> str:
    """A line for a helper: use that much CPU time more, in the thread that runs it."""
    code = f"end = time.thread_time() + {seconds}\nwhile time.thread_time() < end: pass"
    return f"exec({code!r})"


def begin(helper: Any, line: str) -> None:
    """Have a helper run a line, without waiting for it."""
    helper.process.stdin.write(line.encode() + b"\n")
    helper.process.stdin.flush()


class Goer:
    """A process that goes one of the ways of ways.c."""

    def __init__(self, program: Path, way: str) -> None:
        self.process = subprocess.Popen([program, way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        said = self._line()
        if said.startswith("no: "):
            self.end()
            pytest.skip(f"this kernel has no such way: {said[4:]}")
        assert said == "ready"

    @property
    def pid(self) -> int:
        return self.process.pid

    def go(self, count: int) -> list[int]:
        """That often there and back; returns the processes that were born."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        *born, done = self._line().split()
        assert done == "done"
        return [int(pid) for pid in born]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="session")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program."""
    program = tmp_path_factory.mktemp("ways") / "ways"
    subprocess.run(["gcc", "-pthread", "-o", program, Path(__file__).with_name("ways.c")], check=True)
    return program


@pytest.fixture
def goer(ways: Path) -> Iterator[Callable[[str], Goer]]:
    """Makes such processes; they end with the test."""
    made: list[Goer] = []

    def make(way: str) -> Goer:
        made.append(Goer(ways, way))
        made[-1].go(10)
        return made[-1]

    yield make
    for one in made:
        one.end()
