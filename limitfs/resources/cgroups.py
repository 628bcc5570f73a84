"""The only place that reads cgroups: which there are, who is in them, and what the kernel counts for them.

A machine may have one unified hierarchy (version 2), several of version 1, or both. Here a partition is a *path*,
which exists while any hierarchy has a directory of that name; a controller's files are looked for in the hierarchy
that has the controller. Which processes belong to a path is told by the first hierarchy that has it: the unified
one, then the one that systemd names, then the others in the order in which they were mounted.

Readers of one partition raise `Gone` where it was removed, and `Unsupported` where the kernel does not keep that
number for it. See cgroups(7), Documentation/admin-guide/cgroup-v2.rst and .../cgroup-v1/.
"""

import contextlib
import errno
import functools
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from limitfs.errors import Gone, Unsupported
from limitfs.resources import procfs
from limitfs.resources.model import Partition

MOUNTS = "/proc/self/mountinfo"
"""Where mounts are told; parser tests put a made-up file here."""

ROOT = "/"
"""The path of the root of every hierarchy."""

_SIZE = 65_536
_LONG = 128
"""Bytes of a directory's path beyond which the way to what is below begins anew: each name on it costs, and the
kernel takes no path of PATH_MAX."""
DEEPEST = 15
"""Levels down to which partitions are told one by one, as far as hooks tell them apart. Cgroups nest by
the thousand, and each counts for all above it."""
_UNLIMITED = 2**62
"""Version 1 writes "no limit" as LONG_MAX, rounded down to a page."""
_OCTAL = re.compile(rb"\\([0-7]{3})")


class Hierarchy(NamedTuple):
    """One mounted hierarchy.

    Attributes:
        mount: its mount point.
        top: the cgroup that is mounted there; "/" unless part of it is mounted only.
        unified: version 2.
        controllers: of version 1, also `name=…`; those of version 2 differ from cgroup to cgroup.
        device: st_dev of its files.
    """

    mount: str
    top: str
    unified: bool
    controllers: frozenset[str]
    device: int

    def directory(self, path: str) -> str:
        """Where the files of a partition are."""
        return self.mount if path == ROOT else self.mount + path


# Hierarchies


@functools.cache
def hierarchies() -> tuple[Hierarchy, ...]:
    """What is mounted, the one first that says where processes belong; found out once."""
    found: dict[int, Hierarchy] = {}
    with open(MOUNTS, "rb") as file:
        for line in file:
            with contextlib.suppress(OSError):
                hierarchy = _hierarchy(line)
                if hierarchy is not None:
                    found.setdefault(hierarchy.device, hierarchy)
    return tuple(sorted(found.values(), key=_rank))


def _rank(hierarchy: Hierarchy) -> int:
    if hierarchy.unified:
        return 0
    return 1 if "name=systemd" in hierarchy.controllers else 2


def _hierarchy(line: bytes) -> Hierarchy | None:
    """One line of /proc/self/mountinfo, see proc_pid_mountinfo(5)."""
    before, _, after = line.partition(b" - ")
    kind, _source, options = after.split()
    if kind not in (b"cgroup", b"cgroup2"):
        return None
    words = before.split()
    top, mount = (os.fsdecode(_OCTAL.sub(lambda octal: bytes([int(octal[1], 8)]), word)) for word in words[3:5])
    unified = kind == b"cgroup2"
    controllers = frozenset() if unified else frozenset(options.decode().split(","))
    return Hierarchy(mount, top, unified, controllers, os.stat(mount).st_dev)


def unified() -> Hierarchy | None:
    """The hierarchy of version 2, where one is mounted."""
    first = hierarchies()[:1]
    return first[0] if first and first[0].unified else None


def _of_controller(controller: str) -> list[Hierarchy]:
    """Where the files of `controller` may be: in its hierarchy of version 1, else in the unified one."""
    return [each for each in reversed(hierarchies()) if each.unified or controller in each.controllers]


# Which there are


_known: dict[str, Partition] = {}
"""As each path was found last: it stays the same partition while that directory does, also when the same path
appears in another hierarchy."""


def identify(path: str) -> Partition:
    """The partition that has this path now.

    Raises:
        Gone: no hierarchy has it.
    """
    known = _known.get(path)
    if known is not None:
        with contextlib.suppress(Gone):
            check(known)
            return known
    for hierarchy in hierarchies():
        try:
            about = os.stat(hierarchy.directory(path))
        except OSError:
            continue
        _known[path] = found = Partition(path, about.st_dev, about.st_ino)
        return found
    raise _gone(path)


def check(partition: Partition) -> None:
    """Make sure that `partition` still exists.

    Raises:
        Gone: it was removed; also where another one has its path now.
    """
    for hierarchy in hierarchies():
        if hierarchy.device == partition.device:
            with contextlib.suppress(OSError):
                if os.stat(hierarchy.directory(partition.path)).st_ino == partition.inode:
                    return
    if _known.get(partition.path) == partition:
        del _known[partition.path]
    raise _gone(partition.path)


