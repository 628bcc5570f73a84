"""Rules on a real mount: read again while others look, from the command line, and as they are shipped."""

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cgroupkit import Cgroup, cgroup, hierarchy_of
from crashkit import Service, service
from mountkit import Watching, events, other, refused

from conftest import PATIENCE, Helper, poll_for
from limitfs.resources import cgroups

Make = Callable[..., Helper]
SHIPPED = Path(__file__).parents[2] / "mount/limitfs.d/limitfs.conf"


@pytest.fixture
def limits(tmp_path: Path) -> Iterator[Service]:
    for parent in (tmp_path, *tmp_path.parents):
        if str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    with service(tmp_path) as made:
        yield made


def put(limits: Service, *lines: str) -> None:
    (limits.rules / "10.conf").write_text("".join(f"{line}\n" for line in lines))


def limitfs(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "limitfs", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 2, check=False)


def test_rules_are_armed_when_it_is_mounted(limits: Service, helper: Make) -> None:
    child = helper()
    put(limits, f"process/{child.pid}/fds/rule/threshold = {child.fds() + 5}")
    limits.daemon.send_signal(signal.SIGINT)
    limits.daemon.wait(PATIENCE)
    limits.start()
    directory = f"process/{child.pid}/fds/rule"
    with (limits / f"{directory}/event").open("rb", buffering=0) as event:
        event.read()
        child.open_files(4)
        assert poll_for(event.fileno(), 1) == 0
        child.open_files(1)
        assert poll_for(event.fileno()) & select.POLLPRI
    (line,) = events(limits, directory)
    assert (line["crossing"], line["watcher"], line["pid"]) == ("alarm", "rule", str(child.pid))


def test_readers_of_what_stayed_notice_nothing(limits: Service, helper: Make) -> None:
    child = helper()
    here = f"process/{child.pid}/fds"
    level = child.fds() + 5
    put(limits, f"{here}/threshold = {level}", f"{here}/goes/threshold = 900", "system/fds/threshold = 900000")
    limits.write("rules", "reload")
    child.open_files(5)
    limits.wait_for(lambda: events(limits, here))
    before = limits.read(f"{here}/state")
    path = limits / f"{here}/event"
    with Watching(path) as watching, path.open("rb", buffering=0) as event:
        seen = event.read()
        put(
            limits, "system/fds/threshold = 800000", f"{here}/threshold = {level}", f"{here}/comes/threshold = 900"
        )
        limits.daemon.send_signal(signal.SIGHUP)
        limits.wait_for(lambda: limits.read("system/fds/threshold") == ">= 800000\n")
        assert limits.read(f"{here}/state") == before
        assert poll_for(event.fileno(), 0.5) == 0
        assert [name for name in watching.next(0.1) if name[1] == "MODIFY"] == []
        # And they hear what comes.
        child.close_files(1)
        assert poll_for(event.fileno()) & select.POLLPRI
        event.seek(0)
        lines = event.read()
        assert lines.startswith(seen)
        assert b"crossing=clear" in lines.removeprefix(seen)
    assert {"comes", "goes"} & set(os.listdir(limits / here)) == {"comes"}


def test_the_kernel_forgets_a_directory_whose_rule_went(limits: Service) -> None:
    put(limits, "system/fds/goes/threshold = 900000")
    limits.write("rules", "reload")
    with (limits / "system/fds/goes/event").open("rb") as event:
        assert (limits / "system/fds/goes/threshold").read_text() == ">= 900000\n"
        put(limits)
        limits.write("rules", "reload")
        limits.wait_for(lambda: refused(lambda: os.stat(limits / "system/fds/goes")) == "ENOENT")
        # An open file in it hangs up.
        assert poll_for(event.fileno()) & select.POLLHUP
    os.mkdir(limits / "system/fds/goes")
    assert limits.read("system/fds/goes/threshold") == "off\n"


def test_rules_are_roots(limits: Service) -> None:
    assert os.stat(limits / "rules").st_mode & 0o777 == 0o600
    with other() as nobody:
        assert nobody.refused(f"read('{limits.root}/rules')") == "EACCES"
        assert nobody.refused(f"write('{limits.root}/rules', 'reload')") == "EACCES"
    assert refused(lambda: limits.write("rules", "apply")) == "EINVAL"
    assert limits.last_error() == "rules: 'apply' 'apply' is no command here; reload"


