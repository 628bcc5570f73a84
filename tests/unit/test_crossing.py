"""The line of one crossing, and that nobody can forge it."""

import math
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limitfs.errors import Invalid
from limitfs.resources.model import Unit
from limitfs.watching.condition import format_value
from limitfs.watching.crossing import Crossing, Record, parse_line

ORDER = "seq time crossing path watcher value threshold pid tid comm uid partition source guarantee"
KEYS = ORDER.split(" ")

CONTRACT = Record(
    seq=12,
    time=1795219141.123456,
    crossing=Crossing.ALARM,
    path="process/1234/fds",
    value=201.0,
    unit=Unit.COUNT,
    threshold=">= 200",
    pid=1234,
    comm="nginx",
    uid=33,
    partition="/system.slice/nginx.service",
    source="fd_install",
    guarantee="exact",
)
LINE = (
    "seq=12 time=2026-11-20T23:59:01.123456Z crossing=alarm path=process/1234/fds watcher=- value=201 "
    'threshold=">= 200" pid=1234 tid=- comm="nginx" uid=33 partition="/system.slice/nginx.service" '
    "source=fd_install guarantee=exact\n"
)

# What the kernel and other users may call things: any bytes, any text, and what looks like our own syntax.
PIECES = ['"', "\\", "\n", " ", "=", "seq=1", "crossing=clear", "-", "\x7f", "\u2028", "\0"]
names = st.one_of(
    st.binary(max_size=30).map(os.fsdecode),
    st.text(max_size=30),
    st.lists(st.sampled_from(PIECES)).map("".join),
)
optional_names = st.none() | names
numbers = st.none() | st.integers(0, 2**64)

records = st.builds(
    Record,
    seq=st.integers(0, 2**64),
    time=st.floats(0, 4e9),
    crossing=st.sampled_from(list(Crossing)),
    path=names,
    watcher=optional_names,
    value=st.none() | st.floats(0, 2**64),
    unit=st.sampled_from(list(Unit)),
    threshold=optional_names,
    pid=numbers,
    tid=numbers,
    comm=optional_names,
    uid=numbers,
    partition=optional_names,
    source=optional_names,
    guarantee=optional_names,
    count=numbers,
)


def test_the_line_of_the_contract() -> None:
    assert CONTRACT.line() == LINE


def test_reading_the_line_of_the_contract() -> None:
    values = parse_line(LINE)
    assert values["threshold"] == ">= 200"
    assert values["comm"] == "nginx"
    assert list(values) == [key for key in KEYS if key not in ("watcher", "tid")]


def test_nothing_is_a_dash_and_no_key_is_left_out() -> None:
    line = Record(seq=1, time=0, crossing=Crossing.GONE, path="system/fds").line()
    nothing = " ".join(f"{key}=-" for key in KEYS[4:])
    assert line == f"seq=1 time=1970-01-01T00:00:00.000000Z crossing=gone path=system/fds {nothing}\n"


def test_lost_lines_are_counted() -> None:
    line = Record(seq=1, time=0, crossing=Crossing.LOST, path="system/fds", count=7).line()
    assert line.endswith(" guarantee=- count=7\n")
    assert parse_line(line)["count"] == "7"


@pytest.mark.parametrize(
    ("path", "written"),
    [
        ("process/1234/fds", "process/1234/fds"),
        ("partition/user@1000.service/a_b:c+d/fds", "partition/user@1000.service/a_b:c+d/fds"),
        ("partition/a b/fds", '"partition/a b/fds"'),
        ('partition/a"=\\/fds', '"partition/a\\"=\\\\/fds"'),
        ("partition/é/fds\n", '"partition/\\u00e9/fds\\n"'),
        ("fds\n", '"fds\\n"'),
        ("", '""'),
        ("-", '"-"'),
    ],
)
def test_paths_are_quoted_where_they_must_be(path: str, written: str) -> None:
    assert f" path={written} watcher=" in replace(CONTRACT, path=path).line()


def test_values_are_shown_in_their_unit() -> None:
    assert " value=0.25 " in replace(CONTRACT, value=0.25, unit=Unit.SECONDS).line()
    assert " value=max " in replace(CONTRACT, value=math.inf, unit=Unit.BYTES).line()


def test_a_process_named_dash_is_not_nothing() -> None:
    assert parse_line(replace(CONTRACT, comm="-").line())["comm"] == "-"
    assert "comm" not in parse_line(replace(CONTRACT, comm=None).line())


def test_a_forged_name_stays_a_name() -> None:
    evil = 'evil" crossing=clear\nseq=1'
    line = replace(CONTRACT, comm=evil).line()
    assert line.count("\n") == 1
    assert parse_line(line) == {**parse_line(LINE), "comm": evil}


@given(records)
def test_a_record_is_one_line_of_printable_ascii(record: Record) -> None:
    line = record.line()
    assert line.splitlines(keepends=True) == [line]
    assert line.endswith("\n")
    assert line.isascii()
    assert line[:-1].isprintable()


@given(records)
def test_reading_gives_back_what_was_written(record: Record) -> None:
    values = parse_line(record.line())
    for key in (*KEYS[2:5], *KEYS[6:], "count"):
        written = getattr(record, key)
        assert values.get(key) == (None if written is None else str(written))
    assert values["seq"] == str(record.seq)
    assert values.get("value") == (None if record.value is None else format_value(record.value, record.unit))


@given(records)
def test_names_never_make_a_key(record: Record) -> None:
    assert set(parse_line(record.line())) <= {*KEYS, "count"}


def test_unknown_keys_are_kept() -> None:
    assert parse_line('seq=1 verdict=deadlock chain="1>2>1" new.key=-\n') == {
        "seq": "1",
        "verdict": "deadlock",
        "chain": "1>2>1",
    }


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\n",
        "seq",
        "=1",
        "seq=1  pid=2",
        "seq=1 seq=2",
        "a=- a=1",
        'comm="a',
        'comm="a"b=1',
        'comm="\\q"',
        "seq=1\npid=2",
        'a="\n"',
        " a=1",
        "a=1 ",
    ],
)
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(Invalid):
        parse_line(line)


@given(st.text() | names)
def test_any_text_is_a_line_or_refused(line: str) -> None:
    try:
        values = parse_line(line)
    except Invalid:
        return
    assert all(isinstance(value, str) for value in values.values())
