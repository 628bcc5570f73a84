"""Memory, heard by kmem:rss_stat."""

import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_bpf_kit import Alarmed, links, loaded, settle

from conftest import EXCURSIONS
from kernelkit import Goer, Turned, want
from limitfs.hearing.bpf.source import BpfRss
from limitfs.resources import procfs
from limitfs.resources.memory import Memory, Shared
from limitfs.resources.model import Process, Processes, Target

PAGE = mmap.PAGESIZE
MEMORY = Memory()

MakeHelper = Callable[..., Any]

MAPPED = (
    "m = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
    "m.madvise(mmap.MADV_NOHUGEPAGE)\n"
    "def excursion(pages):\n"
    "    for i in range(pages): m[i * mmap.PAGESIZE] = 1\n"
    "    m.madvise(mmap.MADV_DONTNEED)\n"
    "for _ in range(100): excursion(200)"
)


@pytest.fixture
def source(reactor: Turned) -> Iterator[BpfRss]:
    with loaded(BpfRss, reactor) as source:
        yield source


def resident(child: Any) -> int:
    """Pages, exactly: statm may leave out what processors keep for themselves."""
    with open(f"/proc/{child.pid}/smaps_rollup") as lines:
        return next(int(line.split()[1]) * 1024 // PAGE for line in lines if line.startswith("Rss:"))


def test_every_excursion_counts(reactor: Turned, source: BpfRss, helper: MakeHelper) -> None:
    child = helper(MAPPED)
    child.do("for _ in range(100): excursion(200)")
    # The interpreter itself takes some pages more or less while it works.
    level = (resident(child) + 100) * PAGE
    heard = Alarmed(level=level)
    armed = source.arm(want(MEMORY, procfs.identify(child.pid), f">= {level}"), heard)
    child.do(f"for _ in range({EXCURSIONS}): excursion(200)")
    settle(reactor)
    armed.disarm()
    assert heard.total == EXCURSIONS


def test_below_is_silent_and_wakes_nobody(reactor: Turned, source: BpfRss, helper: MakeHelper) -> None:
    child = helper(MAPPED)
    child.do("for _ in range(100): excursion(200)")
    level = (resident(child) + 250) * PAGE
    heard = Alarmed(level=level)
    armed = source.arm(want(MEMORY, procfs.identify(child.pid), f">= {level}"), heard)
    settle(reactor)
    child.do("for _ in range(1000): excursion(200)")
    quiet = reactor.quiet(0.2)
    armed.disarm()
    assert quiet == 0
    assert heard.total == 0


def test_value_is_exact(reactor: Turned, source: BpfRss, helper: MakeHelper) -> None:
    child = helper(MAPPED)
    level = (resident(child) + 1000) * PAGE
    heard = Alarmed(level=level)
    armed = source.arm(want(MEMORY, procfs.identify(child.pid), f">= {level}"), heard)
    child.do("for i in range(3000): m[i * mmap.PAGESIZE] = 1")
    settle(reactor)
    armed.disarm()
    assert heard.total == 1
    # A fault may bring in more than one page at once.
    assert level <= heard.values()[-1] <= level + 64 * PAGE


def test_born_later_and_gone_within_milliseconds(reactor: Turned, source: BpfRss) -> None:
    level = 128 << 20
    heard = Alarmed(level=level)
    armed = source.arm(want(MEMORY, Processes(), ">= 128M", each=True), heard)
    child = subprocess.Popen([sys.executable, "-S", "-c", "bytearray(150 << 20)"])
    child.wait()
    reactor.until(lambda: any(isinstance(m, Process) and m.pid == child.pid for m in heard.ended))
    armed.disarm()
    assert [n for m, n in heard.alarms.items() if isinstance(m, Process) and m.pid == child.pid] == [1]


FORKS = 20
FORK = f"for _ in range({FORKS}): os.waitpid(os.fork() or os._exit(0), 0)"


@pytest.mark.parametrize("each", [False, True])
def test_forks_in_alarm_are_no_news(reactor: Turned, source: BpfRss, helper: MakeHelper, each: bool) -> None:
    """Nor is the memory that fork copies anything of the parent's."""
    child = helper("m = bytearray(40 << 20)")
    target = procfs.identify(child.pid)
    scope: Target = Processes() if each else target
    heard = Alarmed(level=20 << 20)
    armed = source.arm(want(MEMORY, scope, ">= 20M", each=each), heard)
    child.do(FORK)
    settle(reactor)
    armed.disarm()
    assert heard.alarms.get(target) == 1
    assert min(heard.values(target)) >= 20 << 20


def test_who_forks_has_not_lost_its_memory(reactor: Turned, source: BpfRss, helper: MakeHelper) -> None:
    """The silent twin, the other way round."""
    child = helper("m = bytearray(40 << 20)")
    heard = Alarmed()
    armed = source.arm(want(MEMORY, procfs.identify(child.pid), "<= 1M"), heard)
    settle(reactor)
    before = len(heard.readings)
    child.do(FORK)
    settle(reactor)
    armed.disarm()
    assert heard.readings[before:] == []


FILLS = EXCURSIONS // 20


@pytest.mark.parametrize(("way", "alarms"), [("fill_shared", FILLS), ("fill_vfork", FILLS), ("fill_copy", 0)])
def test_what_a_child_does_to_shared_memory(
    reactor: Turned, source: BpfRss, goer: Callable[[str], Goer], way: str, alarms: int
) -> None:
    """By CLONE_VM and by vfork(2) it is its parent's as well; a copy is not."""
    child = goer(way)
    level = (resident(child) + 256) * PAGE
    heard = Alarmed(level=level)
    armed = source.arm(want(MEMORY, procfs.identify(child.pid), f">= {level}"), heard)
    child.go(FILLS)
    settle(reactor)
    armed.disarm()
    assert heard.total == alarms


def test_the_peak_of_who_dies_at_once(reactor: Turned, source: BpfRss) -> None:
    """What it had at its end; before Linux 6.16 but for what processors keep for themselves."""
    heard = Alarmed(level=128 << 20)
    armed = source.arm(want(MEMORY, Processes(), ">= 128M", each=True), heard)
    code = "import os\nheld = bytearray(300 << 20)\nos._exit(0)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code])
    child.wait()
    settle(reactor)
    margin = source.engine.control.margin * 6 * PAGE
    armed.disarm()
    [peak] = [peak for who, peak in heard.peaks.items() if isinstance(who, Process) and who.pid == child.pid]
    assert (300 << 20) - margin <= peak <= 400 << 20


def test_shared(reactor: Turned, source: BpfRss, helper: MakeHelper) -> None:
    child = helper("s = mmap.mmap(-1, 8 << 20)")
    heard = Alarmed(level=4 << 20)
    armed = source.arm(want(Shared(), procfs.identify(child.pid), ">= 4M"), heard)
    child.do("for i in range(2048): s[i * 4096] = 1")
    settle(reactor)
    child.do("s.close()")
    settle(reactor)
    armed.disarm()
    assert heard.total == 1
    assert heard.values()[-1] < 4 << 20


def test_disarmed_leaves_no_hook(reactor: Turned, source: BpfRss, helper: MakeHelper) -> None:
    child = helper()
    assert links() == 0
    armed = source.arm(want(MEMORY, procfs.identify(child.pid), ">= 1T"), Alarmed())
    assert links() > 0
    armed.disarm()
    reactor.until(lambda: links() == 0)


def test_sums_are_declined(source: BpfRss) -> None:
    assert not source.hears(MEMORY, Processes(), False)
    assert source.hears(MEMORY, Processes(), True)
