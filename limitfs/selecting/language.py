"""The condition language of selections: text to `Expression`.

    condition  = all { "||" all }
    all        = one { "&&" one }
    one        = "!" one | "(" condition ")" | COLUMN op operand
    op         = "==" | "!=" | "<" | "<=" | ">" | ">=" | "~"
    operand    = a JSON string | a word without spaces and operators

`~` searches with a regular expression of RE2, at a bounded price: see limitfs/selecting/pattern.py. Who writes
gets the text back in the refusal, with a caret under what is wrong.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from limitfs.errors import Impossible, Invalid, LimitsError
from limitfs.selecting.columns import OF_PROCESSES, OPS, Column, Kind
from limitfs.selecting.expression import Comparison, Expression, Joined, Not
from limitfs.selecting.pattern import Pattern, TooLarge, compiled
from limitfs.watching.condition import LARGEST_AMOUNT, Amount, parse_amount

if TYPE_CHECKING:
    from lark import Lark, Token, Tree
    from lark.exceptions import UnexpectedInput

DEEPEST = 64
"""Levels of `||`, `&&` and `!` in one another."""
MOST_PATTERNS = 8
LONGEST_PATTERN = 256
"""Characters."""
LONGEST_COMM = 15
"""Bytes of a name that the kernel keeps, see PR_SET_NAME in prctl(2)."""
STATES = "RSDTtIZ"
PASSWD = "/etc/passwd"

_GRAMMAR = r"""
?start: any
?any: all ("||" all)*
?all: one ("&&" one)*
?one: "!" one                -> not
    | "(" any ")"
    | COLUMN OP (STRING | WORD) -> comparison

