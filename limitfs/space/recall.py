"""What was set up in the tree, kept so that it can be set up again when the daemon was killed.

A *setup* is of one directory that somebody wrote to or made: a resource's own watcher, a named watcher, a group.
It holds the commands that make it again, whose it is, and the target that it stands for: a process number that
belongs to another process by then leads to another setup.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from limitfs.errors import Gone, LimitsError
from limitfs.resources.members import has_members
from limitfs.resources.model import Group, Several
from limitfs.space import content
from limitfs.space.house import House
from limitfs.space.shell import Shell
from limitfs.store import Store
from limitfs.watching.condition import parse, render
from limitfs.watching.crossing import Crossing, Record
from limitfs.watching.watcher import Watcher

log = logging.getLogger(__name__)

KEY = "setup "
"""Before the path and the target, in the store."""


def identity(target: object) -> Any:
    """A target in the words of JSON, the same in every daemon."""
    if isinstance(target, Group):
        # Its directory is all that tells it from others.
        return target.name
    if dataclasses.is_dataclass(target):
        fields = (getattr(target, field.name) for field in dataclasses.fields(target))
        return [type(target).__name__, *(identity(value) for value in fields)]
    return target


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """How a directory is set up again.

    Attributes:
        path: below the mount point.
        target: its `identity`; None: whatever the path leads to.
        owner: uid of who made it.
        made: by mkdir.
        files: what is to be written, in this order.
    """

    path: str
    target: Any
    owner: int
    made: bool
    files: dict[str, str]

    @property
    def key(self) -> str:
        """In the store. What stands in a directory comes after it in order."""
        return f"{KEY}{self.path} {self.target}"


class Recall:
    """Keeps setups, and sets them up again.

    Args:
        shell: gives a user's shell.
        house: whose watchers these are.
        store: where it is kept.

    Attributes:
        lost: directories that could not be set up again as they were.
    """

    def __init__(self, shell: Callable[[int], Shell], house: House, store: Store) -> None:
        self._shell = shell
        self._house = house
        self._store = store
        self._restoring = False
        self.lost: set[str] = set()

    # Keeping

    def keep(self, setup: Setup) -> None:
        """Have a directory set up again after a crash."""
        if not self._restoring:
            self._store.put(setup.key, dataclasses.asdict(setup))

    def forget(self, setup: Setup) -> None:
        """It is no more, or as it always was."""
        if not self._restoring:
            self._store.drop(setup.key)

    def made(self, path: str, owner: int, files: dict[str, str]) -> None:
        """A directory that is no watcher was made, or written to; `files` is all that has been written."""
        self.keep(Setup(path, None, owner, True, files))

    def unmade(self, path: str) -> None:
        """It was removed."""
        self.forget(Setup(path, None, 0, True, {}))

    def watcher_changed(self, watcher: Watcher) -> None:
        """A watcher was made, set, or removed."""
        if not watcher.shared:
            return
        if self._house.registry.find(watcher.target, watcher.resource, watcher.name) is watcher:
            setup = _setup(watcher, self._files(watcher))
            if setup.made or setup.files:
                self.keep(setup)
                return
        self.forget(_setup(watcher, {}))

    def _files(self, watcher: Watcher) -> dict[str, str]:
        """What differs from a watcher that was just made; the threshold last, which arms it."""
        files = {}
        if watcher.hearing != self._house.registry.hearing:
            files["hearing"] = watcher.hearing
        if watcher.each != isinstance(watcher.target, Several) and has_members(watcher.resource, watcher.target):
            files["mode"] = "each" if watcher.each else "sum"
        if watcher.condition is not None:
            files["threshold"] = render(watcher.condition, watcher.resource.unit)
        return files

    # Setting up again

    def restore(self, found: dict[str, Any], stop: Callable[[], object] = lambda: False) -> int:
        """Set up what is in the store; gives how many places are as they were. The others are said and dropped.

        When `stop` is true the rest stays in the store, for the next daemon.
        """
        setups = [setup for key, value in found.items() if key.startswith(KEY) and (setup := _read(key, value))]
        restored = 0
        for setup in setups:
            if stop():
                break
            try:
                self._restore(setup)
                restored += 1
            except LimitsError as error:
                self._lose(setup, error)
            except Exception as error:
                # Whatever is in that file, the daemon must begin.
                log.exception("setting up %s", ascii(setup.path))
                self._lose(setup, LimitsError(f"it failed: {type(error).__name__}"))
        if setups:
            log.warning("the daemon before has ended: %d places set up again, %d lost", restored, len(self.lost))
        return restored

    def _restore(self, setup: Setup) -> None:
        self._restoring = True
        shell = self._shell(setup.owner)
        try:
            self._check_target(setup, shell)
            if setup.made:
                shell.mkdir(setup.path)
            try:
                self._write(setup, shell)
            except LimitsError:
                self._remove(setup)
                raise
        finally:
            self._restoring = False
        watcher = self._watcher(setup)
        if watcher is not None:
            # It may have rung `once` by now.
            self.watcher_changed(watcher)

    def _write(self, setup: Setup, shell: Shell) -> None:
        for name, text in setup.files.items():
            if name == "threshold":
                self._tell_the_gap(setup, shell, text)
            shell.write(f"{setup.path}/{name}", text)

    def _remove(self, setup: Setup) -> None:
        """Leave nothing half done."""
        if setup.made:
            self._shell(0).rmdir(setup.path)
        elif (watcher := self._watcher(setup)) is not None:
            self._house.registry.remove(watcher)

    def _watcher(self, setup: Setup) -> Watcher | None:
        with self._shell(0).at(setup.path) as node:
            return content.known(node.place, self._house) if node.place.resource is not None else None

    def _check_target(self, setup: Setup, shell: Shell) -> None:
        """Raises Gone, Absent where the target that it stands for is no more."""
        if setup.target is None:
            return
        path = setup.path.rpartition("/")[0] if setup.made else setup.path
        with shell.at(path) as node:
            if identity(node.place.target) != setup.target:
                raise Gone("what it was about has ended")

    def _tell_the_gap(self, setup: Setup, shell: Shell, text: str) -> None:
        """The line that says that crossings may have been missed, before those that are heard from now on."""
        with shell.at(setup.path) as node:
            watcher = content.need(node.place, self._house)
        condition = parse(text, watcher.resource.unit, watcher.resource.rate)
        if condition is not None:
            watcher.owner = setup.owner
            watcher.begin(condition)
            watcher.lost(None)

    def _lose(self, setup: Setup, error: LimitsError) -> None:
        self.lost.add(setup.path)
        self._store.drop(setup.key)
        log.warning("%s is lost: %s", ascii(setup.path), error)
        if "threshold" not in setup.files:
            return
        around = self._house.registry.surroundings
        path, _slash, name = setup.path.rpartition("/") if setup.made else (setup.path, "", None)
        record = Record(
            around.next_seq(), around.wall(), Crossing.GONE, path, name, threshold=setup.files["threshold"]
        )
        self._house.delivery.all.append(record.line().encode(), (setup.owner,))


def _read(key: str, value: Any) -> Setup | None:
    """None for what is left of a setup in a damaged file."""
    match value:
        case {"path": str(path), "target": target, "owner": int(owner), "made": bool(made), "files": dict(files)}:
            if all(isinstance(text, str) for text in files.values()):
                return Setup(path, target, owner, made, files)
    log.warning("what was kept of %s is damaged: dropped", ascii(key))
    return None


def _setup(watcher: Watcher, files: dict[str, str]) -> Setup:
    path = f"{watcher.path}/{watcher.name}" if watcher.name else watcher.path
    return Setup(path, identity(watcher.target), watcher.owner, watcher.name is not None, files)
