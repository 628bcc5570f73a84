"""The lines behind an `event` file, and one reader's place in them.

Offsets are bytes since the log began, so that st_size only grows and `tail -f` can follow; what is older than
the last `RETAINED` lines is dropped. A reader that was overtaken is told how many lines it missed.
"""

from collections import deque
from collections.abc import Callable

RETAINED = 1024
"""Lines kept for a reader that comes later."""


class EventLog:
    """The retained lines of one event file.

    Attributes:
        start: offset of the oldest retained line.
        end: offset behind the newest.
        total: lines ever appended.
        closed: no line will come any more.
        waiters: called, and emptied, when a line comes or the log closes.
        mtime_ns: Unix time of the newest line.
    """

    __slots__ = ("_joined", "_lines", "closed", "end", "mtime_ns", "start", "total", "waiters")

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._joined: bytes | None = b""
        self.start = 0
        self.end = 0
        self.total = 0
        self.closed = False
        self.mtime_ns = 0
        self.waiters: dict[object, Callable[[], None]] = {}

    def append(self, line: bytes) -> None:
        """Add a line (with its newline) and wake who waits."""
        if len(self._lines) == RETAINED:
            self.start += len(self._lines.popleft())
        self._lines.append(line)
        self.end += len(line)
        self.total += 1
        self._joined = None
        self._wake()

    def close(self) -> None:
        """No more lines: waiters are woken to see the hang-up."""
        self.closed = True
        self._wake()

    def since(self, offset: int) -> bytes:
        """What is retained from `offset` on; all of it where `offset` is older than the oldest line."""
        if self._joined is None:
            self._joined = b"".join(self._lines)
        return self._joined if offset <= self.start else self._joined[offset - self.start :]

    def dropped_since(self, line: int) -> int:
        """How many lines from number `line` on (counted from 0) are no longer retained."""
        return max(0, self.total - len(self._lines) - line)

    def _wake(self) -> None:
        waiters, self.waiters = self.waiters, {}
        for call in waiters.values():
            call()


class Cursor:
    """One open file's place in a log.

    A read at offset 0 takes a snapshot; reading on gives the rest of it, then what came since, then end of file.

    Args:
        log: what is read.
        overtaken: makes the line that says how many lines were dropped unread.
    """

    __slots__ = ("_begun", "_chunk", "_chunk_at", "_next", "_overtaken", "_seen", "log")

    def __init__(self, log: EventLog, overtaken: Callable[[int], bytes]) -> None:
        self.log = log
        self._overtaken = overtaken
        self._chunk = b""
        self._chunk_at = 0
        self._next = log.end
        # Lines that came after this reader are owed to it, also before its first read.
        self._seen = log.total
        self._begun = False

    def rewind(self, offset: int) -> None:
        """Take a fresh snapshot that stands at file offset `offset`."""
        self._load(offset, self.log.start)

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at file offset `offset`; empty at the end."""
        if offset == 0:
            self.rewind(0)
        elif not self._begun or offset < self._chunk_at:
            self._load(offset, offset)
        behind = offset - self._chunk_at
        if behind >= len(self._chunk):
            self._load(offset, self._next)
            behind = 0
        return self._chunk[behind : behind + size]

    @property
    def ready(self) -> bool:
        """Whether a line came that this reader has not been given."""
        return self.log.end > self._next

    def _load(self, offset: int, position: int) -> None:
        """Hold what is retained from log offset `position`, at file offset `offset`."""
        missed = self.log.dropped_since(self._seen)
        notice = self._overtaken(missed) if missed else b""
        self._chunk = notice + self.log.since(position)
        self._chunk_at = offset
        self._next = self.log.end
        self._seen = self.log.total
        self._begun = True
