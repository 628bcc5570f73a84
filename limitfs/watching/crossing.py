"""What happened, as one line that every reader can take apart and nobody can forge.

A line is logfmt: `key=value` pairs with one space between, ended by a newline. Names that users choose (a
process can call itself anything) appear as JSON strings in ASCII, so they hold no newline and end where they
seem to end.
"""

import enum
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from limitfs.errors import Invalid
from limitfs.resources.model import Unit
from limitfs.watching.condition import format_value

NOTHING = "-"
"""Stands for a value that there is none of."""

_SAFE = re.compile(r"[A-Za-z0-9/._@:+-]+")
_PAIR = re.compile(r'(?P<key>[A-Za-z_][A-Za-z0-9_.-]*)=(?:(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<bare>[^\s"]*))')


class Crossing(enum.StrEnum):
    """What happened to one member of a watcher."""

    ALARM = "alarm"
    CLEAR = "clear"
    CHANGE = "change"
    GONE = "gone"
    """The target ended; the last line."""
    LOST = "lost"
    """Lines could not be kept; states were read again afterwards."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of `event`; None is written `-`.

    Attributes:
        seq: number of the line.
        time: seconds after the epoch, UTC.
        crossing: what happened.
        path: of the resource directory, from the root of the tree.
        watcher: the name of a further watcher; None for the resource's own.
        value: the value that crossed, in the base unit.
        unit: the base unit; not a key, it only shapes the number.
        threshold: the condition in its canonical form.
        pid, tid, comm, uid, partition: whose resource it is.
        source: how it was heard.
        guarantee: how surely.
        count: how many lines could not be kept, None for nobody knows; only with LOST, and only then a key.
    """

    seq: int
    time: float
    crossing: Crossing
    path: str
    watcher: str | None = None
    value: float | None = None
    unit: Unit = Unit.COUNT
    threshold: str | None = None
    pid: int | None = None
    tid: int | None = None
    comm: str | None = None
    uid: int | None = None
    partition: str | None = None
    source: str | None = None
    guarantee: str | None = None
    count: int | None = None

    def line(self) -> str:
        """The line, with its newline."""
        return " ".join(f"{key}={text}" for key, text in self._pairs()) + "\n"

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """The keys in the order of the contract."""
        yield "seq", str(self.seq)
        yield "time", iso(self.time)
        yield "crossing", str(self.crossing)
        yield "path", bare(self.path)
        yield "watcher", bare(self.watcher)
        yield "value", NOTHING if self.value is None else format_value(self.value, self.unit)
        yield "threshold", quoted(self.threshold)
        yield "pid", number(self.pid)
        yield "tid", number(self.tid)
        yield "comm", quoted(self.comm)
        yield "uid", number(self.uid)
        yield "partition", quoted(self.partition)
        yield "source", bare(self.source)
        yield "guarantee", bare(self.guarantee)
        if self.count is not None or self.crossing is Crossing.LOST:
            yield "count", number(self.count)


def parse_line(line: str) -> dict[str, str]:
    """Take a line apart, for clients.

    Returns:
        The values by key, unquoted, in the order of the line. Keys without a value (`-`) are absent, so that a
        process that calls itself "-" is still told from none; unknown keys are kept.

    Raises:
        Invalid: it is not one such line.
    """
    values: dict[str, str | None] = {}
    for match in _matches(line.removesuffix("\n")):
        if match["key"] in values:
            raise Invalid(f"given twice: {match['key']}")
        values[match["key"]] = _value(match)
    return {key: value for key, value in values.items() if value is not None}


def _matches(line: str) -> Iterator[re.Match[str]]:
    """The pairs of a line, one space between."""
    start = 0
    while start <= len(line):
        match = _PAIR.match(line, start)
        if match is None or line[match.end() : match.end() + 1] not in ("", " "):
            raise Invalid(f"not a key and value at column {start + 1}", 'for example `seq=12 comm="nginx"`')
        yield match
        start = match.end() + 1


def _value(match: re.Match[str]) -> str | None:
    if match["quoted"] is None:
        return None if match["bare"] == NOTHING else match["bare"]
    try:
        return str(json.loads(match["quoted"]))
    except ValueError as error:
        raise Invalid(f"not a JSON string: {match['quoted']!a}") from error


def iso(time: float) -> str:
    """Unix time as every file here writes it: UTC, microseconds, Z."""
    return datetime.fromtimestamp(time, UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def number(value: int | None) -> str:
    """A whole number."""
    return NOTHING if value is None else str(value)


def quoted(text: str | None) -> str:
    """A JSON string in ASCII: what a user chose can end neither itself nor the line."""
    # In ASCII, which escapes all that is not printable: no reader's idea of a line end is met.
    return NOTHING if text is None else json.dumps(text, ensure_ascii=True)


def bare(text: str | None) -> str:
    """Unquoted where nothing in it could be taken for something else."""
    if text is None:
        return NOTHING
    return text if text != NOTHING and _SAFE.fullmatch(text) else quoted(text)
