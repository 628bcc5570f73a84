"""A user's commands, made by the daemon itself: what a shell would do in the tree, by the same code.

The daemon's own mount is never used for it: that would wait for the daemon.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator

from limitfs.errors import Absent, Denied, Forbidden, Invalid, LimitsError, Unsupported
from limitfs.space.handles import TextFile
from limitfs.space.table import Dir, File
from limitfs.space.tree import Node, Tree

log = logging.getLogger(__name__)


class Shell:
    """Writes, reads, mkdir and rmdir of one user, whose right to do so was checked, or who is root.

    Args:
        tree: what paths lead through; a path begins below the mount point.
        user: whose quota counts, and whose `last_error` tells of refusals.
        removed: is given a node that is no more, of which the kernel may know still.
    """

    def __init__(self, tree: Tree, user: int = 0, removed: Callable[[Node], None] = lambda _node: None) -> None:
        self._tree = tree
        self._user = user
        self._removed = removed

    @contextlib.contextmanager
    def at(self, path: str) -> Iterator[Node]:
        """The node of a path. Raises Absent."""
        node = self._tree.root
        try:
            for name in filter(None, path.split("/")):
                node = self._tree.lookup(node, name, self._user)
            yield node
        finally:
            # Unless the kernel knows of it, nobody needs it any more.
            self._tree.prune(node)

    def write(self, path: str, text: str) -> None:
        """`echo text > path`. Raises LimitsError."""
        with self.explained(path, text), self.at(path) as node:
            if _file(node).write is None:
                raise Denied("this file cannot be written")
            slow = TextFile(node, self._tree.house, self._user).write(text.encode())
            if slow is not None:
                # A rule, or what was set before a crash: root's own. Nobody is served until it is done.
                slow.call()
                slow.then()

    def read(self, path: str) -> str:
        """`cat path`, without space around it. Raises LimitsError."""
        with self.at(path) as node:
            file = _file(node)
            return file.read(node.place, self._tree.house, self._user).strip() if file.read else ""

    def mkdir(self, path: str) -> None:
        """`mkdir path`. Raises LimitsError."""
        parent, _slash, name = path.rpartition("/")
        with self.explained(path), self.at(parent) as node:
            self._tree.make(node, name, self._user)

    def missing(self, path: str) -> list[str]:
        """Which directories on the way to `path` mkdir could make, in that order. Raises Absent."""
        names = path.split("/")[:-1]
        for depth in range(1, len(names) + 1):
            try:
                with self.at("/".join(names[:depth])):
                    continue
            except Absent as absent:
                if not self._makes("/".join(names[: depth - 1])):
                    raise absent from None
                return ["/".join(names[:deep]) for deep in range(depth, len(names) + 1)]
        return []

    def _makes(self, path: str) -> bool:
        with self.at(path) as node, contextlib.suppress(Forbidden):
            self._tree.maker(node)
            return True
        return False

    def rmdir(self, path: str) -> None:
        """`rmdir path`. Raises LimitsError."""
        parent, _slash, name = path.rpartition("/")
        with self.explained(path), self.at(parent) as node:
            self._removed(self._tree.remove(node, name, self._user))

    @contextlib.contextmanager
    def explained(self, path: str, written: str | None = None) -> Iterator[None]:
        """Note in `last_error` why it was refused; what fails for no reason of the user's is a refusal too."""
        try:
            yield
        except LimitsError as error:
            self._tree.house.last_errors.refused(self._user, path, written, error)
            raise
        except Exception as error:
            log.exception("%a failed", path)
            raise LimitsError(f"it failed: {type(error).__name__}", "the log tells more") from error


def _file(node: Node) -> File:
    if isinstance(node.entry, Dir):
        raise Invalid("this is a directory", "name a file in it, such as threshold")
    if not isinstance(node.entry, File):
        raise Unsupported("a condition written here lives as long as the open file", "write to `threshold`")
    return node.entry
