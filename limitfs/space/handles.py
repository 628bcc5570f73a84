"""Open files: what a read, a write and a poll on one of them do.

Every write(2) is one whole command and its offset is ignored. A read at offset 0 makes the answer anew; after a
write the next read starts the answer from its beginning, wherever the file position is.
"""

import os
import select
from collections.abc import Callable
from typing import Protocol

from limitfs.errors import Busy, Gone, Impossible, Invalid, LimitsError, TooBig, Unsupported
from limitfs.hearing.psi import PsiTrigger
from limitfs.hearing.source import Refused
from limitfs.space import content
from limitfs.space.births import BirthLog
from limitfs.space.delivery import Broadcast, overtaken
from limitfs.space.eventlog import Cursor, EventLog
from limitfs.space.house import House
from limitfs.space.table import Event, File
from limitfs.space.tree import Node
from limitfs.watching.condition import parse, parse_psi
from limitfs.watching.crossing import Crossing, Record
from limitfs.watching.watcher import PRIVATE, Watcher

LONGEST_WRITE = 4096
"""Bytes of one command."""

ALWAYS = select.POLLIN | select.POLLOUT


class Waker(Protocol):
    """What the kernel gives with a poll, to be told when to ask again."""

    def notify(self) -> None:
        """Wake the pollers."""


def command(data: bytes) -> str:
    """The text of one write: outer space and one NUL or newline dropped.

    Raises:
        TooBig: over 4,096 bytes.
        Invalid: not UTF-8.
    """
    if len(data) > LONGEST_WRITE:
        raise TooBig(f"{len(data)} bytes in one write", f"at most {LONGEST_WRITE}")
    try:
        return data.removesuffix(b"\0").decode().strip()
    except UnicodeDecodeError:
        raise Invalid("not UTF-8 text") from None


class TextFile:
    """An open file whose text is made when it is read."""

    def __init__(self, node: Node, house: House, user: int) -> None:
        assert isinstance(node.entry, File)
        self._file = node.entry
        self._place = node.place
        self._house = house
        self._user = user
        self._text: bytes | None = None
        self._at = 0

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes of the answer. Raises as its reader."""
        if offset == 0 or self._text is None:
            assert self._file.read is not None
            self._text = os.fsencode(self._file.read(self._place, self._house, self._user))
            self._at = offset
        behind = offset - self._at
        return self._text[behind : behind + size] if behind >= 0 else b""

    def write(self, data: bytes) -> content.Slow | None:
        """One command, and what is left of it. Raises as its writer."""
        assert self._file.write is not None
        self._text = None
        return self._file.write(self._place, self._house, self._user, command(data))

    def poll(self, waker: Waker | None) -> int:
        """Always ready, as a regular file."""
        del waker
        return ALWAYS

    def close(self) -> None:
        """Nothing is held."""


class EventFile:
    """An open file of lines. Subclasses say where the lines come from, and what ends with the file."""

    def __init__(self, log: EventLog, house: House, path: str) -> None:
        self._house = house
        self._path = path
        self._cursor = self._beginning(log)
        self._written = False

    def _beginning(self, log: EventLog) -> Cursor:
        return Cursor(log, overtaken(self._house.registry.surroundings, self._path))

    def _follow(self, log: EventLog) -> None:
        """Read another log from now on; who polls already is woken, to wait there."""
        wake = self._cursor.log.waiters.pop(self, None)
        self._cursor = self._beginning(log)
        if wake is not None:
            wake()

    def read(self, offset: int, size: int) -> bytes:
        """Lines; never waits."""
        if self._written:
            self._written = False
            self._cursor.rewind(offset)
        return self._cursor.read(offset, size)

    def write(self, data: bytes) -> None:
        """Only a watcher's event file takes writes."""
        del data
        raise Unsupported("this file takes no condition")

    def poll(self, waker: Waker | None) -> int:
        """POLLIN|POLLPRI when there is a line that was not read, POLLHUP when none will come any more."""
        log = self._cursor.log
        if log.closed:
            return select.POLLHUP | (select.POLLIN | select.POLLPRI if self._cursor.ready else 0)
        if self._cursor.ready:
            return select.POLLIN | select.POLLPRI
        if waker is not None:
            # Only the newest handle counts; the kernel wakes all pollers of this open file by it.
            log.waiters[self] = waker.notify
        return 0

    def close(self) -> None:
        """The waiting poll, if any, is forgotten."""
        self._cursor.log.waiters.pop(self, None)