def test_without_rules(tmp_path: Path) -> None:
    with service(tmp_path, "rules=none") as limits:
        put(limits, "system/fds/threshold = 900000")
        limits.write("rules", "reload")
        assert limits.armed() == {}


# Partitions that are not there yet


@pytest.fixture(params=[None, "pids"], ids=["unified", "of-a-controller"])
def above(request: pytest.FixtureRequest) -> Iterator[Cgroup]:
    """A cgroup below which the tests make others; also in a hierarchy of version 1, where there is one."""
    with cgroup(request.param) as made:
        yield made


def fates(limits: Service) -> dict[str, str]:
    """What `rules` says of each rule, by its line in the file."""
    found = re.findall(rf"^{limits.rules}/10.conf:(\d+): (\w+): ", limits.read("rules"), re.MULTILINE)
    return dict(found)


def rings(limits: Service, path: str, child: Helper) -> bool:
    """Whether the watcher is armed at five more than the child has open: one fewer is silent."""
    before = len(events(limits, path))
    with (limits / f"{path}/event").open("rb", buffering=0) as event:
        event.read()
        child.open_files(4)
        silent = poll_for(event.fileno(), 1) == 0
        child.open_files(1)
        heard = poll_for(event.fileno()) & select.POLLPRI
    (line,) = events(limits, path)[before:]
    child.close_files(5)
    return bool(silent and heard and line["crossing"] == "alarm" and line["pid"] == str(child.pid))


