"""The threshold grammar."""

import math

import pytest
from hypothesis import example as explicit
from hypothesis import given
from hypothesis import strategies as st

from limitfs.errors import Impossible, Invalid, LimitsError, Unsupported
from limitfs.resources.model import Unit
from limitfs.watching.condition import (
    LARGEST_AMOUNT,
    LONGEST_TIME,
    SHORTEST_WINDOW,
    Amount,
    Condition,
    Op,
    example,
    format_value,
    parse,
    parse_psi,
    render,
)

UNITS = st.sampled_from(list(Unit))

# Numbers as people write them are rare among floats, so they are asked for too.
numbers = st.one_of(
    st.integers(0, 2**64).map(float),
    st.integers(0, 10**6).map(lambda n: n / 1000),
    st.builds(lambda n, power: float(n * 1024**power), st.integers(0, 2000), st.integers(0, 4)),
    st.floats(0, LARGEST_AMOUNT, allow_subnormal=False),
)


def times(shortest: float) -> st.SearchStrategy[float]:
    return st.one_of(st.integers(1, int(LONGEST_TIME)).map(float), st.floats(shortest, LONGEST_TIME))


@st.composite
def amounts(draw: st.DrawFn, unit: Unit) -> Amount:
    return Amount(draw(numbers), unit is not Unit.PERCENT and draw(st.booleans()))


@st.composite
def conditions(draw: st.DrawFn, unit: Unit, rate: bool) -> Condition:
    """Every condition that `parse` can give, except None."""
    op = draw(st.sampled_from(list(Op)))
    if op is Op.CHANGE:
        return Condition(op)
    amount = draw(amounts(unit))
    clear = draw(st.none() | amounts(unit))
    if clear is not None and clear.percent == amount.percent:
        clear, amount = sorted((amount, clear), key=lambda a: a.number, reverse=op in (Op.LE, Op.LT))
    if op is Op.LT and amount.number == 0:
        op = Op.LE
    per = draw(st.none() | times(SHORTEST_WINDOW)) if rate else None
    return Condition(op, amount, per, draw(st.none() | times(5e-324)), clear, draw(st.booleans()))


# Words of the grammar in any order come nearer to its corners than arbitrary text.
WORDS = ">= > <= < 80 1.5 .5 5. -1 0 % K KiB mb T us ms s m h per for clear once off change unusual inf nan 1e9"
ODDITIES = ["٣", "²", "９", "\0", "\n", "\ud800", "9" * 400, "0." + "0" * 400 + "1"]
near_misses = st.lists(st.sampled_from(WORDS.split(" ") + ODDITIES), max_size=12)
texts = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(exclude_categories=()), max_size=60),
    st.builds(lambda words, glue: glue.join(words), near_misses, st.sampled_from(["", " ", "  "])),
)


# Examples of the contract


@pytest.mark.parametrize(
    ("text", "unit", "rate", "condition", "canonical"),
    [
        ("200", Unit.COUNT, False, Condition(Op.GE, Amount(200)), ">= 200"),
        ("> 80%", Unit.COUNT, False, Condition(Op.GT, Amount(80, percent=True)), "> 80%"),
        ("> 80%", Unit.PERCENT, True, Condition(Op.GT, Amount(80)), "> 80%"),
        ("80% per 10s", Unit.PERCENT, True, Condition(Op.GE, Amount(80), per=10), ">= 80% per 10s"),
        ("< 64M", Unit.BYTES, False, Condition(Op.LT, Amount(64 * 2**20)), "< 64M"),
        (">= 200 clear 180", Unit.COUNT, False, Condition(Op.GE, Amount(200), clear=Amount(180)), None),
        (">= 5s once", Unit.SECONDS, False, Condition(Op.GE, Amount(5), once=True), None),
        (">= 1G for 30s", Unit.BYTES, False, Condition(Op.GE, Amount(2**30), hold=30), None),
        ("change", Unit.COUNT, False, Condition(Op.CHANGE), None),
        ("off", Unit.COUNT, False, None, None),
    ],
)
def test_examples_of_the_contract(
    text: str, unit: Unit, rate: bool, condition: Condition | None, canonical: str | None
) -> None:
    assert parse(text, unit, rate) == condition
    assert render(condition, unit) == (canonical or text)


