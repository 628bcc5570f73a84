"""From a record to its readers: event files, the root's `event`, inotify.

Every line goes to the log of its watcher and to the log of all; a user who is not root reads a log of all that
holds only what is his: watchers that he made, and members that run as him.
"""

from collections import Counter, deque
from collections.abc import Callable, Container

from limitfs.resources.model import Partitions, Process, Processes, System, Target, Thread, Threads
from limitfs.space.eventlog import RETAINED, EventLog
from limitfs.watching.crossing import Crossing, Record
from limitfs.watching.watcher import Surroundings, Watcher

ALL = "event"
"""The root's file, below the mount point."""


class Broadcast:
    """A log that root reads whole, and every other user as far as it is his; a user's log lives while read."""

    def __init__(self) -> None:
        self._all = EventLog()
        self._recent: deque[tuple[bytes, Container[int | None]]] = deque(maxlen=RETAINED)
        self._mine: dict[int, EventLog] = {}
        self._readers: Counter[int] = Counter()

    def append(self, line: bytes, users: Container[int | None]) -> None:
        """Add a line, for root and for these users."""
        self._all.append(line)
        self._recent.append((line, users))
        for user, mine in self._mine.items():
            if user in users:
                mine.append(line)

    def opened(self, user: int) -> EventLog:
        """One more open file reads what `user` may see."""
        self._readers[user] += 1
        if user == 0:
            return self._all
        if user not in self._mine:
            mine = self._mine[user] = EventLog()
            for line, users in self._recent:
                if user in users:
                    mine.append(line)
        return self._mine[user]

    def closed(self, user: int) -> None:
        """One reader less."""
        self._readers[user] -= 1
        if not self._readers[user]:
            del self._readers[user]
            self._mine.pop(user, None)

    def size(self, user: int) -> int:
        """st_size for that user."""
        log = self._all if user == 0 else self._mine.get(user)
        return log.end if log is not None else 0


class Delivery:
    """Keeps the logs.

    Attributes:
        all: behind the root's `event`.
        announce: has a file touched for inotify, and then something called.
    """

    def __init__(self, announce: Callable[[str, Callable[[], None] | None], None]) -> None:
        self.announce = announce
        self._logs: dict[Watcher, EventLog] = {}
        self._readers: Counter[Watcher] = Counter()
        self.all = Broadcast()
        self._lingering: Counter[Target] = Counter()

    # Writing

    def emit(self, watcher: Watcher, record: Record) -> None:
        """Hand a record to everybody who may see it."""
        line = record.line().encode()
        self.log(watcher).append(line)
        self.all.append(line, (watcher.owner, record.uid))
        if watcher.shared:
            self.announce(self._path(watcher), self._after_last(watcher, record))
        self.announce(ALL, None)

    def _after_last(self, watcher: Watcher, record: Record) -> Callable[[], None] | None:
        """The directory of a target that ended stays until inotify was told of the last line."""
        target = watcher.target
        if record.crossing is not Crossing.GONE or isinstance(target, System | Partitions | Processes):
            return None
        self._lingering[target] += 1
        return lambda: self._leave(target)

    def lingers(self, target: Target | None) -> bool:
        """Whether a target that has ended is still to be found, for its last line."""
        return target in self._lingering or any(_within(target, ended) for ended in self._lingering)

    def _leave(self, target: Target) -> None:
        self._lingering[target] -= 1
        if not self._lingering[target]:
            del self._lingering[target]

    @staticmethod
    def _path(watcher: Watcher) -> str:
        return f"{watcher.path}/{watcher.name}/event" if watcher.name else f"{watcher.path}/event"

    def ended(self, watcher: Watcher) -> None:
        """The watcher is gone; open files read what they had and see the hang-up."""
        log = self._logs.pop(watcher, None)
        if log is not None:
            log.close()

    # Reading

    def log(self, watcher: Watcher) -> EventLog:
        """The log of a watcher."""
        log = self._logs.get(watcher)
        if log is None:
            log = self._logs[watcher] = EventLog()
        return log

    def size(self, watcher: Watcher | None) -> int:
        """st_size of an event file, which only grows."""
        log = self._logs.get(watcher) if watcher is not None else None
        return log.end if log is not None else 0

    def opened(self, watcher: Watcher) -> EventLog:
        """One more open file reads that watcher."""
        self._readers[watcher] += 1
        return self.log(watcher)

    def closed(self, watcher: Watcher) -> bool:
        """One reader less; tells whether it was the last."""
        self._readers[watcher] -= 1
        if self._readers[watcher]:
            return False
        del self._readers[watcher]
        return True


def _within(target: Target | None, ended: Target) -> bool:
    """Whether `target`'s directory is on the way to that of `ended`."""
    if not isinstance(target, Process):
        return False
    return ended == Threads(target) or (isinstance(ended, Thread) and ended.pid == target.pid)


def overtaken(around: Surroundings, path: str) -> Callable[[int], bytes]:
    """Makes the line for a reader that was too slow: so many lines are no longer kept."""

    def notice(count: int) -> bytes:
        record = Record(around.next_seq(), around.wall(), Crossing.LOST, path, count=count)
        return record.line().encode()

    return notice
