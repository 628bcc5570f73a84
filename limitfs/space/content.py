"""What each file says and does: the readers, writers and bindings that the table names.

A `Place` is where a path leads. Readers return text for a user; writers take one whole command of a user and
raise `LimitsError`. Nothing here knows FUSE.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import islice, takewhile
from typing import TYPE_CHECKING, NamedTuple

from limitfs.errors import Absent, Busy, Denied, Exists, Gone, Invalid, Unsupported
from limitfs.resources import ABSENT, RESOURCES, at, cgroups, members, model, procfs, who
from limitfs.resources.limits import parse_limit, set_limit
from limitfs.resources.model import (
    Level,
    Measured,
    Partition,
    Partitions,
    Process,
    Processes,
    Resource,
    Several,
    System,
    Target,
    Thread,
    Threads,
    Unit,
)
from limitfs.rules import Fate
from limitfs.selecting.groups import Group
from limitfs.watching.condition import format_value, parse, render
from limitfs.watching.crossing import bare, iso
from limitfs.watching.registry import HEARING
from limitfs.watching.watcher import TOP_MEMBERS, Watcher

if TYPE_CHECKING:
    from limitfs.space.house import House

LONGEST_NAME = 255
"""Bytes of a watcher's name, as statfs says."""
TOP = 20
"""Lines of `top`."""
KEPT_PEAKS = 8192
"""Own high-water marks that are kept, for resources whose peak the kernel does not keep."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a path leads.

    Attributes:
        path: below the mount point; empty for the root.
        target: what is measured there, once the path has named it.
        resource: likewise.
        watcher: the name of a named watcher.
    """

    path: str = ""
    target: Target | None = None
    resource: Resource | None = None
    watcher: str | None = None

    def at(self, name: str) -> "Place":
        """The same, one name further down."""
        return replace(self, path=f"{self.path}/{name}" if self.path else name)

    @property
    def subject(self) -> tuple[Target, Resource]:
        """Target and resource, in a resource directory."""
        assert self.target is not None
        assert self.resource is not None
        return self.target, self.resource


# Where paths lead


def whole_system(place: Place) -> Place:
    """system/"""
    return replace(place, target=System())


def all_processes(place: Place) -> Place:
    """process/"""
    return replace(place, target=Processes())


def all_partitions(place: Place) -> Place:
    """partition/"""
    return replace(place, target=Partitions())


def has_partitions(place: Place) -> bool:
    """Whether cgroups are mounted."""
    del place
    return cgroups.present()


def threads_of(place: Place) -> Place:
    """process/PID/thread/"""
    assert isinstance(place.target, Process)
    return replace(place, target=Threads(place.target))


def resource_names(place: Place, house: "House", user: int) -> list[str]:
    """The resources measured here."""
    del house, user
    assert place.target is not None
    return [resource.name for resource in RESOURCES.values() if members.measured(resource, place.target)]


def bind_resource(place: Place, house: "House", user: int, name: str) -> Place:
    """A resource directory."""
    del house, user
    assert place.target is not None
    resource = RESOURCES.get(name)
    if resource is None or not members.measured(resource, place.target):
        raise Absent(f"{name} is not measured here, at {place.target.level} level")
    return replace(place.at(name), resource=resource)


def hides(house: "House", user: int, member: Target) -> bool:
    """Whether `hidepid` keeps the user from knowing of a member, and of its name."""
    if not house.options.hidepid or user == 0 or not isinstance(member, Process | Thread):
        return False
    try:
        return who.owner(member.pid) != user
    except Gone:
        return True


def process_names(place: Place, house: "House", user: int) -> Iterable[str]:
    """The processes that the user may see."""
    del place
    hidden = house.options.hidepid == 2 and user != 0
    for pid in procfs.pids():
        if not hidden or who.owner(pid) == user:
            yield str(pid)


def bind_process(place: Place, house: "House", user: int, name: str) -> Place:
    """process/PID/, of a process that exists now."""
    pid = _number(name)
    try:
        process = procfs.identify(pid)
        hidden = house.options.hidepid == 2 and user not in (0, who.owner(pid))
    except Gone:
        raise Absent(f"no process {name}") from None
    if hidden:
        raise Absent(f"no process {name}")
    return replace(place.at(name), target=process)


