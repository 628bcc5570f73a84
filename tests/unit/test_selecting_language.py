"""The condition language: text to expression and back, its refusals, and what it says of rows."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limitfs.errors import Impossible, Invalid, LimitsError
from limitfs.resources import RESOURCES
from limitfs.resources.model import Resource
from limitfs.selecting import language
from limitfs.selecting.columns import OF_PROCESSES, Column, Kind, Value
from limitfs.selecting.expression import Comparison, Expression, Joined, Not
from limitfs.selecting.language import parse, picture
from limitfs.selecting.pattern import LARGEST_PROGRAM, Pattern


@dataclass
class Written:
    """A row that a test wrote; what is asked of it is noted."""

    values: dict[str, Value | None]
    wholes: dict[str, float] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def value(self, column: Column) -> Value | None:
        self.asked.append(column.name)
        return self.values.get(column.name)

    def whole(self, resource: Resource) -> float | None:
        return self.wholes.get(resource.name)


NGINX = Written(
    {"pid": 12.0, "ppid": 1.0, "comm": "nginx", "uid": 33.0, "exe": "/usr/sbin/nginx", "state": "S",
     "partition": "/system.slice/nginx.service", "memory": float(2 << 30), "fds": 900.0, "cputime": 5400.0},
    {"fds": 1000.0},
)  # fmt: skip


# Canonical text


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        (
            'comm == "nginx" && uid != 0 && memory > 1G || !(partition ~ "^/system")',
            'comm == "nginx" && uid != 0 && memory > 1G || !(partition ~ "^/system")',
        ),
        ("  comm==nginx\n&&uid!=0 ", 'comm == "nginx" && uid != 0'),
        ("((((comm == x))))", 'comm == "x"'),
        ("comm == x && (uid == 0 && pid == 1)", 'comm == "x" && uid == 0 && pid == 1'),
        ("(comm == x || uid == 0) && !pid == 1", '(comm == "x" || uid == 0) && !(pid == 1)'),
        ("memory > 2048K || cputime >= 90m || cpu < 50", "memory > 2M || cputime >= 90m || cpu < 50%"),
        ("fds > 80.0%", "fds > 80%"),
        ("partition == /system.slice/a@b.service", 'partition == "/system.slice/a@b.service"'),
        ("comm ~ ^ng.*", 'comm ~ "^ng.*"'),
        (r'comm == "a\n\"\udcff"', r'comm == "a\n\"\udcff"'),
        ('start > "2026-01-01T12:00:00.5+01:00"', 'start > "2026-01-01T11:00:00.500000Z"'),
        ('start > "0001-01-01T00:00:00Z"', 'start > "0001-01-01T00:00:00.000000Z"'),
        ('start < "9999-12-31T23:59:59"', 'start < "9999-12-31T23:59:59.000000Z"'),
        ("state == R", "state == R"),
        ("uid == root", "uid == 0"),
    ],
)
def test_canonical(written: str, canonical: str) -> None:
    assert parse(written).text == canonical
    assert parse(canonical) == parse(written)


# Refusals


@pytest.mark.parametrize(
    ("written", "error", "said"),
    [
        (
            "comm < 5",
            Invalid,
            "comm is text: == != ~ compare it, not <\n"
            "    comm < 5\n"
            "         ^",
        ),
        (
            "uid == 0 && (comm == x",
            Invalid,
            "expected &&, || or ), found the end\n"
            "    uid == 0 && (comm == x\n"
            "                          ^",
        ),
        (
            "comm == x)",
            Invalid,
            "expected &&, || or the end, found ')'\n"
            "    comm == x)\n"
            "             ^",
        ),
        (
            "comm = x",
            Invalid,
            "expected one of == != < <= > >= ~, found '='\n"
            "    comm = x\n"
            "         ^",
        ),
        (
            'comm == "abc',
            Invalid,
            "expected a string that ends in \", found '\"'\n"
            '    comm == "abc\n'
            "            ^",
        ),
        (
            "comm == 'x'",
            Invalid,
            'expected a word, or a string in "", found "\'"\n'
            "    comm == 'x'\n"
            "            ^",
        ),
        (
            r'comm == "\x"',
            Invalid,
            "not a JSON string: \\ is written \\\\\n"
            '    comm == "\\x"\n'
            "             ^",
        ),
        (
            'uid == 0 && exe ~ "("',
            Invalid,
            "not a regular expression: missing ): (\n"
            '    uid == 0 && exe ~ "("\n'
            "                      ^",
        ),
        (
            "comm ~ \"(?=x)\"",
            Invalid,
            "not a regular expression: invalid perl operator: (?=\n"
            '    comm ~ "(?=x)"\n'
            "           ^",
        ),
        (
            "memory > 12Q",
            Invalid,
            "'12Q' is no amount of memory, in bytes\n"
            "    memory > 12Q\n"
            "             ^",
        ),
        (
            "fds > -1",
            Impossible,
            "'-1' can be no fds: negative, endless, or beyond 64 bits\n"
            "    fds > -1\n"
            "          ^",
        ),
        (
            "state == Q",
            Invalid,
            "state is a state, one of R S D T t I Z, 'Q' is not\n"
            "    state == Q\n"
            "             ^",
        ),
        (
            "uid == nosuchuser",
            Invalid,
            "/etc/passwd has no user 'nosuchuser'; others by number\n"
            "    uid == nosuchuser\n"
            "           ^",
        ),
        (
            "comm == systemd-networkd",
            Impossible,
            "the kernel keeps 15 bytes of a name, this has 16\n"
            "    comm == systemd-networkd\n"
            "            ^",
        ),
        (
            "comm == a\tä && x",
            Invalid,
            "expected &&, || or the end, found '\\xe4'\n"
            "    comm == a ? && x\n"
            "              ^",
        ),
    ],
)  # fmt: skip
def test_a_caret_under_what_is_wrong(written: str, error: type[LimitsError], said: str) -> None:
    with pytest.raises(error) as refused:
        parse(written)
    assert f"{refused.value.message}\n{refused.value.picture}" == said


def test_an_unknown_column_names_those_there_are() -> None:
    with pytest.raises(Invalid) as refused:
        parse("comm == x &&\nbogus < 5")
    first, drawn = refused.value.message, refused.value.picture.split("\n")
    assert first.startswith("no column bogus; there are pid, ppid, comm, state")
    assert "memory" in first
    assert drawn == ["    comm == x && bogus < 5", "                 ^"]


def test_a_thread_is_no_process() -> None:
    with pytest.raises(Invalid, match="no column tid"):
        parse("tid == 1")
    assert parse("tid == 1", {**OF_PROCESSES, "tid": Column("tid", Kind.NUMBER, 0, True)}).text == "tid == 1"


def test_nothing_is_no_condition() -> None:
    for text in ("", " \n"):
        with pytest.raises(Invalid, match="a condition was expected"):
            parse(text)


def test_a_long_text_is_cut_around_the_caret() -> None:
    text = "comm == x && " * 50 + "uid = 0" + " && comm == x" * 50
    shown, caret = picture(text, text.index("= 0")).split("\n")
    assert shown.startswith("    ...")
    assert shown.endswith("...")
    assert len(shown) <= 4 + 3 + 60 + 40 + 3
    assert shown[caret.index("^")] == "="


@pytest.mark.parametrize(
    "time", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "9999-12-31T23:59:59.999999"]
)
def test_times_that_cannot_be_shown_are_refused(time: str) -> None:
    with pytest.raises(Impossible, match="years 1 to 9999"):
        parse(f'start > "{time}"')


@pytest.mark.parametrize(
    "written",
    [
        "!" * 4000 + "comm == x",
        "!(comm == a || " * 200 + "comm == x" + ")" * 200,
        " || ".join("comm ~ a" for _ in range(language.MOST_PATTERNS + 1)),
        "comm ~ " + "a" * (language.LONGEST_PATTERN + 1),
    ],
)
def test_what_would_cost_too_much_is_refused(written: str) -> None:
    with pytest.raises(Impossible):
        parse(written)


def test_what_looks_dear_and_is_not() -> None:
    assert parse("(" * 2000 + "comm == x" + ")" * 2000).text == 'comm == "x"'
    assert len(list(parse(" || ".join("pid == 1" for _ in range(300))).comparisons())) == 300


def test_no_pattern_takes_long() -> None:
    """Each of these keeps a backtracking engine busy for longer than the machine lasts."""
    for pattern in ("(a+)+$", "(a|aa)+$", "(.*a){9}$", "(a*)*b"):
        row = Written({"exe": "a" * 4095 + "!"})
        assert parse(f'exe ~ "{pattern}"').matches(row) in (False, True)


def test_a_pattern_that_grows_too_large_is_refused() -> None:
    with pytest.raises(Invalid, match="pattern too large"):
        parse(r'exe ~ "[\\pL\\pN]{100}"')


@pytest.mark.parametrize("pattern", ["((a{1,9}){1,9})b", "x(.*){40}$", "a" * 200])
def test_a_pattern_that_is_dear_to_search_for_is_refused(pattern: str) -> None:
    with pytest.raises(Impossible) as refusal:
        parse(f'uid == 0 && exe ~ "{pattern}"')
    assert f" instructions, at most {LARGEST_PROGRAM}" in str(refusal.value)
    shown = refusal.value.picture or ""
    assert shown.splitlines()[1].index("^") == 4 + len("uid == 0 && exe ~ ")


def test_a_pattern_that_is_cheap_is_searched_for_once() -> None:
    """What it costs is its program times the text, at first; then it is known. Another text costs anew."""
    expression = parse('exe ~ "((a{1,3}){1,5})b7"')
    (comparison,) = expression.comparisons()
    assert comparison.pattern is not None
    assert expression.work == comparison.pattern.size <= LARGEST_PROGRAM
    before = Pattern.spent
    for _ in range(3):
        assert not expression.matches(Written({"exe": "/a" * 50}))
    assert Pattern.spent - before == expression.work * 100
    assert expression.matches(Written({"exe": "/aab7"}))
    assert Pattern.spent - before == expression.work * 105
    assert parse("exe == /a/a").work == 0


def test_users_come_from_the_local_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passwd = tmp_path / "passwd"
    passwd.write_bytes(b"# comment\n\xff:x:9:\nshort\nweb:x:1033:33::/:/bin/sh\nbad:x:many:\n")
    monkeypatch.setattr(language, "PASSWD", str(passwd))
    assert parse("uid == web").text == "uid == 1033"
    for name in ("root", "short", "bad"):
        with pytest.raises(Invalid):
            parse(f"uid == {name}")
    monkeypatch.setattr(language, "PASSWD", str(tmp_path / "none"))
    with pytest.raises(Invalid):
        parse("uid == web")


@given(st.text(max_size=60) | st.text(alphabet='comuid =!<>~&|()"\\x5G', max_size=40))
def test_whatever_is_written_it_is_read_or_refused(text: str) -> None:
    try:
        read = parse(text)
    except LimitsError as error:
        said = f"{error.message}; {error.hint}"
        assert said.isascii()
        assert len(said.splitlines()) in (1, 3)
    else:
        assert parse(read.text) == read


# What it says of rows


@pytest.mark.parametrize(
    "condition",
    [
        "comm == nginx",
        "comm != apache",
        'comm ~ "^ng" && exe ~ "sbin"',
        "uid == 33 && uid > 32 && uid <= 33",
        "memory > 1G && memory >= 2G && memory != 1",
        "fds > 80%",
        "cputime >= 1.5h",
        'partition ~ "nginx.service$"',
        "!(comm == apache || ppid == 2)",
        "state == S && pid < 13",
    ],
)
def test_matches(condition: str) -> None:
    assert parse(condition).matches(NGINX)
    assert not Not(parse(condition)).matches(NGINX)


def test_what_cannot_be_told_matches_nothing_and_nor_does_its_opposite() -> None:
    for condition in ("stack > 1M", "memory > 80%", "!(stack > 1M)", "stack > 1M && pid == 12"):
        assert not parse(condition).matches(NGINX), condition
    assert parse("stack > 1M || pid == 12").matches(NGINX)
    assert parse("!(stack > 1M && pid == 13)").matches(NGINX)


def test_cheap_columns_are_asked_first_and_others_only_if_they_decide() -> None:
    row = Written(dict(NGINX.values))
    assert not parse("memory > 1G && exe ~ nginx && comm == apache").matches(row)
    assert row.asked == ["comm"]
    row.asked.clear()
    assert parse("memory > 1G && exe ~ nginx && comm == nginx || uid == 5").matches(row)
    assert row.asked == ["uid", "comm", "exe", "memory"]


def test_what_is_told_may_decide_alone() -> None:
    condition = parse("comm == nginx && memory > 1G")
    assert condition.judge(Written({"comm": "apache"}), told=True) is False
    row = Written({"comm": "nginx"})
    assert condition.judge(row, told=True) is None
    assert row.asked == ["comm"]
    assert parse("comm == nginx || memory > 1G").judge(row, told=True) is True


def test_text_that_is_not_utf8() -> None:
    name = os.fsdecode(b"a\xffb\n")
    row = Written({"comm": name})
    assert parse(r'comm == "a\udcffb\n"').matches(row)
    assert parse('comm ~ "^a.*"').matches(row)
    assert not parse('comm ~ "^b"').matches(row), "a newline begins nothing"


# Any expression

_words = st.text(st.characters(codec="utf-8"), max_size=15).filter(lambda text: len(text.encode()) <= 15)


def _leaves() -> st.SearchStrategy[str]:
    text = st.builds(
        lambda column, op, operand: f"{column} {op} {operand}",
        st.sampled_from(["comm", "exe", "partition"]),
        st.sampled_from(["==", "!="]),
        _words.map(lambda text: str(Comparison(OF_PROCESSES["comm"], "==", text))[len("comm == ") :]),
    )
    ops = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
    whole = st.integers(0, 2**40)
    numbers = st.builds("{} {} {}".format, st.sampled_from(["pid", "ppid", "uid", "fds", "threads"]), ops, whole)
    sizes = st.builds(
        "{} {} {}{}".format, st.sampled_from(["memory", "swap"]), ops, whole, st.sampled_from(["", "K", "M"])
    )
    states = st.builds("state {} {}".format, st.sampled_from(["==", "!="]), st.sampled_from(language.STATES))
    return text | numbers | sizes | states


def _deeper(below: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    joined = st.builds(
        lambda op, parts: op.join(parts), st.sampled_from([" && ", "||"]), st.lists(below, min_size=2)
    )
    return joined.map("({})".format) | below.map("!({})".format)


_conditions = st.recursive(_leaves(), _deeper, max_leaves=12)
_rows = st.fixed_dictionaries(
    {
        **{
            name: st.none() | st.integers(0, 2**41).map(float) for name in ("pid", "ppid", "uid", "fds", "threads")
        },
        **{name: st.none() | st.integers(0, 2**61).map(float) for name in ("memory", "swap")},
        **{name: st.none() | _words for name in ("comm", "exe", "partition")},
        "state": st.none() | st.sampled_from(language.STATES),
    }
)


def reference(expression: Expression, values: dict[str, Value | None]) -> bool | None:
    """Kleene's logic by its table, in the order in which it is written, without any short cut."""
    match expression:
        case Comparison(column=column, op=op, operand=operand):
            value = values[column.name]
            if value is None:
                return None
            number = getattr(operand, "number", operand)
            return bool(eval(f"value {op} number", {"value": value, "number": number}))
        case Not(of=inner):
            found = reference(inner, values)
            return None if found is None else not found
        case Joined(every=every, parts=parts):
            found_all = [reference(part, values) for part in parts]
            if (not every) in found_all:
                return not every
            return None if None in found_all else every
    raise AssertionError(expression)


@given(_conditions)
def test_any_text_and_back(text: str) -> None:
    read = parse(text)
    assert parse(read.text) == read
    assert parse(read.text).text == read.text


@given(_conditions, _rows)
def test_any_row(text: str, values: dict[str, Value | None]) -> None:
    read = parse(text)
    expected = reference(read, values)
    assert read.judge(Written(values)) is expected
    assert read.matches(Written(values)) is (expected is True)


@given(_conditions, _rows)
def test_what_is_told_never_contradicts_the_whole(text: str, values: dict[str, Value | None]) -> None:
    told = parse(text).judge(Written(values), told=True)
    assert told is None or told is parse(text).judge(Written(values))


def test_every_resource_of_a_process_is_a_column() -> None:
    assert {name for name, each in RESOURCES.items() if "process" in each.levels} <= OF_PROCESSES.keys()