def _gone(path: str) -> Gone:
    return Gone(f"there is no partition {path!a}")


def root() -> Partition:
    """The partition that holds all others.

    Raises:
        Gone: no hierarchy is mounted.
    """
    return identify(ROOT)


def present() -> bool:
    """Whether there are partitions at all."""
    return bool(hierarchies())


def directories(path: str) -> Iterator[str]:
    """Where hierarchies have that path, the one first that says who belongs to it."""
    for hierarchy in hierarchies():
        directory = hierarchy.directory(path)
        if os.path.isdir(directory):
            yield directory


def children(path: str) -> list[str]:
    """The names directly below a path, in any hierarchy; none where it was removed."""
    names: dict[str, None] = {}
    for hierarchy in hierarchies():
        names.update(dict.fromkeys(_below(hierarchy.directory(path))))
    return list(names)


def _below(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def join(path: str, name: str) -> str:
    """The path of a name below another."""
    return f"{path.rstrip('/')}/{name}"


def within(path: str, above: str) -> bool:
    """Whether a path is `above`, or below it."""
    return above == ROOT or path == above or path.startswith(f"{above}/")


def depth(path: str) -> int:
    """How many levels a path is below the root."""
    return path.rstrip("/").count("/")


def partitions(path: str = ROOT) -> Iterator[Partition]:
    """Every partition below a path, down to `DEEPEST`."""
    for name in children(path) if depth(path) < DEEPEST else ():
        below = join(path, name)
        with contextlib.suppress(Gone):
            yield identify(below)
        yield from partitions(below)


def unified_id(partition: Partition) -> int | None:
    """By which number the kernel knows it in the unified hierarchy (cgroup_id); None where it is not there."""
    hierarchy = unified()
    try:
        return os.stat(hierarchy.directory(partition.path)).st_ino if hierarchy is not None else None
    except OSError:
        return None


# Who belongs


def of(pid: int) -> str | None:
    """The path of the partition that a process belongs to; None on a machine without.

    Where the unified hierarchy is not used (it has all processes in its root), the next one tells; but not of a
    path whose processes another one tells.

    Raises:
        Gone: the process ended.
    """
    paths = _paths(pid)
    for hierarchy in hierarchies():
        path = paths.get(_key(hierarchy))
        if path is not None and path != ROOT and _home(path) in (hierarchy, None):
            return path
    return ROOT if paths else None


def places(pid: int) -> Iterator[tuple[Hierarchy, str]]:
    """The path of a process in each hierarchy.

    Raises:
        Gone: the process ended.
    """
    paths = _paths(pid)
    for hierarchy in hierarchies():
        path = paths.get(_key(hierarchy))
        if path is not None:
            yield hierarchy, path


def home(partition: Partition) -> Hierarchy:
    """The hierarchy that tells who belongs to a partition.

    Raises:
        Gone: it was removed.
    """
    hierarchy = _home(partition.path)
    if hierarchy is None:
        raise _gone(partition.path)
    return hierarchy


def _home(path: str) -> Hierarchy | None:
    """The first that has it."""
    return next((each for each in hierarchies() if os.path.isdir(each.directory(path))), None)


def belongs(pid: int, partition: Partition) -> bool:
    """Whether a process is in a partition, or in one below it; nobody is in one that was removed.

    Raises:
        Gone: the process ended.
    """
    try:
        there = home(partition)
    except Gone:
        return False
    return any(hierarchy == there and within(path, partition.path) for hierarchy, path in places(pid))


def _key(hierarchy: Hierarchy) -> frozenset[str]:
    return hierarchy.controllers & _controllers()


@functools.cache
def _controllers() -> frozenset[str]:
    """All that /proc/PID/cgroup can name; the options of a mount name more than controllers."""
    return frozenset(name for names in procfs.cgroups(os.getpid()) for name in names)


def _paths(pid: int) -> dict[frozenset[str], str]:
    """The cgroups of a process, by controllers (none: unified), as paths below what is mounted."""
    tops = {_key(hierarchy): hierarchy.top for hierarchy in hierarchies()}
    return {names: _below_top(path, tops.get(names, ROOT)) for names, path in procfs.cgroups(pid).items()}


def _below_top(path: str, top: str) -> str:
    if top == ROOT or not (path == top or path.startswith(top + "/")):
        return path
    return path[len(top) :] or ROOT


def pids(partition: Partition) -> list[int]:
    """The processes of a partition, and of all below it.

    Raises:
        Gone: it was removed.
    """
    for top in directories(partition.path):
        found = _residents(top, DEEPEST - depth(partition.path))
        if not found:
            check(partition)
        return list(found)
    raise _gone(partition.path)


_looked: dict[str, dict[int, None]] | None = None
"""Whom each directory had, with all below it, in the present look at all partitions."""


@contextlib.contextmanager
def one_look() -> Iterator[None]:
    """Read each cgroup once, for itself and for all above it, until this ends."""
    global _looked
    _looked = {}
    try:
        yield
    finally:
        _looked = None


def _residents(directory: str, levels: int) -> dict[int, None]:
    """Who is in a directory, or below it; so many levels are told one by one."""
    if _looked is not None and directory in _looked:
        return _looked[directory]
    # A threaded cgroup's processes are listed in the one above its tree, too.
    if levels > 0:
        found = dict.fromkeys(_listed(directory))
        for name in _below(directory):
            found.update(_residents(f"{directory}/{name}", levels - 1))
    else:
        found = dict.fromkeys(pid for each in _all_below(directory) for pid in _listed(each))
    if _looked is not None:
        _looked[directory] = found
    return found


def _all_below(top: str) -> Iterator[str]:
    """A directory, and every one below it, by paths that the kernel takes, however deep and long its own are."""
    # Those to be looked at, and descriptors that nothing is below any more when they are reached.
    waiting: list[str | int] = [top]
    try:
        while waiting:
            each = waiting.pop()
            if isinstance(each, int):
                os.close(each)
                continue
            if len(os.fsencode(each)) > _LONG:
                try:
                    fd = os.open(each, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError:  # removed meanwhile
                    continue
                waiting.append(fd)
                each = f"/proc/self/fd/{fd}"
            yield each
            waiting += [f"{each}/{name}" for name in _below(each)]
    finally:
        for each in waiting:
            if isinstance(each, int):
                os.close(each)


def _listed(directory: str) -> list[int]:
    """The processes of one cgroup; of a threaded one those whose first thread is there, as in /proc/PID/cgroup."""
    try:
        return _numbers(f"{directory}/cgroup.procs")
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            return []  # removed meanwhile
    with contextlib.suppress(OSError):
        return [tid for tid in _numbers(f"{directory}/cgroup.threads") if _leads(tid)]
    return []


def _leads(tid: int) -> bool:
    """Whether a thread is the first of its process."""
    with contextlib.suppress(Gone):
        return procfs.thread_group(tid) == tid
    return False


def _numbers(path: str) -> list[int]:
    """Without those of other PID namespaces, which the kernel shows as 0."""
    return [number for number in map(int, _read(path).split()) if number]


# What the kernel counts


class Knob(NamedTuple):
    """One number of a controller, and the files that show it in version 2 and in version 1; None: none does."""

    controller: str
    v2: str | None
    v1: str | None

    def __str__(self) -> str:
        return self.v2 or self.v1 or "-"


def file(partition: Partition, knob: Knob) -> str:
    """The file behind a knob.

    Raises:
        Gone: the partition was removed.
        Unsupported: it has no such file.
    """
    for hierarchy in _of_controller(knob.controller):
        name = knob.v2 if hierarchy.unified else knob.v1
        path = f"{hierarchy.directory(partition.path)}/{name}"
        if name is not None and os.path.exists(path):
            return path
    check(partition)
    raise Unsupported(f"the kernel keeps no {knob} of partition {partition.path!a}")


def has(partition: Partition, knob: Knob) -> bool:
    """Whether the kernel keeps it there."""
    try:
        file(partition, knob)
    except (Gone, Unsupported):
        return False
    return True


def read(partition: Partition, knob: Knob) -> bytes:
    """The text behind a knob; raises as `file`."""
    path = file(partition, knob)
    try:
        return _read(path)
    except OSError as error:
        check(partition)
        raise Unsupported(f"the kernel does not tell {knob} of partition {partition.path!a}") from error


def number(partition: Partition, knob: Knob) -> float:
    """The number behind a knob, infinity for "max" and what version 1 writes for it; raises as `file`."""
    return _number(read(partition, knob).strip())


def _number(text: bytes) -> float:
    if text == b"max":
        return math.inf
    value = int(text)
    return math.inf if value >= _UNLIMITED or value < 0 else value


def field(partition: Partition, knob: Knob, *names: bytes) -> int:
    """A line of a flat-keyed file, the first of the names that it has; raises as `file`."""
    lines = dict(line.split(b" ", 1) for line in read(partition, knob).splitlines())
    for name in names:
        if name in lines:
            return int(lines[name])
    raise Unsupported(f"the kernel keeps no {names[-1].decode()} of partition {partition.path!a}")


def write(partition: Partition, knob: Knob, text: str) -> None:
    """Write to a knob.

    Raises:
        Gone, Unsupported: as `file`.
        OSError: what the kernel says.
    """
    path = file(partition, knob)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise _gone(partition.path) from None
    try:
        os.write(fd, text.encode())
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise _gone(partition.path) from None
        raise
    finally:
        os.close(fd)


def owner(partition: Partition) -> int:
    """The uid that a partition was delegated to: the owner of its directory.

    Raises:
        Gone: it was removed.
    """
    for directory in directories(partition.path):
        with contextlib.suppress(OSError):
            return os.stat(directory).st_uid
    raise _gone(partition.path)


def born(partition: Partition) -> float:
    """When its directory was made, in seconds since the epoch. Raises Gone."""
    for directory in directories(partition.path):
        with contextlib.suppress(OSError):
            return os.stat(directory).st_mtime
    raise _gone(partition.path)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, _SIZE):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)
