"""The files of limitfs.d: which there are, and the rules and faults in them. See limitfs.d(5).

    file = { line }
    line = "" | "#" text | ";" text | ["-"] path "=" value

Nothing here knows the tree: what a path leads to and what may be written there is for who applies a rule.
"""

import contextlib
import enum
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

from limitfs.errors import Invalid, LimitsError
from limitfs.mounting import unescape

DIRECTORIES = ("/etc/limitfs.d", "/run/limitfs.d", "/usr/lib/limitfs.d")
"""Searched for rules; a file hides those of the same name in later ones."""
SUFFIX = ".conf"
LARGEST = 1 << 20
"""Bytes of one file of rules."""
LONGEST_NAME = 255
"""Bytes of one name in a path; see NAME_MAX."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of one file.

    Attributes:
        file: as it was found.
        number: counted from 1; 0 for the file as a whole.
        text: of the line, without its end.
    """

    file: str
    number: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.number else self.file


@dataclass(frozen=True, slots=True)
class Rule:
    """A write that is made when the mount begins.

    Attributes:
        path: of a file, below the mount point.
        value: what is written.
        tolerant: a refusal is no fault.
        line: where it stands.
        path_at, value_at: their columns there, counted from 0.
    """

    path: str
    value: str
    tolerant: bool
    line: Line
    path_at: int = 0
    value_at: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a line, in the words of an error, and in which column (None: the whole line)."""

    line: Line
    error: LimitsError
    column: int | None = None

    def __str__(self) -> str:
        hint = f"; {self.error.hint}" if self.error.hint else ""
        return f"{self.line}: {self.error.message}{hint}"

    def pointed(self) -> str:
        """The same with the line below it, and a caret under what is wrong."""
        if self.column is None:
            return str(self)
        # A tab keeps its width, whatever that is.
        indent = "".join("\t" if letter == "\t" else " " for letter in self.line.text[: self.column])
        return f"{self}\n  {_printable(self.line.text)}\n  {indent}^"


@dataclass(slots=True)
class Rules:
    """What was read.

    Attributes:
        rules: in the order in which they are applied; of several for one path, the last is meant.
        faults: what could not be understood.
        unread: files and directories that could not be read at all; who knows what they hold.
    """

    rules: list[Rule] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def refuse(self, file: str, error: OSError | LimitsError) -> None:
        """Note a file or directory that could not be read."""
        self.unread.append(file)
        why = error if isinstance(error, LimitsError) else LimitsError(error.strerror or str(error))
        self.faults.append(Fault(Line(file, 0), why))

    def by_path(self) -> dict[str, Rule]:
        """The rule that is meant for each path, in the order in which they are applied."""
        meant: dict[str, Rule] = {}
        for rule in self.rules:
            # The later one takes its own place in the order.
            meant.pop(rule.path, None)
            meant[rule.path] = rule
        return meant


class Fate(enum.StrEnum):
    """What became of a rule when the files were read."""

    APPLIED = "applied"
    KEPT = "kept"
    WAITING = "waiting"
    """Its partition is not there; it is applied when it comes."""
    UNDONE = "undone"
    LEFT = "left"
    """It went, but somebody had changed by hand what it did: that stays."""
    TOLERATED = "tolerated"
    """It was refused, and has a `-`."""
    REFUSED = "refused"


@dataclass(slots=True)
class Report:
    """What the latest reading did, for `rules`, the log and `limitfs reload`; and what became of it since."""

    _lines: dict[str | Line, tuple[Fate, str]] = field(default_factory=dict)
    """By the path of a rule; by the line, where there is none."""

    def add(self, fate: Fate, where: object, path: str, value: str, why: LimitsError | str | None = None) -> bool:
        """Say what became of the rule on `path`, in place of what was said of it; whether that is news."""
        hint = f"; {why.hint}" if isinstance(why, LimitsError) and why.hint else ""
        said = f": {why}{hint}" if why else ""
        before = self._lines.get(path)
        self._lines[path] = fate, f"{where}: {fate}: {plain(path)} = {plain(value)}{said}"
        return self._lines[path] != before

    def fault(self, fault: Fault) -> None:
        """Say that a line is no rule."""
        hint = f"; {fault.error.hint}" if fault.error.hint else ""
        self._lines[fault.line] = Fate.REFUSED, f"{fault.line}: {Fate.REFUSED}: {fault.error}{hint}"

    def about(self, path: str) -> tuple[Fate, str]:
        """What is said of the rule on `path`."""
        return self._lines[path]

    @property
    def lines(self) -> list[tuple[Fate, str]]:
        """In the order in which they were first said."""
        return list(self._lines.values())

    def of(self, *fates: Fate) -> list[str]:
        """The lines of these fates."""
        return [line for fate, line in self._lines.values() if fate in fates]

    def summary(self) -> str:
        return ", ".join(f"{len(self.of(fate))} {fate}" for fate in Fate)

    def text(self) -> str:
        """All of it, what was refused first, the summary last."""
        lines = [*self.of(Fate.REFUSED), *self.of(*(fate for fate in Fate if fate is not Fate.REFUSED))]
        return "".join(f"{line}\n" for line in [*lines, self.summary()])


def load(directories: Iterable[str]) -> Rules:
    """Read the rules of all directories; what cannot be read is a fault."""
    found = Rules()
    read(_files(directories, found), found)
    return found


def read(files: Iterable[str], into: Rules) -> None:
    """Read these files, in this order."""
    for file in files:
        try:
            parse(file, _content(file), into)
        except (OSError, Invalid) as error:
            into.refuse(file, error)


def _files(directories: Iterable[str], found: Rules) -> list[str]:
    """The files that count, in the order of their names, whatever their directory."""
    by_name: dict[str, str] = {}
    for directory in directories:
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            found.refuse(directory, error)
            continue
        for name in names:
            if name.endswith(SUFFIX) and not name.startswith("."):
                by_name.setdefault(name, os.path.join(directory, name))
    return [path for _name, path in sorted(by_name.items())]


def _content(file: str) -> bytes:
    """Raises OSError, or Invalid for what is no file; a link to /dev/null is an empty one."""
    with open(file, "rb", opener=_opener) as opened:
        found = os.fstat(opened.fileno())
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == os.stat(os.devnull).st_rdev:
            return b""
        if not stat.S_ISREG(found.st_mode):
            raise Invalid("not a file")
        data = opened.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise Invalid(f"larger than {LARGEST} bytes")
    return data


def _opener(path: str, flags: int) -> int:
    # A FIFO that is called .conf would make us wait for its writer.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def parse(file: str, data: bytes, into: Rules) -> None:
    """Read the lines of one file."""
    for number, raw in enumerate(data.split(b"\n"), 1):
        line = Line(file, number, raw.decode(errors="replace").rstrip())
        try:
            raw.decode()
            rule = _rule(line)
        except UnicodeDecodeError as error:
            into.faults.append(Fault(line, Invalid("not UTF-8 text"), len(raw[: error.start].decode())))
        except _Wrong as wrong:
            into.faults.append(Fault(line, wrong.error, wrong.column))
        else:
            if rule is not None:
                into.rules.append(rule)


class _Wrong(Exception):
    def __init__(self, column: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.column = column
        self.error = Invalid(message, hint)


def _rule(line: Line) -> Rule | None:
    """The rule of a line; None for a comment. Raises _Wrong."""
    text = line.text
    start = len(text) - len(text.lstrip())
    if start == len(text) or text[start] in "#;":
        return None
    tolerant = text[start] == "-"
    start += tolerant
    written, equals, value = text[start:].partition("=")
    if not equals:
        raise _Wrong(start, "no `=`", "path = value")
    path_at = start + len(written) - len(written.lstrip())
    value_at = start + len(written) + 1 + len(value) - len(value.lstrip())
    path = unescape(written.strip())
    _refuse_bad_path(path, path_at)
    if not value.strip():
        raise _Wrong(len(text), "no value", "for a threshold, `off` disarms")
    return Rule(path, value.strip(), tolerant, line, path_at, value_at)


def _refuse_bad_path(path: str, column: int) -> None:
    if not path:
        raise _Wrong(column, "no path", "path = value")
    if path.startswith("/"):
        raise _Wrong(
            column, "a path begins below the mount point", "system/fds/threshold, without a slash before it"
        )
    names = path.split("/")
    if any(name in ("", ".", "..") for name in names):
        raise _Wrong(column, "a path holds names only", "no `.`, `..` or empty name")
    if "\0" in path or any(len(os.fsencode(name)) > LONGEST_NAME for name in names):
        raise _Wrong(column, "no file can have this name", f"at most {LONGEST_NAME} bytes, and no NUL")
    if len(names) == 1:
        raise _Wrong(column, "no rule is about a file of the root", "system/fds/threshold")
    with contextlib.suppress(UnicodeEncodeError):
        path.encode()
        return
    raise _Wrong(column, "not UTF-8 text")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\t" else "?" for letter in text)


def plain(text: str) -> str:
    """As it is, or escaped where it could be taken for more than one line."""
    return text if text.isprintable() else ascii(text)
