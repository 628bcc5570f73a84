"""Births and deaths from the proc connector. Each sound has a silent twin."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from kernelkit import Heard, Turned, want
from limitfs.errors import Gone
from limitfs.hearing import connector as module
from limitfs.hearing.births import Birth, ConnectorBirths
from limitfs.hearing.connector import Comm, Connector, Event, Exec, Exit, Fork, Kind, Lost, Uid
from limitfs.hearing.counting import Census, ConnectorSource
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.membership import Membership
from limitfs.hearing.source import Refused
from limitfs.resources import procfs, tasks
from limitfs.resources.model import Process, Processes, System, Thread

MakeHelper = Callable[..., Any]

ALL = frozenset(Kind)

STAY = """
stop = threading.Event()
def stay(count):
    for _ in range(count): threading.Thread(target=stop.wait).start()
def leave():
    stop.set()
    while threading.active_count() > 1: time.sleep(0.001)
    stop.clear()
"""


@pytest.fixture
def source(reactor: Turned, connector: Connector) -> ConnectorSource:
    deaths = Deaths(reactor)
    return ConnectorSource(reactor, connector, deaths, Membership(reactor, connector, deaths))


def fork_and_end(count: int, status: int = 0) -> list[int]:
    """Children that live for a moment, one after the other."""
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            os._exit(status)
        os.waitpid(pid, 0)
        pids.append(pid)
    return pids


# The events


def test_it_works_here(connector: Connector) -> None:
    assert connector.missing() is None
    assert module.missing() is None


def test_every_fork_and_exit_in_order(reactor: Turned, connector: Connector) -> None:
    events: list[Event] = []
    subscription = connector.subscribe(events.append, {Kind.FORK, Kind.EXIT})
    pids = fork_and_end(200, status=7)
    mine = set(pids)
    reactor.until(lambda: sum(isinstance(e, Exit) and e.pid in mine for e in events) == 200)
    told = [e for e in events if not isinstance(e, Lost) and e.pid in mine]
    assert [(type(e), e.pid) for e in told] == [(kind, pid) for pid in pids for kind in (Fork, Exit)]
    assert {e.ppid for e in told if isinstance(e, Fork)} == {os.getpid()}
    assert {e.ppid for e in told if isinstance(e, Exit)} <= {os.getpid(), 0}
    assert {os.waitstatus_to_exitcode(e.status) for e in told if isinstance(e, Exit)} == {7}
    assert [e.time_ns for e in told] == sorted(e.time_ns for e in told)
    assert told[-1].time_ns <= time.monotonic_ns()
    subscription.close()
    subscription.close()


def test_nobody_hears_what_nobody_wants(reactor: Turned, connector: Connector) -> None:
    events: list[Event] = []
    subscription = connector.subscribe(events.append, {Kind.UID}, pid=os.getpid())
    fork_and_end(20)
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert reactor.quiet(0.2) == 0, "dropped in the kernel"
    assert not events
    subscription.close()


def test_no_threads_unless_somebody_wants_them(reactor: Turned, connector: Connector) -> None:
    without: list[Event] = []
    subscription = connector.subscribe(without.append, ALL - {Kind.COMM})
    for _ in range(20):
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
    (last,) = fork_and_end(1)
    reactor.until(lambda: any(isinstance(e, Exit) and e.pid == last for e in without))
    assert not [e for e in without if not isinstance(e, Lost) and e.pid == os.getpid()]
    subscription.close()


def test_threads_where_wanted_and_only_there(reactor: Turned, connector: Connector) -> None:
    without: list[Event] = []
    everything: list[Event] = []
    mine: list[Event] = []
    kinds = {Kind.FORK, Kind.EXIT}
    subscriptions = [
        connector.subscribe(without.append, kinds),
        connector.subscribe(mine.append, kinds, pid=os.getpid()),
        connector.subscribe(everything.append, kinds, threads=True),
    ]
    for _ in range(20):
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
    (last,) = fork_and_end(1)
    reactor.until(lambda: any(isinstance(e, Exit) and e.pid == last for e in without))
    own = [e for e in everything if not isinstance(e, Lost) and e.pid == os.getpid()]
    assert len(own) == 40
    assert mine == own
    assert not [e for e in without if not isinstance(e, Lost) and e.tid != e.pid]
    for subscription in subscriptions:
        subscription.close()


@pytest.mark.parametrize("others", [0, 5, 100])
def test_the_filter_knows_a_process_by_its_number(
    reactor: Turned, connector: Connector, helper: MakeHelper, others: int
) -> None:
    mine: list[Event] = []
    kinds = {Kind.FORK, Kind.EXIT}
    subscriptions = [connector.subscribe(mine.append, kinds, pid=os.getpid())]
    subscriptions += [
        connector.subscribe(lambda _event: pytest.fail("not wanted"), kinds, pid=4_000_000 + number)
        for number in range(others)
    ]
    child = helper(STAY)
    child.do("stay(5)")
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    reactor.until(lambda: len(mine) == 2)
    assert {e.pid for e in mine if not isinstance(e, Lost)} == {os.getpid()}
    for subscription in subscriptions:
        subscription.close()
    child.do("leave()")


def test_the_other_kinds(reactor: Turned, connector: Connector, helper: MakeHelper) -> None:
    events: list[Event] = []
    child = helper()
    subscription = connector.subscribe(events.append, ALL)
    child.do("open('/proc/self/comm', 'w').write('n\\u00e4me \"x\"')")
    child.do("os.setreuid(65534, 65533)")
    reactor.until(lambda: any(isinstance(e, Uid) for e in events))
    names = [e.comm for e in events if isinstance(e, Comm) and e.pid == child.pid]
    assert names == ['näme "x"']
    users = [(e.real, e.effective) for e in events if isinstance(e, Uid) and e.pid == child.pid]
    assert (65534, 65533) in users or users[-1][1] == 65533
    subprocess.run(["true"], check=True)
    reactor.until(lambda: any(isinstance(e, Exec) for e in events))
    subscription.close()


def test_a_signal_is_in_the_status(reactor: Turned, connector: Connector, helper: MakeHelper) -> None:
    events: list[Event] = []
    child = helper()
    subscription = connector.subscribe(events.append, {Kind.EXIT})
    child.end()
    reactor.until(lambda: any(isinstance(e, Exit) and e.pid == child.pid for e in events))
    (end,) = (e for e in events if isinstance(e, Exit) and e.pid == child.pid)
    assert os.waitstatus_to_exitcode(end.status) == -9
    subscription.close()


def test_what_was_lost_is_told_after_what_was_not(
    reactor: Turned, connector: Connector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUFFER", 4096)
    events: list[Event] = []
    subscription = connector.subscribe(events.append, {Kind.FORK, Kind.EXIT})
    fork_and_end(200)
    reactor.until(lambda: any(isinstance(e, Lost) for e in events))
    losses = [at for at, e in enumerate(events) if isinstance(e, Lost)]
    assert losses == [len(events) - 1]
    assert len(events) > 1

    def hears_again() -> bool:
        (after,) = fork_and_end(1)
        reactor.pump(0.1)
        return any(isinstance(e, Exit) and e.pid == after for e in events)

    reactor.until(hears_again)
    subscription.close()


def test_one_who_fails_silences_nobody(reactor: Turned, connector: Connector) -> None:
    events: list[Event] = []

    def fail(_event: Event) -> None:
        raise ValueError("broken")

    broken = connector.subscribe(fail, {Kind.EXIT})
    sound = connector.subscribe(events.append, {Kind.EXIT})
    fork_and_end(1)
    reactor.until(lambda: events)
    broken.close()
    sound.close()


def test_without_the_capability_it_refuses(connector: Connector, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module, "_listen", forbidden)
    assert "CAP_NET_ADMIN" in (connector.missing() or "")
    with pytest.raises(Refused, match="CAP_NET_ADMIN"):
        connector.subscribe(lambda _event: None, ALL)


# The source


def test_what_is_its_business(source: ConnectorSource) -> None:
    process = Process(1, 1)
    assert source.hears(tasks.Threads(), process, each=False)
    assert source.hears(tasks.Threads(), System(), each=False)
    assert source.hears(tasks.Threads(), Processes(), each=True)
    assert source.hears(tasks.Processes(), System(), each=False)
    assert not source.hears(tasks.Processes(), System(), each=True)
    assert not source.hears(tasks.Threads(), Thread(1, 1, 1), each=False)


def test_a_burst_of_threads_is_heard_in_order(
    reactor: Turned, source: ConnectorSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper(STAY)
    process = procfs.identify(child.pid)
    armed = source.arm(want(tasks.Threads(), process, "5"), heard)
    child.do("stay(10)")
    child.do("leave()")
    # Only now do we listen: it is over, and yet heard.
    reactor.until(lambda: len(heard.readings) == 21)
    assert heard.values(process)[:11] == [float(count) for count in range(1, 12)]
    assert heard.values(process)[10:] == [float(count) for count in range(11, 0, -1)]
    armed.disarm()
    armed.disarm()


def test_threads_of_others_are_not_heard(
    reactor: Turned, source: ConnectorSource, heard: Heard, helper: MakeHelper
) -> None:
    child, other = helper(STAY), helper(STAY)
    armed = source.arm(want(tasks.Threads(), procfs.identify(child.pid), "change"), heard)
    other.do("stay(10)")
    other.do("leave()")
    assert reactor.quiet(0.2) == 0
    assert heard.values() == [1.0]
    armed.disarm()


def test_the_end_of_the_process(
    reactor: Turned, source: ConnectorSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper(STAY)
    process = procfs.identify(child.pid)
    child.do("stay(3)")
    armed = source.arm(want(tasks.Threads(), process, "50"), heard)
    assert heard.values() == [4.0]
    child.process.kill()
    reactor.until(lambda: heard.ended)
    assert heard.ended == [process]
    armed.disarm()
    with pytest.raises(Gone):
        source.arm(want(tasks.Threads(), process, "50"), heard)


def test_executing_another_program_leaves_one_thread(
    reactor: Turned, source: ConnectorSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper(STAY)
    child.do("stay(5)")
    process = procfs.identify(child.pid)
    armed = source.arm(want(tasks.Threads(), process, "50"), heard)
    # From a thread that is not the first: it takes the number of the first one.
    child.process.stdin.write(
        b"threading.Thread(target=os.execv, args=(sys.executable, [sys.executable, '-S', '-c', "
        b"'import time; time.sleep(60)'])).start()\n"
    )
    child.process.stdin.flush()
    reactor.until(lambda: heard.values()[-1] == 1.0)
    assert not heard.ended
    armed.disarm()


def test_processes_of_the_machine(reactor: Turned, source: ConnectorSource, heard: Heard) -> None:
    armed = source.arm(want(tasks.Processes(), System(), "change"), heard)
    before = heard.values()[0]
    assert abs(before - len(procfs.pids())) <= 20
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(5)]
    reactor.until(lambda: max(heard.values()) >= before + 5)
    for child in children:
        child.kill()
        child.wait()
    reactor.until(lambda: heard.values()[-1] == len(procfs.pids()))
    steps = [after - earlier for earlier, after in pairwise(heard.values())]
    assert max(steps) <= 1
    armed.disarm()


def test_short_lives_do_not_add_up(reactor: Turned, source: ConnectorSource, heard: Heard) -> None:
    armed = source.arm(want(tasks.Processes(), System(), "100000"), heard)
    fork_and_end(200)
    before = heard.values()[0]
    reactor.until(lambda: len(heard.readings) >= 401)
    assert max(heard.values()) <= before + 100  # other tests may run
    armed.disarm()


def test_a_zombie_counts_until_somebody_waits_for_it(
    reactor: Turned, source: ConnectorSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper()
    child.do("zombie = os.fork() or os._exit(0)")
    zombie = next(pid for pid in procfs.pids() if pid > child.pid and procfs.stat(pid).ppid == child.pid)
    armed = source.arm(want(tasks.Processes(), System(), "change"), heard)
    assert isinstance(armed, Census)
    reactor.quiet(0.1)
    assert zombie in armed._tids
    child.do("os.waitpid(zombie, 0)")
    fork_and_end(1)  # no message tells of a wait, but the next one has it found out
    reactor.until(lambda: zombie not in armed._tids)
    armed.disarm()


def test_threads_of_the_machine(
    reactor: Turned, source: ConnectorSource, heard: Heard, helper: MakeHelper
) -> None:
    child = helper(STAY)
    armed = source.arm(want(tasks.Threads(), System(), "100000"), heard)
    before = heard.values()[0]
    assert abs(before - tasks.Threads().usage(System())) <= 50
    child.do("stay(300)")
    reactor.until(lambda: heard.values()[-1] >= before + 200)
    child.do("leave()")
    reactor.until(lambda: heard.values()[-1] < before + 100)
    armed.disarm()


def test_threads_of_each_process(
    reactor: Turned, source: ConnectorSource, heard: Heard, helper: MakeHelper
) -> None:
    old, idle = helper(STAY), helper(STAY)
    armed = source.arm(want(tasks.Threads(), Processes(), "5", each=True), heard)
    young = helper(STAY)
    for child in (old, young):
        child.do("stay(10)")
    members = {child.pid: procfs.identify(child.pid) for child in (old, idle, young)}
    for child in (old, young):
        reactor.until(partial(last_is, heard, members[child.pid], 11.0))
        child.do("leave()")
        reactor.until(partial(last_is, heard, members[child.pid], 1.0))
    assert heard.values(members[idle.pid]) == [1.0]
    young.end()
    reactor.until(lambda: members[young.pid] in heard.ended)
    armed.disarm()


def last_is(heard: Heard, member: Process, value: float) -> bool:
    return heard.values(member)[-1:] == [value]


def test_after_a_loss_the_truth_is_read_again(
    reactor: Turned, source: ConnectorSource, heard: Heard, helper: MakeHelper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUFFER", 4096)
    child = helper(STAY)
    process = procfs.identify(child.pid)
    armed = source.arm(want(tasks.Threads(), process, "500"), heard)
    child.do("stay(200)")
    reactor.until(lambda: heard.losses)
    reactor.until(lambda: heard.values()[-1] == 201.0)
    armed.disarm()
    child.do("leave()")


# The record


def test_births(reactor: Turned, connector: Connector, helper: MakeHelper) -> None:
    records: list[Birth] = []
    births = ConnectorBirths(connector, records.append)
    child = helper()
    child.process.kill()
    reactor.until(lambda: any(r.kind == "exit" and r.pid == child.pid for r in records))
    mine = [r for r in records if r.pid == child.pid]
    assert [r.kind for r in mine][-1] == "exit"
    assert {"fork", "exec"} <= {r.kind for r in mine}
    assert {r.ppid for r in mine} <= {os.getpid(), None}
    end = mine[-1]
    assert end.comm == os.path.basename(sys.executable)[:15]
    assert end.uid == 0
    assert end.status is not None
    assert os.waitstatus_to_exitcode(end.status) == -9
    births.close()
    fork_and_end(1)
    assert reactor.quiet(0.1) == 0


def test_births_of_what_is_no_more_have_its_parents_name(reactor: Turned, connector: Connector) -> None:
    records: list[Birth] = []
    births = ConnectorBirths(connector, records.append)
    (pid,) = fork_and_end(1)
    reactor.until(lambda: any(r.kind == "exit" and r.pid == pid for r in records))
    ours = procfs.comm(os.getpid())
    assert {(r.ppid, r.comm, r.uid) for r in records if r.pid == pid} == {(os.getpid(), ours, 0)}
    births.close()
