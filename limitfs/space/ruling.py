"""Applies the rules of limitfs.d, and takes them back when they go.

What a rule has done is known by its path. When the files are read again, a rule that reads as before is left
alone, with its state, its readers and what somebody changed by hand, as long as what it is about is there; one
that has gone gives back what was there before it.

A rule for a partition that is not there waits, and is applied when the partition comes; so it is whenever that
was removed and made again. Which rules there are is what the files said when they were read last.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from limitfs import rules
from limitfs.errors import Absent, Gone, LimitsError, Quota
from limitfs.hearing.arrivals import Arrivals
from limitfs.hearing.source import Refused
from limitfs.resources import cgroups
from limitfs.resources.model import Partition
from limitfs.rules import Fate, Report, Rule
from limitfs.space.check import check_rule, missing_partition
from limitfs.space.content import partition_of
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
        arrivals: tells of the partitions that single rules are for.
    """

    def __init__(self, shell: Shell, directories: Sequence[str], store: Store, arrivals: Arrivals) -> None:
        self._shell = shell
        self._directories = directories
        self._store = store
        self._arrivals = arrivals
        self._in_force: dict[str, InForce] = {}
        self._made: list[str] = []
        self._rules: dict[str, Rule] = {}
        # By the path of their partition, in their order; and what ends the listening for it.
        self._by_partition: dict[str, list[Rule]] = {}
        self._listening: dict[str, Callable[[], None]] = {}
        self._deaf: dict[str, Refused] = {}
        # Where each of these partitions was found last.
        self._hierarchies: dict[str, set[str]] = {}
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

    def reload(self, stop: Callable[[], object] = lambda: False) -> Report:
        """Read the files, and do what they say, until `stop` is true; whatever is wrong is in the report."""
        self.report = Report()
        read = rules.load(self._directories)
        for fault in read.faults:
            self.report.fault(fault)
        wanted = read.by_path()
        # Nobody knows what stands in a file that could not be read: nothing is taken back then.
        stays = {path: rule for path, rule in self._rules.items() if read.unread and path not in wanted}
        self._rules = stays | wanted
        # Before anything is looked at: what comes after that is told.
        self._listen()
        with self._together():
            if not read.unread:
                self._undo([path for path in self._in_force if path not in wanted], wanted)
            for rule in wanted.values():
                if stop():
                    break
                if self._stands(rule):
                    self.report.add(Fate.KEPT, rule.line, rule.path, rule.value)
                else:
                    self._try(rule)
        self._log()
        return self.report

    def close(self) -> None:
        """Listen no more."""
        for end in self._listening.values():
            end()
        self._listening.clear()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What is done inside is kept at once, with the directories that it made or removed."""
        with self._store.together():
            yield
            if self._made:
                self._store.put(MADE, self._made)
            else:
                self._store.drop(MADE)

    def _log(self) -> None:
        for line in self.report.of(Fate.REFUSED):
            log.warning("%s", line)
        log.info("rules: %s", self.report.summary())

    # Partitions that come and go

    def _listen(self) -> None:
        """For the partitions that single rules are for, and no others."""
        self._by_partition.clear()
        self._deaf.clear()
        for rule in self._rules.values():
            partition = partition_of(rule.path)
            if partition is not None:
                self._by_partition.setdefault(partition, []).append(rule)
        for partition in self._listening.keys() - self._by_partition.keys():
            self._listening.pop(partition)()
            self._hierarchies.pop(partition, None)
        for partition in self._by_partition.keys() - self._listening.keys():
            try:
                self._listening[partition] = self._arrivals.watch(partition, partial(self._moved, partition))
                self._hierarchies[partition] = set(cgroups.directories(partition))
            except Refused as refusal:
                self._deaf[partition] = refusal
                log.warning("rules for partition %s need a reload when it comes: %s", ascii(partition), refusal)

    def _moved(self, partition: str) -> None:
        """It may have come or gone, in one of the hierarchies."""
        before, now = self._hierarchies.get(partition, set()), set(cgroups.directories(partition))
        self._hierarchies[partition] = now
        with self._together():
            for rule in self._by_partition.get(partition, ()):
                stands = self._stands(rule)
                # One more hierarchy has it: what its controllers keep is better than what was found without.
                if stands and (now <= before or self._changed_by_hand(rule.path)):
                    continue
                if self._try(rule):
                    fate, line = self.report.about(rule.path)
                    log.log(logging.WARNING if fate is Fate.REFUSED else logging.INFO, "%s", line)

    # Applying

    def _stands(self, rule: Rule) -> bool:
        """Whether it is in force as it is written, on what it is about now."""
        known = self._in_force.get(rule.path)
        if known is not None and known.target != self._target(rule.path):
            # Another process or partition of that name, or a directory that somebody removed.
            del self._in_force[rule.path]
            self._store.drop(KEY + rule.path)
            known = None
        return known is not None and known.value == rule.value

    def _try(self, rule: Rule) -> bool:
        """Apply a rule, or have it wait; whether what became of it is news."""
        try:
            waits_for = self._awaited(rule)
            if waits_for is not None:
                why = f"for partition {waits_for!a}"
                return self.report.add(Fate.WAITING, rule.line, rule.path, rule.value, why)
            self._apply(rule, self._in_force.get(rule.path))
        except LimitsError as error:
            fate = Fate.TOLERATED if rule.tolerant else Fate.REFUSED
            return self.report.add(fate, rule.line, rule.path, rule.value, error)
        return self.report.add(Fate.APPLIED, rule.line, rule.path, rule.value)

    def _awaited(self, rule: Rule) -> str | None:
        """The partition that must come first. Raises LimitsError where the rule would be refused even then."""
        partition = missing_partition(rule.path)
        if partition is None:
            return None
        fault = check_rule(rule)
        with self._shell.explained(rule.path, rule.value):
            if fault is not None:
                raise fault.error
            if partition in self._deaf:
                raise Quota(f"nobody would tell when partition {partition!a} comes: {self._deaf[partition]}")
        return partition

    def _target(self, path: str) -> Any:
        """None where there is no such path."""
        try:
            with self._shell.at(path) as node:
                target = node.place.target
                if isinstance(target, Partition):
                    cgroups.check(target)  # one that was removed lingers, so that its last line can be read
                return identity(target)
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
