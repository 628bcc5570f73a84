"""Nodes: the part of the tree that the kernel knows at the moment.

A node is made when a name is first looked up and dropped when the kernel has forgotten it (FUSE lookup counts).
Its inode number is never used again. A process directory is bound to one (pid, start time): when the number
belongs to another process, the old node is cut off and a new one made.
"""

import contextlib
import stat
from collections.abc import Callable, Iterator
from itertools import count

from limitfs.errors import Absent, Exists, Forbidden, Gone, LimitsError
from limitfs.space import content
from limitfs.space.content import Place
from limitfs.space.house import House
from limitfs.space.table import ROOT, Dir, Entry, Family, Link

ROOT_INODE = 1


class Node:
    """One name that the kernel knows.

    Attributes:
        ino: inode number.
        parent: the directory it was found in; None for the root.
        name: in that directory.
        entry: what the table says of it.
        place: where it leads; of a file, where its directory does.
        family: the family that its name is of, or None for a fixed name.
        lookups: how often the kernel was told of it and has not forgotten.
        children: nodes below that the kernel knows.
        mtime_ns: last change of an event file.
        owner: uid, as last known.
    """

    __slots__ = ("children", "entry", "family", "ino", "lookups", "mtime_ns", "name", "owner", "parent", "place")

    def __init__(
        self, ino: int, parent: "Node | None", name: str, entry: Entry, place: Place, family: Family | None
    ) -> None:
        self.ino = ino
        self.parent = parent
        self.name = name
        self.entry = entry
        self.place = place
        self.family = family
        self.lookups = 0
        self.children: dict[str, Node] = {}
        self.mtime_ns = 0
        self.owner = 0

    @property
    def path(self) -> str:
        """Below the mount point."""
        return self.place.path if isinstance(self.entry, Dir) else self.place.at(self.name).path

    @property
    def lasting(self) -> bool:
        """Whether the name, once found, stays valid until its directory goes: the kernel may cache it."""
        return self.family is None or self.family.lasting

    @property
    def kind(self) -> int:
        """The file type bits of st_mode."""
        if isinstance(self.entry, Dir):
            return stat.S_IFDIR
        return stat.S_IFLNK if isinstance(self.entry, Link) else stat.S_IFREG


def _step(place: Place, entry: Entry) -> Place:
    """The place of a fixed name."""
    if not isinstance(entry, Dir):
        return place
    below = place.at(entry.name)
    return entry.step(below) if entry.step else below


class Tree:
    """Finds, makes and forgets nodes."""

    def __init__(self, house: House, now_ns: int) -> None:
        self.house = house
        self._numbers = count(ROOT_INODE + 1)
        self.root = Node(ROOT_INODE, None, "", ROOT, Place(), None)
        self.root.mtime_ns = self._born_ns = now_ns
        self._nodes: dict[int, Node] = {ROOT_INODE: self.root}

    def __len__(self) -> int:
        return len(self._nodes)

    def node(self, ino: int) -> Node:
        """The node with that number; the kernel asks only for what it was told. Raises Absent."""
        try:
            return self._nodes[ino]
        except KeyError:
            raise Absent(f"no inode {ino}") from None

    def lookup(self, parent: Node, name: str, user: int) -> Node:
        """The node of a name, for a user. Raises Absent."""
        child = parent.children.get(name)
        if child is not None and child.lasting:
            return child
        try:
            entry, place, family = self._bind(parent, name, user)
        except Absent:
            if child is not None and self.house.delivery.lingers(child.place.target):
                return child
            raise
        if child is not None and child.place == place:
            return child
        return self._add(parent, name, entry, place, family)

    def _add(self, parent: Node, name: str, entry: Entry, place: Place, family: Family | None) -> Node:
        node = Node(next(self._numbers), parent, name, entry, place, family)
        node.mtime_ns = self._born_ns
        self._nodes[node.ino] = node
        parent.children[name] = node
        return node

    def _bind(self, parent: Node, name: str, user: int) -> tuple[Entry, Place, Family | None]:
        directory = parent.entry
        if not isinstance(directory, Dir):
            raise Absent(f"{parent.path} is no directory")
        for entry in directory.entries:
            if entry.name == name and (entry.present is None or entry.present(parent.place)):
                return entry, _step(parent.place, entry), None
        for family in directory.families:
            try:
                return family.below or directory, family.bind(parent.place, self.house, user, name), family
            except Absent:
                continue
        raise Absent(f"no {name!a} in {parent.place.path or 'the root'}")

    def names(self, node: Node, user: int) -> Iterator[str]:
        """Every name in a directory."""
        directory = node.entry
        assert isinstance(directory, Dir)
        for entry in directory.entries:
            if entry.present is None or entry.present(node.place):
                yield entry.name
        for family in directory.families:
            yield from family.names(node.place, self.house, user)

    def forget(self, ino: int, lookups: int) -> None:
        """The kernel has dropped that many of its references."""
        node = self._nodes.get(ino)
        if node is None or node is self.root:
            return
        node.lookups -= lookups
        self.prune(node)

    def cut(self, node: Node) -> None:
        """The name is no more; the kernel may forget the node later."""
        if node.parent is not None and node.parent.children.get(node.name) is node:
            del node.parent.children[node.name]

    def prune(self, node: Node) -> None:
        """Drop a node that neither the kernel nor a node below needs, and then perhaps its parent."""
        while node.lookups <= 0 and not node.children and node is not self.root:
            self._nodes.pop(node.ino, None)
            parent = node.parent
            assert parent is not None
            self.cut(node)
            node = parent

    def known(self, path: str) -> Node | None:
        """The node at `path`, if the kernel knows it."""
        node: Node | None = self.root
        for name in path.split("/"):
            node = node.children.get(name) if node is not None else None
        return node

    def maker(self, parent: Node) -> Callable[[Place, House, int, str], None]:
        """What mkdir in `parent` does. Raises Forbidden."""
        directory = parent.entry
        families = directory.families if isinstance(directory, Dir) else ()
        made = next((family.make for family in families if family.make is not None), None)
        if made is None:
            raise Forbidden("no directory can be made here", "mkdir in a resource's directory makes a watcher")
        return made

    def make(self, parent: Node, name: str, user: int) -> None:
        """mkdir(2) by a user who may. Raises LimitsError."""
        make = self.maker(parent)
        if self._taken(parent, name, user):
            raise Exists(f"{name!a} is here already")
        make(parent.place, self.house, user, name)

    def _taken(self, parent: Node, name: str, user: int) -> bool:
        try:
            self.lookup(parent, name, user)
        except LimitsError:
            return False
        return True

    def remove(self, parent: Node, name: str, user: int) -> Node:
        """rmdir(2); gives the node, of which the kernel may know still. Raises LimitsError."""
        child = self.lookup(parent, name, user)
        if child.family is None or child.family.remove is None:
            raise Forbidden("this directory is fixed", "rmdir removes named watchers")
        child.family.remove(parent.place, self.house, user, name)
        self.cut(child)
        return child

    def owner(self, node: Node) -> int:
        """The uid of a node; of one whose target has ended, the last that was known."""
        with contextlib.suppress(Gone):
            node.owner = content.owner(node.place, self.house)
        return node.owner
