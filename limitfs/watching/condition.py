"""The threshold grammar: text to `Condition` and back.

    threshold = "off" | "change" | condition
    condition = [op] amount ["per" time] ["for" time] ["clear" amount] ["once"]
    op        = ">=" (understood when left out) | ">" | "<=" | "<"
    amount    = number [unit] | number "%" | "unusual" [sigmas]
    unit      = K M G T (powers of 1024; KB and KiB are the same) for bytes; us ms s m h for time

The words after the amount may come in any order, each once. Everything here is pure: text and numbers go in,
conditions and text come out, and nothing but the errors of `limitfs.errors` is raised, whatever the text.
"""

import enum
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import assert_never

from limitfs.errors import Impossible, Invalid, LimitsError, Unsupported
from limitfs.resources.model import Unit

LARGEST_AMOUNT = 2.0**64
"""In the base unit: the kernel's counters have 64 bits, so nothing is ever beyond this."""

SHORTEST_WINDOW = 0.001
"""Seconds, for `per`: a rate over less would cost its sampler more than it tells."""

LONGEST_TIME = 365 * 86400.0
"""Seconds, for `per` and `for`."""

PSI_WINDOW_US = (500_000, 10_000_000)
"""Shortest and longest window of a PSI trigger; Documentation/accounting/psi.rst."""

_BYTE_UNITS = {
    letter + tail: Decimal(1024**power) for power, letter in enumerate("kmgt", 1) for tail in ("", "b", "ib")
}
_TIME_UNITS = {
    "us": Decimal("0.000001"),
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
}
_OPTIONS = frozenset({"per", "for", "clear", "once"})
_ENDLESS = frozenset({"inf", "infinity", "nan", "max"})

# Explicit ranges: \d would admit the digits of every script, \s the separators of Unicode.
_TOKEN = re.compile(
    r"(?P<op>[<>]=?)"
    r"|(?P<number>-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"
    r"|(?P<word>[A-Za-z]+|%)"
    r"|(?P<other>[^ \t\r\n]+)"
)
_PSI = re.compile(r"[ \t]*(some|full)[ \t]+([0-9]+)[ \t]+([0-9]+)")

# Its own context: without traps a huge number becomes infinite, and is then refused as too large.
_ARITHMETIC = Context(prec=40, traps=[])


class Op(enum.StrEnum):
    """How a value is compared with the level."""

    GE = ">="
    GT = ">"
    LE = "<="
    LT = "<"
    CHANGE = "change"


@dataclass(frozen=True, slots=True)
class Amount:
    """A number in the base unit of the resource or, with `percent`, in percent of its limit.

    For a resource that is itself measured in percent, `%` is the unit, and `percent` stays False.
    """

    number: float
    percent: bool = False

    def of(self, limit: float) -> float:
        """This amount in the base unit, `limit` being the soft limit.

        Raises:
            Impossible: it is a percentage, and there is no limit.
        """
        if not self.percent:
            return self.number
        level = limit * self.number / 100
        if not math.isfinite(level):
            raise Impossible(
                "a percentage of a limit that is not there", "see `limit`; or give a number without %"
            )
        return level


