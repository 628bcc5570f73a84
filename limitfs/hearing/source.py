"""What every way of hearing looks like to the room that decides when it rings.

Arming: `watching` makes a `Want`, asks each source in order of surety whether it hears that, and arms the first
that does. Ringing: the source calls the `Listener` it was given. A source knows targets, resources and levels;
it knows nothing of paths, files or alarms.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from limitfs.resources.model import Process, Resource, Target
from limitfs.watching.condition import Condition


class Guarantee(enum.StrEnum):
    """How surely a crossing is heard; see docs/hearing.md."""

    EXACT = "exact"
    PEAK = "peak"
    SAMPLED = "sampled"


@dataclass(frozen=True, slots=True)
class Want:
    """What is to be heard.

    Attributes:
        resource: what is measured.
        target: on what; with `each`, a collection.
        each: True: every member of `target` separately, present and future; False: `target` as one total.
        condition: when it is of interest.
        levels: (level, clear) of the condition for one member, in the base unit; asked again whenever the
            member's limit may have changed. Raises as `Resource.limit`.
    """

    resource: Resource
    target: Target
    each: bool
    condition: Condition
    levels: Callable[[Target], tuple[float, float]]


class Witness(NamedTuple):
    """Who made a value, as the kernel saw it at that moment; that process may have ended since.

    `time_ns`: CLOCK_MONOTONIC. `uid`: the effective one.
    """

    time_ns: int
    tid: int
    comm: str
    uid: int


class Listener(Protocol):
    """Who is told. `member` is the target itself for a total, else the member."""

    def witnessed(self, member: Target, witness: Witness) -> None:
        """Who made the value of `member` that is told next, and when; only exact sources know."""

    def reading(self, member: Target, value: float) -> None:
        """The value of `member` now; where the source saw a peak that is over, it reports both in turn."""

    def gone(self, member: Target, peak: float | None = None) -> None:
        """`member` has ended; nothing more will be said of it.

        Args:
            member: who.
            peak: the highest value that it had since it was first in alarm; None: only what was told is known.
        """

    def missed(self, member: Target, alarms: int) -> None:
        """`member` entered alarm that many times of which no reading could be kept; they count all the same."""

    def lost(self, count: int) -> None:
        """`count` messages of the kernel were lost; fresh readings follow."""

    def lapsed(self) -> None:
        """Not all can be heard any more in this way: another source is to be armed instead."""


class Armed(Protocol):
    """A source at work for one Want."""

    @property
    def source(self) -> str:
        """The name of the source; of several, with commas between."""

    @property
    def guarantee(self) -> Guarantee:
        """What holds now; of several members, for the one that is heard least surely."""

    @property
    def period(self) -> float | None:
        """Seconds between samples; None where nothing is sampled."""

    def disarm(self) -> None:
        """Stop, and free everything in kernel and process; may be called twice."""


@runtime_checkable
class LooksAgain(Protocol):
    """A source at work that judges by itself, and can be told that what it judges by has changed."""

    def look_again(self, process: Process) -> None:
        """The limit of `process` has changed; raises Gone."""


class Refused(Exception):
    """This source cannot hear this after all (no capability, no memory, no such file); try the next."""


class Source(Protocol):
    """One way of hearing."""

    name: ClassVar[str]
    guarantee: ClassVar[Guarantee]
    cost: ClassVar[str]
    """What it costs, and whom, in a few words."""

    def missing(self) -> str | None:
        """None where it works here, found out by trying; else what is missing and what would bring it."""

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """Whether this is its business at all (for `features`)."""

    def arm(self, want: Want, listener: Listener) -> Armed:
        """Begin; reports a first reading of every member before it returns or soon after.

        Raises:
            Refused: see there.
            Gone: the target has ended.
        """
