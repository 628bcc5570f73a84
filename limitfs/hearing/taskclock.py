"""The CPU time of one thread of another process: perf's task clock.

POSIX CPU timers refuse threads of other processes. The software event task-clock counts the nanoseconds that a
thread runs, and wakes whoever polls each time `sample_period` of them have passed; it hangs up when the thread
ends. See perf_event_open(2). It costs the thread itself something at every context switch (28 % on a pipe
ping-pong), so it is used for threads only, and only where asked.
"""

import contextlib
import os
import select
import sys
from collections.abc import Callable
from typing import ClassVar

from limitfs.errors import Gone
from limitfs.hearing import syscalls
from limitfs.hearing.connector import Connector
from limitfs.hearing.edges import Edges
from limitfs.hearing.membership import ThreadMembers
from limitfs.hearing.meter import NAMES, Clock, Metered, refuse_unheard
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Guarantee, Listener, Refused, Want
from limitfs.resources import procfs
from limitfs.resources.model import Measured, Process, Resource, Target, Thread, Threads

Callback = Callable[[], None]

_NEVER = 1 << 62
"""Nanoseconds: a period that never ends."""

_SHORTEST = 100_000
"""Nanoseconds between two wake-ups: the event repeats until it is set anew, and must not flood us meanwhile."""


class TaskClock:
    """The CPU time of one thread, which can call back.

    Args:
        edges: where it is waited for.
        thread: whose.
        ring: called when it has run for as long as was set.
        ended: called when it has ended; its clock can still be read.

    Raises:
        Gone: it has ended.
        Refused: the kernel or its settings do not allow it (perf_event_paranoid, perf_event_mlock_kb).
    """

    def __init__(self, edges: Edges, thread: Thread, ring: Callback, ended: Callback) -> None:
        self._edges = edges
        self._thread = thread
        self._ring = ring
        self._ended = ended
        self._undo = contextlib.ExitStack()
        self.closed = False
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def now(self) -> float:
        """CPU seconds consumed; before it was opened, as the scheduler accounted them at its last tick."""
        return self._base + self._counted() / 1e9

    def ring_at(self, seconds: float) -> None:
        """Call back when it has consumed `seconds` in all, and again after as much as was missing then."""
        self._set_period(max(_SHORTEST, round((seconds - self.now()) * 1e9)))

    def rest(self) -> None:
        """Do not call back."""
        self._set_period(_NEVER)

    def close(self) -> None:
        """Free it; may be called twice."""
        self.closed = True
        self._undo.close()

    def _open(self) -> None:
        thread = self._thread
        try:
            self._fd = syscalls.perf_task_clock(thread.tid, _NEVER)
            self._undo.callback(os.close, self._fd)
            self._undo.callback(syscalls.perf_unmap, syscalls.perf_map(self._fd))
        except ProcessLookupError as error:
            raise Gone(f"thread {thread.tid} has ended") from error
        except OSError as error:
            raise Refused(f"perf_event_open: {error.strerror} (see kernel.perf_event_paranoid)") from error
        self._base = _ran(thread) - self._counted() / 1e9
        procfs.check(thread)
        self._edges.add(self._fd, self._heard, select.EPOLLIN)
        self._undo.callback(self._edges.remove, self._fd)

    def _counted(self) -> int:
        return int.from_bytes(os.read(self._fd, 8), sys.byteorder)

    def _set_period(self, nanoseconds: int) -> None:
        try:
            syscalls.perf_set_period(self._fd, nanoseconds)
        except OSError as error:
            raise Gone(f"thread {self._thread.tid} has ended") from error

    def _heard(self) -> None:
        poll = select.poll()
        poll.register(self._fd, 0)
        if not poll.poll(0) or self._reopen():  # a hang-up stays
            self._ring()
            return
        self._edges.remove(self._fd)
        self._ended()

    def _reopen(self) -> bool:
        """Whether the thread lives on: executing a set-user-ID program ends its events, but not itself."""
        before = self._fd, self._base, self._undo
        self._undo = contextlib.ExitStack()
        try:
            self._open()
        except (Gone, Refused):
            self._undo.close()
            self._fd, self._base, self._undo = before
            return False
        before[2].close()
        return True


def _ran(thread: Thread) -> float:
    seconds = procfs.runtime(thread.pid, thread.tid) / 1e9
    if seconds:
        return seconds
    now = procfs.verify(thread)  # a kernel without scheduler statistics
    return (now.utime + now.stime) / procfs.TICKS


class TaskClockSource:
    """Hears `cputime` and `cpu` of a thread, and of every thread of a process; bounds as CpuTimerSource."""

    name: ClassVar[str] = "task-clock"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[str] = "the thread's own context switches become slower"

    def __init__(self, reactor: Reactor, edges: Edges, connector: Connector) -> None:
        self._reactor = reactor
        self._edges = edges
        self._connector = connector

    def missing(self) -> str | None:
        """None where a task clock of our own first thread can be opened and mapped."""
        try:
            with contextlib.ExitStack() as undo:
                fd = syscalls.perf_task_clock(os.getpid(), _NEVER)
                undo.callback(os.close, fd)
                syscalls.perf_unmap(syscalls.perf_map(fd))
        except OSError as error:
            return f"perf_event_open: {error.strerror}; needs CAP_PERFMON or kernel.perf_event_paranoid <= 1"
        return None

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """`cpu` and `cputime`, of one thread or of each in a process."""
        if resource.name not in NAMES:
            return False
        return isinstance(target, Process | Threads) if each else isinstance(target, Thread)

    def arm(self, want: Want, listener: Listener) -> Metered:
        """Open the clocks.

        Raises:
            Refused: the condition is not one of growth, or the kernel allows no (more) events; for each thread
                also: births cannot be heard.
            Gone: the thread or process has ended.
        """
        refuse_unheard(want)
        metered: Metered

        def open_clock(member: Measured, ring: Callback) -> Clock:
            assert isinstance(member, Thread)
            return TaskClock(self._edges, member, ring, lambda: metered.ended(member))

        metered = Metered(self.name, self._reactor, want, listener, open_clock, parallel=1.0)
        return metered.begin(lambda armed: self._follow(want, armed))

    def _follow(self, want: Want, armed: Metered) -> Callback:
        match want.target:
            case Thread() as thread:
                armed.add(thread)
                return lambda: None
            case Process() as process:
                return self._follow_each(process, armed)
            case Threads(process=process):
                return self._follow_each(process, armed)
        raise Refused("a thread, or the threads of a process")

    def _follow_each(self, process: Process, armed: Metered) -> Callback:
        members = ThreadMembers(self._connector, process, armed)
        members.start()
        return members.close
