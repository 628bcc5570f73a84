"""Which partitions come and go, by inotify on the directories of the cgroup file systems.

mkdir(2), rmdir(2), and rename(2) in version 1, are the only ways, and all are heard on the directory above: a
directory that is removed there says nothing itself. See inotify(7).
"""

import contextlib
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Protocol

from inotify_simple import INotify, flags

from limitfs.errors import Gone
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Refused
from limitfs.resources import cgroups
from limitfs.resources.model import Partition

log = logging.getLogger(__name__)

_MASK = flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO | flags.ONLYDIR

Told = Callable[[str | None], None]
"""Is told the name of what was made or removed; None: anything may have been."""


class Owner(Protocol):
    """Who keeps something for every partition."""

    def appeared(self, partition: Partition, /) -> None:
        """It is there."""

    def changed(self, partition: Partition, /) -> None:
        """Another hierarchy has its path now, or one has it no more: other numbers of it may be kept."""

    def removed(self, partition: Partition, /) -> None:
        """It is no more."""


class Directories:
    """Watches directories; each costs the kernel one inotify watch however many want to know."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._inotify: INotify | None = None
        self._told: dict[str, dict[object, Told]] = {}
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def watch(self, directory: str, callback: Told) -> Callable[[], None]:
        """Call `callback` when something was made or removed in `directory`; returns what ends that.

        Raises:
            Refused: the kernel gives no more watches (fs.inotify.max_user_watches).
            OSError: there is no such directory.
        """
        self._begin(directory)
        key = object()
        self._told.setdefault(directory, {})[key] = callback

        def end() -> None:
            told = self._told.get(directory, {})
            if told.pop(key, None) is not None and not told:
                self._end(directory)

        return end

    def _begin(self, directory: str) -> None:
        """Watch it; where it is watched already, that may be one of the same name that was removed."""
        try:
            if self._inotify is None:
                self._inotify = INotify(nonblocking=True)
                self._reactor.add_reader(self._inotify.fileno(), self._drain)
            number = self._inotify.add_watch(directory, _MASK)
        except (FileNotFoundError, NotADirectoryError):
            self._close_if_unused()
            raise
        except OSError as error:
            self._close_if_unused()
            raise Refused(f"inotify: {error.strerror} (fs.inotify)") from error
        before = self._numbers.get(directory)
        if before is not None and before != number:
            self._names.pop(before, None)
        self._numbers[directory] = number
        self._names[number] = directory

    def _end(self, directory: str) -> None:
        del self._told[directory]
        number = self._numbers.pop(directory)
        if self._names.pop(number, None) is not None and self._inotify is not None:
            try:
                self._inotify.rm_watch(number)
            except OSError:  # the kernel dropped it with its directory
                log.debug("%a was not watched any more", directory)
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if not self._told and self._inotify is not None:
            self._reactor.remove_reader(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None

    def _drain(self) -> None:
        assert self._inotify is not None
        changed: dict[tuple[str, str | None], None] = {}
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.Q_OVERFLOW:
                changed.update(((directory, None), None) for directory in self._told)
            elif event.wd in self._names and event.mask & flags.ISDIR:
                changed[self._names[event.wd], event.name] = None
        for directory, name in changed:
            for callback in list(self._told.get(directory, {}).values()):
                try:
                    callback(name)
                except Exception:  # the others must hear it all the same
                    log.exception("told of a change in %a, somebody failed", directory)


class PartitionMembers:
    """Tells an owner of every partition below the root: those that are there, then those that come and go.

    Down to `cgroups.DEEPEST`.
    """

    def __init__(self, directories: Directories, owner: Owner) -> None:
        self._directories = directories
        self._owner = owner
        self._known: dict[str, Partition] = {}
        self._below: dict[str, set[str]] = {}
        # The directories in which each path is watched.
        self._ends: dict[str, dict[str, Callable[[], None]]] = {}
        self._started = False

    def start(self) -> None:
        """Begin. Raises Refused, also what `Owner.appeared` raises."""
        try:
            self._enter(cgroups.ROOT)
        except BaseException:
            self.close()
            raise
        self._started = True

    def close(self) -> None:
        """Tell no more."""
        for path in list(self._ends):
            self._leave(path)
        self._known.clear()
        self._below.clear()

    def _enter(self, path: str) -> None:
        """Watch a partition in every hierarchy that has it, and everything below it."""
        ends = self._ends.setdefault(path, {})
        for directory in cgroups.directories(path):
            if directory not in ends:
                try:
                    ends[directory] = self._directories.watch(directory, partial(self._changed, path))
                except OSError:
                    continue  # removed just now: that is heard above
                except Refused as refusal:
                    if not self._started:
                        raise
                    log.warning("what comes and goes below %a is not heard: %s", path, refusal)
                    ends[directory] = _nothing
        self._changed(path, None)

    def _leave(self, path: str) -> None:
        for end in self._ends.pop(path, {}).values():
            end()

    def _changed(self, path: str, name: str | None) -> None:
        """Something was made or removed directly below: this name, or any."""
        names = {name} if name is not None else {*cgroups.children(path), *self._below.get(path, ())}
        for each in names:
            if path not in self._ends:
                return  # closed, or removed, while the owner was told
            self._look(path, each)

    def _look(self, above: str, name: str) -> None:
        path = cgroups.join(above, name)
        known = self._known.get(path)
        if known is not None:
            try:
                cgroups.check(known)
            except Gone:
                self._gone(path)
                known = None
        if known is None:
            self._new(above, name)
        elif set(cgroups.directories(path)) != self._ends[path].keys():
            self._hierarchies_changed(path)

    def _new(self, above: str, name: str) -> None:
        path = cgroups.join(above, name)
        if cgroups.depth(path) > cgroups.DEEPEST:
            return
        try:
            partition = cgroups.identify(path)
        except Gone:
            return
        self._known[path] = partition
        self._below.setdefault(above, set()).add(name)
        self._ends[path] = {}
        self._owner.appeared(partition)
        if path in self._ends:
            self._enter(path)

    def _hierarchies_changed(self, path: str) -> None:
        ends = self._ends[path]
        for directory in ends.keys() - set(cgroups.directories(path)):
            ends.pop(directory)()
        self._owner.changed(self._known[path])
        if path in self._ends:
            self._enter(path)

    def _gone(self, path: str) -> None:
        for name in list(self._below.get(path, ())):
            self._gone(cgroups.join(path, name))
        self._below.pop(path, None)
        self._below.get(os.path.dirname(path), set()).discard(os.path.basename(path))
        self._leave(path)
        partition = self._known.pop(path, None)
        if partition is not None:
            self._owner.removed(partition)


def _nothing() -> None:
    """What ends a watch that there is not."""


class Removals:
    """Tells of the end of single partitions."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories

    def watch(self, partition: Partition, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` once, when `partition` was removed; returns what cancels that.

        Raises:
            Gone: it was removed before.
            Refused: as `Directories.watch`.
        """
        ends = contextlib.ExitStack()

        def look(name: str | None) -> None:
            if name not in (None, os.path.basename(partition.path)):
                return
            try:
                cgroups.check(partition)
            except Gone:
                ends.close()
                callback()

        with contextlib.ExitStack() as undo:
            undo.callback(ends.close)
            for directory in cgroups.directories(os.path.dirname(partition.path)):
                with contextlib.suppress(OSError):  # removed just now
                    ends.callback(self._directories.watch(directory, look))
            cgroups.check(partition)
            undo.pop_all()
        return ends.close
