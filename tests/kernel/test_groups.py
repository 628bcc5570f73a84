"""Membership of groups, live, against real processes. Each who joins has a twin who does not."""

import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from cgroupkit import cgroup

from conftest import NOBODY
from kernelkit import Turned
from limitfs.errors import Busy, Exists, Impossible, Invalid, Quota
from limitfs.hearing.connector import Connector, Lost
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.source import Refused
from limitfs.resources import procfs
from limitfs.resources.model import Process
from limitfs.selecting import backlog
from limitfs.selecting import groups as groups_module
from limitfs.selecting.columns import Row
from limitfs.selecting.groups import Group, Groups

MakeHelper = Callable[..., Any]

RENAME = "open('/proc/self/comm', 'w').write({!r})"
PRCTL = "import ctypes; ctypes.CDLL(None).prctl(15, {!r})"


class Following:
    """A follower that remembers who is in."""

    def __init__(self, group: Group) -> None:
        self.now: set[Process] = set()
        self.told: list[tuple[str, int]] = []
        self.end = group.follow(self.joined, self.left)

    def joined(self, process: Process) -> None:
        assert process not in self.now, "told twice"
        self.now.add(process)
        self.told.append(("joined", process.pid))

    def left(self, process: Process) -> None:
        self.now.discard(process)
        self.told.append(("left", process.pid))

    def has(self, pid: int) -> bool:
        return any(process.pid == pid for process in self.now)

    def about(self, pid: int) -> list[str]:
        return [what for what, who in self.told if who == pid]


@pytest.fixture
def groups(reactor: Turned) -> Groups:
    return Groups(reactor, Connector(reactor), Deaths(reactor))


def selecting(groups: Groups, condition: str, owner: int = 0) -> Group:
    group = groups.make(f"group{len(groups)}", owner)
    group.set_select(condition)
    return group


# Joining and leaving


@pytest.mark.parametrize("rename", [RENAME.format("limitfs-a"), PRCTL.format(b"limitfs-a")])
def test_a_name(reactor: Turned, groups: Groups, helper: MakeHelper, rename: str) -> None:
    child, twin = helper(), helper()
    group = selecting(groups, "comm == limitfs-a")
    follower = Following(group)
    assert group.hearing == "connector"
    assert group.period is None
    child.do(rename)
    twin.do(RENAME.format("limitfs-b"))
    reactor.until(lambda: follower.has(child.pid))
    assert follower.now == {procfs.identify(child.pid)}
    assert list(group.processes()) == list(follower.now)
    child.do(RENAME.format("other"))
    reactor.until(lambda: not follower.now)
    reactor.quiet(0.2)
    assert follower.about(child.pid) == ["joined", "left"]
    assert not follower.about(twin.pid)
    follower.end()


