"""A condition as a value: it is held against rows, and written as text.

Its logic has three values, as in SQL: a column that cannot be told just now (the stack of a running thread, a
percentage of no limit) makes a comparison unknown, and a whole that depends on it. What is unknown does not match.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from limitfs.resources.model import Resource
from limitfs.selecting.columns import Column, Kind, Value
from limitfs.selecting.pattern import Pattern
from limitfs.watching.condition import Amount, render_amount
from limitfs.watching.crossing import iso, quoted

_COMPARE: Mapping[str, Callable[[Value, Value], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


class Readable(Protocol):
    """What an expression needs of a row; see `limitfs.selecting.columns.Row`."""

    def value(self, column: Column, /) -> Value | None:
        """The value of a column; None where it cannot be told."""

    def whole(self, resource: Resource, /) -> float | None:
        """What 100 % of a resource is; None where nothing bounds it."""


class Expression(ABC):
    """Something that is true, false or unknown of a row."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """That of the dearest column in it."""

    @abstractmethod
    def judge(self, row: Readable, told: bool = False) -> bool | None:
        """Whether it is true of `row`; None: unknown.

        Args:
            row: of which only the columns that matter are read.
            told: ask only for columns of whose changes the kernel tells; the others are unknown.

        Raises:
            Gone: the process ended.
        """

    @abstractmethod
    def comparisons(self) -> Iterator["Comparison"]:
        """All that it is made of."""

    @abstractmethod
    def __str__(self) -> str:
        """The canonical text, from which `parse` reads the same expression."""

    @property
    def text(self) -> str:
        """The canonical text."""
        return str(self)

    @property
    def columns(self) -> frozenset[Column]:
        """On which columns it depends."""
        return frozenset(each.column for each in self.comparisons())

    @property
    def work(self) -> int:
        """Instructions of all its patterns: that times the length of a text bounds what it costs to judge."""
        return sum(each.pattern.size for each in self.comparisons() if each.pattern is not None)

    def matches(self, row: Readable) -> bool:
        """Whether it is true of `row`. Raises Gone."""
        return self.judge(row) is True


@dataclass(frozen=True, slots=True)
class Comparison(Expression):
    """`column op operand`.

    Attributes:
        operand: text; a pattern's text; a number (pid, uid, Unix time); an amount of a resource.
        pattern: of `~`.
    """

    column: Column
    op: str
    operand: str | float | Amount
    pattern: Pattern | None = field(default=None, compare=False)

    @property
    def cost(self) -> int:
        return self.column.cost

    def comparisons(self) -> Iterator["Comparison"]:
        yield self

    def judge(self, row: Readable, told: bool = False) -> bool | None:
        if told and not self.column.told:
            return None
        operand = self._operand(row)
        value = None if operand is None else row.value(self.column)
        if value is None or operand is None:
            return None
        if self.pattern is not None:
            return self.pattern.found_in(str(value))
        return _COMPARE[self.op](value, operand)

    def _operand(self, row: Readable) -> Value | None:
        if not isinstance(self.operand, Amount):
            return self.operand
        if not self.operand.percent:
            return self.operand.number
        assert self.column.resource is not None
        whole = row.whole(self.column.resource)
        return None if whole is None else self.operand.of(whole)

    def __str__(self) -> str:
        return f"{self.column.name} {self.op} {self._operand_text()}"

    def _operand_text(self) -> str:
        if isinstance(self.operand, Amount):
            assert self.column.resource is not None
            return render_amount(self.operand, self.column.resource.unit)
        if self.column.kind is Kind.TIME:
            assert not isinstance(self.operand, str)
            return quoted(iso(self.operand))
        return str(self.operand) if self.column.kind is not Kind.TEXT else quoted(str(self.operand))


@dataclass(frozen=True, slots=True)
class Not(Expression):
    """`!(of)`."""

    of: Expression

    @property
    def cost(self) -> int:
        return self.of.cost

    def comparisons(self) -> Iterator[Comparison]:
        return self.of.comparisons()

    def judge(self, row: Readable, told: bool = False) -> bool | None:
        found = self.of.judge(row, told)
        return None if found is None else not found

    def __str__(self) -> str:
        return f"!({self.of})"


@dataclass(frozen=True, slots=True)
class Joined(Expression):
    """Two or more, joined by `&&` (`every`) or by `||`."""

    every: bool
    parts: tuple[Expression, ...]
    _cheapest_first: tuple[Expression, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.parts, key=lambda part: part.cost))
        object.__setattr__(self, "_cheapest_first", ordered)

    @property
    def cost(self) -> int:
        return max(part.cost for part in self.parts)

    def comparisons(self) -> Iterator[Comparison]:
        for part in self.parts:
            yield from part.comparisons()

    def judge(self, row: Readable, told: bool = False) -> bool | None:
        result: bool | None = self.every
        for part in self._cheapest_first:
            found = part.judge(row, told)
            if found is (not self.every):
                return found
            if found is None:
                result = None
        return result

    def __str__(self) -> str:
        if not self.every:
            return " || ".join(str(part) for part in self.parts)
        return " && ".join(f"({part})" if isinstance(part, Joined) else str(part) for part in self.parts)
