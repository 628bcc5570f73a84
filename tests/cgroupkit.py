"""Real cgroups for tests: made below the root of a hierarchy, and removed with all that is below them."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limitfs.resources import cgroups
from limitfs.resources.model import Partition


@dataclass
class Cgroup:
    """One cgroup of a test."""

    hierarchy: cgroups.Hierarchy
    path: str

    @property
    def directory(self) -> Path:
        return Path(self.hierarchy.directory(self.path))

    @property
    def tree(self) -> str:
        """Where it is below the mount point; names of tests collide with nothing."""
        return f"partition{self.path}"

    @property
    def partition(self) -> Partition:
        """As resources and sources know it."""
        return cgroups.identify(self.path)

    def below(self, name: str) -> "Cgroup":
        """A new one, directly below."""
        child = Cgroup(self.hierarchy, cgroups.join(self.path, name))
        child.directory.mkdir()
        return child

    def take(self, *pids: int) -> None:
        """Move processes here."""
        for pid in pids:
            (self.directory / "cgroup.procs").write_text(str(pid))

    def write(self, knob: str, text: str) -> None:
        (self.directory / knob).write_text(text)

    def read(self, knob: str) -> str:
        return (self.directory / knob).read_text().strip()

    def remove(self) -> None:
        """With all below; processes that are still there go to the root."""
        if not self.directory.is_dir():
            return
        for name in [entry.name for entry in os.scandir(self.directory) if entry.is_dir()]:
            Cgroup(self.hierarchy, cgroups.join(self.path, name)).remove()
        for _ in range(100):
            for pid in self.read("cgroup.procs").split():
                with contextlib.suppress(OSError):
                    Cgroup(self.hierarchy, cgroups.ROOT).take(int(pid))
            with contextlib.suppress(OSError):
                self.directory.rmdir()
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.directory} cannot be removed")


def worker(helper: Callable[..., Any], group: Cgroup) -> Any:
    """A child that begins in `group`."""
    child = helper()
    group.take(child.pid)
    return child


def hierarchy_of(controller: str) -> cgroups.Hierarchy | None:
    """The hierarchy of version 1 that has a controller."""
    return next((each for each in cgroups.hierarchies() if controller in each.controllers), None)


@contextlib.contextmanager
def cgroup(controller: str | None = None, name: str = "") -> Iterator[Cgroup]:
    """A cgroup in the unified hierarchy, or in that of version 1 which has `controller`.

    On a machine without that, in the unified one, with the controller switched on for it.
    """
    hierarchy = (hierarchy_of(controller) if controller else None) or cgroups.unified()
    assert hierarchy is not None
    if hierarchy.unified and controller:
        with contextlib.suppress(OSError):  # version 2 has no cpuacct, and always counts
            Path(hierarchy.mount, "cgroup.subtree_control").write_text(f"+{controller}")
    made = Cgroup(hierarchy, f"/limitfs-test-{name}{uuid.uuid4().hex[:8]}")
    made.directory.mkdir()
    try:
        yield made
    finally:
        made.remove()
