"""Tells of rules what can be told without a mount: whether their paths are in the table, and their values parse.

What depends on the machine (whether there is a limit to take a percentage of) is for the mount to say. Only that a
partition is not there at present is remarked: a rule for it waits.
"""

import difflib
import itertools
from collections.abc import Callable, Iterator

from limitfs.errors import Absent, Denied, Forbidden, Gone, Invalid, LimitsError
from limitfs.resources import RESOURCES, at, cgroups
from limitfs.resources.model import Level, Partition, Process, Processes, Target, Thread
from limitfs.rules import Fault, Rule, Rules
from limitfs.selecting.language import parse as parse_selection
from limitfs.space import content
from limitfs.space.content import Place
from limitfs.space.handles import command
from limitfs.space.table import RESOURCE, ROOT, Dir, Entry, Event, Family, File, Link, Writer
from limitfs.watching.condition import parse
from limitfs.watching.registry import HEARING

_PROTOTYPES: dict[str, Target] = {
    "PID": Process(0, 0),
    "TID": Thread(0, 0, 0),
    "CGROUP": Partition("/", 0, 0),
    "GROUP": Processes(),
}
"""Stands for any of a family, by its label; what a family without one measures is not known here."""

_NAMES_OF_FILES = frozenset(entry.name for entry in RESOURCE.entries)

_NUMBERS = ("PID", "TID")
"""Labels of families whose names are numbers."""


def check(rules: Rules) -> Iterator[Fault]:
    """What is wrong with the rules, in the order of their lines."""
    faults = list(rules.faults)
    for rule in rules.rules:
        fault = check_rule(rule)
        if fault is not None:
            faults.append(fault)
    yield from sorted(faults, key=lambda fault: (fault.line.file, fault.line.number))


def remarks(rules: Rules) -> Iterator[str]:
    """What is not wrong, but good to know: which rules would wait for their partition."""
    for rule in rules.rules:
        missing = missing_partition(rule.path)
        if missing is not None and check_rule(rule) is None:
            yield f"{rule.line}: waits for partition {missing!a}, which is not there now"


def missing_partition(path: str) -> str | None:
    """The cgroup that a path in the tree is about, where that does not exist; None where nothing need come."""
    cgroup = content.partition_of(path)
    if cgroup is None or not cgroups.present():
        return None
    try:
        cgroups.identify(cgroup)
    except Gone:
        return cgroup
    return None


def check_rule(rule: Rule) -> Fault | None:
    """What is wrong with one rule."""
    directory, place = ROOT, Place()
    names = rule.path.split("/")
    columns = _columns(rule)
    column = rule.path_at
    try:
        for name, column in zip(names[:-1], columns[:-1], strict=True):  # noqa: B007 (told of what is raised)
            directory, place = _enter(directory, place, name)
        if names[-1] in _NAMES_OF_FILES:
            _need_resource(place, names[-2])
        column = columns[-1]
        file = _file(directory, place, names[-1])
        column = rule.value_at
        _check_value(file, place, command(rule.value.encode()))
    except LimitsError as error:
        return Fault(rule.line, error, column + error.at)
    return None


def _columns(rule: Rule) -> list[int]:
    """Where each name of the path begins, in the line."""
    written = rule.line.text[rule.path_at :].partition("=")[0].split("/")
    starts = itertools.accumulate((len(name) + 1 for name in written[:-1]), initial=rule.path_at)
    # A slash that is written as \057 begins a name, too: the caret then stands under the path.
    return [*starts, *[rule.path_at] * (rule.path.count("/") + 1 - len(written))]


def _need_resource(place: Place, name: str) -> None:
    """Refuse a partition of this `name` to have the files of a resource: it is one with a typing error in it."""
    if place.resource is None and isinstance(place.target, Partition):
        near = difflib.get_close_matches(name, [resource.name for resource in at(Level.PARTITION)], 1)
        raise Absent(f"{name!a} is no resource", f"did you mean {near[0]}?" if near else "")


