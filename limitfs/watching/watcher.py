"""One watcher: a condition on a target, the alarm of each member, and the records that come of it.

A watcher is told values (`reading`, `gone`, `lost`: the `Listener` of limitfs/hearing/source.py) and emits
`Record`s. It reads nothing itself: clocks, limits and the description of a member are given to it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from limitfs.errors import LimitsError
from limitfs.hearing.source import Armed, Guarantee, Want, Witness
from limitfs.resources.members import collection, total
from limitfs.resources.model import Group, Process, Processes, Resource, Target
from limitfs.resources.who import Who
from limitfs.watching.alarm import Alarm, State
from limitfs.watching.condition import Condition, render
from limitfs.watching.crossing import Crossing, Record

PRIVATE = "(private)"
"""The name, in lines, of a watcher that belongs to one open file; no directory can be called that."""
TOP_MEMBERS = 64
"""As many members in alarm are listed in `state`; the rest is a count."""


@dataclass(slots=True)
class Surroundings:
    """What a watcher needs of the world; one for all.

    Attributes:
        now: monotonic seconds.
        wall: Unix time in seconds.
        describe: who a member is; never raises.
        whole: what 100 % of a resource is for a member, in the base unit; raises Gone.
        call_at: have a function called at a monotonic time; returns a function that cancels it.
    """

    now: Callable[[], float]
    wall: Callable[[], float]
    describe: Callable[[Target], Who]
    whole: Callable[[Resource, Target], float]
    call_at: Callable[[float, Callable[[], None]], Callable[[], None]]
    sequence: int = 0

    def next_seq(self) -> int:
        """Number a record; the numbers of one mount are unique and rise."""
        self.sequence += 1
        return self.sequence


Emit = Callable[["Watcher", Record], None]


@dataclass(slots=True, eq=False)
class Watcher:
    """A threshold on one path.

    Attributes:
        path: of the resource directory, below the mount point.
        name: of a named watcher, "(private)", or None for the resource's own.
        owner: uid of who made it; counts against that user's quota.
        each: every member separately, else the total.
        hearing: "auto", or "sampled" where the user declines hooks.
        alarms: entries into alarm since it was armed, at `begun`.
        lost: for how many of them no line exists.
        heard: what sources are asked about: the collection of its members, or what its total is measured on.
    """

    target: Target
    resource: Resource
    path: str
    name: str | None
    owner: int
    each: bool
    surroundings: Surroundings
    emit: Emit
    hearing: str = "auto"
    condition: Condition | None = None
    armed: Armed | None = None
    alarms: int = 0
    lost_lines: int = 0
    since: float | None = None
    begun: float | None = None
    value: float | None = None
    finished: Callable[["Watcher"], None] = lambda _watcher: None
    """Called when a `once` condition has rung, or the target has ended (`ended` tells which)."""
    unheard: Callable[["Watcher"], None] = lambda _watcher: None
    """Called when its source cannot hear all of it any more."""
    ended: bool = False
    heard: Target | None = None
    _members: dict[Target, Alarm] = field(default_factory=dict)
    _known: dict[Target, Who] = field(default_factory=dict)
    _cancel_deadline: dict[Target, Callable[[], None]] = field(default_factory=dict)
    _early: list[tuple[Target, float]] = field(default_factory=list)
    _unfollow: Callable[[], None] | None = None
    _witness: Witness | None = None

    def begin(self, condition: Condition) -> None:
        """Start afresh with `condition`: all members clear, counters at zero. Raises Gone."""
        self.end()
        self.heard = collection(self.target) if self.each else total(self.resource, self.target)
        self.condition = condition
        if (group := _group(self.heard)) is not None:
            # Whoever hears it, its members are known without a search among all processes.
            self._unfollow = group.follow(_nothing, _nothing)
        # The last line names it, when nobody can be asked any more.
        self._known[self.target] = self.surroundings.describe(self.target)
        self.alarms = self.lost_lines = 0
        self.since = self.begun = self.surroundings.wall()

    def attach(self, armed: Armed) -> None:
        """`armed` hears for this watcher from now on; what it said while it was being armed is taken in."""
        self.armed = armed
        early, self._early = self._early, []
        for member, value in early:
            self.reading(member, value)

    def detach(self) -> None:
        """Stop the source; another can be attached, and the alarms of members go on."""
        if self.armed is not None:
            armed, self.armed = self.armed, None
            armed.disarm()

    def end(self) -> None:
        """Disarm: the source is stopped and members are forgotten; counters stay readable."""
        self.detach()
        if self._unfollow is not None:
            self._unfollow()
            self._unfollow = None
        self.condition = None
        for cancel in self._cancel_deadline.values():
            cancel()
        self._cancel_deadline.clear()
        self._members.clear()
        self._known.clear()
        self._early.clear()
        self.value = None

    def want(self) -> Want:
        """What a source is to hear for this watcher."""
        assert self.condition is not None
        assert self.heard is not None
        return Want(self.resource, self.heard, self.each, self.condition, self.levels)

    def levels(self, member: Target) -> tuple[float, float]:
        """(level, clear) for one member, from its limit as it is now where the condition is in percent of it."""
        return self._levels(member)

    @property
    def guarantee(self) -> Guarantee | None:
        """How surely a crossing is heard now: the weaker of how values are, and how members. None: not armed."""
        if self.armed is None:
            return None
        group = _group(self.heard)
        return Guarantee.SAMPLED if group is not None and group.behind else self.armed.guarantee

    @property
    def period(self) -> float | None:
        """Seconds between two looks, at values or at who is a member, the longer; None where all is told."""
        group = _group(self.heard)
        periods = [self.armed.period if self.armed else None, group.period if self.armed and group else None]
        return max((period for period in periods if period is not None), default=None)

    @property
    def shared(self) -> bool:
        """Whether it stands at a path that others can watch; a private one belongs to an open file."""
        return self.name != PRIVATE

    @property
    def state(self) -> State:
        """OFF, or ALARM while any member is in alarm, else CLEAR."""
        if self.condition is None:
            return State.OFF
        alarmed = any(alarm.state is State.ALARM for alarm in self._members.values())
        return State.ALARM if alarmed else State.CLEAR

    def in_alarm(self) -> list[tuple[Target, float]]:
        """The members in alarm with their values, the most extreme first."""
        upward = self.condition is None or self.condition.upward
        found = [(m, a.value or 0.0) for m, a in self._members.items() if a.state is State.ALARM]
        return sorted(found, key=lambda pair: pair[1], reverse=upward)

    # The Listener

    def witnessed(self, member: Target, witness: Witness) -> None:
        """Keep who made the value that is told next."""
        del member
        self._witness = witness

    def reading(self, member: Target, value: float) -> None:
        """Take in a value of `member`; emits a record where that makes a crossing.

        Raises:
            LimitsError: the member, or its limit, is no more; only to a source that gave a witness.
        """
        if self.condition is None:
            return
        if self.armed is None:
            self._early.append((member, value))
            return
        alarm = self._members.get(member)
        if alarm is None:
            alarm = self._members[member] = Alarm(self.condition)
        if not self.each:
            self.value = value
        try:
            level, clear = self._levels(member)
        except LimitsError:
            # It ended just now, or has no limit to take a percentage of. Who judged in the kernel counts it.
            witness, self._witness = self._witness, None
            if witness is not None:
                raise
            return
        crossing = alarm.update(self.surroundings.now(), value, level, clear)
        self._follow_deadline(member, alarm)
        if crossing is not None:
            self._ring(crossing, member, value)
        self._witness = None

    def gone(self, member: Target, peak: float | None = None) -> None:
        """`member` has ended; said where it is the target itself or was in alarm, then with its peak."""
        alarm = self._members.pop(member, None)
        self._drop_deadline(member)
        known = self._known.pop(member, None)
        if self.ended or self.condition is None:
            return
        ended = member in (self.target, self.heard)
        alarmed = alarm is not None and alarm.state is State.ALARM
        if not ended and not alarmed:
            return
        last = alarm.value if alarm is not None else None
        self._emit(Crossing.GONE, member, peak if alarmed and peak is not None else last, known)
        if ended:
            self.ended = True
            self.finished(self)

    def lost(self, count: int | None) -> None:
        """The source missed `count` messages (None: nobody knows); a line says so and readings follow."""
        if self.condition is not None:
            self._emit(Crossing.LOST, self.target, None, None, count=count)

    def lapsed(self) -> None:
        """The source cannot hear all of it any more: have another one attached."""
        if self.armed is not None:
            self.unheard(self)

    def missed(self, member: Target, alarms: int) -> None:
        """`member` entered alarm `alarms` times of which no reading will come; they are counted."""
        del member
        self.alarms += alarms
        self.lost_lines += alarms

    # Inside

    def _levels(self, member: Target) -> tuple[float, float]:
        assert self.condition is not None
        percent = any(a is not None and a.percent for a in (self.condition.amount, self.condition.clear))
        limit = self.surroundings.whole(self.resource, member) if percent else math.inf
        return self.condition.levels(limit)

    def _ring(self, crossing: Crossing, member: Target, value: float) -> None:
        self.since = self._time()
        if crossing is Crossing.ALARM:
            self.alarms += 1
        self._emit(crossing, member, value, None)
        if crossing is Crossing.ALARM and self.condition is not None and self.condition.once:
            self.finished(self)

    def _emit(
        self, crossing: Crossing, member: Target, value: float | None, who: Who | None, count: int | None = None
    ) -> None:
        who = who or self._describe(member)
        if crossing is Crossing.ALARM:
            # A member that ends in alarm is named in its last line, when /proc knows it no more.
            self._known[member] = who
        self.emit(self, self._record(crossing, value, who, count))

    def _describe(self, member: Target) -> Who:
        """Who `member` is; where it has ended already, by the kernel's witness."""
        who, witness = self.surroundings.describe(member), self._witness
        if who.comm is None and who.pid is not None and witness is not None:
            return replace(who, comm=witness.comm, uid=witness.uid)
        return who

    def _time(self) -> float:
        """When it happened, by the kernel's word if there is one, in Unix seconds."""
        around = self.surroundings
        if self._witness is None:
            return around.wall()
        return around.wall() - (around.now() - self._witness.time_ns / 1e9)

    def _record(self, crossing: Crossing, value: float | None, who: Who, count: int | None) -> Record:
        around = self.surroundings
        return Record(
            seq=around.next_seq(),
            time=self._time(),
            crossing=crossing,
            path=self.path,
            watcher=self.name,
            value=value,
            unit=self.resource.unit,
            threshold=render(self.condition, self.resource.unit),
            pid=who.pid,
            tid=who.tid,
            comm=who.comm,
            uid=who.uid,
            partition=who.partition,
            source=self.armed.source if self.armed else None,
            guarantee=str(self.guarantee) if self.armed else None,
            count=count,
        )

    def _follow_deadline(self, member: Target, alarm: Alarm) -> None:
        """Have a pending `for` looked at when it is over, though nothing changes."""
        if alarm.deadline is None:
            self._drop_deadline(member)
        elif member not in self._cancel_deadline:
            self._cancel_deadline[member] = self.surroundings.call_at(
                alarm.deadline, lambda: self._deadline(member, alarm)
            )

    def _deadline(self, member: Target, alarm: Alarm) -> None:
        self._cancel_deadline.pop(member, None)
        if self._members.get(member) is alarm and alarm.value is not None:
            self.reading(member, alarm.value)

    def _drop_deadline(self, member: Target) -> None:
        cancel = self._cancel_deadline.pop(member, None)
        if cancel is not None:
            cancel()


def _group(heard: Target | None) -> Group | None:
    return heard.of if isinstance(heard, Processes) and isinstance(heard.of, Group) else None


def _nothing(member: Process) -> None:
    del member