# Amounts and times


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *[(f"1{unit}", 1024.0) for unit in ("K", "k", "KB", "kB", "kb", "KiB", "KIB", " K")],
        ("1.5G", 1.5 * 2**30),
        ("2 TiB", 2.0**41),
        (".5K", 512.0),
        ("5.", 5.0),
        ("007", 7.0),
        ("18446744073709551615", 2.0**64),
    ],
)
def test_bytes(text: str, number: float) -> None:
    assert parse(text, Unit.BYTES) == Condition(Op.GE, Amount(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [("5", 5.0), ("0.5s", 0.5), ("150 ms", 0.15), ("3us", 3e-6), ("2m", 120.0), ("1.5h", 5400.0), ("70ms", 0.07)],
)
def test_times(text: str, number: float) -> None:
    assert parse(text, Unit.SECONDS) == Condition(Op.GE, Amount(number))
    assert parse(f">1 for {text}", Unit.COUNT) == Condition(Op.GT, Amount(1), hold=number)


def test_percent_of_a_limit_and_percent_as_unit() -> None:
    for unit in (Unit.BYTES, Unit.SECONDS, Unit.COUNT):
        assert parse("80 %", unit) == Condition(Op.GE, Amount(80, percent=True))
    assert parse("80%", Unit.PERCENT) == parse("80", Unit.PERCENT) == Condition(Op.GE, Amount(80))
    assert parse("400%", Unit.PERCENT) == Condition(Op.GE, Amount(400))


@pytest.mark.parametrize(
    "text", ["200", " 200", "200\n", "\t200 \r\n", "200\0", "200\n\0", ">=200", ">=   200", "\n200\n"]
)
def test_space_around_is_dropped(text: str) -> None:
    assert parse(text, Unit.COUNT) == Condition(Op.GE, Amount(200))


def test_options_come_in_any_order() -> None:
    wanted = Condition(Op.GE, Amount(80), per=5, hold=60, clear=Amount(60), once=True)
    assert parse("80% once clear 60% for 1m per 5s", Unit.PERCENT, rate=True) == wanted
    assert parse("80%per5s for60 clear60once", Unit.PERCENT, rate=True) == wanted
    assert render(wanted, Unit.PERCENT) == ">= 80% per 5s for 1m clear 60% once"


# Canonical numbers


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (1000, "1000"),
        (1024, "1K"),
        (1536, "1536"),
        (268435456, "256M"),
        (1.5 * 2**30, "1536M"),
        (2**42, "4T"),
        (307.2, "307.2"),
    ],
)
def test_canonical_bytes(number: float, text: str) -> None:
    assert render(Condition(Op.GE, Amount(float(number))), Unit.BYTES) == f">= {text}"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0s"),
        (10, "10s"),
        (90, "90s"),
        (300, "5m"),
        (7200, "2h"),
        (0.15, "150ms"),
        (1.5, "1500ms"),
        (0.0000005, "0.5us"),
        (0.00015, "150us"),
    ],
)
def test_canonical_times(number: float, text: str) -> None:
    assert render(Condition(Op.GE, Amount(float(number))), Unit.SECONDS) == f">= {text}"


def test_canonical_numbers_have_no_exponent() -> None:
    assert render(Condition(Op.GE, Amount(1e16)), Unit.COUNT) == ">= 10000000000000000"
    assert render(Condition(Op.GE, Amount(1e-7)), Unit.COUNT) == ">= 0.0000001"


