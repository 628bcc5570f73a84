"""`limitfs check`: rules, without a mount."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from limitfs import rules
from limitfs.cli import main
from limitfs.resources import cgroups
from limitfs.rules import Rules
from limitfs.space.check import check

GOLDEN = Path(__file__).parent / "golden"


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["check", *map(str, arguments)])
    return done.exit_code, done.stdout


@pytest.fixture
def partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two partitions, whatever this one has."""
    (tmp_path / "system.slice/cron.service").mkdir(parents=True)
    made_up = cgroups.Hierarchy(str(tmp_path), cgroups.ROOT, True, frozenset(), tmp_path.stat().st_dev)
    monkeypatch.setattr(cgroups, "hierarchies", lambda: (made_up,))


@pytest.mark.usefixtures("partitions")
@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.conf")))
def test_golden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of golden/NAME.conf is in golden/NAME.out; nothing, where all is well."""
    monkeypatch.chdir(GOLDEN)
    expected = (GOLDEN / f"{name}.out").read_text() if (GOLDEN / f"{name}.out").exists() else ""
    # A caret stands under what is wrong; a remark is no fault.
    assert run(f"{name}.conf") == (1 if "^" in expected else 0, expected)


def test_nothing_waits_where_there_are_no_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "hierarchies", lambda: ())
    (tmp_path / "x.conf").write_text("partition/a.slice/memory/threshold = 1G\n")
    code, said = run(tmp_path / "x.conf")
    assert (code, "no 'partition' in the root" in said, ": waits" in said) == (1, True, False)


def test_all_that_a_mount_would_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.setattr(rules, "DIRECTORIES", (str(first), str(second), str(tmp_path / "absent")))
    assert run() == (0, "")
    (second / "a.conf").write_text("nonsense\n")
    (second / "b.conf").write_text("nonsense\n")
    (first / "a.conf").symlink_to(os.devnull)
    assert run() == (1, f"{second}/b.conf:1: no `=`; path = value\n  nonsense\n  ^\n")


def test_a_file_that_is_not_there() -> None:
    assert run("/nowhere.conf") == (1, "/nowhere.conf: No such file or directory\n")


@given(st.text(), st.text())
def test_whatever_is_written(path: str, value: str) -> None:
    found = Rules()
    rules.parse("x.conf", f"{path}={value}".encode(errors="surrogateescape"), found)
    for fault in check(found):
        assert "\n" not in str(fault)
        assert fault.pointed().count("\n") in (0, 2)


FIXED = ("process", "system", "partition", "self", "thread", "threshold", "mode", "event")
NAMES = st.sampled_from((*FIXED, "1", "fds", "stack", "memory", "x"))


@given(st.lists(NAMES, min_size=2, max_size=7), st.sampled_from(["5", "off", "each", "max", "80%", "?"]))
def test_whatever_the_path(path: list[str], value: str) -> None:
    found = Rules()
    rules.parse("x.conf", f"{'/'.join(path)} = {value}".encode(), found)
    assert len(list(check(found))) <= 1