@dataclass(frozen=True, slots=True)
class Condition:
    """When a value is of interest.

    Attributes:
        op: how the value is compared; CHANGE compares with the value before, and has nothing else.
        amount: with what it is compared; None for CHANGE.
        per: for a rate, the window in seconds; None: the resource's own.
        hold: seconds for which it must stay beyond without interruption (the word `for`); None: none.
        clear: where the alarm ends; None: as soon as the value is no longer beyond.
        once: disarm after the first alarm.
    """

    op: Op
    amount: Amount | None = None
    per: float | None = None
    hold: float | None = None
    clear: Amount | None = None
    once: bool = False

    @property
    def upward(self) -> bool:
        """True where more is worse (`>=`, `>`)."""
        return self.op in (Op.GE, Op.GT)

    def levels(self, limit: float) -> tuple[float, float]:
        """The level and the clear level in the base unit, `limit` being the soft limit.

        Without `clear` both are the same. A clear level is never on the wrong side of the level: where one is a
        percentage and the other is not, a new limit could put it there, and the alarm would flap. For CHANGE
        both are 0, so that a source compares nothing away.

        Raises:
            Impossible: a percentage, and there is no limit.
        """
        if self.amount is None:
            return 0.0, 0.0
        level = self.amount.of(limit)
        if self.clear is None:
            return level, level
        clear = self.clear.of(limit)
        return level, min(clear, level) if self.upward else max(clear, level)

    def beyond(self, value: float, level: float) -> bool:
        """Whether `value` is past `level`; never so for CHANGE."""
        match self.op:
            case Op.GE:
                return value >= level
            case Op.GT:
                return value > level
            case Op.LE:
                return value <= level
            case Op.LT:
                return value < level
            case Op.CHANGE:
                return False
            case _:
                assert_never(self.op)

    def cleared(self, value: float, level: float, clear: float) -> bool:
        """Whether an alarm ends at `value`: not beyond `level`, and back at `clear` or better.

        `>= 200 clear 180` ends at 180 or less. Asking for both keeps `>= 200 clear 200` from ringing and
        clearing at once.
        """
        if self.beyond(value, level):
            return False
        return value <= clear if self.upward else value >= clear


def parse(text: str, unit: Unit, rate: bool = False) -> Condition | None:
    """Read a threshold.

    Args:
        text: one whole write; space around it, newlines at its end and one NUL after it are dropped.
        unit: of the resource.
        rate: whether the resource is a rate, and so has a window ("per").

    Returns:
        The condition; None for "off".

    Raises:
        Invalid: the text does not follow the grammar.
        Impossible: it does, but no value can ever meet it, or no clock can measure it.
        Unsupported: it asks for `unusual`.
    """
    return _Parser(text, unit, rate).threshold()


def parse_amount(text: str, unit: Unit) -> Amount:
    """Read an amount alone: `1.5G`, `80%`, `150ms`.

    Raises:
        Invalid: it is none.
        Impossible: no value of that unit can be so large, small or endless.
        Unsupported: it asks for `unusual`.
    """
    return _Parser(text, unit, rate=False).only_amount()


def render(condition: Condition | None, unit: Unit) -> str:
    """The canonical text; `parse` reads the same condition back from it."""
    if condition is None:
        return "off"
    if condition.amount is None:
        return str(condition.op)
    words = [str(condition.op), render_amount(condition.amount, unit)]
    if condition.per is not None:
        words += ["per", _render_time(condition.per)]
    if condition.hold is not None:
        words += ["for", _render_time(condition.hold)]
    if condition.clear is not None:
        words += ["clear", render_amount(condition.clear, unit)]
    if condition.once:
        words.append("once")
    return " ".join(words)


def parse_psi(text: str) -> tuple[str, int, int] | None:
    """Read a trigger as programs write it to /proc/pressure: `some 150000 2000000`.

    Returns:
        "some" or "full", the stall and the window in microseconds; None if the text is not of that form.

    Raises:
        Impossible: the kernel could not watch for that either.
    """
    match = _PSI.fullmatch(_trim(text))
    if match is None:
        return None
    # Not int() yet: it refuses thousands of digits with an error of its own, where a float becomes infinite.
    stall, window = float(match[2]), float(match[3])
    shortest, longest = PSI_WINDOW_US
    if not shortest <= window <= longest:
        raise Impossible(f"the window must be {shortest} to {longest} microseconds", "some 150000 2000000")
    if not 0 < stall <= window:
        raise Impossible("the stall must be more than 0 and at most the window", "some 150000 2000000")
    return match[1], int(stall), int(window)


