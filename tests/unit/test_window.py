"""The window against a model that knows exactly when everything was consumed."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limitfs.hearing.window import SHORTEST_STEP, RateWindow, step

TINY = 1e-6


@dataclass
class Life:
    """What a process consumes: (seconds, CPUs in use) one after the other."""

    segments: list[tuple[float, float]]

    def total(self, wall: float) -> float:
        used = 0.0
        for seconds, cpus in self.segments:
            if wall <= seconds:
                return used + max(0.0, wall) * cpus
            used += seconds * cpus
            wall -= seconds
        return used

    def when(self, total: float) -> float | None:
        """The first time at which `total` has been consumed."""
        wall = 0.0
        for seconds, cpus in self.segments:
            if cpus and total <= seconds * cpus:
                return wall + max(0.0, total / cpus)
            total -= seconds * cpus
            wall += seconds
        return None

    def corners(self) -> list[float]:
        walls, wall = [], 0.0
        for seconds, _cpus in self.segments:
            wall += seconds
            walls.append(wall)
        return walls

    def percent(self, wall: float, window: float) -> float:
        return 100 * (self.total(wall) - self.total(wall - window)) / window


def looks(life: Life, window: float, level: float, parallel: float) -> list[tuple[float, float]]:
    """(time, percent) of each look, as a meter takes them whose clock rings in time."""
    watched = RateWindow(window, parallel)
    watched.add(0.0, 0.0)
    found = []
    while (wall := life.when(watched.next_look(level))) is not None:
        watched.add(wall, watched.next_look(level))
        found.append((wall, watched.percent(cautious=True)))
    return found


PARALLEL = 4.0
segments = st.tuples(st.floats(0.001, 3), st.sampled_from([0.0, 0.01, 0.3, 0.75, 0.8, 0.85, 1.0, 2.0, PARALLEL]))
lives = st.builds(Life, st.lists(segments, min_size=1, max_size=12))
windows = st.sampled_from([0.2, 1.0, 2.5])
levels = st.sampled_from([20.0, 80.0, 100.0, 250.0])


def slack(level: float, window: float) -> float:
    """One step, in percent."""
    return 100 * step(level, window) / window


@settings(max_examples=400, deadline=None)
@given(lives, windows, levels)
def test_what_is_two_steps_beyond_rings(life: Life, window: float, level: float) -> None:
    seen = looks(life, window, level, PARALLEL)
    times = [wall for wall, _ in seen] + life.corners() + [wall + window for wall in life.corners()]
    # The use is piecewise linear in time: it is highest where something bends.
    for wall in (time for time in times if time <= life.corners()[-1]):
        if life.percent(wall, window) > level + 2 * slack(level, window) + TINY:
            assert any(at <= wall + TINY and percent >= level for at, percent in seen)


@settings(max_examples=400, deadline=None)
@given(lives, windows, levels)
def test_what_is_a_step_below_does_not_ring(life: Life, window: float, level: float) -> None:
    for wall, percent in looks(life, window, level, PARALLEL):
        assert percent <= life.percent(wall, window) + slack(level, window) + TINY


@settings(max_examples=200, deadline=None)
@given(lives, windows, levels)
def test_at_most_32_looks_for_a_window_of_use_at_the_level(life: Life, window: float, level: float) -> None:
    used = life.total(life.corners()[-1])
    assert len(looks(life, window, level, PARALLEL)) <= used / step(level, window) + TINY


def test_an_idle_hour_before_a_burst_does_not_dilute_it() -> None:
    life = Life([(3600, 0), (1, 1)])
    assert max(percent for _, percent in looks(life, 1.0, 80.0, PARALLEL)) >= 80


def test_a_steady_use_below_the_level_never_rings() -> None:
    life = Life([(600, 0.79)])
    assert max(percent for _, percent in looks(life, 1.0, 80.0, PARALLEL)) < 80


def test_slow_use_for_an_hour_never_rings() -> None:
    life = Life([(3600, 0.01)])
    assert max(percent for _, percent in looks(life, 1.0, 80.0, PARALLEL)) < 10


def test_nothing_is_known_before_the_first_mark() -> None:
    window = RateWindow(1.0, PARALLEL)
    window.add(1000.0, 500.0)
    assert window.percent(cautious=True) == 0
    assert window.percent(cautious=False) == 0


def test_totals_and_clocks_never_go_back() -> None:
    window = RateWindow(1.0, PARALLEL)
    window.add(10.0, 5.0)
    window.add(9.0, 4.0)
    assert window.percent(cautious=True) == 0


def test_marks_are_forgotten_with_the_window() -> None:
    window = RateWindow(1.0, PARALLEL)
    for look in range(10_000):
        window.add(look * 0.1, look * 0.05)
    assert len(window._marks) <= 13
    assert window.percent(cautious=False) == pytest.approx(50)


def test_a_small_level_is_looked_at_no_more_often_than_the_kernel_ticks() -> None:
    assert step(1.0, 0.1) == SHORTEST_STEP
