"""The alarm of one member, under a simulated clock."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from limitfs.resources.model import Unit
from limitfs.watching.alarm import Alarm, State
from limitfs.watching.condition import Condition, parse
from limitfs.watching.crossing import Crossing

LEVEL = 10.0


def condition(text: str) -> Condition:
    parsed = parse(text, Unit.COUNT)
    assert parsed is not None
    return parsed


def crossings(text: str, *samples: tuple[float, float]) -> list[str]:
    """What a fresh alarm says to samples of (time, value)."""
    wanted = condition(text)
    alarm = Alarm(wanted)
    level, clear = wanted.levels(100)
    return [str(alarm.update(now, value, level, clear) or "-") for now, value in samples]


def test_use_already_beyond_rings_at_once() -> None:
    assert crossings(">= 200", (0, 200)) == ["alarm"]


def test_it_rings_once_per_entry() -> None:
    assert crossings(">= 200", (0, 199), (1, 200), (2, 300), (3, 199), (4, 200)) == [
        "-",
        "alarm",
        "-",
        "clear",
        "alarm",
    ]


def test_hysteresis() -> None:
    assert crossings(">= 200 clear 180", (0, 200), (1, 181), (2, 200), (3, 180), (4, 199)) == [
        "alarm",
        "-",
        "-",
        "clear",
        "-",
    ]


def test_hysteresis_downward() -> None:
    assert crossings("< 10 clear 20", (0, 9), (1, 19), (2, 20), (3, 10), (4, 9)) == [
        "alarm",
        "-",
        "clear",
        "-",
        "alarm",
    ]


def test_percent_of_the_limit() -> None:
    assert crossings("> 80%", (0, 80), (1, 81), (2, 80)) == ["-", "alarm", "clear"]


def test_for_rings_at_its_deadline() -> None:
    alarm = Alarm(condition(">= 200 for 30s"))
    assert alarm.deadline is None
    assert alarm.update(100, 200, 200, 200) is None
    assert alarm.deadline == 130
    assert alarm.state is State.CLEAR
    assert alarm.update(129.999, 250, 200, 200) is None
    assert alarm.update(130, 250, 200, 200) is Crossing.ALARM
    assert alarm.deadline is None


def test_for_starts_anew_after_an_interruption() -> None:
    alarm = Alarm(condition(">= 200 for 30s clear 180"))
    alarm.update(0, 200, 200, 180)
    assert alarm.update(20, 199, 200, 180) is None
    assert alarm.deadline is None
    alarm.update(21, 200, 200, 180)
    assert alarm.deadline == 51
    assert alarm.update(40, 200, 200, 180) is None
    assert alarm.update(51, 200, 200, 180) is Crossing.ALARM


def test_for_does_not_delay_clearing() -> None:
    assert crossings(">= 200 for 5s", (0, 200), (5, 200), (6, 0)) == ["-", "alarm", "clear"]


def test_change() -> None:
    assert crossings("change", (0, 5), (1, 5), (2, 6), (3, 5), (4, 5)) == ["-", "-", "change", "change", "-"]


def test_state_since_and_value() -> None:
    alarm = Alarm(condition(">= 200"))
    assert (alarm.state, alarm.since, alarm.value) == (State.CLEAR, None, None)
    alarm.update(1, 5, 200, 200)
    assert (alarm.state, alarm.since, alarm.value) == (State.CLEAR, 1, 5)
    alarm.update(2, 201, 200, 200)
    alarm.update(3, 202, 200, 200)
    assert (alarm.state, alarm.since, alarm.value) == (State.ALARM, 2, 202)
    alarm.update(4, 7, 200, 200)
    assert (alarm.state, alarm.since, alarm.value) == (State.CLEAR, 4, 7)


def test_a_new_limit_moves_the_level_under_an_alarm() -> None:
    alarm = Alarm(condition("80%"))
    assert alarm.update(0, 80, 80, 80) is Crossing.ALARM
    assert alarm.update(1, 80, 160, 160) is Crossing.CLEAR
    assert alarm.update(2, 80, 80, 80) is Crossing.ALARM


def test_it_is_small() -> None:
    assert not hasattr(Alarm(condition("change")), "__dict__")


@given(st.floats(0, 1e9), st.floats(1e-6, 1e6))
def test_at_the_deadline_it_rings_whatever_the_rounding(start: float, hold: float) -> None:
    alarm = Alarm(Condition(condition("5").op, condition("5").amount, hold=hold))
    first = alarm.update(start, 5, 5, 5)
    if first is None:
        assert alarm.deadline is not None
        assert alarm.update(alarm.deadline, 5, 5, 5) is Crossing.ALARM


@given(st.lists(st.integers(0, 3)))
def test_changes_are_counted(values: list[int]) -> None:
    told = crossings("change", *enumerate(values))
    assert told.count("change") == sum(a != b for a, b in itertools.pairwise(values))


def alarm_states(samples: list[tuple[int, int]], hold: int, clear: float) -> list[bool]:
    """The reference for `>= LEVEL`: in alarm at each sample? Looks at the whole past anew each time."""

    def rings(i: int) -> bool:
        start = i
        while start >= 0 and samples[start][1] >= LEVEL:
            start -= 1
        return start < i and samples[i][0] - samples[start + 1][0] >= hold

    def clears(i: int) -> bool:
        return samples[i][1] < LEVEL and samples[i][1] <= clear

    def state(i: int) -> bool:
        decided = (j for j in range(i, -1, -1) if rings(j) or clears(j))
        return rings(next(decided, -1)) if any(rings(j) for j in range(i + 1)) else False

    return [state(i) for i in range(len(samples))]


def entries(states: list[bool]) -> int:
    return sum(now and not before for before, now in itertools.pairwise([False, *states]))


@pytest.mark.parametrize("clear", [10, 7, 0])
@pytest.mark.parametrize("hold", [0, 3])
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=30))
def test_entries_are_counted(clear: int, hold: int, steps: list[tuple[int, int]]) -> None:
    now = itertools.accumulate(step for step, _ in steps)
    samples = list(zip(now, (value for _, value in steps), strict=True))
    text = f">= 10 clear {clear}" + (f" for {hold}s" if hold else "")
    told = crossings(text, *samples)
    states = alarm_states(samples, hold, clear)
    assert told.count("alarm") == entries(states)
    assert told.count("clear") == entries([not state for state in states]) - (bool(states) and not states[0])


class AlarmMachine(RuleBasedStateMachine):
    """Values and time come as they like; deadlines are kept, as the owner of an alarm does."""

    @initialize(hold=st.sampled_from([0, 1, 5]), clear=st.sampled_from([10, 8, 2]))
    def arm(self, hold: int, clear: int) -> None:
        text = f">= 10 clear {clear}" + (f" for {hold}s" if hold else "")
        self.alarm = Alarm(condition(text))
        self.hold, self.clear = hold, clear
        self.now = self.value = 0
        self.samples: list[tuple[int, int]] = []
        self.alarms = self.clears = 0
        self.sample()

    def sample(self) -> None:
        self.samples.append((self.now, self.value))
        crossing = self.alarm.update(self.now, self.value, LEVEL, self.clear)
        self.alarms += crossing is Crossing.ALARM
        self.clears += crossing is Crossing.CLEAR

    @rule(value=st.integers(0, 14))
    def use(self, value: int) -> None:
        self.value = value
        self.sample()

    @rule(seconds=st.integers(1, 8))
    def pass_time(self, seconds: int) -> None:
        until = self.now + seconds
        while self.alarm.deadline is not None and self.alarm.deadline <= until:
            self.now = int(self.alarm.deadline)
            self.sample()
        self.now = until

    @invariant()
    def agrees_with_the_reference(self) -> None:
        states = alarm_states(self.samples, self.hold, self.clear)
        assert self.alarms == entries(states)
        assert (self.alarm.state is State.ALARM) == states[-1]
        assert self.alarms - self.clears == states[-1]

    @invariant()
    def nothing_is_overdue(self) -> None:
        assert self.alarm.deadline is None or self.alarm.deadline > self.now
        assert self.alarm.deadline is None or self.alarm.state is State.CLEAR


TestAlarmMachine = AlarmMachine.TestCase
