"""When one member of a watcher is in alarm.

Sources report values; an `Alarm` tells which of them are crossings. It has no clock: times are passed in, in
seconds of any clock that does not go back, and `deadline` says when it wants to be asked again. `once` is not
obeyed here but by the owner of the alarms, since the first alarm of any member disarms them all.
"""

import enum

from limitfs.watching.condition import Condition, Op
from limitfs.watching.crossing import Crossing


class State(enum.StrEnum):
    """Of a watcher or of one member; OFF only where nothing is armed."""

    OFF = "off"
    CLEAR = "clear"
    ALARM = "alarm"


class Alarm:
    """The state machine of one member. There may be 100,000, so it is small.

    Args:
        condition: shared by all members of the watcher.

    Attributes:
        state: CLEAR or ALARM; always CLEAR for `change`.
        since: time of the last transition or change, at first of the first update; None before that.
        value: the last one, in the base unit; None before the first update.
    """

    __slots__ = ("_beyond_since", "_condition", "since", "state", "value")

    def __init__(self, condition: Condition) -> None:
        self._condition = condition
        self._beyond_since: float | None = None
        self.state = State.CLEAR
        self.since: float | None = None
        self.value: float | None = None

    @property
    def deadline(self) -> float | None:
        """When `update` must be called again even if no value changed; None: not until one does."""
        if self._beyond_since is None or self._condition.hold is None:
            return None
        return self._beyond_since + self._condition.hold

    def update(self, now: float, value: float, level: float, clear: float) -> Crossing | None:
        """Take in a value.

        Args:
            now: the time of the value.
            value: in the base unit.
            level: of the condition, for this member, now; so is `clear`. See `Condition.levels`.
            clear: where an alarm ends.

        Returns:
            ALARM, CLEAR or CHANGE, or None where nothing happened.
        """
        before, self.value = self.value, value
        if before is None:
            self.since = now
        crossing = self._crossing(now, before, value, level, clear)
        if crossing is not None:
            self.since = now
        return crossing

    def _crossing(
        self, now: float, before: float | None, value: float, level: float, clear: float
    ) -> Crossing | None:
        if self._condition.op is Op.CHANGE:
            return Crossing.CHANGE if before is not None and value != before else None
        if self.state is State.ALARM:
            return self._leave(value, level, clear)
        return self._enter(now, value, level)

    def _enter(self, now: float, value: float, level: float) -> Crossing | None:
        if not self._condition.beyond(value, level):
            # Any interruption starts `for` anew, also one that does not reach `clear`.
            self._beyond_since = None
            return None
        if self._beyond_since is None:
            self._beyond_since = now
        # Compare with `deadline` itself: a sum rounded otherwise would ring one timer too late.
        if self.deadline is not None and now < self.deadline:
            return None
        self._beyond_since = None
        self.state = State.ALARM
        return Crossing.ALARM

    def _leave(self, value: float, level: float, clear: float) -> Crossing | None:
        if not self._condition.cleared(value, level, clear):
            return None
        self.state = State.CLEAR
        return Crossing.CLEAR