def test_a_name_with_a_newline_and_a_parenthesis(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    child, twin = helper(), helper()
    follower = Following(selecting(groups, r'comm == "a) S 1\n\udcff"'))
    child.do(PRCTL.format(b"a) S 1\n\xff"))
    twin.do(PRCTL.format(b"a) S 1\n"))
    reactor.until(lambda: follower.has(child.pid))
    reactor.quiet(0.2)
    assert not follower.about(twin.pid)
    follower.end()


def test_a_program(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    child, twin = helper(), helper()
    follower = Following(selecting(groups, 'exe ~ "/sleep$"'))
    before = {process.pid for process in follower.now}
    child.process.stdin.write(b"os.execv('/bin/sleep', ['sleep', '1000'])\n")
    child.process.stdin.flush()
    twin.process.stdin.write(b"os.execv('/bin/cat', ['sleep'])\n")
    twin.process.stdin.flush()
    reactor.until(lambda: follower.has(child.pid))
    reactor.until(lambda: procfs.comm(twin.pid) == "cat")
    reactor.quiet(0.2)
    assert {process.pid for process in follower.now} == before | {child.pid}
    assert not follower.about(twin.pid)
    child.end()
    reactor.until(lambda: follower.about(child.pid) == ["joined", "left"])
    follower.end()


def test_a_user(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    child, twin = helper(), helper()
    group = selecting(groups, f"uid == {NOBODY} && ppid == {os.getpid()}")
    follower = Following(group)
    assert not follower.now
    child.do(f"os.setuid({NOBODY})")
    twin.do("os.setuid(0)")
    reactor.until(lambda: follower.has(child.pid))
    assert follower.now == {procfs.identify(child.pid)}
    assert not follower.about(twin.pid)
    follower.end()


def test_a_partition(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    with cgroup() as there, cgroup() as elsewhere:
        child, twin = helper(), helper()
        group = selecting(groups, f'partition == "{there.path}"')
        follower = Following(group)
        assert group.hearing == "connector, sampled"
        assert group.period is not None
        there.take(child.pid)
        elsewhere.take(twin.pid)
        reactor.until(lambda: follower.has(child.pid))
        elsewhere.take(child.pid)
        reactor.until(lambda: not follower.now)
        assert not follower.about(twin.pid)
        follower.end()
        child.end()
        twin.end()


def test_moves_are_told(reactor: Turned, helper: MakeHelper) -> None:
    """By the kernel, where its hooks work; here by us, and then nobody has to look."""
    tellers: list[Callable[[Process], None]] = []

    def moves(moved: Callable[[Process], None], _lost: Callable[[], None]) -> Callable[[], None]:
        tellers.append(moved)
        return lambda: tellers.remove(moved)

    groups = Groups(reactor, Connector(reactor), Deaths(reactor), moves=moves)
    with cgroup() as there:
        child = helper()
        group = selecting(groups, f'partition == "{there.path}"')
        others = Following(selecting(groups, "pid == 1"))
        assert not tellers
        follower = Following(group)
        assert (group.hearing, group.period) == ("connector, sched_process", None)
        there.take(child.pid)
        reactor.quiet(1.5)
        assert not follower.now, "nobody looks"
        tellers[0](procfs.identify(child.pid))
        assert follower.has(child.pid)
        group.set_select(f'partition == "{there.path}" && memory > 0')
        assert group.hearing == "connector, sched_process, sampled"
        assert follower.has(child.pid)
        follower.end()
        assert not tellers
        others.end()
        child.end()


def test_use(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    child, twin = helper(), helper()
    follower = Following(selecting(groups, f"ppid == {os.getpid()} && fds > 100"))
    assert not follower.now
    child.open_files(150)
    twin.open_files(50)
    reactor.until(lambda: follower.has(child.pid))
    child.close_files(100)
    reactor.until(lambda: not follower.now)
    assert not follower.about(twin.pid)
    follower.end()


def test_births_and_ends(reactor: Turned, groups: Groups) -> None:
    group = selecting(groups, f"ppid == {os.getpid()} && comm != sh")
    follower = Following(group)
    assert not follower.now
    sleeper = subprocess.Popen(["sleep", "1000"])
    shell = subprocess.Popen(["sh", "-c", "read line; exit"], stdin=subprocess.PIPE)
    reactor.until(lambda: follower.has(sleeper.pid) and not follower.has(shell.pid))
    sleeper.kill()
    reactor.until(lambda: not follower.now)  # a zombie yet
    sleeper.wait()
    shell.communicate(b"\n")
    assert follower.about(sleeper.pid)[-2:] == ["joined", "left"]
    follower.end()


def test_a_process_whose_first_thread_ended_stays(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    child = helper("def stay(): time.sleep(1000)")
    follower = Following(selecting(groups, f"pid == {child.pid}"))
    child.do("threading.Thread(target=stay).start()")
    child.process.stdin.write(b"import ctypes; ctypes.CDLL(None).syscall(60, 0)\n")
    child.process.stdin.flush()
    reactor.until(lambda: procfs.stat(child.pid).state == "Z")
    reactor.quiet(0.2)
    assert follower.has(child.pid)
    child.process.kill()
    reactor.until(lambda: not follower.now)
    follower.end()


def test_a_number_used_again_is_another(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    child = helper()
    follower = Following(selecting(groups, f"pid == {child.pid}"))
    stale = Process(child.pid, procfs.identify(child.pid).start - 1)
    groups.live.born(stale)
    reactor.quiet(0.1)
    assert stale not in follower.now
    follower.end()


def test_many_short_lives(reactor: Turned, groups: Groups) -> None:
    """Whoever is gone before anybody looked is no member; nobody stays behind."""
    follower = Following(selecting(groups, "comm == true || exe ~ /true$"))
    for _ in range(100):
        subprocess.run(["true"], check=True)
    with subprocess.Popen(["sleep", "0"]) as last:
        pass
    reactor.until(lambda: last.pid not in groups.live._processes and not follower.now)
    joined = [who for what, who in follower.told if what == "joined"]
    assert len(joined) == len(set(joined))
    follower.end()


# Who may


def test_a_users_group_has_his_processes_only(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    roots, mine, other = helper(), helper(uid=NOBODY), helper(uid=NOBODY - 1)
    for child in (roots, mine, other):
        child.do(RENAME.format("limitfs-w"))
    group = selecting(groups, "comm == limitfs-w", owner=NOBODY)
    everybodys = selecting(groups, "comm == limitfs-w")
    assert {each.pid for each in group.processes()} == {mine.pid}
    assert {each.pid for each in everybodys.processes()} == {roots.pid, mine.pid, other.pid}
    follower = Following(group)
    assert {each.pid for each in follower.now} == {mine.pid}
    # It drops its privilege and is not to be traced by him yet: /proc/PID is root's.
    roots.do(f"os.setuid({NOBODY})")
    reactor.quiet(0.2)
    assert {each.pid for each in follower.now} == {mine.pid}
    # Now it is, as the exec of a program by its user makes it.
    code = "import sys; open('/proc/self/comm', 'w').write('limitfs-w'); sys.stdin.read()"
    roots.process.stdin.write(f"os.execv(sys.executable, [sys.executable, '-c', {code!r}])\n".encode())
    roots.process.stdin.flush()
    reactor.until(lambda: follower.has(roots.pid))
    follower.end()


def test_a_process_that_gets_another_gid_is_its_users_no_more(
    reactor: Turned, groups: Groups, helper: MakeHelper
) -> None:
    """It is not dumpable from then on."""
    child = helper("import ctypes; dumpable = lambda so: ctypes.CDLL(None).prctl(4, so)")
    child.do(f"os.setresgid(0, 100, 0); os.setresuid(0, {NOBODY}, 0); dumpable(1)")
    follower = Following(selecting(groups, f"pid == {child.pid}", owner=NOBODY))
    assert follower.has(child.pid)
    child.do("os.setegid(0)")
    reactor.until(lambda: not follower.now)
    follower.end()


def test_a_process_that_hides_is_found_out_when_it_is_judged_next(
    reactor: Turned, groups: Groups, helper: MakeHelper
) -> None:
    child = helper("import ctypes; dumpable = lambda so: ctypes.CDLL(None).prctl(4, so)", uid=NOBODY)
    child.do("dumpable(1)")
    follower = Following(selecting(groups, f"pid == {child.pid}", owner=NOBODY))
    child.do("dumpable(0)")
    reactor.quiet(0.2)
    assert follower.has(child.pid), "the kernel tells nobody"
    groups.live.lost(1)
    assert not follower.now
    follower.end()


def test_names_are_for_all_and_quotas_for_each(groups: Groups) -> None:
    groups.quota = 2
    first = groups.make("web", NOBODY)
    with pytest.raises(Exists):
        groups.make("web", 1)
    second = groups.make("db", NOBODY)
    with pytest.raises(Quota):
        groups.make("more", NOBODY)
    assert [groups.make(f"root{i}", 0).owner for i in range(3)] == [0, 0, 0]
    first.close()
    first.close()
    assert groups.find("web") is None
    again = groups.make("web", NOBODY)
    assert again.number not in (first.number, second.number)
    assert groups.find("web") is again
    assert [each.name for each in groups] == ["db", "root0", "root1", "root2", "web"]


def test_a_group_in_use_stays(groups: Groups) -> None:
    group = selecting(groups, "pid == 1")
    follower = Following(group)
    with pytest.raises(Busy):
        group.close()
    follower.end()
    follower.end()
    group.close()
    assert groups.find(group.name) is None


# Choosing anew


def test_another_condition(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    child, other = helper(), helper()
    group = groups.make("web", 0)
    assert group.select == ""
    assert list(group.processes()) == []
    follower = Following(group)
    assert not follower.now
    group.set_select(f"pid == {child.pid}\n\0")
    assert group.select == f"pid == {child.pid}"
    assert {each.pid for each in follower.now} == {child.pid}
    group.set_select(f"pid == {other.pid} && fds > 0")
    assert {each.pid for each in follower.now} == {other.pid}
    for wrong, error in (("pid <", Invalid), ("fds < -1", Impossible)):
        with pytest.raises(error):
            group.set_select(wrong)
    assert group.select == f"pid == {other.pid} && fds > 0"
    group.set_select("")
    assert group.select == ""
    assert not follower.now
    assert groups.live._births is None, "nothing is heard for it"
    group.set_select(f"pid == {child.pid}")
    assert {each.pid for each in follower.now} == {child.pid}
    follower.end()
    assert reactor.quiet(0.2) == 0


def test_several_followers(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    child = helper()
    group = selecting(groups, f"ppid == {os.getpid()} && comm == limitfs-s")
    first, second = Following(group), Following(group)
    child.do(RENAME.format("limitfs-s"))
    reactor.until(lambda: first.now and second.now)
    third = Following(group)
    assert third.now == first.now, "at once"
    first.end()
    child.do(RENAME.format("other"))
    reactor.until(lambda: not second.now)
    assert first.now
    second.end()
    third.end()


def test_a_follower_that_has_enough(groups: Groups, helper: MakeHelper) -> None:
    children = [helper(), helper()]
    group = selecting(groups, f"ppid == {os.getpid()}")
    ends: list[Callable[[], None]] = []
    told: list[int] = []

    def joined(process: Process) -> None:
        told.append(process.pid)
        for end in ends:
            end()

    def refuse(process: Process) -> None:
        raise Refused(f"no room for {process}")

    with pytest.raises(Refused):
        group.follow(refuse, told.remove)
    assert not group.followed
    group.set_select("")
    ends.append(group.follow(joined, told.append))
    group.set_select(f"ppid == {os.getpid()}")
    assert len(told) == 1
    assert told[0] in [child.pid for child in children]
    assert not group.followed
    assert groups.live._births is None
    assert not groups.live._processes


def test_a_follower_that_fails_harms_nobody(
    reactor: Turned, groups: Groups, helper: MakeHelper, caplog: pytest.LogCaptureFixture
) -> None:
    child = helper()
    group = selecting(groups, f"pid == {child.pid} && comm == limitfs-f")

    def fail(process: Process) -> None:
        raise ValueError(process)

    end = group.follow(fail, fail)
    follower = Following(group)
    child.do(RENAME.format("limitfs-f"))
    reactor.until(lambda: follower.has(child.pid))
    assert "a follower of group group0 failed" in caplog.text
    end()
    follower.end()


def test_a_newborn_that_does_not_match_has_left(reactor: Turned, groups: Groups) -> None:
    """So that a source can let children inherit, and be put right."""
    follower = Following(selecting(groups, f"pid == {os.getpid()}"))
    with subprocess.Popen(["sleep", "1000"]) as child:
        reactor.until(lambda: follower.about(child.pid) == ["left"])
        child.send_signal(signal.SIGKILL)
    assert {each.pid for each in follower.now} == {os.getpid()}
    follower.end()


# When less is heard


def test_without_a_connector(reactor: Turned, helper: MakeHelper, monkeypatch: pytest.MonkeyPatch) -> None:
    connector = Connector(reactor)

    def refuse(*_args: object, **_named: object) -> None:
        raise Refused("none here")

    monkeypatch.setattr(connector, "subscribe", refuse)
    groups = Groups(reactor, connector, Deaths(reactor))
    child, twin = helper(), helper()
    group = selecting(groups, "comm == limitfs-n")
    follower = Following(group)
    assert group.hearing == "sampled"
    child.do(RENAME.format("limitfs-n"))
    reactor.until(lambda: follower.has(child.pid))
    sleeper = subprocess.Popen(["sleep", "1000"])
    group.set_select(f"pid == {sleeper.pid} || pid == {child.pid}")
    assert not follower.has(sleeper.pid) or sleeper.pid in groups.live._processes
    reactor.until(lambda: follower.has(sleeper.pid))
    sleeper.kill()
    reactor.until(lambda: not follower.has(sleeper.pid))
    sleeper.wait()
    child.end()
    reactor.until(lambda: not follower.now)
    assert not follower.about(twin.pid)
    follower.end()
    assert group.hearing == "on demand"
    assert reactor.quiet(0.3) == 0


def test_lost_messages(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    child, late = helper(), helper()
    group = selecting(groups, "comm == limitfs-l")
    follower = Following(group)
    live = groups.live
    assert live._births is not None
    assert live._changes is not None
    # What the kernel had no room for: a name, a birth and an end.
    child.do(RENAME.format("limitfs-l"))
    del live._processes[late.pid]
    live._births._known.pop(late.pid)
    late.do(RENAME.format("limitfs-l"))
    for subscription in list(live._connector._general):
        subscription.tell(Lost(3))
    assert {each.pid for each in follower.now} == {child.pid, late.pid}
    reactor.quiet(0.2)
    assert follower.about(child.pid) == follower.about(late.pid) == ["joined"]
    follower.end()


# What it costs


def test_nothing_runs_for_a_group_that_nobody_follows(reactor: Turned, groups: Groups, helper: MakeHelper) -> None:
    child = helper()
    group = selecting(groups, f"ppid == {os.getpid()} && fds > 0")
    assert child.pid in {each.pid for each in group.processes()}
    assert group.hearing == "on demand"
    subprocess.run(["true"], check=True)
    assert reactor.quiet(0.3) == 0
    assert not groups.live._processes


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which groups processes were held against."""
    told: list[tuple[str, int]] = []
    hold = Group.hold

    def noting(self: Group, row: Row, newborn: bool = False) -> bool:
        told.append((self.name, row.process.pid))
        return hold(self, row, newborn)

    monkeypatch.setattr(Group, "hold", noting)
    return told


def test_what_a_birth_costs(
    reactor: Turned, groups: Groups, held: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ten groups: who it is, and each column at most once; no column that does not decide."""
    followers = [Following(selecting(groups, f"comm == nosuch{i} && exe ~ x && memory > 1G")) for i in range(5)]
    followers += [Following(selecting(groups, f"exe == /no/such{i} && uid == 0")) for i in range(5)]
    read: list[str] = []
    opened, linked = procfs._read, os.readlink
    monkeypatch.setattr(procfs, "_read", lambda path: (read.append(path), opened(path))[1])
    monkeypatch.setattr(os, "readlink", lambda path: (read.append(str(path)), linked(path))[1])
    pid = os.fork()
    if pid == 0:
        signal.pause()
    reactor.until(lambda: pid in groups.live._processes)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [name for name, who in held if who == pid] == [f"group{i}" for i in range(10)]
    births = [path.removeprefix(f"/proc/{pid}/") for path in read if path.startswith(f"/proc/{pid}/")]
    # Who was born; its name and parent; its program, and that this is still of the same process.
    assert births == ["stat", "stat", "exe", "stat"]
    monkeypatch.undo()
    for follower in followers:
        follower.end()


def test_patterns_of_a_user_are_bounded_together(groups: Groups) -> None:
    mine, other, roots = (groups.make(name, owner) for name, owner in (("a", NOBODY), ("b", NOBODY), ("c", 0)))
    large = " || ".join(f'exe ~ "{"ab" * 55}{number}"' for number in range(8))
    mine.set_select(large)
    with pytest.raises(Quota, match=f"of user {NOBODY} would have"):
        other.set_select(large)
    assert other.select == ""
    other.set_select("exe ~ x")
    assert other.work > 0
    roots.set_select(large)
    groups.make("d", 0).set_select(large)
    mine.set_select("comm == x")
    other.set_select(large)


def test_who_waits_to_be_judged_makes_it_unsure(
    reactor: Turned, groups: Groups, helper: MakeHelper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at each turn of the loop; a group without a pattern has all at once."""
    monkeypatch.setattr(backlog, "BURST", 1)
    monkeypatch.setattr(backlog, "QUANTUM", 1)
    child = helper()
    group, twin = selecting(groups, f'exe ~ "" && pid == {child.pid}'), selecting(groups, f"pid == {child.pid}")
    follower, told = Following(group), Following(twin)
    assert told.has(child.pid)
    assert not twin.behind
    assert group.behind
    assert not follower.has(child.pid)
    assert group.period is None
    reactor.until(lambda: not group.behind)
    assert follower.has(child.pid)
    assert group.hearing == twin.hearing == "connector"
    follower.end()
    told.end()
    assert not groups.live.late(group)


def test_what_takes_too_long_to_find_is_refused(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups_module, "AT_ONCE", 0)
    group, twin = selecting(groups, 'exe ~ "a[0-9]{3}none"'), selecting(groups, f"pid == {os.getpid()}")
    with pytest.raises(Busy, match="takes too long"):
        group.processes()
    assert [process.pid for process in twin.processes()] == [os.getpid()]
    follower = Following(group)
    assert list(group.processes()) == list(follower.now)
    follower.end()


def test_only_who_is_concerned_is_judged(
    reactor: Turned, groups: Groups, helper: MakeHelper, held: list[tuple[str, int]]
) -> None:
    child = helper()
    users, names = Following(selecting(groups, "uid == 12345")), Following(selecting(groups, "comm == nosuch"))
    reactor.quiet(0.2)
    held.clear()
    child.do(RENAME.format("limitfs-c"))
    reactor.until(lambda: held)
    reactor.quiet(0.1)
    assert [name for name, pid in held if pid == child.pid] == ["group1"]
    users.end()
    names.end()


def test_looking_spares_whom_a_name_keeps_out(groups: Groups, helper: MakeHelper) -> None:
    child = helper()
    child.do(RENAME.format("limitfs-o"))
    group = selecting(groups, "comm == limitfs-o && fds > 500")
    follower = Following(group)
    assert [each.pid for each in group.open()] == [child.pid]
    follower.end()


def test_the_period_is_long_where_nothing_changes(reactor: Turned, groups: Groups) -> None:
    group = selecting(groups, f"pid == {os.getpid()} && fds > 5000")
    follower = Following(group)
    reactor.until(lambda: group.period == 1.0)
    follower.end()
    assert groups.live.period is None