def thread_names(place: Place, house: "House", user: int) -> Iterable[str]:
    """The threads of the process, none when it has ended."""
    del house, user
    assert isinstance(place.target, Threads)
    try:
        procfs.check(place.target.process)
        return [str(tid) for tid in procfs.tids(place.target.process.pid)]
    except Gone:
        return []


def bind_thread(place: Place, house: "House", user: int, name: str) -> Place:
    """process/PID/thread/TID/"""
    del house, user
    assert isinstance(place.target, Threads)
    process = place.target.process
    try:
        procfs.check(process)
        return replace(place.at(name), target=procfs.identify_thread(process.pid, _number(name)))
    except Gone:
        raise Absent(f"no thread {name} in process {process.pid}") from None


def is_number(name: str) -> bool:
    """Whether a process or a thread can have this name."""
    return name.isascii() and name.isdigit() and not name.startswith("0") and len(name) <= 10


def _number(name: str) -> int:
    if not is_number(name):
        raise Absent(f"no such name: {name!a}")
    return int(name)


def partition_names(place: Place, house: "House", user: int) -> list[str]:
    """The partitions directly below; cgroups are no secret."""
    del house, user
    return [_escaped(name) for name in cgroups.children(_cgroup(place))]


def bind_partition(place: Place, house: "House", user: int, name: str) -> Place:
    """A partition that exists now."""
    del house, user
    try:
        partition = cgroups.identify(cgroups.join(_cgroup(place), _unescaped(name)))
    except Gone:
        raise Absent(f"no partition {name!a}") from None
    return replace(place.at(name), target=partition)


def _cgroup(place: Place) -> str:
    return place.target.path if isinstance(place.target, Partition) else cgroups.ROOT


def _escaped(name: str) -> str:
    """The name of a cgroup here: with an underscore before it where a resource is called so, as systemd has it."""
    return f"_{name}" if name.lstrip("_") in _TAKEN else name


def _unescaped(name: str) -> str:
    if name in _TAKEN:
        raise Absent(f"{name} is no partition")
    return name[1:] if name.lstrip("_") in _TAKEN else name


_TAKEN = frozenset(resource.name for resource in at(Level.PARTITION))


def partition_path(partition: Partition) -> str:
    """Where a partition is in the tree."""
    return "/".join(["partition", *(_escaped(name) for name in partition.path.split("/") if name)])


def partition_of(path: str) -> str | None:
    """The path of the cgroup that a file's path is about, whether it exists or not; None: of no single one."""
    first, *names = path.split("/")[:-1]
    cgroup = list(takewhile(lambda name: name not in _TAKEN, names))
    if first != "partition" or not cgroup:
        return None
    return cgroups.ROOT + "/".join(map(_unescaped, cgroup))


def partition_link(place: Place, house: "House", thread: int) -> str:
    """process/PID/partition"""
    del house, thread
    assert isinstance(place.target, Process)
    procfs.check(place.target)
    try:
        return f"../../{partition_path(cgroups.identify(cgroups.of(place.target.pid) or cgroups.ROOT))}"
    except Gone:
        raise Absent("its partition is not mounted here") from None


def group_names(place: Place, house: "House", user: int) -> list[str]:
    """Every group, whoever made it."""
    del place, user
    return [group.name for group in house.groups]


def bind_group(place: Place, house: "House", user: int, name: str) -> Place:
    """group/NAME/"""
    del user
    group = house.groups.find(name)
    if group is None:
        raise Absent(f"no group {name!a}")
    return replace(place.at(name), target=Processes(group))


def make_group(place: Place, house: "House", user: int, name: str) -> None:
    """mkdir group/NAME"""
    del place
    check_name(name, "group")
    house.groups.make(name, user)
    house.recall.made(f"group/{name}", user, {})


def remove_group(place: Place, house: "House", user: int, name: str) -> None:
    """rmdir group/NAME; its watchers, none of which is armed, go with it."""
    del place
    group = house.groups.find(name)
    if group is None:
        raise Absent(f"no group {name!a}")
    if user not in (0, group.owner):
        raise Denied(f"group {name!a} belongs to user {group.owner}")
    watchers = [watcher for watcher in house.registry if _group_of(watcher.target) is group]
    if any(watcher.condition is not None for watcher in watchers):
        raise Busy(f"watchers are armed on group {name!a}", "write off to their thresholds first")
    group.close()
    house.recall.unmade(f"group/{name}")
    for watcher in watchers:
        house.registry.remove(watcher)