def _enter(directory: Dir, place: Place, name: str) -> tuple[Dir, Place]:
    """One name further down. Raises Absent, Forbidden, Invalid."""
    entry = _fixed(directory, place, name)
    if isinstance(entry, Dir):
        below = place.at(name)
        return entry, entry.step(below) if entry.step else below
    if isinstance(entry, Link):
        raise Forbidden(f"{name} leads elsewhere for each who asks", "name what it leads to")
    if entry is not None:
        raise Absent(f"{name} is a file", "the last name of a path")
    for family in directory.families:
        bound = _bind(family, place, name)
        if bound is not None:
            if family.make is not None:
                content.check_name(name, "watcher" if place.resource is not None else "group")
            return family.below or directory, bound
    raise _absent(directory, place, name)


def _fixed(directory: Dir, place: Place, name: str) -> Entry | None:
    for entry in directory.entries:
        if entry.name != name:
            continue
        known = place.target is not None or place.resource is None
        if known and entry.present is not None and not entry.present(place):
            continue
        return entry
    return None


def _bind(family: Family, place: Place, name: str) -> Place | None:
    """Where a name of this family leads, None where it cannot be one of it."""
    if family.bind is content.bind_resource:
        resource = RESOURCES.get(name)
        if resource is None or (place.target is not None and place.target.level not in resource.levels):
            return None
        return Place(place.at(name).path, place.target, resource)
    if family.label in _NUMBERS and not content.is_number(name):
        return None
    if place.resource is not None:
        return Place(place.at(name).path, place.target, place.resource, name)
    return Place(place.at(name).path, _PROTOTYPES.get(family.label))


def _file(directory: Dir, place: Place, name: str) -> File:
    """What is written to. Raises LimitsError."""
    entry = _fixed(directory, place, name)
    match entry:
        case File(write=None):
            raise Denied("this file cannot be written")
        case File():
            return entry
        case Event():
            raise Invalid("a condition written here lives as long as the open file", "write to `threshold`")
        case None if all(_bind(family, place, name) is None for family in directory.families):
            raise _absent(directory, place, name)
        case None if place.resource is not None:
            raise _absent(directory, place, name)
    raise Invalid(f"{name} is a directory", "name a file in it, such as threshold")


def _absent(directory: Dir, place: Place, name: str) -> Absent:
    level = place.target.level if place.target is not None else None
    if name in RESOURCES and level is not None and level not in RESOURCES[name].levels:
        known = ", ".join(sorted(RESOURCES[name].levels))
        return Absent(f"{name} is not measured at {level} level", f"it is for: {known}")
    names = [entry.name for entry in directory.entries]
    if any(family.bind is content.bind_resource for family in directory.families):
        names += [r.name for r in RESOURCES.values() if level is None or level in r.levels]
    near = difflib.get_close_matches(name, names, 1)
    return Absent(f"no {name!a} in {place.path or 'the root'}", f"did you mean {near[0]}?" if near else "")


def _check_value(file: File, place: Place, text: str) -> None:
    """Raises LimitsError where no mount would take it."""
    judge = _JUDGES.get(file.write) if file.write is not None else None
    if judge is not None:
        judge(place, text)


def _check_threshold(place: Place, text: str) -> None:
    _target, resource = place.subject
    parse(text, resource.unit, resource.rate)


def _check_hearing(_place: Place, text: str) -> None:
    if text not in HEARING:
        raise Invalid(f"{text!a} is no choice here", " or ".join(HEARING))


_JUDGES: dict[Writer, Callable[[Place, str], object]] = {
    content.store_threshold: _check_threshold,
    content.store_limit: content.wanted_limit,
    content.store_mode: content.check_mode,
    content.store_hearing: _check_hearing,
    content.store_select: lambda _place, text: parse_selection(text),
}
"""Of the files whose text has a grammar."""
