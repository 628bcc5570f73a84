"""The tree, declared: every name a user can meet, with its mode, its reader, its writer and a line of help.

Listings, look-ups, the manual page and the tests derive from `ROOT`. What the entries do is in `content`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from limitfs.space import content

if TYPE_CHECKING:
    from limitfs.space.content import Place, Slow
    from limitfs.space.house import House

Reader = Callable[["Place", "House", int], str]
Writer = Callable[["Place", "House", int, str], "Slow | None"]


@dataclass(frozen=True, slots=True)
class File:
    """A file. `read` gives its text to a user (uid); `write` takes one whole command of a user.

    What `write` returns is to be done yet, where waiting stops nobody.
    """

    name: str
    mode: int
    help: str
    read: Reader | None = None
    write: Writer | None = None
    present: Callable[["Place"], bool] | None = None
    """Where it exists at all; everywhere when None."""


@dataclass(frozen=True, slots=True)
class Event:
    """A file of lines that can be waited for. `private`: a write makes a watcher for the open file."""

    name: str
    mode: int
    help: str
    kind: str
    private: bool = False
    present: Callable[["Place"], bool] | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link; `read` gives where it leads for a caller's thread number."""

    name: str
    help: str
    read: Callable[["Place", "House", int], str]
    mode: int = 0o777
    present: Callable[["Place"], bool] | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Names of one kind that come and go in a directory.

    Each is a directory `below`, or, with None, one more of the kind that it stands in.

    `bind` tells the place of a name, or raises Absent. `make` and `remove` are mkdir(2) and rmdir(2) for a
    user (uid); None: EPERM.
    """

    label: str
    names: Callable[["Place", "House", int], Iterable[str]]
    bind: Callable[["Place", "House", int, str], "Place"]
    below: "Dir | None"
    make: Callable[["Place", "House", int, str], None] | None = None
    remove: Callable[["Place", "House", int, str], None] | None = None
    lasting: bool = True
    """Whether only the kernel's own mkdir and rmdir change the names, so that it may cache them."""


@dataclass(frozen=True, slots=True)
class Dir:
    """A directory: fixed `entries`, and `families` of names that come and go.

    `step` tells the place of a fixed directory from that of its parent.
    """

    name: str
    help: str
    entries: "tuple[Entry, ...]" = ()
    families: tuple[Family, ...] = ()
    mode: int = 0o755
    step: Callable[["Place"], "Place"] | None = None
    present: Callable[["Place"], bool] | None = None


Entry = File | Event | Link | Dir

_WATCHER_FILES: tuple[Entry, ...] = (
    File(
        "threshold",
        0o644,
        "arms the watcher: a condition, `change`, or `off`",
        content.show_threshold,
        content.store_threshold,
    ),
    File(
        "mode",
        0o644,
        "each member separately, or their sum; the choice in brackets",
        content.show_mode,
        content.store_mode,
        content.has_members,
    ),
    File(
        "hearing",
        0o644,
        "auto: the surest source; sampled: no kernel hooks",
        content.show_hearing,
        content.store_hearing,
    ),
    File("state", 0o444, "off, clear or alarm, and how it is heard; flat-keyed", content.show_state),
    Event("event", 0o600, "crossings, one logfmt line each; poll and inotify", "watcher", private=True),
)

WATCHER = Dir("NAME", "a further watcher: mkdir makes it, rmdir disarms it", _WATCHER_FILES)

_NAMED = Family(
    "NAME",
    content.watcher_names,
    content.bind_watcher,
    WATCHER,
    content.make_watcher,
    content.remove_watcher,
)

RESOURCE = Dir(
    "RESOURCE",
    "one resource of one target",
    (
        File(
            "usage", 0o444, "current use, read now, in the base unit", content.show_usage, None, content.measured
        ),
        File(
            "limit",
            0o644,
            "what the kernel enforces: soft and hard, or max; a write sets it",
            content.show_limit,
            content.store_limit,
        ),
        File("peak", 0o444, "the highest value known, and since when", content.show_peak, None, content.measured),
        *_WATCHER_FILES,
        File(
            "top",
            0o444,
            "the largest users: value, pid or tid, comm",
            content.show_top,
            None,
            content.has_members,
        ),
    ),
    (_NAMED,),
)

