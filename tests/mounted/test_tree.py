"""The mounted tree is the declared one: no name too few, none too many."""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from cgroupkit import Cgroup, cgroup

from conftest import Helper, Mount
from limitfs.resources import RESOURCES
from limitfs.resources.model import Level, Resource
from limitfs.space.table import ROOT, WATCHER, Dir, Link, walk

Make = Callable[..., Helper]

LEVELS: dict[str, Level] = {
    "system": Level.SYSTEM,
    "partition": Level.PARTITION,
    "partition/CGROUP": Level.PARTITION,
    "group/GROUP": Level.PROCESS,
    "process": Level.PROCESS,
    "process/PID": Level.PROCESS,
    "process/PID/thread": Level.THREAD,
    "process/PID/thread/TID": Level.THREAD,
}
BELOW = {
    "system": Level.PROCESS,
    "partition": Level.PARTITION,
    "partition/CGROUP": Level.PROCESS,
    "group/GROUP": Level.PROCESS,
    "process": Level.PROCESS,
    "process/PID": Level.THREAD,
    "process/PID/thread": Level.THREAD,
}

COLLECTIONS = ("partition", "group/GROUP", "process", "process/PID/thread")
GROUP = "tree"


@pytest.fixture(scope="module")
def partition() -> Iterator[Cgroup]:
    with cgroup() as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def group(limits: Mount) -> Iterator[None]:
    os.mkdir(limits / "group" / GROUP)
    (limits / "group" / GROUP / "select").write_text('comm == "nobody"')
    yield
    os.rmdir(limits / "group" / GROUP)


def measured(place: str) -> list[Resource]:
    found = [resource for resource in RESOURCES.values() if LEVELS[place] in resource.levels]
    return [*found, RESOURCES["processes"]] if place == "group/GROUP" else found


def paths(declared: str, pid: int, partition: Cgroup) -> Iterable[str]:
    """What a declared path stands for, on a process with one thread, a cgroup and a group."""
    place = declared.replace("PID", str(pid)).replace("TID", str(pid))
    place = place.replace("partition/CGROUP", partition.tree).replace("group/GROUP", f"group/{GROUP}")
    before, found, after = place.partition("RESOURCE")
    if not found:
        yield place
        return
    for resource in measured(declared.partition("/RESOURCE")[0]):
        if "CGROUP" in declared and not (resource.summable or resource.kept(partition.partition)):
            continue  # a pressure that the kernel does not keep there
        yield f"{before}{resource.name}{after}"


def expected(declared: str, path: str) -> bool:
    """Whether a resource has that file there: `mode` and `top` ask for members, a total for a sum."""
    place, found, name = declared.partition("/RESOURCE/")
    if not found:
        return True
    resource = RESOURCES[path.split("/")[-2]]
    if name in ("mode", "top"):
        return BELOW.get(place) in resource.levels
    return name not in ("usage", "peak") or place not in COLLECTIONS or resource.summable


DECLARED = list(walk())


@pytest.mark.parametrize("declared", [path for path, _entry in DECLARED if "NAME" not in path])
def test_what_is_declared_exists(limits: Mount, helper: Make, partition: Cgroup, declared: str) -> None:
    pid = helper().pid
    entry = dict(DECLARED)[declared]
    for path in paths(declared, pid, partition):
        name = path.rpartition("/")[2]
        if not expected(declared, path):
            assert not (limits / path).exists()
            assert name not in os.listdir((limits / path).parent)
            continue
        about = (limits / path).lstat()
        kind = (
            stat.S_ISDIR if isinstance(entry, Dir) else stat.S_ISLNK if isinstance(entry, Link) else stat.S_ISREG
        )
        assert kind(about.st_mode)
        assert stat.S_IMODE(about.st_mode) == entry.mode
        assert name in os.listdir((limits / path).parent)


def test_a_watchers_files(limits: Mount, helper: Make) -> None:
    for directory in (f"process/{helper().pid}/memory", "system/memory", "process/fds"):
        os.mkdir(limits / directory / "warn")
        try:
            names = set(os.listdir(limits / directory / "warn"))
            mode = {"mode"} if (limits / directory / "mode").exists() else set()
            assert names == {entry.name for entry in WATCHER.entries} - {"mode"} | mode
        finally:
            os.rmdir(limits / directory / "warn")


def test_nothing_else_is_there(limits: Mount, helper: Make) -> None:
    pid = helper().pid
    expected = {
        "": {entry.name for entry in ROOT.entries},
        "system": {resource.name for resource in measured("system")},
        "group": {GROUP},
        f"group/{GROUP}": {each.name for each in measured("group/GROUP")} | {"select", "members", "state"},
        f"process/{pid}": {resource.name for resource in measured("process/PID")} | {"thread", "partition"},
        f"process/{pid}/thread/{pid}": {resource.name for resource in measured("process/PID/thread/TID")},
        f"process/{pid}/thread": {each.name for each in measured("process/PID/thread")} | {str(pid)},
    }
    for directory, names in expected.items():
        assert set(os.listdir(limits / directory)) == names
    fixed = {name for name in os.listdir(limits / "process") if not name.isdecimal()}
    assert fixed == {resource.name for resource in measured("process")} | {"self"}


def test_inode_numbers_are_one_each(limits: Mount, helper: Make) -> None:
    root = limits / f"process/{helper().pid}"
    found: dict[int, Path] = {}
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = Path(directory) / name
            assert found.setdefault(path.stat().st_ino, path) == path


def test_every_file_that_can_be_read_says_something(limits: Mount, helper: Make) -> None:
    for path in (limits / f"process/{helper().pid}").rglob("*"):
        # The stack in use cannot be told of a thread that runs.
        if path.is_file() and path.name not in ("event", "top") and "stack" not in path.parts:
            assert path.read_text().endswith("\n"), path