def format_value(value: float, unit: Unit) -> str:
    """A number in the base unit, as `usage` and the events show it.

    Whole for bytes and counts, at most 6 decimals for seconds and percent; never an exponent. "max" for
    infinity, as limits are written.
    """
    if math.isinf(value):
        return "max"
    if unit in (Unit.BYTES, Unit.COUNT):
        return f"{value:.0f}"
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def example(unit: Unit, rate: bool = False) -> str:
    """A condition that makes sense for such a resource, for hints and help."""
    match unit:
        case Unit.BYTES:
            return ">= 1G for 30s"
        case Unit.SECONDS:
            return ">= 5s once"
        case Unit.PERCENT:
            return ">= 80% per 10s" if rate else ">= 80% for 10s"
        case Unit.COUNT:
            return ">= 200 clear 180"
        case _:
            assert_never(unit)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    """The name of its group in _TOKEN, or "end"."""
    text: str
    column: int

    def __str__(self) -> str:
        if self.kind == "end":
            return "the end"
        # Escaped to ASCII: what was written reaches a line of `last_error`, and must not break or forge one.
        shown = self.text if len(self.text) <= 24 else self.text[:24] + "..."
        return f"{shown!a} at column {self.column}"


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str, unit: Unit, rate: bool) -> None:
        self._unit = unit
        self._rate = rate
        text = _trim(text)
        self._tokens = [
            _Token(match.lastgroup or "", match[0], match.start() + 1) for match in _TOKEN.finditer(text)
        ]
        self._tokens.append(_Token("end", "", len(text) + 1))
        self._index = 0

    def threshold(self) -> Condition | None:
        token = self._peek()
        if token.kind == "end":
            raise self._wrong(Invalid, token, "nothing was written; `off` disarms")
        if token.text not in ("off", "change"):
            return self._condition()
        self._take()
        if self._peek().kind != "end":
            raise self._wrong(Invalid, self._peek(), f"nothing may follow {token.text!r}, found {self._peek()}")
        return Condition(Op.CHANGE) if token.text == "change" else None

    def only_amount(self) -> Amount:
        amount = self._amount()
        if self._peek().kind != "end":
            raise self._wrong(Invalid, self._peek(), f"nothing may follow an amount, found {self._peek()}")
        return amount

    def _condition(self) -> Condition:
        op = Op(self._take().text) if self._peek().kind == "op" else Op.GE
        first = self._peek()
        amount = self._amount()
        per = hold = clear = None
        clear_at = first
        given: set[str] = set()
        while (option := self._option(given)) is not None:
            match option.text:
                case "per":
                    per = self._window(option)
                case "for":
                    hold = self._time(option)
                case "clear":
                    clear_at = self._peek()
                    clear = self._amount()
        condition = Condition(op, amount, per, hold, clear, "once" in given)
        self._check_possible(condition, first, clear_at)
        return condition

    def _option(self, given: set[str]) -> _Token | None:
        token = self._take()
        if token.kind == "end":
            return None
        if token.text not in _OPTIONS:
            raise self._wrong(Invalid, token, f"expected per, for, clear or once, found {token}")
        if token.text in given:
            raise self._wrong(Invalid, token, f"given twice: {token}")
        given.add(token.text)
        return token

    def _check_possible(self, condition: Condition, amount_at: _Token, clear_at: _Token) -> None:
        amount, clear = condition.amount, condition.clear
        if condition.op is Op.LT and amount is not None and amount.number == 0:
            raise self._wrong(Impossible, amount_at, "no value is ever below 0")
        if amount is None or clear is None or amount.percent != clear.percent:
            return
        if condition.upward and clear.number > amount.number:
            raise self._wrong(Impossible, clear_at, f"after '{condition.op}', clear cannot be above the amount")
        if not condition.upward and clear.number < amount.number:
            raise self._wrong(Impossible, clear_at, f"after '{condition.op}', clear cannot be below the amount")

    def _amount(self) -> Amount:
        if self._peek().text == "unusual":
            raise self._wrong(
                Unsupported,
                self._peek(),
                "'unusual' needs recorded history, which this version does not keep",
            )
        token = self._number("an amount")
        if self._peek().text == "%":
            self._take()
            return Amount(self._scaled(token, Decimal(1)), percent=self._unit is not Unit.PERCENT)
        return Amount(self._scaled(token, self._amount_scale()))

    def _amount_scale(self) -> Decimal:
        match self._unit:
            case Unit.BYTES:
                return self._scale(_BYTE_UNITS, self._peek().text.lower(), "a unit of bytes (K M G T %)")
            case Unit.SECONDS:
                return self._scale(_TIME_UNITS, self._peek().text, "a unit of time (us ms s m h %)")
            case _:
                return self._scale({}, "", "%")

    def _scale(self, units: Mapping[str, Decimal], name: str, expected: str) -> Decimal:
        """Take the next token as the unit `name`; a word that is none of the options must be one."""
        token = self._peek()
        if token.kind != "word" or token.text in _OPTIONS:
            return Decimal(1)
        if name not in units:
            raise self._wrong(Invalid, token, f"neither {expected} nor per, for, clear or once: {token}")
        self._take()
        return units[name]

    def _window(self, option: _Token) -> float:
        if not self._rate:
            raise self._wrong(Impossible, option, f"not a rate, so it has no window: {option}")
        window = self._time(option)
        if window < SHORTEST_WINDOW:
            raise self._wrong(Impossible, option, f"a window must be 1ms at least: {option}")
        return window

    def _time(self, option: _Token) -> float:
        token = self._number("a time")
        seconds = self._scaled(token, self._scale(_TIME_UNITS, self._peek().text, "a unit of time (us ms s m h)"))
        if seconds <= 0:
            raise self._wrong(Impossible, option, f"a time must be more than 0: {option}")
        if seconds > LONGEST_TIME:
            raise self._wrong(Impossible, option, f"a time can be 8760h (a year) at most: {option}")
        return seconds

    def _number(self, expected: str) -> _Token:
        token = self._take()
        if token.text.lower() in _ENDLESS:
            raise self._wrong(Impossible, token, f"not a finite number: {token}")
        if token.kind != "number":
            raise self._wrong(Invalid, token, f"expected {expected}, found {token}")
        return token

    def _scaled(self, token: _Token, scale: Decimal) -> float:
        """The float nearest to the number; exact decimals first, so that 150ms is 0.15."""
        if token.text.startswith("-"):
            raise self._wrong(Impossible, token, f"cannot be negative: {token}")
        number = _ARITHMETIC.multiply(Decimal(token.text), scale)
        if number > LARGEST_AMOUNT:
            raise self._wrong(Impossible, token, f"more than 64 bits can count: {token}")
        return float(number)

    def _peek(self) -> _Token:
        return self._tokens[self._index]

    def _take(self) -> _Token:
        token = self._tokens[self._index]
        # "end" stays, so that nobody can read past it.
        self._index = min(self._index + 1, len(self._tokens) - 1)
        return token

    def _wrong(self, error: type[LimitsError], token: _Token, message: str) -> LimitsError:
        return error(message, f"for example `{example(self._unit, self._rate)}`", at=token.column - 1)


