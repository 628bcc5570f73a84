"""Applies the rules of limitfs.d, and takes them back when they go.

What a rule has done is known by its path. When the files are read again, a rule that reads as before is left
alone, with its state, its readers and what somebody changed by hand, as long as what it is about is there; one
that has gone gives back what was there before it.
"""

import contextlib
import logging
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from limitfs import rules
from limitfs.errors import Absent, Gone, LimitsError
from limitfs.rules import Fate, Report, Rule
from limitfs.space.recall import identity
from limitfs.space.shell import Shell
from limitfs.store import Store

log = logging.getLogger(__name__)

KEY = "rule "
"""Before the path, in the store."""
MADE = "directories made by rules"
"""The key of those, in the store."""

_CHOICE = re.compile(r"(?:\w+ )*\[(?P<chosen>\w+)\](?: \w+)*")


@dataclass(frozen=True, slots=True)
class InForce:
    """A rule that was applied.

    Attributes:
        value: as it was written.
        before: what the file said before the first of the rules on this path.
        after: what it said then; what it says otherwise was written by hand.
        target: what the path stood for, see `identity`.
    """

    value: str
    before: str
    after: str
    target: Any


class Ruling:
    """The rules of one mount.

    Args:
        shell: root's.
        directories: where the files are; none: no rules.
        store: keeps what is in force, so that a restart after a crash is no more than one more reading.
    """

    def __init__(self, shell: Shell, directories: Sequence[str], store: Store) -> None:
        self._shell = shell
        self._directories = directories
        self._store = store
        self._in_force: dict[str, InForce] = {}
        self._made: list[str] = []
        self.report = Report()

    def __len__(self) -> int:
        """How many rules are in force."""
        return len(self._in_force)

    def restore(self, found: dict[str, Any], lost: Container[str]) -> None:
        """Take over what the daemon before had in force.

        Args:
            found: what was in the store.
            lost: directories that did not come back as they were: their rules are to be applied anew.
        """
        for key, value in found.items():
            path = key.removeprefix(KEY)
            if key == path:
                continue
            if path.rpartition("/")[0] in lost or not _is_in_force(value):
                self._store.drop(key)
            else:
                self._in_force[path] = InForce(**value)
        made = found.get(MADE)
        self._made = [str(path) for path in made] if isinstance(made, list) else []

    def reload(self) -> Report:
        """Read the files, and do what they say; whatever is wrong is in the report."""
        self.report = Report()
        read = rules.load(self._directories)
        for fault in read.faults:
            self.report.fault(fault)
        wanted = read.by_path()
        with self._store.together():
            if not read.unread:
                # Nobody knows what stands in a file that could not be read: nothing is taken back then.
                self._undo([path for path in self._in_force if path not in wanted], wanted)
            for rule in wanted.values():
                self._follow(rule)
            if self._made:
                self._store.put(MADE, self._made)
            else:
                self._store.drop(MADE)
        self._log()
        return self.report

    def _log(self) -> None:
        for line in self.report.of(Fate.REFUSED):
            log.warning("%s", line)
        log.info("rules: %s", self.report.summary())

    # Applying

    def _follow(self, rule: Rule) -> None:
        known = self._in_force.get(rule.path)
        if known is not None and known.target != self._target(rule.path):
            # Another process or partition of that name, or a directory that somebody removed.
            del self._in_force[rule.path]
            self._store.drop(KEY + rule.path)
            known = None
        if known is not None and known.value == rule.value:
            self.report.add(Fate.KEPT, rule.line, rule.path, rule.value)
            return
        try:
            self._apply(rule, known)
        except LimitsError as error:
            fate = Fate.TOLERATED if rule.tolerant else Fate.REFUSED
            self.report.add(fate, rule.line, rule.path, rule.value, error)
        else:
            self.report.add(Fate.APPLIED, rule.line, rule.path, rule.value)

    def _target(self, path: str) -> Any:
        """None where there is no such path."""
        try:
            with self._shell.at(path) as node:
                return identity(node.place.target)
        except LimitsError:
            return None

    def _apply(self, rule: Rule, known: InForce | None) -> None:
        made: list[str] = []
        try:
            for directory in self._shell.missing(rule.path):
                self._shell.mkdir(directory)
                made.append(directory)
            before = known.before if known else _chosen(self._shell.read(rule.path))
            self._shell.write(rule.path, rule.value)
            after = self._shell.read(rule.path)
        except LimitsError:
            for directory in reversed(made):
                self._shell.rmdir(directory)
            raise
        self._made += [directory for directory in made if directory not in self._made]
        self._in_force[rule.path] = InForce(rule.value, before, after, self._target(rule.path))
        self._store.put(KEY + rule.path, asdict(self._in_force[rule.path]))

    # Taking back

    def _undo(self, gone: list[str], wanted: Iterable[str]) -> None:
        by_hand = [path for path in gone if self._changed_by_hand(path)]
        # What they stand in is no longer the rules' either.
        self._made = [made for made in self._made if not any(path.startswith(f"{made}/") for path in by_hand)]
        doomed = [made for made in self._made if not any(path.startswith(f"{made}/") for path in wanted)]
        for path in reversed(gone):
            rule = self._in_force.pop(path)
            self._store.drop(KEY + path)
            if path in by_hand:
                self.report.add(Fate.LEFT, "-", path, rule.value, "it is no longer as the rule left it")
            elif any(path.startswith(f"{made}/") for made in doomed):
                # Disarmed before its directory goes: a group in use stays.
                if rule.before:
                    with contextlib.suppress(LimitsError):
                        self._shell.write(path, rule.before)
                self.report.add(Fate.UNDONE, "-", path, rule.value)
            else:
                self._take_back(path, rule)
        for directory in sorted(doomed, reverse=True):
            self._remove(directory)

    def _changed_by_hand(self, path: str) -> bool:
        try:
            return self._shell.read(path) != self._in_force[path].after
        except LimitsError:
            # What it was about is no more.
            return False

    def _take_back(self, path: str, rule: InForce) -> None:
        try:
            self._shell.write(path, rule.before)
        except (Absent, Gone):
            pass
        except LimitsError as error:
            self.report.add(Fate.REFUSED, "-", path, rule.before, error)
            return
        self.report.add(Fate.UNDONE, "-", path, rule.value)

    def _remove(self, directory: str) -> None:
        self._made.remove(directory)
        try:
            self._shell.rmdir(directory)
        except Absent:
            pass
        except LimitsError as error:
            self._made.append(directory)
            self.report.add(Fate.REFUSED, "-", directory, "rmdir", error)


def _is_in_force(value: Any) -> bool:
    """Whether it is what was kept, and not what is left of it in a damaged file."""
    match value:
        case {"value": str(), "before": str(), "after": str(), "target": _}:
            return len(value) == len(fields(InForce))
    return False


def _chosen(text: str) -> str:
    """What would have to be written for a file to say this: of a choice, the word in brackets."""
    choice = _CHOICE.fullmatch(text)
    return choice["chosen"] if choice else text
