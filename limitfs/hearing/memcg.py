"""Memory of a partition: the thresholds of the memory controller, version 1.

An eventfd is registered in cgroup.event_control, for a size; the kernel signals it when usage comes to that size,
and when it falls below again. It compares only after some hundred pages that one CPU charged or gave back, so a
short spike can pass between, and a slow growth can stop there: therefore the high-water mark
(memory.max_usage_in_bytes) is looked at with every signal, and now and then without. See
Documentation/admin-guide/cgroup-v1/memory.rst, "Thresholds".

Version 2 has nothing that wakes at a size of one's own choice (memory.events tells of its limits only): there the
high-water mark alone is looked at. Nor has version 1 for swap, which it counts only together with memory.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable
from typing import ClassVar

from limitfs.errors import Gone, LimitsError, Unsupported
from limitfs.hearing.eachpartition import EachPartition
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.sampling import Sampled
from limitfs.hearing.slowly import Slowly
from limitfs.hearing.source import Armed, Guarantee, Listener, Refused, Want
from limitfs.resources import cgroups
from limitfs.resources.memory import CONTROL, USAGE
from limitfs.resources.model import Partition, Partitions, Resource, Target
from limitfs.watching.condition import Condition, Op

log = logging.getLogger(__name__)

_PAGE = os.sysconf("SC_PAGESIZE")
_LARGEST = 1 << 62


class Thresholds:
    """Calls back when the memory of a partition comes to one of some sizes, or falls below it.

    Also when the partition was removed.

    Raises:
        Gone: it was removed before.
        Refused: it has no such thresholds.
    """

    def __init__(
        self, reactor: Reactor, partition: Partition, sizes: frozenset[int], callback: Callable[[], None]
    ) -> None:
        self._undo = contextlib.ExitStack()
        self._callback = callback
        try:
            # Closing it is what makes the kernel forget the thresholds.
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._undo.callback(os.close, self._fd)
            _register(partition, self._fd, sizes)
            reactor.add_reader(self._fd, self._signalled)
            self._undo.callback(reactor.remove_reader, self._fd)
        except (OSError, Unsupported) as error:
            self.close()
            cgroups.check(partition)
            raise Refused(f"cgroup.event_control of {partition.path!a}: {error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free them; may be called twice."""
        self._undo.close()

    def _signalled(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        self._callback()


def _register(partition: Partition, eventfd: int, sizes: frozenset[int]) -> None:
    control = cgroups.file(partition, CONTROL)
    usage = os.open(cgroups.file(partition, USAGE), os.O_RDONLY | os.O_CLOEXEC)
    try:
        for size in sizes:
            cgroups.write(partition, CONTROL, f"{eventfd} {usage} {size}")
    except FileNotFoundError as error:
        raise Unsupported(f"{control} is no more") from error
    finally:
        os.close(usage)


def _sizes(condition: Condition, level: float, clear: float) -> frozenset[int]:
    """The sizes, in bytes, at which the alarm begins and ends; usage is in whole pages."""
    begin = int(level) // _PAGE + 1 if condition.op is Op.GT else -(-int(level) // _PAGE)
    end = int(clear) // _PAGE + 1 if clear < level else begin
    return frozenset(pages * _PAGE for pages in (begin, end) if pages * _PAGE <= _LARGEST)


class Signalled:
    """The memory of one partition at work: looked at when the kernel signals, and seldom without.

    Raises as `Thresholds`, `Want.levels`.
    """

    def __init__(self, source: str, reactor: Reactor, slowly: Slowly, want: Want, listener: Listener) -> None:
        assert isinstance(want.target, Partition)
        self.source = source
        self._reactor = reactor
        self._slowly = slowly
        self._want = want
        self._partition = want.target
        self._thresholds: Thresholds | None = None
        self._disarmed = False
        self._sizes = _sizes(want.condition, *want.levels(want.target))
        _refuse_without_thresholds(want.target)
        self._slowly.call(self._register)
        try:
            # It asks for the levels at every look: where a limit has changed, the thresholds follow.
            want = dataclasses.replace(want, levels=self._levels)
            self._sampled = Sampled(source, reactor, want, listener, peaks=True)
        except BaseException:
            self._close()
            raise

    @property
    def guarantee(self) -> Guarantee:
        """What the high-water mark is good for."""
        return self._sampled.guarantee

    @property
    def period(self) -> float | None:
        """Between looks without a signal."""
        return self._sampled.period

    def disarm(self) -> None:
        """Stop, and have the kernel forget the thresholds."""
        self._sampled.disarm()
        self._close()

    def _close(self) -> None:
        self._disarmed = True
        if self._thresholds is not None:
            self._thresholds.close()

    def _register(self) -> None:
        """Have the kernel signal at the sizes as they are now."""
        if self._disarmed:
            return
        if self._thresholds is not None:
            self._thresholds.close()
        try:
            self._thresholds = Thresholds(
                self._reactor, self._partition, self._sizes, lambda: self._sampled.look_now()
            )
        except (Refused, LimitsError) as error:
            log.info("memory of %s is looked at only: %s", self._partition, error)

    def _levels(self, member: Target) -> tuple[float, float]:
        levels = self._want.levels(member)
        sizes = _sizes(self._want.condition, *levels)
        if sizes != self._sizes:
            self._sizes = sizes
            self._slowly.call(self._register)
        return levels


def _refuse_without_thresholds(partition: Partition) -> None:
    try:
        cgroups.file(partition, CONTROL)
    except Unsupported as error:
        raise Refused(str(error)) from error


class MemcgSource:
    """Hears `memory` of a partition, and of each, where version 1 keeps it."""

    name: ClassVar[str] = "memcg"
    guarantee: ClassVar[Guarantee] = Guarantee.PEAK
    cost: ClassVar[str] = "the kernel compares once in some hundred pages; the daemon reads every 0.1 to 5 s"

    def __init__(self, reactor: Reactor, each: EachPartition) -> None:
        self._reactor = reactor
        self._slowly = Slowly(reactor)
        self._each = each

    def missing(self) -> str | None:
        """None where a threshold can be registered for all processes."""
        try:
            Thresholds(self._reactor, cgroups.root(), frozenset({_LARGEST}), lambda: None).close()
        except (Gone, Refused) as error:
            return f"{error}; needs the memory controller of version 1"
        return None

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """`memory` of one partition or of each."""
        return resource.name == "memory" and isinstance(target, Partitions if each else Partition)

    def arm(self, want: Want, listener: Listener) -> Armed:
        """Register the thresholds.

        Raises:
            Refused: the condition is not one of growth, or the partition has no such thresholds.
            Gone: the partition was removed.
        """
        if not want.condition.upward:
            raise Refused("a high-water mark tells of high values only")
        if want.each:
            return self._each.arm(self, want, listener)
        return Signalled(self.name, self._reactor, self._slowly, want, listener)