class SharedEvents(EventFile):
    """The root's `event`, or `births`: one log for all who read, each as far as he may."""

    def __init__(self, source: Broadcast | BirthLog, house: House, path: str, user: int) -> None:
        self._source = source
        self._user = user
        super().__init__(source.opened(user), house, path)

    def close(self) -> None:
        """One reader less."""
        super().close()
        self._source.closed(self._user)


class WatcherEvents(EventFile):
    """`event` of a resource or of a named watcher; written to, it gets a watcher of its own."""

    def __init__(self, node: Node, house: House, user: int) -> None:
        self._place = node.place
        self._user = user
        self._watcher = content.need(node.place, house)
        house.registry.follow(self._watcher)
        self._own: Watcher | None = None
        self._trigger: PsiTrigger | None = None
        self._fired = False
        self._shared = house.delivery.opened(self._watcher)
        super().__init__(self._shared, house, node.place.path)

    def write(self, data: bytes) -> None:
        """A condition for this open file alone; on a pressure also the PSI form.

        Raises:
            Busy: it has one already.
            LimitsError: as writing to `threshold`.
        """
        if self._own is not None:
            raise Busy("this open file has its watcher already", "open the file again for another")
        text = command(data)
        target, resource = self._place.subject
        psi = parse_psi(text) if hasattr(resource, "path") else None
        own = self._house.registry.make_private(target, resource, self._place.path, self._user)
        try:
            self._own = own
            self._follow(self._house.delivery.opened(own))
            if psi is None:
                self._arm(own, text)
            else:
                self._arm_trigger(own, *psi)
        except LimitsError:
            self._own = None
            self._drop(own)
            self._follow(self._shared)
            raise
        self._written = True

    def _arm(self, own: Watcher, text: str) -> None:
        condition = parse(text, own.resource.unit, own.resource.rate)
        if condition is None:
            raise Invalid("a private watcher cannot be off", "close the file instead")
        shared = content.find(self._place, self._house)
        own.each = shared.each if shared is not None else own.each
        self._house.registry.set_condition(own, condition, self._user)

    def _arm_trigger(self, own: Watcher, kind: str, stall: int, window: int) -> None:
        path = own.resource.path  # type: ignore[attr-defined]
        self._told = f"{kind} {stall} {window}"
        try:
            self._trigger = PsiTrigger(self._house.hearing.edges, path, kind, stall, window, self._fire)
        except Refused as refusal:
            raise Impossible(str(refusal)) from None

    def _fire(self) -> None:
        """The kernel's trigger fired: a line, and one wake-up, as /proc/pressure gives it."""
        assert self._own is not None
        around = self._house.registry.surroundings
        value = self._own.resource.usage(self._own.target)  # type: ignore[arg-type]
        self._own.alarms += 1
        self._fired = True
        record = Record(
            around.next_seq(),
            around.wall(),
            Crossing.ALARM,
            self._path,
            PRIVATE,
            value,
            self._own.resource.unit,
            self._told,
            source="psi",
            guarantee="exact",
        )
        self._house.delivery.emit(self._own, record)

    def poll(self, waker: Waker | None) -> int:
        """As `EventFile.poll`; with a PSI trigger, POLLPRI once for each time it fired, read or not."""
        if self._trigger is None:
            return super().poll(waker)
        if self._fired:
            self._fired = False
            return select.POLLPRI
        if waker is not None:
            self._cursor.log.waiters[self] = waker.notify
        return 0

    def close(self) -> None:
        """A private watcher ends with its file; a watcher that was never armed with its last reader."""
        super().close()
        if self._trigger is not None:
            self._trigger.close()
        if self._own is not None:
            self._drop(self._own)
        if self._house.delivery.closed(self._watcher):
            self._house.registry.drop_unused(self._watcher)

    def _drop(self, own: Watcher) -> None:
        self._house.delivery.closed(own)
        self._house.registry.remove(own)


OpenFile = TextFile | EventFile
Opener = Callable[[Node, House, int], OpenFile]


def open_file(node: Node, house: House, user: int) -> OpenFile:
    """Open a node for a user, whose right to do so was checked.

    Raises:
        Gone: the target has ended.
        Unsupported: this kernel has not what it takes.
    """
    if isinstance(node.entry, File):
        return TextFile(node, house, user)
    if not isinstance(node.entry, Event):
        raise Gone(f"{node.place.path} is no file")
    if node.entry.kind == "watcher":
        return WatcherEvents(node, house, user)
    shared = house.delivery.all if node.entry.kind == "all" else house.births
    return SharedEvents(shared, house, node.path, user)
