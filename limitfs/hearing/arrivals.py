"""Tells when the partition of a path may have come or gone, however much of the way to it is there yet.

The directories on the way that exist are watched, in every hierarchy, by inotify. Nothing is polled, and what
nobody waits for is not watched.
"""

import logging
from collections.abc import Callable
from functools import partial

from limitfs.hearing.partitions import Directories
from limitfs.hearing.source import Refused
from limitfs.resources import cgroups

log = logging.getLogger(__name__)


class Arrivals:
    """Follows the paths of partitions that need not exist."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories

    def watch(self, path: str, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` whenever something on the way to `path`, or `path` itself, was made or removed.

        What is there then is for the callback to see: a cgroup that was removed and made again may be told of
        once. Returns what ends that.

        Raises:
            Refused: the kernel gives no more watches (fs.inotify.max_user_watches).
        """
        return _Way(self._directories, path, callback).end


class _Way:
    """The way to one partition, as far as it exists."""

    def __init__(self, directories: Directories, path: str, callback: Callable[[], None]) -> None:
        self._directories = directories
        self._path = path
        self._callback = callback
        self._ends: list[Callable[[], None]] = []
        self._follow()

    def end(self) -> None:
        """Watch no more."""
        ends, self._ends = self._ends, []
        for end in ends:
            end()

    def _follow(self) -> None:
        """Watch the directories that exist now. Raises Refused; then those are watched that were before."""
        before, self._ends = self._ends, []
        try:
            for hierarchy in cgroups.hierarchies():
                self._follow_in(hierarchy)
        except Refused:
            self.end()
            self._ends = before
            raise
        # Not earlier: what is watched without a break loses no event.
        for end in before:
            end()

    def _follow_in(self, hierarchy: cgroups.Hierarchy) -> None:
        above = cgroups.ROOT
        for name in self._path.split("/")[1:]:
            # From the top: a directory that is made after it was not found is told of by the one above.
            try:
                end = self._directories.watch(hierarchy.directory(above), partial(self._changed, name))
            except OSError:
                return
            self._ends.append(end)
            above = cgroups.join(above, name)

    def _changed(self, next_name: str, name: str | None) -> None:
        if name not in (None, next_name):
            return
        try:
            self._follow()
        except Refused as refusal:
            log.warning("what comes on the way to partition %s may not be heard: %s", ascii(self._path), refusal)
        self._callback()
