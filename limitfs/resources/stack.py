"""Stacks."""

import resource
from typing import ClassVar, NamedTuple

from limitfs.errors import Gone, Unsupported
from limitfs.resources import limits, procfs
from limitfs.resources.model import Level, Limit, Measured, Process, Resource, Thread, Unit
from limitfs.resources.recent import Recent


class _Place(NamedTuple):
    """The mapping that a thread's stack lies in, and the stack pointer when last seen."""

    start: int
    end: int
    pointer: int

    @property
    def used(self) -> int:
        return self.end - self.pointer


class Stack(Resource):
    """Stack, in bytes. Sums make no sense: each stack has a limit of its own.

    A process, and its first thread: the size to which the kernel has grown the stack (VmStk); it never shrinks.

    Any other thread: from its stack pointer to the end of the mapping that holds it. That includes what the C
    library keeps at the top (thread control block, thread-local variables), and too much where several stacks
    share one mapping because they have no guard pages of their own in between. The kernel tells the stack
    pointer of a waiting thread only: for a running one the answer is the last one known, and where there is
    none, `Unsupported`; see proc_pid_syscall(5). Kernel threads have no such stack: 0.
    """

    name = "stack"
    unit = Unit.BYTES
    levels = frozenset({Level.THREAD, Level.PROCESS})
    help = "stack in use; limit: RLIMIT_STACK"
    rlimit: ClassVar[int | None] = resource.RLIMIT_STACK
    summable = False

    def __init__(self) -> None:
        self._last: Recent[Thread, _Place] = Recent()

    def usage(self, target: Measured) -> float:
        match target:
            case Process():
                return procfs.reading(target, procfs.status).size(b"VmStk")
            case Thread(pid=pid, tid=tid) if pid == tid:
                size = procfs.status(pid, tid).size(b"VmStk")
                procfs.verify(target)
                return size
            case Thread():
                return self._place(target).used
        raise self.elsewhere(target)

    def limit(self, target: Measured) -> Limit:
        """A process and its first thread: RLIMIT_STACK. Any other thread: the mapping that its stack was given."""
        match target:
            case Process():
                return limits.enforced(self, target)
            case Thread(pid=pid, tid=tid) if pid == tid:
                return limits.enforced(self, Process(pid, target.start))
            case Thread():
                place = self._place(target)
                return Limit(place.end - place.start, place.end - place.start)
        raise self.elsewhere(target)

    def _place(self, target: Thread) -> _Place:
        try:
            pointer = procfs.stack_pointer(target.pid, target.tid)
            place = self._last.get(target) if pointer is None else self._find(target, pointer)
            procfs.verify(target)
        except Gone:
            self._last.drop(target)
            raise
        if place is None:
            raise Unsupported(
                f"thread {target.tid} is running, and the kernel tells the stack of a waiting one only",
                "try again",
            )
        self._last.put(target, place)
        return place

    def _find(self, target: Thread, pointer: int) -> _Place:
        """Where `pointer` lies; a stack stays in its mapping, so all mappings are gone through once only."""
        last = self._last.get(target)
        if last is not None and last.start <= pointer < last.end:
            return last._replace(pointer=pointer)
        found = procfs.mapping(target.pid, pointer) if pointer else None
        return _Place(*found, pointer) if found else _Place(pointer, pointer, pointer)