def _group_of(target: Target | None) -> Group | None:
    return target.of if isinstance(target, Processes) and isinstance(target.of, Group) else None


def _group(place: Place, house: "House") -> Group:
    """The group of a place. Raises Gone where it was removed."""
    group = _group_of(place.target)
    assert group is not None
    if house.groups.find(group.name) is not group:
        raise Gone(f"group {group.name!a} was removed")
    return group


def watcher_names(place: Place, house: "House", user: int) -> list[str]:
    """The named watchers here."""
    del user
    return house.registry.names(*place.subject)


def bind_watcher(place: Place, house: "House", user: int, name: str) -> Place:
    """A named watcher's directory."""
    del user
    if house.registry.find(*place.subject, name) is None:
        raise Absent(f"no watcher {name!a}")
    return replace(place.at(name), watcher=name)


def make_watcher(place: Place, house: "House", user: int, name: str) -> None:
    """mkdir NAME: a further watcher."""
    if house.registry.find(*place.subject, name) is not None:
        raise Exists(f"a watcher {name!a} is here already")
    check_name(name, "watcher")
    house.registry.make_named(*place.subject, place.path, name, user)


def check_name(name: str, what: str) -> None:
    """Refuse a name that mkdir would not give a group or watcher. Raises Invalid."""
    if name.startswith((".", "(")) or not name.isprintable():
        raise Invalid(
            f"{name!a} is no good name for a {what}",
            "printable characters, no dot or parenthesis at the beginning",
        )
    if len(name.encode()) > LONGEST_NAME:
        raise Invalid(f"a name of {len(name.encode())} bytes", f"at most {LONGEST_NAME}")


def remove_watcher(place: Place, house: "House", user: int, name: str) -> None:
    """rmdir NAME: the watcher is disarmed and gone."""
    watcher = house.registry.find(*place.subject, name)
    if watcher is None:
        raise Absent(f"no watcher {name!a}")
    if user not in (0, watcher.owner):
        raise Denied(f"watcher {name!a} belongs to user {watcher.owner}")
    house.registry.remove(watcher)


def self_link(place: Place, house: "House", thread: int) -> str:
    """process/self: the caller's process; FUSE tells the thread."""
    del place, house
    try:
        return str(procfs.thread_group(thread))
    except Gone:
        raise Absent("the caller is of another PID namespace") from None


def owner(place: Place, house: "House") -> int:
    """Whose a place is: who made a watcher, else the owner of its process or partition, else root."""
    if place.watcher is not None:
        watcher = house.registry.find(*place.subject, place.watcher)
        return watcher.owner if watcher else 0
    target = place.target
    if isinstance(target, Partition):
        return cgroups.owner(target)
    if (group := _group_of(target)) is not None:
        return group.owner
    if isinstance(target, Process | Thread):
        return who.owner(target.pid)
    return who.owner(target.process.pid) if isinstance(target, Threads) else 0


def has_members(place: Place) -> bool:
    """Whether something stands below this place for which the resource is measured."""
    target, resource = place.subject
    return members.has_members(resource, target)


def measured(place: Place) -> bool:
    """Whether there is one value here: a sum of stacks, say, makes no sense."""
    target, resource = place.subject
    return resource.summable or not isinstance(target, Several)


# The files of a group


def show_select(place: Place, house: "House", user: int) -> str:
    """`select`, in its canonical form; empty where nothing was selected yet."""
    del user
    selected = _group(place, house).select
    return f"{selected}\n" if selected else ""


def store_select(place: Place, house: "House", user: int, text: str) -> None:
    """A write to `select`."""
    del user
    group = _group(place, house)
    group.set_select(text)
    house.recall.made(place.path, group.owner, {"select": text})


def show_members(place: Place, house: "House", user: int) -> str:
    """`members`, of those that the user may see."""
    found = sorted(process.pid for process in _group(place, house).processes() if not hides(house, user, process))
    return "".join(f"{pid}\n" for pid in found)


def show_group(place: Place, house: "House", user: int) -> str:
    """The group's `state`."""
    del user
    group = _group(place, house)
    period = "-" if group.period is None else f"{group.period:g}"
    return f"members {len(group.processes())}\nhearing {group.hearing}\nperiod {period}\n"


# The files of a resource


