"""Which processes and threads stand below a path, and what they add up to."""

from collections.abc import Iterator

from limitfs.errors import Gone, Unsupported
from limitfs.resources import procfs
from limitfs.resources.model import Level, Measured, Process, Processes, Resource, System, Target, Threads


def members(target: Target) -> Iterator[Measured]:
    """The members that `each` tests: the processes of the system, the threads of a process.

    Raises:
        Gone: the process whose threads are asked for has ended.
    """
    if isinstance(target, System | Processes):
        for pid in procfs.pids():
            try:
                yield procfs.identify(pid)
            except Gone:
                continue
        return
    process = target.process if isinstance(target, Threads) else target
    if not isinstance(process, Process):
        raise TypeError(f"{target} has no members")
    procfs.check(process)
    for tid in procfs.tids(process.pid):
        try:
            yield procfs.identify_thread(process.pid, tid)
        except Gone:
            continue


def collection(target: Target) -> Target:
    """What `each` on `target` stands for: `Processes` for the system, `Threads` for a process."""
    if isinstance(target, System):
        return Processes()
    return Threads(target) if isinstance(target, Process) else target


def member_level(target: Target) -> Level | None:
    """The level of what stands below `target`, or None where nothing does."""
    if isinstance(target, System | Processes):
        return Level.PROCESS
    return Level.THREAD if isinstance(target, Process | Threads) else None


def has_members(resource: Resource, target: Target) -> bool:
    """Whether `mode` and `top` make sense for `resource` at `target`."""
    return member_level(target) in resource.levels


def usage(resource: Resource, target: Target) -> float:
    """The use of `target` now; of a collection, the sum over its members. Raises as `Resource.usage`."""
    if not isinstance(target, Processes | Threads):
        return resource.usage(target)
    return sum(value for _member, value in usages(resource, target))


def usages(resource: Resource, target: Target) -> Iterator[tuple[Measured, float]]:
    """The use of each member now, without those that end meanwhile or cannot be told just now (a stack in use)."""
    for member in members(target):
        try:
            yield member, resource.usage(member)
        except (Gone, Unsupported):
            continue


def counters(resource: Resource, target: Target) -> dict[Measured, float]:
    """The counter of a rate, of each member of a collection or of the target itself."""
    if not isinstance(target, Processes | Threads):
        return {target: resource.counter(target)}
    found: dict[Measured, float] = {}
    for member in members(target):
        try:
            found[member] = resource.counter(member)
        except (Gone, Unsupported):
            continue
    return found