def test_a_rule_waits_for_its_partition(limits: Service, above: Cgroup, helper: Make) -> None:
    child = helper()
    path, other_path = f"{above.tree}/late/fds", f"{above.tree}/never/fds"
    put(
        limits,
        f"{path}/mode = each",
        f"{path}/threshold = {child.fds() + 5}",
        f"{other_path}/threshold = {child.fds() + 5}",
    )
    done = limitfs("reload", limits.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"10.conf:2: waiting: {path}/threshold = {child.fds() + 5}: for partition '{above.path}/late'\n" in (
        done.stdout
    )
    assert done.stdout.endswith("0 applied, 0 kept, 3 waiting, 0 undone, 0 left, 0 tolerated, 0 refused\n")
    done = limitfs("check", limits.rules / "10.conf")
    assert done.returncode == 0
    assert done.stdout.count("10.conf:2: waits for partition") == 1
    assert limits.state("state")["rules"] == "0"
    late = above.below("late")
    limits.wait_for(lambda: path in limits.armed())
    late.take(child.pid)
    assert fates(limits) == {"1": "applied", "2": "applied", "3": "waiting"}
    assert limits.read(f"{path}/mode") == "[each] sum\n"
    limits.wait_for(lambda: limits.read(f"{above.tree}/late/processes/usage") == "1\n")
    assert rings(limits, path, child)
    # Nobody was told of an error.
    assert ": refused: " not in limits.said()
    assert limits.last_error() == "ok"


def test_a_rule_comes_back_with_its_partition(limits: Service, above: Cgroup, helper: Make) -> None:
    path = f"{above.tree}/late/fds"
    child = helper()
    far = f"{path}/far/threshold = {child.fds() + 5}"
    put(limits, f"{path}/mode = each", f"{path}/threshold = 900000", f"{path}/far/mode = each", far)
    for again in range(3):
        late = above.below("late")
        if again == 0:
            limits.write("rules", "reload")
        limits.wait_for(lambda: f"{path}/far" in limits.armed())
        assert fates(limits) == dict.fromkeys("1234", "applied")
        late.take(child.pid)
        assert rings(limits, f"{path}/far", child)
        late.remove()
        limits.wait_for(lambda: set(fates(limits).values()) == {"waiting"})
        assert limits.armed() == {}
        assert limits.state("state")["rules"] == "0"
    # Removed and made again faster than anybody looks.
    for _again in range(20):
        above.below("late").remove()
    above.below("late")
    limits.wait_for(lambda: f"{path}/far" in limits.armed())
    # What was made by hand ends with its partition.
    os.mkdir(limits / f"{path}/mine")
    limits.write(f"{path}/mine/threshold", "900000")
    Cgroup(above.hierarchy, f"{above.path}/late").remove()
    limits.wait_for(lambda: limits.armed() == {})
    above.below("late")
    limits.wait_for(lambda: f"{path}/far" in limits.armed())
    assert limits.armed().keys() == {path, f"{path}/far"}


def test_what_no_longer_stands_in_the_file_is_not_applied_later(limits: Service, above: Cgroup) -> None:
    goes, stays = f"{above.tree}/goes/fds", f"{above.tree}/stays/fds"
    put(limits, f"{goes}/threshold = 900000", f"{stays}/threshold = 900000")
    limits.write("rules", "reload")
    put(limits, f"{stays}/threshold = 800000")
    limits.write("rules", "reload")
    assert fates(limits) == {"1": "waiting"}
    above.below("goes")
    above.below("stays")
    limits.wait_for(lambda: limits.armed() == {stays: ">= 800000"})
    # Nor is it when its rule went while its partition was away.
    put(limits, f"{goes}/far/threshold = 900000")
    limits.write("rules", "reload")
    Cgroup(above.hierarchy, f"{above.path}/goes").remove()
    limits.wait_for(lambda: fates(limits) == {"1": "waiting"})
    put(limits)
    limits.write("rules", "reload")
    above.below("goes")
    assert limits.read("rules").startswith("0 applied, 0 kept, 0 waiting")
    assert limits.armed() == {}


def test_nothing_is_listened_for_where_nothing_waits(limits: Service) -> None:
    assert inotify_watches(limits.daemon.pid) == 0
    put(limits, "partition/limitfs-never/a/b/fds/threshold = 900000", "system/fds/threshold = 900000")
    limits.write("rules", "reload")
    # What exists of the way: the roots.
    assert inotify_watches(limits.daemon.pid) == len(cgroups.hierarchies())
    put(limits, "system/fds/threshold = 900000")
    limits.write("rules", "reload")
    assert inotify_watches(limits.daemon.pid) == 0


def inotify_watches(pid: int) -> int:
    """How many a process has, in all its instances."""
    return sum(info.read_text().count("inotify wd:") for info in Path(f"/proc/{pid}/fdinfo").iterdir())


def test_several_levels_may_be_missing(limits: Service, above: Cgroup, helper: Make) -> None:
    child = helper()
    path = f"{above.tree}/a/b/_fds/c/fds"
    put(limits, f"{path}/mode = each", f"{path}/threshold = {child.fds() + 5}")
    limits.write("rules", "reload")
    for _time in range(2):
        inner = above
        for name in ("a", "b", "fds"):
            assert set(fates(limits).values()) == {"waiting"}
            inner = inner.below(name)
        # A level that goes and comes again is followed, too.
        inner.remove()
        deepest = Cgroup(inner.hierarchy, inner.path)
        deepest.directory.mkdir()
        deepest = deepest.below("c")
        deepest.take(child.pid)
        limits.wait_for(lambda: path in limits.armed())
        assert rings(limits, path, child)
        Cgroup(above.hierarchy, f"{above.path}/a").remove()
        limits.wait_for(lambda: limits.armed() == {})
    # All of it at once.
    (above.directory / "a/b/fds/c").mkdir(parents=True)
    limits.wait_for(lambda: path in limits.armed())


def test_bad_rules_do_not_wait(limits: Service) -> None:
    put(
        limits,
        "partition/limitfs-never/memory/threshold = much",
        "partition/limitfs-never/memory/treshold = 1G",
        "partition/limitfs-never/memroy/threshold = 1G",
        "-partition/limitfs-never/memory/usage = 1G",
        "partition/limitfs-never/memory/threshold/x = 1G",
        "partition/limitfs-never/memory/limit = 1G",
        "partition/limitfs-never/fds/limit = max",
        "partition/limitfs-never/swap/limit = 1G 2G",
        "-partition/limitfs-never/fds/.x/threshold = 3",
    )
    done = limitfs("reload", limits.root)
    assert done.returncode == 1
    assert fates(limits) == {
        "1": "refused", "2": "refused", "3": "refused", "4": "tolerated", "5": "refused", "6": "waiting",
        "7": "refused", "8": "refused", "9": "tolerated",
    }  # fmt: skip
    assert "/memroy/threshold = 1G: 'memroy' is no resource; did you mean memory?\n" in done.stdout


def test_limits_come_back_in_their_order(limits: Service) -> None:
    """A limit that a rule sets is there when the next rule takes a percentage of it."""
    with cgroup("pids") as above:
        path = f"{above.tree}/late/threads"
        put(limits, f"{path}/limit = 50", f"{path}/threshold = 80%", f"{path}/more/threshold = 100")
        limits.write("rules", "reload")
        if above.hierarchy.unified:
            above.write("cgroup.subtree_control", "+pids")
        for _time in range(2):
            late = above.below("late")
            limits.wait_for(lambda: fates(limits) == dict.fromkeys("123", "applied"))
            assert late.read("pids.max") == "50"
            assert limits.armed() == {path: ">= 80%", f"{path}/more": ">= 100"}
            late.remove()
            limits.wait_for(lambda: fates(limits) == dict.fromkeys("123", "waiting"))


def test_what_stayed_notices_nothing_of_what_waits(limits: Service, above: Cgroup, helper: Make) -> None:
    child = helper()
    here = above.below("here")
    here.take(child.pid)
    path, level = f"{above.tree}/here/fds", child.fds() + 5
    put(limits, f"{path}/mode = each", f"{path}/threshold = {level}", f"{above.tree}/late/fds/threshold = 900000")
    limits.write("rules", "reload")
    child.open_files(5)
    limits.wait_for(lambda: events(limits, path))
    before = limits.state(f"{path}/state")
    with (limits / f"{path}/event").open("rb", buffering=0) as event:
        event.read()
        limits.write("rules", "reload")
        above.below("late")
        limits.wait_for(lambda: f"{above.tree}/late/fds" in limits.armed())
        assert poll_for(event.fileno(), 0.5) == 0
        # How often it is looked at, where it is, depends on how long that takes.
        assert limits.state(f"{path}/state") | {"period": ""} == before | {"period": ""}
        child.close_files(1)
        assert poll_for(event.fileno()) & select.POLLPRI


def test_after_a_crash_it_waits_and_comes_back(limits: Service, above: Cgroup) -> None:
    here, late = f"{above.tree}/here/fds", f"{above.tree}/late/fds"
    group = above.below("here")
    put(limits, f"{here}/far/threshold = 900000", f"{late}/threshold = 900000")
    limits.write("rules", "reload")
    limits.kill()
    group.remove()
    limits.start()
    assert set(fates(limits).values()) == {"waiting"}
    above.below("here")
    above.below("late")
    limits.wait_for(lambda: limits.armed() == {f"{here}/far": ">= 900000", late: ">= 900000"})
    limits.restart()
    assert limits.armed() == {f"{here}/far": ">= 900000", late: ">= 900000"}
    assert fates(limits) == {"1": "kept", "2": "kept"}


@pytest.mark.skipif(hierarchy_of("memory") is None, reason="no hierarchy of version 1 has memory")
def test_one_more_hierarchy_has_better_numbers(limits: Service) -> None:
    """systemd makes a service's cgroup in one hierarchy after the other."""
    with cgroup() as first:
        path = f"{first.tree}/late/memory"
        put(limits, f"{path}/threshold = 1G", f"{path}/limit = 2G")
        limits.write("rules", "reload")
        first.below("late")
        limits.wait_for(lambda: fates(limits) == {"1": "applied", "2": "refused"})
        memory = hierarchy_of("memory")
        assert memory is not None
        second = Cgroup(memory, first.path)
        try:
            second.directory.mkdir()
            second.below("late")
            limits.wait_for(lambda: fates(limits) == {"1": "applied", "2": "applied"})
            assert limits.state(f"{path}/state")["source"] == "memcg"
            assert limits.read(f"{path}/limit") == f"{2 << 30}\n"
        finally:
            second.remove()


# limitfs reload, check, status


def test_reload_says_what_it_did(limits: Service) -> None:
    file = limits.rules / "10.conf"
    put(limits, "system/fds/threshold = 900000", "system/cpu/threshold = 90000%")
    done = limitfs("reload", limits.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{file}:1: applied: system/fds/threshold = 900000\n"
        f"{file}:2: applied: system/cpu/threshold = 90000%\n"
        "2 applied, 0 kept, 0 waiting, 0 undone, 0 left, 0 tolerated, 0 refused\n"
    )
    put(limits, "system/fds/threshold = 900000", "system/fds/treshold = 5", "-system/fds/usage = 5")
    done = limitfs("reload", limits.root)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == (
        f"{file}:2: refused: system/fds/treshold = 5: no 'treshold' in system/fds\n"
        "-: undone: system/cpu/threshold = 90000%\n"
        f"{file}:3: tolerated: system/fds/usage = 5: this file cannot be written\n"
        "0 applied, 1 kept, 0 waiting, 1 undone, 0 left, 1 tolerated, 1 refused\n"
    )
    # Those who look are told too.
    refusal = f"{file}:2: refused: system/fds/treshold = 5: no 'treshold' in system/fds"
    assert f"  refused_rule {refusal}\n" in limitfs("status", limits.root).stdout
    assert refusal in limits.said()
    limits.daemon.send_signal(signal.SIGSTOP)
    try:
        assert limitfs("status", limits.root).returncode == 1
    finally:
        limits.daemon.send_signal(signal.SIGCONT)


def test_reload_says_it_of_many_rules(limits: Service) -> None:
    """What was kept is not shown, and must not push out what is."""
    put(limits, *(f"system/fds/{'r' * 100}{number}/threshold = 900000" for number in range(600)))
    limits.write("rules", "reload")
    file = limits.rules / "zz.conf"
    file.write_text("system/cpu/threshold = 90000%\nsystem/fds/treshold = 5\n")
    done = limitfs("reload", limits.root)
    assert len(limits.read("rules")) > 65536
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == (
        f"{file}:2: refused: system/fds/treshold = 5: no 'treshold' in system/fds\n"
        f"{file}:1: applied: system/cpu/threshold = 90000%\n"
        "1 applied, 600 kept, 0 waiting, 0 undone, 0 left, 0 tolerated, 1 refused\n"
    )


def test_reload_where_nothing_is_mounted(tmp_path: Path) -> None:
    done = limitfs("reload", tmp_path)
    assert done.returncode == 1
    assert "limitfs is not mounted at" in done.stderr


# What is shipped


def shipped() -> list[str]:
    """The rules of the shipped file; those that come after a group's `select` need it."""
    return [line[1:] for line in SHIPPED.read_text().splitlines() if re.match(r"#[a-z]\S* = ", line)]


def test_the_shipped_file_is_all_comment() -> None:
    done = limitfs("check", SHIPPED)
    assert (done.returncode, done.stdout) == (0, "")
    lines = SHIPPED.read_text().splitlines()
    assert all(line.startswith("#") or not line for line in lines)
    assert len(shipped()) >= 10


@pytest.mark.parametrize("rule", shipped())
def test_each_shipped_rule_is_good(rule: str, limits: Service) -> None:
    group = re.match(r"group/\w+/", rule)
    before = [other for other in shipped() if group and other.startswith(f"{group[0]}select")]
    lines = list(dict.fromkeys([*before, rule]))
    put(limits, *lines)
    done = limitfs("reload", limits.root)
    assert done.returncode == 0, done.stdout
    assert f"{len(lines)} applied" in done.stdout
    done = limitfs("check", limits.rules / "10.conf")
    assert (done.returncode, done.stdout) == (0, "")
    # Taken back, nothing is left.
    put(limits)
    done = limitfs("reload", limits.root)
    assert f"{len(lines)} undone" in done.stdout
    assert limits.armed() == {}
    assert not group or os.listdir(limits / "group") == []


def in_the_manual() -> list[str]:
    """The rules that limitfs.d(5) gives as examples."""
    page = (Path(__file__).parents[2] / "docs/man/limitfs.d.5").read_text().partition(".Sh EXAMPLES")[2]
    blocks = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if " = " in line]


def test_the_examples_of_the_manual(limits: Service) -> None:
    rules = in_the_manual()
    assert len(rules) == 5
    put(limits, *rules)
    # As its last example has it.
    check, reload = limitfs("check", limits.rules / "10.conf"), limitfs("reload", limits.root)
    assert (check.returncode, reload.returncode) == (0, 0), check.stdout + reload.stdout
    fates = re.findall(r": (applied|tolerated|waiting): ", reload.stdout)
    assert len(fates) == 5
    assert len(limits.armed()) == fates.count("applied")
    assert fates.count("tolerated") == (not Path("/proc/pressure/memory").exists())
    # Here the service of the example may run, or not.
    assert fates.count("waiting") == ("waits for partition" in check.stdout)
