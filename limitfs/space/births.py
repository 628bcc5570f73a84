"""The file `births`: a line for every fork, exec and exit, recorded while somebody has it open."""

import os
from collections.abc import Callable

from limitfs.errors import Unsupported
from limitfs.hearing.births import Birth
from limitfs.hearing.source import Refused
from limitfs.space.delivery import Broadcast
from limitfs.space.eventlog import EventLog
from limitfs.space.poke import Announce
from limitfs.watching.crossing import iso, number, quoted
from limitfs.watching.watcher import Surroundings

Record = Callable[[Callable[[Birth], None]], Callable[[], None]]

PATH = "births"
"""Below the mount point."""


class BirthLog:
    """Listens to the kernel's record of processes while there is a reader.

    Args:
        record: begins to call back, and returns what ends that; raises Refused.
        around: numbers and times the lines.
        announce: tells inotify.
    """

    def __init__(self, record: Record, around: Surroundings, announce: Announce) -> None:
        self._record = record
        self._around = around
        self._announce = announce
        self._lines = Broadcast()
        self._end: Callable[[], None] | None = None
        self._open = 0

    def opened(self, user: int) -> EventLog:
        """One more open file; the first begins the record.

        Raises:
            Unsupported: nothing here tells of processes.
        """
        if self._end is None:
            try:
                self._end = self._record(self._hear)
            except Refused as refusal:
                raise Unsupported(f"no record of processes: {refusal}") from None
        self._open += 1
        return self._lines.opened(user)

    def closed(self, user: int) -> None:
        """One open file less; the last ends the record."""
        self._lines.closed(user)
        self._open -= 1
        if self._open == 0 and self._end is not None:
            self._end()
            self._end = None

    def size(self, user: int) -> int:
        """st_size for a user."""
        return self._lines.size(user)

    def _hear(self, birth: Birth) -> None:
        self._lines.append(self._line(birth), _Everybody() if birth.kind == "lost" else (birth.uid,))
        self._announce(PATH, None)

    def _line(self, birth: Birth) -> bytes:
        around = self._around
        code = None if birth.status is None else os.waitstatus_to_exitcode(birth.status)
        # The kernel's clock is monotonic; the line tells the time of day at which it happened.
        happened = around.wall() - (around.now() - birth.time_ns / 1e9)
        pairs = (
            ("seq", str(around.next_seq())),
            ("time", iso(happened)),
            ("birth", birth.kind),
            ("pid", number(birth.pid)),
            ("ppid", number(birth.ppid)),
            ("comm", quoted(birth.comm)),
            ("uid", number(birth.uid)),
            ("status", number(code if code is not None and code >= 0 else None)),
            ("signal", number(-code if code is not None and code < 0 else None)),
            ("peak", number(birth.peak)),
        )
        return (" ".join(f"{key}={value}" for key, value in pairs) + "\n").encode()


class _Everybody:
    def __contains__(self, _user: object) -> bool:
        return True
