"""Files of rules: which count, and what their lines mean."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limitfs import rules
from limitfs.rules import LARGEST, Fate, Report, Rules

GOLDEN = b"""\
# a comment, and ; another
  ; indented
process/fds/threshold = >= 80% clear 70%
system/fds/threshold=100
-process/1/fds/threshold = 5 once
\tgroup/web/select = comm == "nginx" && uid != 0\t
partition/a\\075b\\040c/memory/threshold = 1G
-  system/cpu/threshold = 90%\r

"""


def parsed(data: bytes) -> Rules:
    found = Rules()
    rules.parse("x.conf", data, found)
    return found


def test_lines() -> None:
    found = parsed(GOLDEN)
    assert found.faults == []
    assert [(rule.line.number, rule.path, rule.value, rule.tolerant) for rule in found.rules] == [
        (3, "process/fds/threshold", ">= 80% clear 70%", False),
        (4, "system/fds/threshold", "100", False),
        (5, "process/1/fds/threshold", "5 once", True),
        (6, "group/web/select", 'comm == "nginx" && uid != 0', False),
        (7, "partition/a=b c/memory/threshold", "1G", False),
        (8, "system/cpu/threshold", "90%", True),
    ]


@pytest.mark.parametrize(
    ("line", "message", "column"),
    [
        (b"process/fds/threshold", "no `=`", 0),
        (b"  process/fds/threshold 5", "no `=`", 2),
        (b"= 5", "no path", 0),
        (b"-= 5", "no path", 1),
        (b"process/fds/threshold =  ", "no value", 23),
        (b"/process/fds/threshold = 5", "a path begins below the mount point", 0),
        (b" - process/../fds/threshold = 5", "a path holds names only", 3),
        (b"process//fds/threshold = 5", "a path holds names only", 0),
        (b"process/fds/ = 5", "a path holds names only", 0),
        (b"README = 5", "no rule is about a file of the root", 0),
        (b"process/fds/threshold = \xff5", "not UTF-8 text", 24),
        (b"process/\\377/threshold = 5", "not UTF-8 text", 0),
    ],
)
def test_bad_lines_are_named_and_the_others_count(line: bytes, message: str, column: int) -> None:
    found = parsed(b"system/fds/threshold = 1\n" + line + b"\nsystem/fds/threshold = 2\n")
    assert [rule.value for rule in found.rules] == ["1", "2"]
    (fault,) = found.faults
    assert (fault.line.number, str(fault.error), fault.column) == (2, message, column)
    assert str(fault).startswith(f"x.conf:2: {message}")
    below = fault.pointed().split("\n")
    assert below[2].index("^") == column + 2


def test_the_caret_stands_under_tabs_too() -> None:
    (fault,) = parsed(b"\t/system/fds/threshold = 1").faults
    assert fault.pointed().split("\n")[1:] == ["  \t/system/fds/threshold = 1", "  \t^"]


@given(st.binary())
def test_whatever_stands_in_a_file(data: bytes) -> None:
    found = parsed(data)
    lines = data.split(b"\n")
    told = {rule.line.number for rule in found.rules} | {fault.line.number for fault in found.faults}
    # Each line is a rule or a fault, or says nothing.
    for number, line in enumerate(lines, 1):
        silent = line.decode(errors="replace").lstrip()[:1] in ("", "#", ";")
        assert (number in told) != silent or b"\xff" in line or not _decodes(line)
    for fault in found.faults:
        assert "\n" not in str(fault)
        assert fault.pointed().count("\n") in (0, 2)


def _decodes(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


names = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/=\\#;-"), min_size=1).filter(
    lambda name: name not in (".", "..")
)


values = st.text(min_size=1).map(str.strip).filter(bool)


@given(st.lists(names, min_size=2, max_size=6), values, st.booleans(), st.text())
def test_what_was_written_is_read(parts: list[str], value: str, tolerant: bool, indent: str) -> None:
    space = "".join(letter for letter in indent if letter in " \t")
    if "\n" in value:
        value = value.replace("\n", " ").strip()
    path = "/".join(parts)
    found = parsed(f"{space}{'-' * tolerant}{space}{path}{space}={space}{value}{space}\n".encode())
    assert [(rule.path, rule.value, rule.tolerant) for rule in found.rules] == [(path, value, tolerant)]


# Files


def write(directory: Path, **files: str) -> None:
    directory.mkdir(exist_ok=True)
    for name, value in files.items():
        (directory / f"{name}.conf").write_text(f"system/fds/threshold = {value}\n")


def test_files_are_read_by_name_over_all_directories(tmp_path: Path) -> None:
    etc, run, lib = (tmp_path / name for name in ("etc", "run", "lib"))
    write(lib, a="lib-a", c="lib-c", z="lib-z")
    write(run, b="run-b", c="run-c")
    write(etc, z="etc-z")
    found = rules.load([str(etc), str(run), str(tmp_path / "absent"), str(lib)])
    assert [rule.value for rule in found.rules] == ["lib-a", "run-b", "run-c", "etc-z"]
    assert found.faults == []
    # The last one for a path is meant.
    assert [rule.value for rule in found.by_path().values()] == ["etc-z"]


def test_a_link_to_dev_null_hides_a_file(tmp_path: Path) -> None:
    etc, lib = tmp_path / "etc", tmp_path / "lib"
    write(lib, a="hidden", b="seen")
    etc.mkdir()
    (etc / "a.conf").symlink_to("/dev/null")
    found = rules.load([str(etc), str(lib)])
    assert [rule.value for rule in found.rules] == ["seen"]
    assert found.faults == []


def test_only_visible_files_called_conf(tmp_path: Path) -> None:
    write(tmp_path, a="1")
    for name in (".hidden.conf", "a.conf.dpkg-old", "b.conf~", "README"):
        (tmp_path / name).write_text("nonsense\n")
    found = rules.load([str(tmp_path)])
    assert [rule.value for rule in found.rules] == ["1"]
    assert found.faults == []


def test_what_cannot_be_read_is_named_and_the_others_count(tmp_path: Path) -> None:
    write(tmp_path, m="1")
    (tmp_path / "a.conf").mkdir()
    os.mkfifo(tmp_path / "b.conf")
    (tmp_path / "c.conf").symlink_to("nowhere")
    (tmp_path / "d.conf").write_bytes(b"\n" * (LARGEST + 1))
    (tmp_path / "file").write_text("")
    found = rules.load([str(tmp_path), str(tmp_path / "file")])
    assert [rule.value for rule in found.rules] == ["1"]
    assert [str(fault).removeprefix(f"{tmp_path}/") for fault in found.faults] == [
        "file: Not a directory",
        "a.conf: Is a directory",
        "b.conf: not a file",
        "c.conf: No such file or directory",
        f"d.conf: larger than {LARGEST} bytes",
    ]
    assert len(found.unread) == 5


# The report


@given(st.text(), st.text())
def test_a_report_has_one_line_for_each_rule(path: str, value: str) -> None:
    report = Report()
    report.add(Fate.APPLIED, "x.conf:1", path, value)
    report.add(Fate.WAITING, "x.conf:2", f"{path}2", value)
    # What becomes of it later takes that line's place.
    assert report.add(Fate.REFUSED, "x.conf:2", f"{path}2", value, "no")
    assert not report.add(Fate.REFUSED, "x.conf:2", f"{path}2", value, "no")
    lines = report.text().split("\n")
    assert len(lines) == 4
    assert lines[0].startswith("x.conf:2: refused: ")
    assert lines[2] == "1 applied, 0 kept, 0 waiting, 0 undone, 0 left, 0 tolerated, 1 refused"
