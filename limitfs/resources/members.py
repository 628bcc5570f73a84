"""Which members stand below a path, and what they add up to."""

import math
from collections.abc import Iterator

from limitfs.errors import Gone, Unsupported
from limitfs.resources import cgroups, procfs
from limitfs.resources.model import (
    Group,
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
    Threads,
)


def members(target: Target) -> Iterator[Measured]:
    """The members that `each` tests: partitions, processes, the threads of a process.

    Raises:
        Gone: the process whose threads are asked for has ended, the partition was removed.
    """
    match collection(target):
        case Partitions():
            return cgroups.partitions()
        case Processes(of=group):
            return _processes(group)
        case Threads(process=process):
            return _threads(process)
    raise TypeError(f"{target} has no members")


def _processes(group: Partition | Group | None) -> Iterator[Process]:
    if isinstance(group, Group):
        yield from group.processes()
        return
    for pid in procfs.pids() if group is None else cgroups.pids(group):
        try:
            yield procfs.identify(pid)
        except Gone:
            continue


def _threads(process: Process) -> Iterator[Measured]:
    procfs.check(process)
    for tid in procfs.tids(process.pid):
        try:
            yield procfs.identify_thread(process.pid, tid)
        except Gone:
            continue


def collection(target: Target) -> Target:
    """What `each` on `target` stands for: the processes of a system or partition, the threads of a process."""
    match target:
        case System():
            return Processes()
        case Partition():
            return Processes(target)
        case Process():
            return Threads(target)
    return target


def total(resource: Resource, target: Target) -> Target:
    """What a sum on `target` is measured on.

    A partition is, where the kernel keeps its number; else its processes are. All partitions together are what is
    in the root, where nothing is counted twice.

    Raises:
        Gone: there are no partitions.
    """
    if isinstance(target, Partitions):
        target = cgroups.root()
    if not isinstance(target, Partition) or resource.kept(target):
        return target
    return Processes() if target.path == cgroups.ROOT else Processes(target)


def whole(resource: Resource, target: Target) -> float:
    """What 100 % of a sum or a member is; of a collection, what it is for the thing whose parts it collects.

    `math.inf` where nothing bounds it. Raises as `Resource.whole`.
    """
    match target:
        case Processes(of=Partition() as partition):
            target = partition
        case Processes():
            target = System()
        case Partitions():
            target = cgroups.root()
        case Threads(process=process):
            target = process
    return resource.whole(target) if target.level in resource.levels else math.inf


def concerns(heard: Target, each: bool, changed: Process | Partition) -> bool:
    """Whether a limit of `changed` counts for who hears `heard`: it is that, or one of its members."""
    if not each:
        return heard in (changed, Processes(changed) if isinstance(changed, Partition) else changed)
    match heard, changed:
        case Partitions(), Partition():
            return True
        case Processes(of=Partition() as partition), Process(pid=pid):
            return cgroups.belongs(pid, partition)
        case Processes(of=Group() as group), Process():
            return changed in group.processes()
        case Processes(), Process():
            return True
    return False


def member_level(target: Target) -> Level | None:
    """The level of what stands below `target`, or None where nothing does."""
    below = collection(target)
    return below.level if isinstance(below, Several) else None


def measured(resource: Resource, target: Target) -> bool:
    """Whether `target` has `resource` at all."""
    match target:
        case Processes(of=Group()):
            return resource.headcount or Level.PROCESS in resource.levels
        case Partition() if not resource.summable:
            return Level.PARTITION in resource.levels and resource.kept(target)
    return target.level in resource.levels


def starts_as_each(resource: Resource, target: Target) -> bool:
    """The mode before anybody chose one: a collection is tested member by member."""
    return isinstance(target, Several) and has_members(resource, target)


def has_members(resource: Resource, target: Target) -> bool:
    """Whether `mode` and `top` make sense for `resource` at `target`."""
    return member_level(target) in resource.levels


def usage(resource: Resource, target: Target) -> float:
    """The use of `target` now; of a collection, the sum over its members. Raises as `Resource.usage`."""
    measured = total(resource, target)
    if not isinstance(measured, Several):
        return resource.usage(measured)
    return sum(value for _member, value in usages(resource, measured))


def usages(resource: Resource, target: Target) -> Iterator[tuple[Measured, float]]:
    """The use of each member now, without those that end meanwhile or cannot be told just now (a stack in use)."""
    resource = resource.look()
    if isinstance(target, Partitions):
        with cgroups.one_look():
            found = list(_usages(resource, target))
        yield from found
        return
    yield from _usages(resource, target)


def _usages(resource: Resource, target: Target) -> Iterator[tuple[Measured, float]]:
    for member in members(target):
        try:
            yield member, usage(resource, member)
        except (Gone, Unsupported):
            continue


def counters(resource: Resource, target: Target) -> dict[Measured, float]:
    """The counter of a rate, of each member of a collection or of the target itself."""
    if not isinstance(target, Several):
        return {target: resource.counter(target)}
    found: dict[Measured, float] = {}
    for member in members(target):
        try:
            found[member] = resource.counter(member)
        except (Gone, Unsupported):
            continue
    return found