COLUMN: /[A-Za-z_][A-Za-z0-9_.-]*/
OP: "==" | "!=" | "<=" | ">=" | "<" | ">" | "~"
STRING: /"([^"\\]|\\.)*"/s
WORD: /[^\s"'()!&|=<>~]+/
%ignore /\s+/
"""


def parse(text: str, columns: Mapping[str, Column] = OF_PROCESSES) -> Expression:
    """Read a condition.

    Args:
        text: as it was written.
        columns: that it may name.

    Raises:
        Invalid: it does not follow the grammar, names no column, or compares what cannot be compared.
        Impossible: it does, but no process can ever match it, or it would cost too much.
    """
    return _Reader(text, columns).expression()


class _Reader:
    """One text."""

    def __init__(self, text: str, columns: Mapping[str, Column]) -> None:
        self._text = text
        self._columns = columns
        self._patterns = 0

    def expression(self) -> Expression:
        from lark.exceptions import UnexpectedInput

        if not self._text.strip():
            raise Invalid("a condition was expected", 'for example `comm == "nginx" && memory > 1G`')
        try:
            tree = _parser().parse(self._text)
        except UnexpectedInput as error:
            raise self._unexpected(error) from None
        self._refuse_deep(tree)
        return self._build(tree)

    # The tree

    def _refuse_deep(self, tree: "Tree[Token]") -> None:
        """Walks without recursion, which all that follows uses."""
        waiting = [(tree, 1)]
        while waiting:
            node, depth = waiting.pop()
            if depth > DEEPEST:
                raise self._wrong(Impossible, 0, f"more than {DEEPEST} levels of ||, && and ! in one another")
            waiting += [(child, depth + 1) for child in node.children if not isinstance(child, str)]

    def _build(self, tree: "Tree[Token]") -> Expression:
        if tree.data == "comparison":
            return self._comparison(*tree.children)  # type: ignore[arg-type]
        parts = [self._build(child) for child in tree.children]  # type: ignore[arg-type]
        if tree.data == "not":
            return Not(parts[0])
        return _joined(tree.data == "all", parts)

    def _comparison(self, name: "Token", op: "Token", operand: "Token") -> Comparison:
        column = self._columns.get(name)
        if column is None:
            raise self._wrong(Invalid, _at(name), f"no column {name}; there are {', '.join(self._columns)}")
        if op not in OPS[column.kind]:
            what = f"{column.name} is {column.kind.value}: {' '.join(OPS[column.kind])} compare it, not {op}"
            raise self._wrong(Invalid, _at(op), what)
        text = self._string(operand) if operand.type == "STRING" else str(operand)
        if op == "~":
            return Comparison(column, str(op), text, self._pattern(operand, text))
        try:
            return Comparison(column, str(op), _READERS[column.kind](column, text))
        except LimitsError as error:
            raise self._wrong(type(error), _at(operand), error.message) from None

    def _string(self, token: "Token") -> str:
        try:
            return str(json.loads(token, strict=False))
        except ValueError as error:
            at = _at(token) + getattr(error, "pos", 0)
            raise self._wrong(Invalid, at, "not a JSON string: \\ is written \\\\") from None

    def _pattern(self, token: "Token", text: str) -> Pattern:
        self._patterns += 1
        if self._patterns > MOST_PATTERNS:
            raise self._wrong(Impossible, _at(token), f"more than {MOST_PATTERNS} regular expressions")
        if len(text) > LONGEST_PATTERN:
            raise self._wrong(Impossible, _at(token), f"more than {LONGEST_PATTERN} characters in one pattern")
        try:
            return compiled(text)
        except TooLarge as error:
            raise self._wrong(Impossible, _at(token), str(error)) from None
        except ValueError as error:
            raise self._wrong(Invalid, _at(token), f"not a regular expression: {error}") from None

    # Refusals

    def _unexpected(self, error: "UnexpectedInput") -> LimitsError:
        allowed = set(getattr(error, "accepts", None) or getattr(error, "allowed", None) or ())
        at = getattr(error, "pos_in_stream", None)
        token = getattr(error, "token", None)
        if at is None or (token is not None and token.type == "$END"):
            at = len(self._text.rstrip())
        found = f"found {self._text[at]!a}" if at < len(self._text.rstrip()) else "found the end"
        return self._wrong(Invalid, at, f"expected {_expected(allowed, self._text[at : at + 1])}, {found}")

    def _wrong(self, error: type[LimitsError], at: int, message: str) -> LimitsError:
        return error(message, picture=picture(self._text, at), at=at)


def picture(text: str, at: int) -> str:
    """The text with a caret under the character `at`; in ASCII and one line, cut where it is long."""
    shown = "".join(map(_drawn, text))
    first = max(0, at - _BEFORE) if len(shown) > _BEFORE + _AFTER else 0
    left = "..." if first else ""
    right = "..." if len(shown) > at + _AFTER and len(shown) > _BEFORE + _AFTER else ""
    line = left + shown[first : at + _AFTER if right else None] + right
    return f"    {line.rstrip()}\n    {' ' * (len(left) + at - first)}^"


_BEFORE, _AFTER = 60, 40
"""Characters around the caret."""


def _drawn(char: str) -> str:
    """One column, whatever it is."""
    if char.isascii() and char.isprintable():
        return char
    return " " if char.isspace() else "?"


def _expected(allowed: set[str], found: str) -> str:
    if "COLUMN" in allowed:
        return "a column"
    if "OP" in allowed:
        return "one of == != < <= > >= ~"
    if "WORD" in allowed:
        return 'a string that ends in "' if found == '"' else 'a word, or a string in ""'
    return "&&, || or )" if "RPAR" in allowed else "&&, || or the end"


def _at(token: "Token") -> int:
    return token.start_pos or 0


def _joined(every: bool, parts: list[Expression]) -> Expression:
    return Joined(every, tuple(_flat(every, parts)))


def _flat(every: bool, parts: list[Expression]) -> Iterator[Expression]:
    for part in parts:
        if isinstance(part, Joined) and part.every is every:
            yield from part.parts
        else:
            yield part


@functools.cache
def _parser() -> "Lark":
    """Made, and its library loaded, when the first condition is written."""
    from lark import Lark

    return Lark(_GRAMMAR, parser="lalr")


# Operands; each raises Invalid or Impossible with a message alone


def _number(column: Column, text: str) -> float:
    digits = text.isascii() and text.isdigit()
    if not digits:
        raise Invalid(f"{column.name} is {column.kind.value}, {_quote(text)} is not")
    if len(text) > 20 or int(text) > LARGEST_AMOUNT:
        raise Impossible("more than 64 bits can count")
    return int(text)


def _user(column: Column, text: str) -> float:
    if text.isascii() and text.isdigit():
        return _number(column, text)
    uid = _local_user(text)
    if uid is None:
        raise Invalid(f"{PASSWD} has no user {_quote(text)}; others by number")
    return uid


def _local_user(name: str) -> int | None:
    """Of the local file only: a directory service could take minutes, in which the daemon would answer nobody."""
    try:
        with open(PASSWD, encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                fields = line.split(":")
                if fields[0] == name and len(fields) > 2 and fields[2].isdigit():
                    return int(fields[2])
    except OSError:
        pass
    return None


def _text(column: Column, text: str) -> str:
    length = len(text.encode("utf-8", "surrogatepass"))
    if column.name == "comm" and length > LONGEST_COMM:
        raise Impossible(f"the kernel keeps {LONGEST_COMM} bytes of a name, this has {length}")
    return text


def _state(column: Column, text: str) -> str:
    if len(text) != 1 or text not in STATES:
        raise Invalid(f"{column.name} is {column.kind.value}, {_quote(text)} is not")
    return text


def _time(column: Column, text: str) -> float:
    try:
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise Invalid(f"{column.name} is {column.kind.value}, {_quote(text)} is not") from None
    try:
        seconds = (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()
        datetime.fromtimestamp(seconds, UTC)  # as it is shown
    except (ValueError, OverflowError):
        raise Impossible(f"{_quote(text)} is not in the years 1 to 9999 of UTC") from None
    return seconds


def _amount(column: Column, text: str) -> Amount:
    assert column.resource is not None
    try:
        return parse_amount(text, column.resource.unit)
    except Impossible:
        raise Impossible(f"{_quote(text)} can be no {column.name}: negative, endless, or beyond 64 bits") from None
    except LimitsError:
        raise Invalid(f"{_quote(text)} is no amount of {column.name}, in {column.resource.unit}") from None


def _quote(text: str) -> str:
    return ascii(text if len(text) <= 24 else text[:24] + "...")


_READERS: Mapping[Kind, Callable[[Column, str], str | float | Amount]] = {
    Kind.NUMBER: _number,
    Kind.USER: _user,
    Kind.TEXT: _text,
    Kind.STATE: _state,
    Kind.TIME: _time,
    Kind.AMOUNT: _amount,
}
