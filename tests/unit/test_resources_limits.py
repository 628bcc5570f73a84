"""Reading, parsing and setting resource limits."""

import math
import resource
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limitfs.errors import Denied, Gone, Impossible, Invalid, LimitsError
from limitfs.resources import RESOURCES, procfs
from limitfs.resources.limits import parse_limit, read_limit, set_limit
from limitfs.resources.model import Limit, Process, Unit

NOFILE = resource.RLIMIT_NOFILE


@pytest.fixture
def child() -> Iterator[Process]:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        yield procfs.identify(sleeper.pid)
        sleeper.kill()


@pytest.mark.parametrize(
    ("text", "unit", "parsed"),
    [
        ("100", Unit.COUNT, (100, None)),
        (" 100  200\n", Unit.COUNT, (100, 200)),
        ("max", Unit.COUNT, (math.inf, math.inf)),
        ("max max", Unit.COUNT, (math.inf, math.inf)),
        ("8M max", Unit.BYTES, (8 << 20, math.inf)),
        ("1.5G", Unit.BYTES, (3 << 29, None)),
        ("1T", Unit.BYTES, (1 << 40, None)),
        ("90m", Unit.SECONDS, (5400, None)),
        ("2000ms 1h", Unit.SECONDS, (2, 3600)),
        ("12.5", Unit.PERCENT, (12.5, None)),
        ("50", Unit.PERCENT, (50, None)),
    ],
)
def test_parse(text: str, unit: Unit, parsed: tuple[float, float | None]) -> None:
    assert parse_limit(text, unit) == parsed


@pytest.mark.parametrize(
    "text", ["", "1 2 3", "-1", "x", "1 K", "1k", "1e3", "inf", "nan", "unlimited", "5%", "٣"]
)
def test_syntax(text: str) -> None:
    with pytest.raises(Invalid) if text != "1 K" else pytest.raises(Invalid, match="'K'"):
        parse_limit(text, Unit.BYTES)


@pytest.mark.parametrize("text", ["0.3", "2 1", "max 1", "9223372036854775807", "9999999T"])
def test_understood_but_impossible(text: str) -> None:
    with pytest.raises(Impossible):
        parse_limit(text, Unit.BYTES)


@given(st.text(max_size=30), st.sampled_from(Unit))
def test_any_text_is_an_answer_or_a_refusal(text: str, unit: Unit) -> None:
    try:
        soft, hard = parse_limit(text, unit)
    except LimitsError:
        return
    assert 0 <= soft <= (math.inf if hard is None else hard)


def test_read(child: Process) -> None:
    soft, hard = resource.prlimit(child.pid, NOFILE)
    assert read_limit(child, NOFILE) == Limit(soft, hard)


def test_the_file_says_the_same_as_the_system_call(child: Process) -> None:
    assert [Limit(*each) for each in procfs.limits(child.pid)] == [read_limit(child, n) for n in range(16)]


def test_read_without_the_capability(child: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_limit(child, NOFILE)
    monkeypatch.setattr(resource, "prlimit", refuse)
    assert read_limit(child, NOFILE) == expected


def refuse(*_args: object) -> None:
    raise PermissionError


def test_set_the_soft_limit_alone(child: Process) -> None:
    hard = read_limit(child, NOFILE).hard
    set_limit(child, NOFILE, 64)
    assert resource.prlimit(child.pid, NOFILE) == (64, hard)
    assert RESOURCES["fds"].limit(child) == Limit(64, hard)


def test_set_both_and_back_up_to_the_hard_limit(child: Process) -> None:
    set_limit(child, NOFILE, 64, 128)
    set_limit(child, NOFILE, 128)
    assert read_limit(child, NOFILE) == Limit(128, 128)


def test_soft_above_hard(child: Process) -> None:
    set_limit(child, NOFILE, 64, 128)
    with pytest.raises(Impossible, match="above the hard limit 128"):
        set_limit(child, NOFILE, 129)
    assert read_limit(child, NOFILE) == Limit(64, 128)


def test_a_hard_limit_does_not_rise_unless_the_user_may(child: Process) -> None:
    set_limit(child, NOFILE, 64, 128)
    with pytest.raises(Denied) as refused:
        set_limit(child, NOFILE, 64, 129)
    assert "CAP_SYS_RESOURCE" in refused.value.hint
    assert read_limit(child, NOFILE) == Limit(64, 128)


def test_the_kernel_s_refusal_to_raise(child: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit(child, NOFILE, 64, 128)
    monkeypatch.setattr(resource, "prlimit", refuse)
    with pytest.raises(Denied) as refused:
        set_limit(child, NOFILE, 64, 129, raise_hard=True)
    assert "CAP_SYS_RESOURCE" in refused.value.hint


def test_the_kernel_s_refusal_of_another_user_s_process(child: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "prlimit", refuse)
    with pytest.raises(Denied, match="does not let the daemon"):
        set_limit(child, NOFILE, 10)


def test_more_descriptors_than_anybody_may_have(child: Process) -> None:
    with pytest.raises(Impossible, match="no process may have more"):
        set_limit(child, NOFILE, 64, procfs.sysctl("fs/nr_open") + 1, raise_hard=True)


def test_infinity_is_kept(child: Process) -> None:
    core = resource.RLIMIT_RSS
    before = read_limit(child, core)
    set_limit(child, core, before.hard)
    assert read_limit(child, core) == Limit(before.hard, before.hard)


def test_gone(child: Process) -> None:
    with pytest.raises(Gone):
        set_limit(Process(child.pid, child.start - 1), NOFILE, 64)
    assert read_limit(child, NOFILE).soft != 64