def _trim(text: str) -> str:
    """Drop what surrounds a command: programs in C send its NUL along, echo a newline."""
    return text.removesuffix("\0").rstrip(" \t\r\n")


def render_amount(amount: Amount, unit: Unit) -> str:
    """The canonical text of an amount; `parse_amount` reads the same back from it."""
    if amount.percent or unit is Unit.PERCENT:
        return _render_number(amount.number) + "%"
    if unit is Unit.BYTES:
        return _render_bytes(amount.number)
    if unit is Unit.SECONDS:
        return _render_time(amount.number)
    return _render_number(amount.number)


def _render_number(number: float) -> str:
    if number == int(number):
        return str(int(number))
    return f"{Decimal(repr(number)):f}"


def _render_bytes(number: float) -> str:
    """With the largest unit that divides it exactly: 268435456 is 256M, 1000 stays 1000."""
    if number and number == int(number):
        for power, letter in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
            whole, rest = divmod(int(number), 1024**power)
            if rest == 0:
                return f"{whole}{letter}"
    return _render_number(number)


def _render_time(seconds: float) -> str:
    """With the largest unit that divides it exactly: 90s, not 1.5m; 150ms, not 0.15s."""
    if seconds == int(seconds):
        for size, letter in ((3600, "h"), (60, "m")):
            if seconds and int(seconds) % size == 0:
                return f"{int(seconds) // size}{letter}"
        return f"{int(seconds)}s"
    exact = Decimal(repr(seconds))
    milliseconds = exact.scaleb(3, _ARITHMETIC)
    if milliseconds == milliseconds.to_integral_value():
        return f"{milliseconds:f}ms"
    return f"{exact.scaleb(6, _ARITHMETIC):f}us"
