"""The command line: help, usage, exit codes, and what needs no mount."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from limitfs import __version__, cli, mounting
from limitfs.cli import main, new_lines
from limitfs.mounting import Health, Mount

COMMANDS = ["mount", "umount", "status", "doctor", "wait"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="limitfs")


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> list[Mount]:
    """What mountinfo is said to hold."""
    mounts: list[Mount] = []
    monkeypatch.setattr(mounting, "table", lambda: mounts)
    return mounts


def answer(monkeypatch: pytest.MonkeyPatch, health: Health, text: str = "") -> None:
    monkeypatch.setattr(mounting, "ask", lambda *_, **__: (health, text))


# --- help and usage


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_examples_and_exit_codes(command: str, option: str) -> None:
    result = run(command, option)
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"  limitfs {command}" in result.output
    assert "Exit codes: 0" in result.output


def test_the_first_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert [name for name in COMMANDS if f"  {name} " not in result.output] == []
    assert "124" in result.output


def test_version() -> None:
    assert run("--version").output == f"limitfs, version {__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "limitfs", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"limitfs, version {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["mount"],
        ["mount", "--nonsense", "/limits"],
        ["mount", "/limits", "-o", "nonsense"],
        ["umount"],
        ["wait"],
        ["wait", "-n", "0", "x"],
        ["wait", "-n", "many", "x"],
        ["wait", "-t", "-1", "x"],
        ["status", "a", "b"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: limitfs" in result.stderr


def test_an_unknown_mount_option_is_named() -> None:
    assert "nonsense" in run("mount", "/limits", "-o", "allow_other,nonsense").stderr


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), BaseExceptionGroup("nursery", [KeyboardInterrupt()])])
def test_interrupted_exits_130(interrupt: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def limitfs_mounts() -> list[Mount]:
        raise interrupt

    monkeypatch.setattr(mounting, "limitfs_mounts", limitfs_mounts)
    assert run("status").exit_code == 130


# --- mount


def test_a_missing_directory_is_refused_with_a_hint(tmp_path: Path) -> None:
    result = run("mount", f"{tmp_path}/none")
    assert result.exit_code == 1
    assert result.stderr == f"limitfs: {tmp_path}/none does not exist\n  make it first: mkdir -p {tmp_path}/none\n"


def test_a_file_is_no_mount_point(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("mount", f"{tmp_path}/file")
    assert result.exit_code == 1
    assert "not a directory" in result.stderr


@pytest.mark.parametrize(
    ("health", "words"), [(Health.ANSWERS, "already mounted\n"), (Health.SILENT, "limitfs umount --lazy /limits")]
)
def test_mounted_already(health: Health, words: str, mounts: list[Mount], monkeypatch: pytest.MonkeyPatch) -> None:
    mounts.append(Mount("/limits", "fuse.limitfs", "limitfs"))
    answer(monkeypatch, health)
    result = run("mount", "/limits")
    assert result.exit_code == 1
    assert words in result.stderr


def test_a_stale_mount_is_detached_and_said(
    mounts: list[Mount], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = str(tmp_path.resolve())
    mounts.append(Mount(place, "fuse.limitfs", "limitfs"))
    answer(monkeypatch, Health.STALE)
    monkeypatch.setattr(mounting, "unmount", lambda *_, **__: mounts.clear())
    monkeypatch.setattr(mounting, "launch", lambda _: pytest.fail("not this far"))
    monkeypatch.setattr(cli, "_serve", lambda *_: 0)
    result = run("mount", "-f", place)
    assert result.exit_code == 0
    assert f"detached the mount that a dead daemon left at {place}" in result.stderr


def test_a_mount_that_has_no_features_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mounting, "launch", lambda _: "a warning")
    result = run("mount", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("limitfs: a warning\nlimitfs: ")


# --- umount, status


def test_umount_where_nothing_is_mounted(mounts: list[Mount]) -> None:
    mounts.append(Mount("/limits", "fuse.limitfs", "limitfs"))
    result = run("umount", "/elsewhere")
    assert result.exit_code == 1
    assert result.stderr == "limitfs: limitfs is not mounted at /elsewhere\n  it is mounted at /limits\n"


def test_status_of_nothing(mounts: list[Mount]) -> None:
    assert mounts == []
    assert run("status").exit_code == 1


def test_status_shows_the_daemons_facts(mounts: list[Mount], monkeypatch: pytest.MonkeyPatch) -> None:
    mounts += [Mount("/limits", "fuse.limitfs", "limitfs"), Mount("/tmp", "tmpfs", "tmpfs")]
    answer(monkeypatch, Health.ANSWERS, "version 0.1.0\nwatchers 3\n")
    result = run("status")
    assert result.exit_code == 0
    assert result.output == "/limits answers\n  version 0.1.0\n  watchers 3\n"
    assert run("status", "/limits").output == result.output
    assert run("status", "/tmp").exit_code == 1


@pytest.mark.parametrize("health", [Health.STALE, Health.SILENT, Health.PRIVATE])
def test_status_of_what_does_not_answer(
    health: Health, mounts: list[Mount], monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts.append(Mount("/limits", "fuse.limitfs", "limitfs"))
    answer(monkeypatch, health)
    result = run("status")
    assert result.exit_code == 1
    assert result.output == f"/limits {health}\n"


# --- wait


@pytest.mark.parametrize(
    ("name", "words"), [("", "has no file `event`"), ("usage", "not an event file"), ("none", "No such file")]
)
def test_wait_refuses_what_is_no_event_file(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "usage").touch()
    result = run("wait", f"{tmp_path}/{name}")
    assert result.exit_code == 1
    assert words in result.stderr


@pytest.mark.parametrize(
    ("snapshot", "last", "fresh"),
    [
        ("", -1, []),
        ("seq=0 a\nseq=1 b\n", -1, ["seq=0 a", "seq=1 b"]),
        ("seq=0 a\nseq=1 b\n", 0, ["seq=1 b"]),
        ("seq=9 a\nseq=10 b\n", 9, ["seq=10 b"]),
        ("seq=1 a\nseq=2 b", 0, ["seq=1 a"]),
        ('seq=1 comm="a\x0bb\u2028c\x85"\n', 0, ['seq=1 comm="a\x0bb\u2028c\x85"']),
        ("seq=x a\n# seq=5\nxseq=6 b\n", 0, []),
    ],
)
def test_new_lines(snapshot: str, last: int, fresh: list[str]) -> None:
    assert [line for _, line in new_lines(snapshot, last)] == fresh