def show_usage(place: Place, house: "House", user: int) -> str:
    """`usage`"""
    del user
    target, resource = place.subject
    value = members.usage(resource, target)
    note_peak(house, target, resource, value)
    return format_value(value, resource.unit) + "\n"


def show_limit(place: Place, house: "House", user: int) -> str:
    """`limit`"""
    del house, user
    target, resource = place.subject
    if isinstance(target, Several):
        return "max\n"
    limit = resource.limit(target)
    if limit.soft == limit.hard and (resource.rlimit is None or math.isinf(limit.soft)):
        return _limit(limit.soft, resource.unit) + "\n"
    return f"{_limit(limit.soft, resource.unit)} {_limit(limit.hard, resource.unit)}\n"


class Slow(NamedTuple):
    """What is left of a write: a call for which the kernel may take its time, and what follows in the event loop.

    Both raise LimitsError. The call may be made in any thread.
    """

    call: Callable[[], None]
    then: Callable[[], None]


def store_limit(place: Place, house: "House", user: int, text: str) -> Slow | None:
    """A write to `limit`: prlimit(2) for a process, the controller's own file for a partition."""
    target, resource = place.subject
    soft, hard = wanted_limit(place, text)
    if isinstance(target, Partition):
        cgroups.check(target)
        return Slow(
            functools.partial(resource.store, target, soft, user),
            functools.partial(house.registry.limit_changed, target, resource),
        )
    assert isinstance(target, Process)
    assert resource.rlimit is not None
    procfs.check(target)
    set_limit(target, resource.rlimit, soft, hard, raise_hard=user == 0)
    house.registry.limit_changed(target, resource)
    return None


def wanted_limit(place: Place, text: str) -> tuple[float, float | None]:
    """The soft and hard limit that a write to `limit` asks for; the target need not exist.

    Raises:
        Unsupported: nothing of this kind has such a limit, on any machine.
        Invalid, Impossible: see `parse_limit`.
    """
    target, resource = place.subject
    if isinstance(target, Partition):
        resource.check_storable()
        soft, hard = parse_limit(text, resource.unit)
        if hard not in (None, soft):
            raise Invalid("a partition has one limit", 'write one number, or "max"')
        return soft, hard
    if not isinstance(target, Process) or resource.rlimit is None:
        raise Unsupported(f"the kernel has no limit on {resource.name} to set here")
    return parse_limit(text, resource.unit)


def _limit(value: float, unit: Unit) -> str:
    return "max" if math.isinf(value) else format_value(value, unit)


def show_peak(place: Place, house: "House", user: int) -> str:
    """`peak`: the kernel's own mark (since the process or the machine began), else the highest seen here."""
    del user
    target, resource = place.subject
    if not isinstance(target, Several) and (mark := resource.peak(target)) is not None:
        return f"{format_value(mark, resource.unit)} {iso(who.started(target))}\n"
    value, since = note_peak(house, target, resource, members.usage(resource, target))
    return f"{format_value(value, resource.unit)} {iso(since)}\n"


def note_peak(house: "House", target: Target, resource: Resource, value: float) -> tuple[float, float]:
    """Keep the highest value seen of `target`; returns it and since when it is kept."""
    marks, key = house.highest, (target, resource.name)
    highest, since = marks.pop(key, (value, house.registry.surroundings.wall()))
    marks[key] = max(highest, value), since
    if len(marks) > KEPT_PEAKS:
        del marks[next(iter(marks))]
    return marks[key]


def show_top(place: Place, house: "House", user: int) -> str:
    """`top`: the largest users below this place, of those that the user may see."""
    target, resource = place.subject
    seen = (row for row in members.usages(resource, target) if not hides(house, user, row[0]))
    rows = sorted(seen, key=lambda row: row[1], reverse=True)[:TOP]
    return "".join(f"{format_value(value, resource.unit)} {_member(member)}\n" for member, value in rows)


def _member(member: Measured) -> str:
    if isinstance(member, Partition):
        return bare(member.path)
    described = who.describe(member)
    number = described.pid if described.tid is None else described.tid
    # A name is quoted as in event lines where it could be taken for more than one field or line.
    comm = described.comm or "-"
    return f"{number} {comm if comm.isprintable() and ' ' not in comm else ascii(comm)}"


# The files of a watcher


def known(place: Place, house: "House") -> Watcher | None:
    """The watcher of a place, if it was made."""
    return house.registry.find(*place.subject, place.watcher)


