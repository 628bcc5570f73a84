"""What the ring does not take: nobody turns the reactor meanwhile, as on a machine where others work."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_bpf_fds import loaded_once as loaded_once
from test_bpf_fds import source as source
from test_bpf_kit import Alarmed, base_fds, loaded, settle

from kernelkit import Turned, begin, want
from limitfs.hearing.bpf.libbpf import Map
from limitfs.hearing.bpf.source import BpfFds, BpfTasks
from limitfs.resources import procfs
from limitfs.resources.fds import Fds
from limitfs.resources.model import Process, Processes
from limitfs.resources.tasks import Threads

FDS = Fds()
FULL = 2500
"""Excursions that fill the ring: it has room for 3,276 records."""

BIRTHS = 5000
"""Of processes that are in alarm, and end: two records each."""

MakeHelper = Callable[..., Any]


class Filler:
    """A process that fills the ring, and who is told of it."""

    def __init__(self, source: BpfFds, child: Any) -> None:
        self._child = child
        level = base_fds(child.pid) + 1
        self.heard = Alarmed(level=level)
        self.armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {level}"), self.heard)

    def fill(self) -> None:
        self._child.do(f"for _ in range({FULL}): os.close(os.dup(0))")


def dropped(source: BpfFds) -> int:
    return int(source.engine.control.dropped)


def test_states_are_read_once_for_all_watchers(
    reactor: Turned, source: BpfFds, helper: MakeHelper, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [helper() for _ in range(4)]
    listeners = [Alarmed(level=1) for _ in range(40)]
    armed = [
        source.arm(want(FDS, procfs.identify(others[number % 4].pid), ">= 1"), heard)
        for number, heard in enumerate(listeners)
    ]
    filler = Filler(source, helper())
    settle(reactor)
    reads: list[int] = []
    slices = Map.slices

    def counted(self: Map, *args: Any) -> Any:
        reads.append(1)
        return slices(self, *args)

    monkeypatch.setattr(Map, "slices", counted)
    filler.fill()
    assert dropped(source) > 0
    settle(reactor)
    assert len(reads) == 1
    assert filler.heard.total == FULL
    assert filler.heard.losses > 0
    assert filler.heard.values()[-1] < filler.heard.level
    # Nothing was lost of the others.
    assert {(heard.total, heard.losses, len(heard.readings)) for heard in listeners} == {(1, 0, 1)}
    for one in [*armed, filler.armed]:
        one.disarm()


def test_without_an_overrun_states_are_not_read(
    reactor: Turned, source: BpfFds, helper: MakeHelper, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = helper()
    filler = Filler(source, child)
    settle(reactor)
    before = dropped(source)
    monkeypatch.delattr(Map, "slices")
    child.do("for _ in range(1000): os.close(os.dup(0))")
    settle(reactor)
    filler.armed.disarm()
    assert dropped(source) == before
    assert (filler.heard.total, filler.heard.unseen, filler.heard.losses) == (1000, 0, 0)


def test_a_storm_of_births_in_alarm_leaves_nobody(
    reactor: Turned, source: BpfFds, helper: MakeHelper, tmp_path: Path
) -> None:
    """The ring is full, is read, and is full again while the states are read."""
    child = helper("born = []")
    child.open_files(3000)  # as hardly anybody else here has
    heard = Alarmed(level=3000)
    armed = source.arm(want(FDS, Processes(), ">= 3000", each=True), heard)
    before = dropped(source)
    done = tmp_path / "done"
    births = "born.append(os.fork() or os._exit(0)); len(born) % 20 or [os.wait() for _ in [0] * 20]"
    storm = f"for _ in range({BIRTHS}): {births}"
    begin(child, f"exec({storm!r}); open({str(done)!r}, 'w').write(' '.join(map(str, born)))")
    while not (done.exists() and done.read_text()):
        if dropped(source) > before:
            reactor.pump(0)
        time.sleep(0.02)
    settle(reactor)
    armed.disarm()
    assert dropped(source) > before
    born = set(map(int, done.read_text().split()))
    mine = {who: count for who, count in heard.alarms.items() if isinstance(who, Process) and who.pid in born}
    assert len(mine) == BIRTHS
    assert set(mine.values()) == {1}
    ended = [who for who in heard.ended if who in mine]
    assert len(ended) == BIRTHS
    assert set(ended) == set(mine)
    # Nothing is told of anybody after his end.
    assert not heard._beyond & set(mine)
    assert [count for who, count in heard.alarms.items() if isinstance(who, Process) and who.pid == child.pid] == [
        1
    ]


def test_an_end_that_the_ring_does_not_take_is_an_end(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    """And who lives on has not ended."""
    dying, living = helper(), helper()
    for one in (dying, living):
        one.open_files(2000)
    heard = Alarmed(level=2000)
    armed = source.arm(want(FDS, Processes(), ">= 2000", each=True), heard)
    settle(reactor)
    members = [procfs.identify(one.pid) for one in (dying, living)]
    filler = Filler(source, helper())
    filler.fill()
    before = dropped(source)
    dying.open_files(50)
    dying.process.send_signal(signal.SIGKILL)
    dying.process.wait()
    assert dropped(source) > before
    settle(reactor)
    armed.disarm()
    filler.armed.disarm()
    assert [heard.alarms[member] for member in members] == [1, 1]
    assert members[0] in heard.ended
    assert heard.peaks[members[0]] == base_fds(living.pid) + 50
    assert members[1] not in heard.ended


def test_an_alarm_that_the_ring_does_not_take_counts_though_the_end_is_told(
    reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    child = helper()
    heard = Alarmed(level=2000)
    armed = source.arm(want(FDS, Processes(), ">= 2000", each=True), heard)
    member = procfs.identify(child.pid)
    filler = Filler(source, helper())
    filler.fill()
    before = dropped(source)
    child.open_files(2000)
    assert dropped(source) == before + 1
    while source.engine._take():
        pass  # there is room, and nobody has looked at the states
    child.end()
    settle(reactor)
    armed.disarm()
    filler.armed.disarm()
    assert heard.alarms[member] == 1
    assert heard.ended.count(member) == 1
    assert member not in heard._beyond


def test_of_a_percentage_too(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    """The limit of who has ended cannot be read: the alarm counts without a line."""
    heard = Alarmed(level=80)
    armed = source.arm(want(FDS, Processes(), ">= 80%", each=True), heard)
    filler = Filler(source, helper())
    filler.fill()
    before = dropped(source)
    child = helper("import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))")
    member = procfs.identify(child.pid)
    child.open_files(90)
    child.end()
    assert dropped(source) >= before + 2
    settle(reactor)
    armed.disarm()
    filler.armed.disarm()
    assert heard.alarms[member] == 1
    assert heard.ended.count(member) == 1


# Peaks


def test_who_crosses_and_dies_tells_his_peak(reactor: Turned, source: BpfFds) -> None:
    heard, above = Alarmed(level=500), Alarmed(level=800)
    armed = [source.arm(want(FDS, Processes(), f">= {one.level}", each=True), one) for one in (heard, above)]
    code = (
        "import os\nos.closerange(3, 1000)\nfor _ in range(700): os.dup(0)\nos.closerange(600, 1000)\nos._exit(0)"
    )
    child = subprocess.Popen([sys.executable, "-S", "-c", code])
    child.wait()
    settle(reactor)
    for one in armed:
        one.disarm()
    peaks = {who.pid: peak for who, peak in heard.peaks.items() if isinstance(who, Process)}
    assert peaks[child.pid] == 703
    assert child.pid not in {who.pid for who in above.ended if isinstance(who, Process)}


def test_where_less_is_worse_there_is_no_peak(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    heard = Alarmed()
    target = procfs.identify(child.pid)
    armed = source.arm(want(FDS, target, f"<= {base_fds(child.pid)}"), heard)
    child.open_files(100)
    child.end()
    settle(reactor)
    armed.disarm()
    assert heard.ended == [target]
    assert heard.peaks == {}


def test_the_peak_of_threads_that_stay_in_alarm(reactor: Turned, helper: MakeHelper) -> None:
    with loaded(BpfTasks, reactor) as source:
        child = helper("wait = threading.Event()")
        heard = Alarmed(level=5)
        armed = source.arm(want(Threads(), procfs.identify(child.pid), ">= 5"), heard)
        child.do("[threading.Thread(target=wait.wait, daemon=True).start() for _ in range(20)]")
        child.end()
        settle(reactor)
        armed.disarm()
        assert heard.total == 1
        assert list(heard.peaks.values()) == [21]
