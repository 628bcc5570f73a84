"""Each partition by the best source that there is for it: what makes a source for one a source for each."""

import contextlib
import logging
from collections.abc import Callable

from limitfs.errors import Gone, LimitsError
from limitfs.hearing.partitions import Directories, PartitionMembers
from limitfs.hearing.source import Armed, Guarantee, Listener, Refused, Source, Want, Witness
from limitfs.resources.members import measured, total
from limitfs.resources.model import Partition, Target

log = logging.getLogger(__name__)

_SURETY = (Guarantee.EXACT, Guarantee.PEAK, Guarantee.SAMPLED)


class EachPartition:
    """Arms a source on every partition, present and future.

    Args:
        directories: where partitions are seen to come and go.
        others: best first, for a partition that the source refuses; the last hears everything.
    """

    def __init__(self, directories: Directories, *others: Source) -> None:
        self._directories = directories
        self._others = others

    def arm(self, source: Source, want: Want, listener: Listener) -> "Armed":
        """Begin.

        Raises:
            Refused: the source hears none of the partitions that there are; or their coming and going cannot be
                heard.
        """
        armed = EachArmed((source, *self._others), want, listener)
        try:
            self._start(armed)
            armed.refuse_if_unheard()
        except BaseException:
            armed.disarm()
            raise
        return armed

    def arm_rest(self, heard: Callable[[Partition], bool], want: Want, listener: Listener) -> "EachArmed":
        """Begin for the partitions that are not `heard` already, with the other sources alone.

        Raises:
            Refused: the coming and going of partitions cannot be heard.
        """
        armed = EachArmed(self._others, want, listener, heard)
        try:
            self._start(armed)
        except BaseException:
            armed.disarm()
            raise
        return armed

    def _start(self, armed: "EachArmed") -> None:
        members = PartitionMembers(self._directories, armed)
        armed.cleanup.callback(members.close)
        members.start()


class EachArmed:
    """A want at work: an armed source for every partition, save those that are `heard` in another way.

    Attributes:
        cleanup: what is to be undone in the end.
    """

    def __init__(
        self,
        sources: tuple[Source, ...],
        want: Want,
        listener: Listener,
        heard: Callable[[Partition], bool] = lambda _partition: False,
    ) -> None:
        self.cleanup = contextlib.ExitStack()
        self._sources = sources
        self._want = want
        self._listener = listener
        self._heard = heard
        self._armed: dict[Partition, Armed] = {}
        self._disarmed = False

    def __len__(self) -> int:
        """How many partitions it hears."""
        return len(self._armed)

    @property
    def source(self) -> str:
        """The names of all that are at work, best first."""
        there = {armed.source for armed in self._armed.values()}
        names = [source.name for source in self._sources if source.name in there]
        return ",".join(names or [self._sources[0].name])

    @property
    def guarantee(self) -> Guarantee:
        """Of the partition that is heard least surely."""
        there = [armed.guarantee for armed in self._armed.values()]
        return max(there or [self._sources[0].guarantee], key=_SURETY.index)

    @property
    def period(self) -> float | None:
        """The shortest, of those that are sampled."""
        return min((armed.period for armed in self._armed.values() if armed.period is not None), default=None)

    def disarm(self) -> None:
        """Disarm all of them."""
        self._disarmed = True
        self.cleanup.close()
        for partition in list(self._armed):
            self._disarm(partition)

    def refuse_if_unheard(self) -> None:
        """Raise Refused where the best source has none of the partitions that there are."""
        if self._armed and not any(armed.source == self._sources[0].name for armed in self._armed.values()):
            raise Refused(f"{self._sources[0].name} hears none of the partitions")

    # Partitions come and go

    def appeared(self, partition: Partition) -> None:
        """A partition is there."""
        if self._disarmed or self._heard(partition) or not measured(self._want.resource, partition):
            return
        with contextlib.suppress(Gone):
            self._arm(partition)

    def changed(self, partition: Partition) -> None:
        """Another of its numbers may be kept now, or heard in another way."""
        self._disarm(partition)
        self.appeared(partition)

    def removed(self, partition: Partition) -> None:
        """A partition is no more."""
        if partition in self._armed:
            self._disarm(partition)
            self._listener.gone(partition)

    def _disarm(self, partition: Partition) -> None:
        armed = self._armed.pop(partition, None)
        if armed is not None:
            armed.disarm()

    def _arm(self, partition: Partition) -> None:
        resource, target = self._want.resource, total(self._want.resource, partition)
        want = Want(resource, target, False, self._want.condition, lambda _target: self._want.levels(partition))
        listener = _One(self, self._listener, partition)
        for source in self._sources:
            if not source.hears(resource, target, False):
                continue
            try:
                armed = source.arm(want, listener)
            except Gone:
                raise
            except (Refused, LimitsError) as error:
                log.debug("%s declines %s of %s: %s", source.name, resource.name, partition, error)
                continue
            self._armed[partition] = armed
            break
        if self._disarmed:
            self._disarm(partition)  # the listener had enough of the first reading


class _One:
    """The listener of one partition; its target may be the processes in it."""

    def __init__(self, owner: EachArmed, listener: Listener, partition: Partition) -> None:
        self._owner = owner
        self._listener = listener
        self._partition = partition

    def witnessed(self, member: Target, witness: Witness) -> None:
        del member
        self._listener.witnessed(self._partition, witness)

    def reading(self, member: Target, value: float) -> None:
        del member
        self._listener.reading(self._partition, value)

    def gone(self, member: Target, peak: float | None = None) -> None:
        del member, peak
        self._owner.removed(self._partition)

    def missed(self, member: Target, alarms: int) -> None:
        del member
        self._listener.missed(self._partition, alarms)

    def lost(self, count: int) -> None:
        self._listener.lost(count)

    def lapsed(self) -> None:
        self._listener.lapsed()