def find(place: Place, house: "House") -> Watcher | None:
    """The same; None only where it is the resource's own, of a target that exists. Raises Gone."""
    watcher = known(place, house)
    if watcher is not None:
        return watcher
    if place.watcher is not None:
        raise Gone(f"watcher {place.watcher!a} was removed")
    target, _resource = place.subject
    if isinstance(target, Threads):
        target = target.process
    if isinstance(target, Partition):
        cgroups.check(target)
    if _group_of(target) is not None:
        _group(place, house)
    if isinstance(target, Process | Thread):
        procfs.check(target)
    return None


def need(place: Place, house: "House") -> Watcher:
    """The watcher of a place, made now where it is the resource's own. Raises Gone."""
    return find(place, house) or house.registry.own(*place.subject, place.path)


def show_threshold(place: Place, house: "House", user: int) -> str:
    """`threshold`, in its canonical form."""
    del user
    _target, resource = place.subject
    watcher = find(place, house)
    return render(watcher.condition if watcher else None, resource.unit) + "\n"


def store_threshold(place: Place, house: "House", user: int, text: str) -> None:
    """A write to `threshold`."""
    _target, resource = place.subject
    condition = parse(text, resource.unit, resource.rate)
    if condition is None and find(place, house) is None:
        return
    house.registry.set_condition(need(place, house), condition, user)


def show_mode(place: Place, house: "House", user: int) -> str:
    """`mode`, the choice in brackets."""
    del user
    target, resource = place.subject
    watcher = find(place, house)
    each = watcher.each if watcher else members.starts_as_each(resource, target)
    if isinstance(target, Several) and not resource.summable:
        return "[each]\n"
    return _choice(("each", "sum"), "each" if each else "sum")


def store_mode(place: Place, house: "House", user: int, text: str) -> None:
    """A write to `mode`."""
    del user
    check_mode(place, text)
    house.registry.set_mode(need(place, house), text == "each")


def check_mode(place: Place, text: str) -> None:
    """Refuse what no `mode` of this kind can be; the target need not exist. Raises Invalid, Unsupported."""
    target, resource = place.subject
    if text not in ("each", "sum"):
        raise Invalid(f"{text!a} is no mode", "each or sum")
    if text == "sum" and isinstance(target, Several) and not resource.summable:
        raise Unsupported(f"a sum of {resource.name} makes no sense", "each")


def show_hearing(place: Place, house: "House", user: int) -> str:
    """`hearing`, the choice in brackets."""
    del user
    watcher = find(place, house)
    return _choice(HEARING, watcher.hearing if watcher else house.registry.hearing)


def store_hearing(place: Place, house: "House", user: int, text: str) -> None:
    """A write to `hearing`."""
    del user
    house.registry.set_hearing(need(place, house), text)


def _choice(choices: tuple[str, ...], chosen: str) -> str:
    return " ".join(f"[{choice}]" if choice == chosen else choice for choice in choices) + "\n"


def show_state(place: Place, house: "House", user: int) -> str:
    """`state`, flat-keyed; `-` for nothing."""
    target, resource = place.subject
    watcher = find(place, house)
    if watcher is None:
        watcher = Watcher(
            target,
            resource,
            place.path,
            place.watcher,
            0,
            members.starts_as_each(resource, target),
            house.registry.surroundings,
            lambda _watcher, _record: None,
        )
    return "".join(f"{key} {value}\n" for key, value in _state(watcher, house, user))


def _state(watcher: Watcher, house: "House", user: int) -> Iterable[tuple[str, object]]:
    unit = watcher.resource.unit
    armed = watcher.armed
    yield "state", watcher.state
    yield "value", "-" if watcher.value is None else format_value(watcher.value, unit)
    yield "threshold", render(watcher.condition, unit)
    yield "since", "-" if watcher.since is None else iso(watcher.since)
    yield "alarms", watcher.alarms
    yield "lost", watcher.lost_lines
    yield "source", armed.source if armed else "-"
    yield "guarantee", watcher.guarantee or "-"
    yield "period", f"{watcher.period:g}" if watcher.period else "-"
    yield "armed", iso(watcher.begun) if armed and watcher.begun is not None else "-"
    if not watcher.each:
        return
    alarmed = watcher.in_alarm()
    shown = (pair for pair in alarmed if not hides(house, user, pair[0]))
    for member, value in islice(shown, TOP_MEMBERS):
        yield f"member {_name(member)}", format_value(value, unit)
    yield "members", len(alarmed)