# Refusals


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "nothing was written"),
        (" \n", "nothing was written"),
        ("on", "expected an amount, found 'on' at column 1"),
        (">=", "expected an amount, found the end"),
        (">> 5", "expected an amount, found '>' at column 2"),
        ("= 5", "expected an amount, found '=' at column 1"),
        ("5 5", "expected per, for, clear or once, found '5' at column 3"),
        ("5 for", "expected a time, found the end"),
        ("5 for soon", "expected a time, found 'soon' at column 7"),
        (
            "5 for 5 parsecs",
            "neither a unit of time (us ms s m h) nor per, for, clear or once: 'parsecs' at column 9",
        ),
        ("5 for 5%", "neither a unit of time (us ms s m h) nor per, for, clear or once: '%' at column 8"),
        ("5 for 5M", "neither a unit of time (us ms s m h) nor per, for, clear or once: 'M' at column 8"),
        ("5 clear", "expected an amount, found the end"),
        ("5 once once", "given twice: 'once' at column 8"),
        ("5 for 1s for 2s", "given twice: 'for' at column 10"),
        ("5 fro 10s", "neither % nor per, for, clear or once: 'fro' at column 3"),
        ("5K", "neither % nor per, for, clear or once: 'K' at column 2"),
        ("1e9", "neither % nor per, for, clear or once: 'e' at column 2"),
        ("5s", "neither % nor per, for, clear or once: 's' at column 2"),
        ("1,000", "expected per, for, clear or once, found ',000' at column 2"),
        ("1.2.3", "expected per, for, clear or once, found '.3' at column 4"),
        ("200\n300", "expected per, for, clear or once, found '300' at column 5"),
        ("200\n off", "neither % nor per, for, clear or once: 'off' at column 6"),
        ("off 5", "nothing may follow 'off', found '5' at column 5"),
        ("change once", "nothing may follow 'change', found 'once' at column 8"),
        ("OFF", "expected an amount, found 'OFF' at column 1"),
        ("+5", "expected an amount, found '+5' at column 1"),
        ("٣", r"expected an amount, found '\u0663' at column 1"),
        ("5٣", r"expected per, for, clear or once, found '\u0663' at column 2"),
        ("\ud800", r"expected an amount, found '\ud800' at column 1"),
        ("5\0\0", r"expected per, for, clear or once, found '\x00' at column 2"),
    ],
)
def test_syntax_errors_say_where(text: str, told: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(text, Unit.COUNT)
    assert told in caught.value.message
    assert caught.value.hint == "for example `>= 200 clear 180`"


@pytest.mark.parametrize(
    "text",
    [
        "-5",
        "-5%",
        "-0",
        "inf",
        "nan",
        "NaN",
        "max",
        "< 0",
        "< 0%",
        "9" * 400,
        "18446744073709551617",
        ">= 200 clear 201",
        "> 80% clear 81%",
        "< 10 clear 9",
        "<= 10% clear 9%",
        "5 clear -1",
        "5 clear inf",
        "5 for 0",
        "5 for -1s",
        "5 for inf",
        "5 for 8761h",
        "5 for 0." + "0" * 400 + "1",
        "5 per 1s",
    ],
)
def test_what_cannot_be(text: str) -> None:
    with pytest.raises(Impossible):
        parse(text, Unit.COUNT)


@pytest.mark.parametrize("text", ["80% per 0", "80% per -1s", "80% per 1us", "80% per 8761h"])
def test_windows_that_cannot_be(text: str) -> None:
    with pytest.raises(Impossible):
        parse(text, Unit.PERCENT, rate=True)


@pytest.mark.parametrize("text", ["unusual", "unusual 3", "> unusual 3 for 5s", "5 clear unusual"])
def test_unusual_is_not_kept(text: str) -> None:
    with pytest.raises(Unsupported, match="recorded history, which this version does not keep"):
        parse(text, Unit.COUNT)


@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize("rate", [False, True])
def test_the_hint_is_right(unit: Unit, rate: bool) -> None:
    assert render(parse(example(unit, rate), unit, rate), unit) == example(unit, rate)


def test_a_long_token_is_cut_in_the_message() -> None:
    with pytest.raises(Invalid) as caught:
        parse("é" * 4096, Unit.COUNT)
    assert len(caught.value.message) < 200
    assert caught.value.message.isascii()


# Properties


@given(st.data(), UNITS, st.booleans())
def test_the_canonical_form_reads_back(data: st.DataObject, unit: Unit, rate: bool) -> None:
    condition = data.draw(st.none() | conditions(unit, rate))
    assert parse(render(condition, unit), unit, rate) == condition


@given(texts, UNITS, st.booleans())
@explicit("9" * 4096, Unit.BYTES, True)
@explicit("1 for 0." + "0" * 4000 + "1us", Unit.BYTES, True)
@explicit("9" * 2_000_000 + "h", Unit.SECONDS, True)
@explicit("<" * 4096, Unit.COUNT, False)
@explicit("5 once " * 600, Unit.COUNT, False)
@explicit("0." + "0" * 62 + "1us", Unit.SECONDS, False)
def test_any_text_is_read_or_refused(text: str, unit: Unit, rate: bool) -> None:
    refusal: LimitsError | None = None
    condition = None
    try:
        condition = parse(text, unit, rate)
    except (Invalid, Impossible, Unsupported) as error:
        refusal = error
    if refusal is not None:
        assert refusal.message.isprintable()
        assert refusal.hint
    canonical = render(condition, unit)
    assert parse(canonical, unit, rate) == condition
    assert render(parse(canonical, unit, rate), unit) == canonical


# What a condition means


def test_levels() -> None:
    assert Condition(Op.GE, Amount(200)).levels(math.inf) == (200, 200)
    assert Condition(Op.GE, Amount(200), clear=Amount(180)).levels(math.inf) == (200, 180)
    assert Condition(Op.GE, Amount(80, percent=True), clear=Amount(50, percent=True)).levels(1000) == (800, 500)
    assert Condition(Op.CHANGE).levels(math.inf) == (0, 0)


def test_a_percentage_needs_a_limit() -> None:
    for number in (80.0, 0.0):
        with pytest.raises(Impossible, match="limit that is not there"):
            Condition(Op.GE, Amount(number, percent=True)).levels(math.inf)
    with pytest.raises(Impossible):
        Condition(Op.GE, Amount(5), clear=Amount(1, percent=True)).levels(math.inf)


def test_a_new_limit_cannot_put_clear_on_the_wrong_side() -> None:
    upward = Condition(Op.GE, Amount(80, percent=True), clear=Amount(180))
    assert upward.levels(1000) == (800, 180)
    assert upward.levels(100) == (80, 80)
    downward = Condition(Op.LE, Amount(20, percent=True), clear=Amount(100))
    assert downward.levels(100) == (20, 100)
    assert downward.levels(1000) == (200, 200)


@pytest.mark.parametrize(
    ("op", "below", "at", "above"),
    [
        (Op.GE, False, True, True),
        (Op.GT, False, False, True),
        (Op.LE, True, True, False),
        (Op.LT, True, False, False),
        (Op.CHANGE, False, False, False),
    ],
)
def test_beyond(op: Op, below: bool, at: bool, above: bool) -> None:
    condition = Condition(op, Amount(200))
    assert [condition.beyond(value, 200) for value in (199, 200, 201)] == [below, at, above]


def test_cleared() -> None:
    up, down = Condition(Op.GE, Amount(200)), Condition(Op.LT, Amount(10))
    assert [up.cleared(value, 200, 180) for value in (200, 199, 181, 180, 0)] == [False, False, False, True, True]
    assert [up.cleared(value, 200, 200) for value in (201, 200, 199)] == [False, False, True]
    assert [down.cleared(value, 10, 20) for value in (9, 10, 19, 20, 21)] == [False, False, False, True, True]
    assert [down.cleared(value, 10, 10) for value in (9, 10)] == [False, True]


@given(st.data(), UNITS, numbers, numbers)
def test_no_value_is_beyond_and_cleared(data: st.DataObject, unit: Unit, value: float, limit: float) -> None:
    condition = data.draw(conditions(unit, rate=False))
    level, clear = condition.levels(limit)
    assert not (condition.beyond(value, level) and condition.cleared(value, level, clear))


# PSI triggers


def test_psi_triggers() -> None:
    assert parse_psi("some 150000 2000000") == ("some", 150000, 2000000)
    assert parse_psi("full 50000 1000000\0") == ("full", 50000, 1000000)
    assert parse_psi(" some\t500000 500000 \n") == ("some", 500000, 500000)


@pytest.mark.parametrize(
    "text",
    ["", "some", "some 1", "some 1 2 3", "Some 1 2", "most 1 2", ">= 80%", "some -1 2", "some 1.5 2", "some ٣ 2"],
)
def test_other_texts_are_no_psi_triggers(text: str) -> None:
    assert parse_psi(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "some 0 1000000",
        "some 1000001 1000000",
        "some 1 499999",
        "some 1 10000001",
        f"some 1 {'9' * 5000}",
        f"full {'9' * 5000} 1000000",
    ],
)
def test_psi_triggers_the_kernel_refuses(text: str) -> None:
    with pytest.raises(Impossible):
        parse_psi(text)


