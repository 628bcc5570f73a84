"""Groups on a real mount: made, told who belongs to them, armed and removed, by root and by another user."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cgroupkit import cgroup
from mountkit import Lines, Other, crossings, events, other, private_mount, refused

from conftest import NOBODY, Helper, Mount, poll_for

Make = Callable[..., Helper]

QUIET = 0.7
"""Seconds in which nothing must be heard."""

RENAME = "import ctypes; ctypes.CDLL(None).prctl(15, {!r})"


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with private_mount(tmp_path_factory.mktemp("mount")) as mount:
        yield mount


@pytest.fixture
def nobody() -> Iterator[Other]:
    with other() as made:
        yield made


@contextlib.contextmanager
def group(limits: Mount, name: str, condition: str = "") -> Iterator[str]:
    path = f"group/{name}"
    os.mkdir(limits / path)
    try:
        if condition:
            limits.write(f"{path}/select", condition)
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(limits / path)


def members(limits: Mount, path: str) -> set[int]:
    return {int(pid) for pid in limits.read(f"{path}/members").split()}


def about(limits: Mount, path: str, pid: int) -> Lines:
    return [line for line in events(limits, path) if line.get("pid") == str(pid)]


def told_of(limits: Mount, path: str, crossing: str) -> set[str]:
    """Of whom there are lines with this crossing."""
    return {line["pid"] for line in events(limits, path) if line["crossing"] == crossing}


# Conditions

REFUSALS = [
    (
        "comm < 5",
        "comm is text: == != ~ compare it, not <",
        "    comm < 5",
        "         ^",
    ),
    (
        "comm == x && bogus < 5",
        "no column bogus; there are pid, ppid, comm, ",
        "    comm == x && bogus < 5",
        "                 ^",
    ),
    (
        "uid == 5 &&",
        "expected a column, found the end",
        "    uid == 5 &&",
        "               ^",
    ),
    (
        'comm ~ "("',
        "not a regular expression: missing ): (",
        '    comm ~ "("',
        "           ^",
    ),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal[0])
def test_a_refusal_shows_the_condition_once_with_a_caret(limits: Mount, refusal: tuple[str, ...]) -> None:
    written, said, shown, caret = refusal
    with group(limits, "web", "pid == 1") as path:
        assert refused(lambda: limits.write(f"{path}/select", written)) == "EINVAL"
        first, *drawn = limits.read("last_error").splitlines()[-3:]
        assert first.startswith(f"{path}/select: {said}")
        assert drawn == [shown, caret]
        assert limits.read(f"{path}/select") == "pid == 1\n", "all stays as it was"
        assert members(limits, path) == {1}


def test_what_no_process_can_match_is_out_of_range(limits: Mount) -> None:
    with group(limits, "web") as path:
        assert refused(lambda: limits.write(f"{path}/select", 'comm == "sixteen-letters!"')) == "ERANGE"
        assert "the kernel keeps 15 bytes of a name" in limits.read("last_error").splitlines()[-3]


def test_a_condition_reads_as_it_is_understood(limits: Mount, helper: Make) -> None:
    child = helper()
    with group(limits, "web") as path:
        assert limits.read(f"{path}/select") == ""
        assert members(limits, path) == set()
        limits.write(f"{path}/select", f"pid=={child.pid}&&uid==root")
        assert limits.read(f"{path}/select") == f"pid == {child.pid} && uid == 0\n"
        assert members(limits, path) == {child.pid}
        assert limits.state(f"{path}/state") == {"members": "1", "hearing": "on demand", "period": "-"}
        limits.write(f"{path}/select", "")
        assert members(limits, path) == set()


# Who belongs to it

WAYS = {
    "exec": ('exe ~ "/sleep$" && pid >= {pid}', "os.execv('/bin/sleep', ['sleep', '1000'])", None),
    "name": ('comm == "limitfs-a"', RENAME.format(b"limitfs-a"), RENAME.format(b"limitfs-b")),
    "setuid": (f"uid == {NOBODY} && ppid == {{parent}}", f"os.seteuid({NOBODY})", "os.seteuid(0)"),
    "use": ("fds >= 40 && ppid == {parent}", "held += [os.dup(0) for _ in range(60)]", "os.closerange(10, 200)"),
}


def told(child: Helper, code: str) -> None:
    """Do it, also what does not come back."""
    if "exec" not in code:
        child.do(code)
        return
    assert child.process.stdin is not None
    child.process.stdin.write(code.encode() + b"\n")
    child.process.stdin.flush()


@pytest.mark.parametrize("way", WAYS)
def test_members_come_and_go_when_somebody_asks(limits: Mount, helper: Make, way: str) -> None:
    condition, comes, goes = WAYS[way]
    child, twin = helper(), helper()
    with group(limits, "web", condition.format(pid=child.pid, parent=os.getpid())) as path:
        assert not members(limits, path) & {child.pid, twin.pid}
        told(child, comes)
        limits.wait_for(lambda: child.pid in members(limits, path))
        assert twin.pid not in members(limits, path)
        if goes is None:
            child.end()
        else:
            child.do(goes)
        assert child.pid not in members(limits, path)


@pytest.mark.parametrize("way", WAYS)
def test_members_come_and_go_while_it_is_armed(limits: Mount, helper: Make, way: str) -> None:
    """A newcomer is held against the threshold at once; who leaves rings no more."""
    condition, comes, goes = WAYS[way]
    child, twin = helper(), helper()
    with group(limits, "web", condition.format(pid=child.pid, parent=os.getpid())) as path:
        limits.write(f"{path}/fds/threshold", ">= 1")
        limits.write(f"{path}/processes/threshold", "change")
        try:
            told(child, comes)
            limits.wait_for(lambda: about(limits, f"{path}/fds", child.pid))
            assert crossings(about(limits, f"{path}/fds", child.pid)) == ["alarm"]
            limits.wait_for(lambda: child.pid in members(limits, path))
            assert limits.state(f"{path}/state")["hearing"].startswith(("connector", "sampled"))
            if goes is None:
                child.end()
            else:
                child.do(goes)
            limits.wait_for(lambda: child.pid not in members(limits, path))
            limits.wait_for(lambda: len(about(limits, f"{path}/fds", child.pid)) == 2)
            assert crossings(about(limits, f"{path}/fds", child.pid))[1] in ("gone", "clear")
            time.sleep(QUIET)
            assert len(about(limits, f"{path}/fds", child.pid)) == 2
            assert about(limits, f"{path}/fds", twin.pid) == []
        finally:
            limits.write(f"{path}/fds/threshold", "off")
            limits.write(f"{path}/processes/threshold", "off")


def test_a_move_to_another_partition(limits: Mount, helper: Make) -> None:
    child, twin = helper(), helper()
    with contextlib.ExitStack() as stack:
        there, elsewhere = stack.enter_context(cgroup()), stack.enter_context(cgroup())
        with group(limits, "web", f'partition == "{there.path}"') as path:
            limits.write(f"{path}/fds/threshold", ">= 1")
            there.take(child.pid)
            elsewhere.take(twin.pid)
            limits.wait_for(lambda: about(limits, f"{path}/fds", child.pid))
            assert members(limits, path) == {child.pid}
            elsewhere.take(child.pid)
            limits.wait_for(lambda: members(limits, path) == set())
            limits.write(f"{path}/fds/threshold", "off")
            there.take(twin.pid)
            assert members(limits, path) == {twin.pid}, "also when nothing is armed"
            assert about(limits, f"{path}/fds", twin.pid) == []


def test_children_of_members(limits: Mount, helper: Make) -> None:
    """What is selected by name is inherited, and a sum counts it."""
    child = helper(RENAME.format(b"limitfs-tree"))
    with group(limits, "web", 'comm == "limitfs-tree"') as path:
        limits.write(f"{path}/fds/mode", "sum")
        limits.write(f"{path}/fds/threshold", str(3 * child.fds()))
        child.do("held.append(os.fork() or time.sleep(1e6))")
        limits.wait_for(lambda: len(members(limits, path)) == 2)
        time.sleep(QUIET)
        assert events(limits, f"{path}/fds") == []
        child.do("held.append(os.fork() or time.sleep(1e6))")
        limits.wait_for(lambda: events(limits, f"{path}/fds"))
        assert limits.read(f"{path}/processes/usage") == "3\n"
        child.do("[(os.kill(pid, 9), os.waitpid(pid, 0)) for pid in held]")
        limits.wait_for(lambda: crossings(events(limits, f"{path}/fds")) == ["alarm", "clear"])
        limits.write(f"{path}/fds/threshold", "off")


# What is measured


def test_use_of_all_and_of_the_largest(limits: Mount, helper: Make) -> None:
    one, two, outside = helper(), helper(), helper()
    two.open_files(20)
    outside.open_files(30)
    with group(limits, "web", f"pid == {one.pid} || pid == {two.pid}") as path:
        assert limits.read(f"{path}/fds/usage") == f"{one.fds() + two.fds()}\n"
        assert limits.read(f"{path}/processes/usage") == "2\n"
        rows = [line.split()[:2] for line in limits.read(f"{path}/fds/top").splitlines()]
        assert rows == [[str(two.fds()), str(two.pid)], [str(one.fds()), str(one.pid)]]
        assert limits.read(f"{path}/fds/mode") == "[each] sum\n"
        assert not (limits / path / "processes/top").exists()
        assert not (limits / path / "processes/mode").exists()
        assert refused(lambda: limits.write(f"{path}/fds/limit", "5")) == "EOPNOTSUPP"


def test_the_last_one_ends(limits: Mount, helper: Make) -> None:
    one, two = helper(RENAME.format(b"limitfs-last")), helper(RENAME.format(b"limitfs-last"))
    with group(limits, "web", 'comm == "limitfs-last"') as path:
        limits.write(f"{path}/processes/threshold", "< 1")
        with (limits / path / "processes/event").open("rb") as event:
            one.end()
            assert poll_for(event.fileno(), QUIET) == 0, "one is there still"
            assert event.read() == b""
            two.end()
            assert poll_for(event.fileno())
        (line,) = events(limits, f"{path}/processes")
        assert (line["crossing"], line["value"], line["path"]) == ("alarm", "0", f"{path}/processes")
        three = helper(RENAME.format(b"limitfs-last"))
        limits.wait_for(lambda: crossings(events(limits, f"{path}/processes")) == ["alarm", "clear"])
        assert members(limits, path) == {three.pid}
        limits.write(f"{path}/processes/threshold", "off")


def test_who_is_selected_otherwise_rings_no_more(limits: Mount, helper: Make) -> None:
    one, two = helper(), helper()
    with group(limits, "web", f"pid == {one.pid}") as path:
        level = max(one.fds(), two.fds()) + 5
        limits.write(f"{path}/fds/threshold", str(level))
        two.open_files(10)
        time.sleep(QUIET)
        assert events(limits, f"{path}/fds") == []
        limits.write(f"{path}/select", f"pid == {two.pid}")
        limits.wait_for(lambda: events(limits, f"{path}/fds"))
        one.open_files(10)
        time.sleep(QUIET)
        assert {line["pid"] for line in events(limits, f"{path}/fds")} == {str(two.pid)}
        limits.write(f"{path}/fds/threshold", "off")


# Names, and the end


@pytest.mark.parametrize("name", [".hidden", "(private)", "new\nline", "\x7f", "ä" * 128])
def test_bad_names(limits: Mount, name: str) -> None:
    assert refused(lambda: os.mkdir(limits / "group" / name)) in ("EINVAL", "ENAMETOOLONG")
    assert name not in os.listdir(limits / "group")


@pytest.mark.parametrize("name", ["fds", "state", "a b", "ä" * 127, "-", "x..y"])
def test_good_names(limits: Mount, helper: Make, name: str) -> None:
    child = helper()
    with group(limits, name, f"pid == {child.pid}") as path:
        assert name in os.listdir(limits / "group")
        limits.write(f"{path}/fds/threshold", str(child.fds() + 2))
        child.open_files(2)
        limits.wait_for(lambda: events(limits, f"{path}/fds"))
        assert events(limits, f"{path}/fds")[0]["path"] == f"{path}/fds"
        limits.write(f"{path}/fds/threshold", "off")
    assert name not in os.listdir(limits / "group")


def test_a_name_is_taken_once(limits: Mount) -> None:
    with group(limits, "web"):
        assert refused(lambda: os.mkdir(limits / "group/web")) == "EEXIST"


def test_the_tree_of_groups_is_fixed_otherwise(limits: Mount) -> None:
    with group(limits, "web") as path:
        assert refused(lambda: os.mkdir(limits / path / "deeper")) == "EPERM"
        assert refused(lambda: os.rename(limits / path, limits / "group/other")) == "EPERM"
        assert refused(lambda: (limits / "group/file").touch()) == "EPERM"
        assert refused(lambda: os.rmdir(limits / path / "fds")) == "EPERM"
    assert refused(lambda: os.rmdir(limits / "group/web")) == "ENOENT"


@pytest.mark.parametrize("mode", ["each", "sum"])
def test_an_armed_group_stays(limits: Mount, helper: Make, mode: str) -> None:
    child = helper()
    with group(limits, "web", f"pid == {child.pid}") as path:
        os.mkdir(limits / path / "fds/mine")
        limits.write(f"{path}/fds/mine/mode", mode)
        limits.write(f"{path}/fds/mine/threshold", str(child.fds() + 2))
        assert refused(lambda: os.rmdir(limits / path)) == "EBUSY"
        assert "write off to their thresholds first" in limits.last_error()
        child.open_files(2)
        limits.wait_for(lambda: events(limits, f"{path}/fds/mine"))
        limits.write(f"{path}/fds/mine/threshold", "off")
        os.rmdir(limits / path)
        assert not (limits / path).exists()


def test_files_of_a_removed_group(limits: Mount, helper: Make) -> None:
    child = helper()
    with group(limits, "web", f"pid == {child.pid}") as path, contextlib.ExitStack() as stack:
        names = ("select", "members", "state", "fds/usage", "fds/threshold", "fds/top")
        fds = {name: os.open(limits / path / name, os.O_RDONLY) for name in names}
        select = os.open(limits / path / "select", os.O_WRONLY)
        threshold = os.open(limits / path / "fds/threshold", os.O_WRONLY)
        for fd in (*fds.values(), select, threshold):
            stack.callback(os.close, fd)
        os.rmdir(limits / path)
        for again in (False, True):
            if again:  # another group of that name is another
                os.mkdir(limits / path)
            for name, fd in fds.items():
                assert refused(lambda: os.pread(fd, 100, 0)) == "ESRCH", name  # noqa: B023
            assert refused(lambda: os.write(select, b"pid == 1")) == "ESRCH"
            assert refused(lambda: os.write(threshold, b"5")) == "ESRCH"
        assert limits.read(f"{path}/select") == ""
        assert limits.read(f"{path}/fds/threshold") == "off\n"


# Another user


def test_groups_of_another_user(limits: Mount, helper: Make, nobody: Other) -> None:
    mine, his = helper(RENAME.format(b"limitfs-u")), helper(RENAME.format(b"limitfs-u"), uid=NOBODY)
    with group(limits, "roots", 'comm == "limitfs-u"') as roots:
        root = limits.root
        nobody.ask(f"os.mkdir('{root}/group/his')")
        try:
            path = f"{root}/group/his"
            assert os.stat(path).st_uid == NOBODY
            nobody.ask(f"""write('{path}/select', 'comm == "limitfs-u"')""")
            assert members(limits, "group/his") == {his.pid}, "only processes of his own"
            assert members(limits, roots) == {mine.pid, his.pid}
            assert nobody.ask(f"read('{path}/members')") == f"{his.pid}\n"

            nobody.ask(f"write('{path}/fds/threshold', '{max(mine.fds(), his.fds()) + 3}')")
            mine.open_files(10)
            time.sleep(QUIET)
            assert nobody.ask(f"read('{path}/fds/event')") == ""
            his.open_files(3)
            limits.wait_for(lambda: events(limits, "group/his/fds"))
            assert {line["pid"] for line in events(limits, "group/his/fds")} == {str(his.pid)}
            assert f"pid={his.pid}" in str(nobody.ask(f"read('{path}/fds/event')"))

            # Root's are not his.
            assert nobody.ask(f"read('{root}/{roots}/select')") == 'comm == "limitfs-u"\n'
            for what in (
                f"write('{root}/{roots}/select', 'pid == 1')",
                f"write('{root}/{roots}/fds/threshold', '5')",
                f"write('{root}/{roots}/fds/mode', 'sum')",
                f"read('{root}/{roots}/fds/event')",
                f"os.mkdir('{root}/{roots}/fds/mine')",
                f"os.rmdir('{root}/{roots}')",
            ):
                assert nobody.refused(what) == "EACCES", what
            assert nobody.refused(f"os.mkdir('{root}/{roots}/mine')") == "EPERM"
            # Elsewhere he makes nothing.
            assert nobody.refused(f"os.mkdir('{root}/process/x')") == "EPERM"
            assert nobody.refused(f"os.mkdir('{root}/x')") == "EPERM"
            assert nobody.refused(f"os.mkdir('{root}/process/fds/x')") == "EACCES"

            assert nobody.refused(f"os.rmdir('{path}')") == "EBUSY"
            nobody.ask(f"write('{path}/fds/threshold', 'off')")
        finally:
            nobody.refused(f"write('{limits.root}/group/his/fds/threshold', 'off')")
            nobody.ask(f"os.rmdir('{limits.root}/group/his')")


def test_a_users_groups_do_not_silence_roots(limits: Mount, helper: Make, nobody: Other) -> None:
    """Nor themselves: whoever finds no room for a member in the kernel says so, and hears it otherwise."""
    his, twin = helper(uid=NOBODY), helper(uid=NOBODY)
    names = [f"his{number}" for number in range(12)]
    level = max(his.fds(), twin.fds()) + 20
    with group(limits, "roots", 'comm == "limitfs-w"') as roots:
        try:
            for name in names:
                path = f"{limits.root}/group/{name}"
                nobody.ask(f"os.mkdir('{path}')")
                nobody.ask(f"""write('{path}/select', 'comm == "limitfs-w"')""")
                nobody.ask(f"write('{path}/fds/threshold', '>= {level}')")
            limits.write(f"{roots}/fds/threshold", f">= {level}")
            before = limits.state(f"{roots}/fds/state")["guarantee"]
            his.do(RENAME.format(b"limitfs-w"))
            limits.wait_for(lambda: members(limits, roots) == {his.pid})
            for one in (his, twin):
                one.open_files(20)
            for path in (roots, *(f"group/{name}" for name in names)):
                limits.wait_for(lambda path=path: told_of(limits, f"{path}/fds", "alarm"))
                assert told_of(limits, f"{path}/fds", "alarm") == {str(his.pid)}
            assert limits.state(f"{roots}/fds/state")["guarantee"] == before
            states = [limits.state(f"group/{name}/fds/state") for name in names]
            if before == "exact":
                assert sorted(state["guarantee"] for state in states) == ["exact"] * 7 + ["sampled"] * 5
                assert not told_of(limits, f"{roots}/fds", "lost")
            assert all((state["period"] == "-") == (state["guarantee"] == "exact") for state in states)
            limits.write(f"{roots}/fds/threshold", "off")
        finally:
            for name in names:
                nobody.refused(f"write('{limits.root}/group/{name}/fds/threshold', 'off')")
                nobody.refused(f"os.rmdir('{limits.root}/group/{name}')")


def test_what_is_heard_is_no_surer_than_who_is_a_member(limits: Mount, helper: Make) -> None:
    child = helper(RENAME.format(b"limitfs-y"))
    with (
        group(limits, "looked", 'comm == "limitfs-y" && fds > 5000') as looked,
        group(limits, "told", 'comm == "limitfs-y"') as told_,
    ):
        for path in (looked, told_):
            limits.write(f"{path}/fds/threshold", f">= {child.fds() + 3}")
        state, twin = (limits.state(f"{path}/fds/state") for path in (looked, told_))
        assert state["source"] == twin["source"]
        assert state["guarantee"] == "sampled"
        assert float(state["period"]) > 0
        sampled = limits.state(f"{told_}/state")["hearing"] == "sampled"
        assert (twin["guarantee"] == "sampled") == (sampled or twin["source"] == "sampled")
        child.open_files(3)
        limits.wait_for(lambda: events(limits, f"{told_}/fds"))
        assert not events(limits, f"{looked}/fds")
        before = limits.state(f"{told_}/state")["hearing"]
        limits.write(f"{told_}/fds/hearing", "sampled")
        assert limits.state(f"{told_}/state")["hearing"] == before, "its members are not searched for"
        for path in (looked, told_):
            limits.write(f"{path}/fds/threshold", "off")


def test_a_process_that_becomes_his(limits: Mount, helper: Make, nobody: Other) -> None:
    """Another user's process is no member until it is his, and no more when it is not."""
    child, twin = helper(RENAME.format(b"limitfs-v")), helper(RENAME.format(b"limitfs-v"))
    path = f"{limits.root}/group/his"
    nobody.ask(f"os.mkdir('{path}')")
    try:
        nobody.ask(f"""write('{path}/select', 'comm == "limitfs-v"')""")
        nobody.ask(f"write('{path}/processes/threshold', '>= 1')")
        assert members(limits, "group/his") == set()
        # Another program, as one that changed its user may not be looked into.
        keep = "open('/proc/self/comm', 'w').write('limitfs-v'); import time; time.sleep(1000)"
        code = f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY})"
        child.do(code)
        assert members(limits, "group/his") == set()
        told(child, f"os.execv({sys.executable!r}, ['python', '-S', '-c', {keep!r}])")
        limits.wait_for(lambda: members(limits, "group/his") == {child.pid})
        limits.wait_for(lambda: events(limits, "group/his/processes"))
        assert twin.pid not in members(limits, "group/his")
    finally:
        nobody.ask(f"write('{path}/processes/threshold', 'off')")
        nobody.ask(f"os.rmdir('{path}')")


def test_so_many_groups_and_no_more(tmp_path: Path) -> None:
    with private_mount(tmp_path, "max_groups=2") as limits, other() as nobody:
        make = f"os.mkdir('{limits.root}/group/{{}}')"
        nobody.ask(make.format("a"))
        nobody.ask(make.format("b"))
        assert nobody.refused(make.format("c")) == "ENOSPC"
        assert "max_groups" in str(nobody.ask(f"read('{limits.root}/last_error')"))
        for name in "defg":  # root has no quota, and takes none of his
            os.mkdir(limits / "group" / name)
        nobody.ask(f"os.rmdir('{limits.root}/group/a')")
        nobody.ask(make.format("c"))
        os.rmdir(limits / "group/b")
        nobody.ask(make.format("a"))
        assert nobody.refused(make.format("b")) == "ENOSPC"
