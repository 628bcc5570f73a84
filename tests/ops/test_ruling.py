"""Rules, applied and taken back, by a daemon that nobody serves."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroupkit import cgroup
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opskit import house

from conftest import PATIENCE
from limitfs.daemon import Daemon
from limitfs.errors import LimitsError
from limitfs.hearing.source import Refused
from limitfs.rules import Fate, Report
from limitfs.space.shell import Shell
from limitfs.watching.watcher import Watcher


class Ruled:
    """A daemon and its directory of rules."""

    def __init__(self, daemon: Daemon, directory: Path) -> None:
        self.daemon = daemon
        self.directory = directory
        self.shell = Shell(daemon.tree)

    def rules(self, text: str, name: str = "10.conf") -> Report:
        (self.directory / name).write_text(text)
        return self.daemon.house.rules.reload()

    def watcher(self, path: str) -> Watcher | None:
        """What is armed there."""
        return next((w for w in self.daemon.house.registry if _path(w) == path and w.condition is not None), None)

    def armed(self) -> dict[str, str]:
        return {
            _path(w): self.shell.read(f"{_path(w)}/threshold")
            for w in self.daemon.house.registry
            if w.condition is not None
        }

    def refused(self) -> str:
        return self.shell.read("last_error").split("\n")[-1]


def _path(watcher: Watcher) -> str:
    return f"{watcher.path}/{watcher.name}" if watcher.name else watcher.path


@pytest.fixture
def ruled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ruled]:
    directory = tmp_path / "rules"
    directory.mkdir()
    with house(monkeypatch, f"rules={directory}", "state=none", "hearing=sampled") as kernel:
        yield Ruled(kernel.daemon, directory)


def fates(report: Report) -> dict[str, int]:
    return {str(fate): len(report.of(fate)) for fate in Fate if report.of(fate)}


def test_what_a_shell_would_write(ruled: Ruled) -> None:
    report = ruled.rules(
        "system/fds/threshold = 500000 clear 400000\n"
        "system/fds/mode = each\n"
        "system/threads/far/threshold = 90000\n"
        "system/threads/far/hearing = sampled\n"
    )
    assert fates(report) == {"applied": 4}
    assert ruled.armed() == {"system/fds": ">= 500000 clear 400000", "system/threads/far": ">= 90000"}
    assert ruled.shell.read("system/fds/mode") == "[each] sum"
    assert (report.lines[0][1]) == (
        f"{ruled.directory}/10.conf:1: applied: system/fds/threshold = 500000 clear 400000"
    )


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("system/fds/treshold = 5", "no 'treshold' in system/fds"),
        ("system/fds/usage = 5", "this file cannot be written"),
        ("system/fds/event = 5", "a condition written here lives as long as the open file; write to `threshold`"),
        ("system/fds = 5", "this is a directory; name a file in it, such as threshold"),
        ("system/nothing/threshold = 5", "no 'nothing' in system"),
        ("system/stack/threshold = 5", "no 'stack' in system"),
        ("process/self/fds/threshold = 5", "process/self is no directory"),
        ("process/999999999/fds/threshold = 5", "no '999999999' in process"),
        ("system/fds/threshold = many", "expected an amount, found 'many' at column 1"),
        ("system/fds/threshold = " + "5" * 5000, "5000 bytes in one write; at most 4096"),
        ("system/fds/limit = 5", "the kernel has no limit on fds to set here"),
        ("system/fds/a/b/threshold = 5", "no directory can be made here"),
        ("system/fds/new/treshold = 5", "no 'treshold' in system/fds/new"),
        ("system/fds/new/threshold = many", "expected an amount, found 'many' at column 1"),
        ("system/fds/.new/threshold = 5", "'.new' is no good name"),
    ],
)
def test_a_bad_line_is_told_and_the_others_apply(ruled: Ruled, rule: str, why: str) -> None:
    report = ruled.rules(f"system/threads/threshold = 100000\n{rule}\nsystem/processes/threshold = 100000\n")
    assert fates(report) == {"applied": 2, "refused": 1}
    (line,) = report.of(Fate.REFUSED)
    path, _equals, value = rule.partition(" = ")
    assert line.startswith(f"{ruled.directory}/10.conf:2: refused: {path} = {value}: ")
    assert why in line
    assert set(ruled.armed()) == {"system/threads", "system/processes"}
    # What was made on the way is gone again.
    with ruled.shell.at("system/fds") as node:
        assert not {"new", "a"} & set(ruled.daemon.tree.names(node, 0))
    # With a `-` it is no fault.
    report = ruled.rules(f"-{rule}\n")
    assert fates(report) == {"undone": 2, "tolerated": 1}


def test_what_fails_in_the_daemon_is_a_refusal(
    ruled: Ruled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ruled.daemon.house.registry, "set_condition", broken)
    report = ruled.rules("system/fds/threshold = 5\n")
    assert "it failed: ZeroDivisionError" in report.of(Fate.REFUSED)[0]
    assert "Traceback" in caplog.text


def test_refusals_are_in_last_error_and_in_state(ruled: Ruled) -> None:
    ruled.rules("system/fds/threshold = many\n")
    assert ruled.refused().startswith("system/fds/threshold: 'many' expected an amount")
    state = ruled.shell.read("state").split("\n")
    assert [line for line in state if line.startswith("refused_rule ")] == [
        f"refused_rule {ruled.daemon.house.rules.report.of(Fate.REFUSED)[0]}"
    ]
    # It is root's.
    assert "refused_rule" not in Shell(ruled.daemon.tree, 1000).read("state")
    ruled.rules("system/fds/threshold = 500000\n")
    assert "refused_rule" not in ruled.shell.read("state")


# Reading again


def test_what_stayed_is_left_alone(ruled: Ruled) -> None:
    before = (
        "system/fds/threshold = 500000\nsystem/threads/far/threshold = 90000\nsystem/processes/threshold = 90000\n"
    )
    ruled.rules(before)
    stayed = ruled.watcher("system/fds")
    assert stayed is not None
    armed = stayed.armed
    report = ruled.rules(
        "# moved\nsystem/threads/far/threshold = 80000\nsystem/fds/threshold = 500000\n"
        "system/cpu/threshold = 5000%\n"
    )
    assert fates(report) == {"applied": 2, "kept": 1, "undone": 1}
    assert ruled.watcher("system/fds") is stayed
    assert stayed.armed is armed
    assert ruled.armed() == {
        "system/fds": ">= 500000",
        "system/threads/far": ">= 80000",
        "system/cpu": ">= 5000%",
    }


def test_what_went_gives_back_what_was_there(ruled: Ruled) -> None:
    ruled.shell.write("system/fds/threshold", "400000")
    ruled.shell.mkdir("system/fds/byhand")
    ruled.rules(
        "system/fds/threshold = 500000\nsystem/fds/mode = each\nsystem/fds/byhand/threshold = 5%\n"
        "system/fds/byrule/threshold = 500000\nsystem/fds/byrule/mode = each\n"
    )
    ruled.rules("system/fds/threshold = 600000\nsystem/fds/byrule/mode = each\n")
    # A directory stays while a rule needs it.
    assert ruled.shell.read("system/fds/byrule/threshold") == "off"
    assert ruled.shell.read("system/fds/byrule/mode") == "[each] sum"
    report = ruled.rules("")
    assert fates(report) == {"undone": 2}
    assert ruled.armed() == {"system/fds": ">= 400000"}
    assert ruled.shell.read("system/fds/mode") == "each [sum]"
    assert ruled.shell.read("system/fds/byhand/threshold") == "off"
    with pytest.raises(LimitsError, match="no 'byrule' in system/fds"):
        ruled.shell.read("system/fds/byrule/threshold")


def test_what_was_changed_by_hand_stays(ruled: Ruled) -> None:
    text = "system/fds/threshold = 500000\nsystem/fds/byrule/threshold = 500000\n"
    ruled.rules(text)
    ruled.shell.write("system/fds/threshold", "600000")
    ruled.shell.write("system/fds/byrule/threshold", "600000")
    assert fates(ruled.rules(text)) == {"kept": 2}
    assert ruled.armed() == {"system/fds": ">= 600000", "system/fds/byrule": ">= 600000"}
    assert fates(ruled.rules("")) == {"left": 2}
    assert ruled.armed() == {"system/fds": ">= 600000", "system/fds/byrule": ">= 600000"}
    # It is nobody's rule any more.
    assert fates(ruled.rules(text)) == {"applied": 2}
    assert ruled.armed() == {"system/fds": ">= 500000", "system/fds/byrule": ">= 500000"}
    # A rule that changed wins.
    ruled.shell.write("system/fds/threshold", "600000")
    assert fates(ruled.rules("system/fds/threshold = 700000\n" + text.split("\n")[1])) == {"applied": 1, "kept": 1}
    assert ruled.armed()["system/fds"] == ">= 700000"


def test_what_was_removed_by_hand_is_made_again(ruled: Ruled) -> None:
    text = "system/fds/byrule/threshold = 500000\n"
    ruled.rules(text)
    ruled.shell.rmdir("system/fds/byrule")
    assert fates(ruled.rules(text)) == {"applied": 1}
    assert ruled.armed() == {"system/fds/byrule": ">= 500000"}
    ruled.shell.rmdir("system/fds/byrule")
    assert fates(ruled.rules("")) == {"undone": 1}


def test_a_refused_change_leaves_what_was_there(ruled: Ruled) -> None:
    ruled.rules("system/fds/threshold = 500000\n")
    assert fates(ruled.rules("system/fds/threshold = many\n")) == {"refused": 1}
    assert ruled.armed() == {"system/fds": ">= 500000"}
    assert fates(ruled.rules("system/fds/threshold = 500000\n")) == {"kept": 1}
    assert fates(ruled.rules("")) == {"undone": 1}
    assert ruled.armed() == {}


def test_nothing_is_taken_back_for_a_file_that_cannot_be_read(ruled: Ruled) -> None:
    ruled.rules("system/fds/threshold = 500000\n")
    (ruled.directory / "10.conf").unlink()
    (ruled.directory / "10.conf").symlink_to("nowhere")
    assert fates(ruled.daemon.house.rules.reload()) == {"refused": 1}
    assert ruled.armed() == {"system/fds": ">= 500000"}
    (ruled.directory / "10.conf").unlink()
    assert fates(ruled.daemon.house.rules.reload()) == {"undone": 1}


def test_the_last_rule_for_a_path_is_meant(ruled: Ruled) -> None:
    ruled.rules("system/fds/threshold = 500000\n", "10.conf")
    report = ruled.rules("system/fds/threshold = 600000\n", "20.conf")
    assert fates(report) == {"applied": 1}
    assert ruled.armed() == {"system/fds": ">= 600000"}
    (ruled.directory / "20.conf").unlink()
    assert fates(ruled.daemon.house.rules.reload()) == {"applied": 1}
    assert ruled.armed() == {"system/fds": ">= 500000"}


def test_what_nobody_would_hear_of_is_refused(
    ruled: Ruled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(*_arguments: object) -> None:
        raise Refused("inotify: No space left on device (fs.inotify)")

    text = "partition/limitfs-late/fds/threshold = 5\nsystem/fds/threshold = 500000\n"
    with monkeypatch.context() as full:
        full.setattr(ruled.daemon.hearing.directories, "watch", none_left)
        assert fates(ruled.rules(text)) == {"applied": 1, "refused": 1}
    assert "nobody would tell when partition '/limitfs-late' comes: inotify: No space left" in ruled.refused()
    assert "rules for partition '/limitfs-late' need a reload when it comes" in caplog.text
    assert fates(ruled.rules(text)) == {"kept": 1, "waiting": 1}


def test_what_waits_in_a_file_that_cannot_be_read_goes_on_waiting(ruled: Ruled) -> None:
    path = "partition/limitfs-late/fds"
    with cgroup() as group:
        ruled.rules(f"{group.tree}/late/fds/threshold = 500000\n")
        (ruled.directory / "10.conf").unlink()
        (ruled.directory / "10.conf").symlink_to("nowhere")
        assert fates(ruled.rules(f"{path}/threshold = 5\n", "20.conf")) == {"waiting": 1, "refused": 1}
        group.below("late")
        ruled.daemon.reactor.pump(PATIENCE)
        assert ruled.armed() == {f"{group.tree}/late/fds": ">= 500000"}
    while list(ruled.daemon.house.registry):
        ruled.daemon.reactor.pump(PATIENCE)


RESOURCES = ("fds", "threads", "processes")
PATHS = [f"system/{resource}{name}" for resource in RESOURCES for name in ("", "/one", "/two")]
levels = st.integers(1, 3).map(lambda number: f">= {number}00000")


class Model:
    """What the files say, and what was changed by hand since a rule was applied."""

    def __init__(self) -> None:
        self.now: dict[str, str] = {}
        self.in_force: dict[str, tuple[str, str | None]] = {}
        self.made: set[str] = set()

    def reload(self, wanted: dict[str, str]) -> None:
        for path in set(self.in_force) - set(wanted):
            value, before = self.in_force.pop(path)
            by_hand = self.now.get(path) != value
            if not by_hand:
                self._set(path, None if path in self.made else before)
            self.made.discard(path)
        for path, value in wanted.items():
            known = self.in_force.get(path)
            if known is None or known[0] != value:
                if path.count("/") == 2 and path not in self.now:
                    self.made.add(path)
                self.in_force[path] = value, known[1] if known else self.now.get(path)
                self.now[path] = value

    def _set(self, path: str, value: str | None) -> None:
        if value is None:
            self.now.pop(path)
        else:
            self.now[path] = value


@given(st.lists(st.tuples(st.dictionaries(st.sampled_from(PATHS), levels), st.sets(st.sampled_from(PATHS)))))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_after_each_reading_is_armed_what_the_files_say(
    ruled: Ruled, steps: list[tuple[dict[str, str], set[str]]]
) -> None:
    model = Model()
    for number, (wanted, by_hand) in enumerate(steps):
        unchanged = {
            path: ruled.watcher(path) for path in wanted if model.in_force.get(path, ("", None))[0] == wanted[path]
        }
        ruled.rules("".join(f"{path}/threshold = {value}\n" for path, value in wanted.items()))
        model.reload(wanted)
        assert ruled.armed() == model.now
        for path, watcher in unchanged.items():
            assert ruled.watcher(path) is watcher
        for path in by_hand & set(model.now):
            model.now[path] = f">= {900000 + number}"
            ruled.shell.write(f"{path}/threshold", model.now[path])
    ruled.rules("")
    for path in PATHS:
        with contextlib.suppress(LimitsError):
            if path.count("/") == 1:
                ruled.shell.write(f"{path}/threshold", "off")
            else:
                ruled.shell.rmdir(path)
    assert ruled.armed() == {}