def _name(member: Target) -> str:
    """A member in one word; of a sum there is none."""
    match member:
        case Partition(path=path):
            return bare(path)
        case Thread(tid=number) | Process(pid=number):
            return str(number)
    return "-"


# The files of the root


def show_readme(place: Place, house: "House", user: int) -> str:
    """README"""
    del place, house, user
    return files("limitfs").joinpath("README").read_text(encoding="utf-8")


def show_features(place: Place, house: "House", user: int) -> str:
    """`features`: resource, level, mode, source, guarantee and cost, tab-separated."""
    del place, user
    rows = ["resource\tlevel\tmode\tsource\tguarantee\tcost"]
    for level, mode, target in _prototypes():
        for resource in RESOURCES.values():
            if not members.measured(resource, target):
                continue
            if mode == "each" and not members.has_members(resource, target):
                continue
            if mode == "sum" and isinstance(target, Several) and not resource.summable:
                continue
            source = next(house.registry.choices(resource, target, mode == "each", house.registry.hearing))
            rows.append("\t".join((resource.name, level, mode, source.name, source.guarantee, source.cost)))
    missing = [f"# {name}: {why}" for name, why in (*ABSENT.items(), *house.registry.missing.items())]
    return "\n".join(rows + missing) + "\n"


def _prototypes() -> Iterable[tuple[str, str, Target]]:
    """A path and a target of each kind."""
    somewhere = next(cgroups.partitions(), None)
    if somewhere is not None:
        yield "partition", "each", Partitions()
        yield "partition/CGROUP", "sum", somewhere
        yield "partition/CGROUP", "each", somewhere
    yield "group/NAME", "each", Processes(SomeGroup())
    yield "group/NAME", "sum", Processes(SomeGroup())
    yield from _PROTOTYPES


class SomeGroup(model.Group):
    """A group, whichever, to ask who would hear it."""

    name, number = "NAME", 0

    def processes(self) -> list[Process]:
        return []

    def follow(self, joined: Callable[[Process], None], left: Callable[[Process], None]) -> Callable[[], None]:
        del joined, left
        return lambda: None


_SOMEBODY = Process(0, 0)
_PROTOTYPES: tuple[tuple[str, str, Target], ...] = (
    ("system", "sum", System()),
    ("system", "each", System()),
    ("process", "each", Processes()),
    ("process", "sum", Processes()),
    ("process/PID", "sum", _SOMEBODY),
    ("process/PID", "each", _SOMEBODY),
    ("process/PID/thread", "each", Threads(_SOMEBODY)),
    ("process/PID/thread", "sum", Threads(_SOMEBODY)),
    ("process/PID/thread/TID", "sum", Thread(0, 0, 0)),
)


def show_last_error(place: Place, house: "House", user: int) -> str:
    """`last_error`, the user's own."""
    del place
    return house.last_errors.show(user)


def show_daemon(place: Place, house: "House", user: int) -> str:
    """The root's `state`: what the daemon is doing; a watcher's line only for who may arm it."""
    del place
    watchers = [w for w in house.registry if w.condition is not None]
    mine = [w for w in watchers if user in (0, w.owner)]
    lines = [f"{key} {value}\n" for key, value in house.facts().items()]
    lines.append(f"armed {len(watchers)}\n")
    for watcher in mine[:TOP_MEMBERS]:
        path = f"{watcher.path}/{watcher.name}" if watcher.name else watcher.path
        threshold = render(watcher.condition, watcher.resource.unit)
        lines.append(f"watcher {bare(path)} {watcher.state} {threshold}\n")
    if user == 0:
        lines += [f"refused_rule {line}\n" for line in house.rules.report.of(Fate.REFUSED)]
    return "".join(lines)


def show_rules(place: Place, house: "House", user: int) -> str:
    """`rules`: a line for each rule, and what the latest reading of the files did with it."""
    del place, user
    return house.rules.report.text()


def store_rules(place: Place, house: "House", user: int, text: str) -> None:
    """A write to `rules`: `reload` reads the files again."""
    del place, user
    if text != "reload":
        raise Invalid(f"{text!a} is no command here", "reload")
    house.rules.reload()