_RESOURCES = Family("RESOURCE", content.resource_names, content.bind_resource, RESOURCE)

THREAD = Dir("TID", "one thread", families=(_RESOURCES,))

THREADS = Dir(
    "thread",
    "the threads of the process, and RESOURCES for each or all of them",
    families=(_RESOURCES, Family("TID", content.thread_names, content.bind_thread, THREAD, lasting=False)),
    step=content.threads_of,
)

PROCESS = Dir(
    "PID",
    "one process",
    (
        THREADS,
        Link(
            "partition", "the partition that it belongs to", content.partition_link, present=content.has_partitions
        ),
    ),
    (_RESOURCES,),
)

PROCESSES = Dir(
    "process",
    "all processes, and RESOURCES for each or all of them",
    (Link("self", "the caller's own directory", content.self_link),),
    (Family("PID", content.process_names, content.bind_process, PROCESS, lasting=False), _RESOURCES),
    step=content.all_processes,
)


def _partitions(below: Dir | None) -> tuple[Family, ...]:
    return _RESOURCES, Family("CGROUP", content.partition_names, content.bind_partition, below, lasting=False)


PARTITION = Dir(
    "CGROUP", "one partition, that is cgroup, with all that is in it and below", families=_partitions(None)
)

PARTITIONS = Dir(
    "partition",
    "all partitions, and RESOURCES for each or all of them",
    families=_partitions(PARTITION),
    step=content.all_partitions,
    present=content.has_partitions,
)

GROUP = Dir(
    "GROUP",
    "a group of processes: mkdir makes it, rmdir ends it",
    (
        File(
            "select",
            0o644,
            "which processes belong to it: a condition on their columns",
            content.show_select,
            content.store_select,
        ),
        File("members", 0o444, "the processes that belong to it now, one pid on a line", content.show_members),
        File("state", 0o444, "how many belong to it, and how that is known; flat-keyed", content.show_group),
    ),
    (_RESOURCES,),
)

GROUPS = Dir(
    "group",
    "groups of processes that users made",
    families=(
        Family(
            "GROUP",
            content.group_names,
            content.bind_group,
            GROUP,
            content.make_group,
            content.remove_group,
        ),
    ),
    mode=0o1777,
)

SYSTEM = Dir("system", "the whole machine", families=(_RESOURCES,), step=content.whole_system)

ROOT = Dir(
    "",
    "the mount point",
    (
        File("README", 0o444, "how to use it, in 30 lines", content.show_readme),
        File("features", 0o444, "what this kernel lets us hear, how surely, at what cost", content.show_features),
        File("last_error", 0o444, "why your latest writes were refused", content.show_last_error),
        File("state", 0o444, "the daemon: watchers, sources, requests; flat-keyed", content.show_daemon),
        File(
            "rules",
            0o600,
            "what became of each rule of limitfs.d; write `reload` to read them again",
            content.show_rules,
            content.store_rules,
        ),
        Event("event", 0o444, "every crossing that the reader may see", "all"),
        Event("births", 0o444, "fork, exec and exit of processes, while somebody has it open", "births"),
        SYSTEM,
        PARTITIONS,
        PROCESSES,
        GROUPS,
    ),
)


def walk(directory: Dir = ROOT, path: str = "") -> Iterator[tuple[str, Entry]]:
    """Every declared path with its entry, for manuals and tests; names that vary are in capitals."""
    below = (family.below for family in directory.families if family.below is not None)
    for entry in (*directory.entries, *below):
        yield f"{path}{entry.name}", entry
        if isinstance(entry, Dir):
            yield from walk(entry, f"{path}{entry.name}/")