@given(texts | st.builds("some {} {}".format, st.integers(), st.integers()))
def test_any_text_is_a_psi_trigger_or_not(text: str) -> None:
    try:
        trigger = parse_psi(text)
    except Impossible:
        return
    if trigger is not None:
        assert parse_psi("{} {} {}".format(*trigger)) == trigger


# Values


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (201.0, Unit.COUNT, "201"),
        (2.0**40, Unit.BYTES, "1099511627776"),
        (1e22, Unit.BYTES, "10000000000000000000000"),
        (0.0, Unit.PERCENT, "0"),
        (-0.0, Unit.PERCENT, "0"),
        (100.0, Unit.PERCENT, "100"),
        (12.5, Unit.PERCENT, "12.5"),
        (1 / 3, Unit.SECONDS, "0.333333"),
        (1e-9, Unit.SECONDS, "0"),
        (1e17, Unit.SECONDS, "100000000000000000"),
        (math.inf, Unit.BYTES, "max"),
    ],
)
def test_format_value(value: float, unit: Unit, text: str) -> None:
    assert format_value(value, unit) == text


@given(st.floats(0, 2**70), UNITS)
def test_values_are_plain_numbers(value: float, unit: Unit) -> None:
    text = format_value(value, unit)
    assert set(text) <= set("0123456789.")
    assert float(text) == pytest.approx(value, abs=0.5 if unit in (Unit.BYTES, Unit.COUNT) else 1e-6)
