"""How much of a rate's window was used, from as few looks as possible.

Pure: wall times and totals are passed in. A look gives a *mark*: at this time, so much had been consumed in
all. Between two marks only their difference is known, not how it was spread; so the marks stand at most one
`step` of consumption apart, and whoever is idle needs none.

The bound, of which tests/unit/test_window.py holds the proof: looked at after every step, a window that
truly holds two steps more than the level is never missed, and none rings that holds a step less than it.
"""

from collections import deque

STEPS = 32
"""Looks per window's worth of the level: two of them are 6.25 % of the level."""

SHORTEST_STEP = 0.004
"""Seconds consumed: the kernel looks at CPU timers at its ticks only, which are 1 to 10 ms apart."""

DENSE = 8
"""Marks closer together than this part of the window are taken as evenly used between."""


class RateWindow:
    """A sliding window over a total that only grows.

    Args:
        window: its length in seconds.
        parallel: how many seconds can be consumed in one second: 1 for a thread, the CPUs for a process.
    """

    __slots__ = ("_marks", "_parallel", "_window")

    def __init__(self, window: float, parallel: float) -> None:
        self._window = window
        self._parallel = parallel
        self._marks: deque[tuple[float, float]] = deque()

    def add(self, wall: float, total: float) -> None:
        """Take a mark: at `wall`, `total` had been consumed."""
        marks = self._marks
        if marks:
            # Neither goes back; a total read from two clocks of one kernel may seem to.
            wall, total = max(wall, marks[-1][0]), max(total, marks[-1][1])
        marks.append((wall, total))
        while len(marks) > 2 and marks[1][0] <= wall - self._window:
            marks.popleft()

    def percent(self, cautious: bool) -> float:
        """The use in the window that ends at the last mark, in percent of the window.

        What was consumed before the first mark is not known and counts as nothing.

        Args:
            cautious: where it is unknown when something was consumed, take it as inside the window, so that
                an alarm rings too early rather than not at all; else as evenly spread.
        """
        wall, total = self._marks[-1]
        return max(0.0, 100 * (total - self._total_at(wall - self._window, cautious)) / self._window)

    def next_look(self, level: float) -> float:
        """The total at which to look again, for a level in percent."""
        return self._marks[-1][1] + step(level, self._window)

    def _total_at(self, wall: float, cautious: bool) -> float:
        before, used = self._marks[0]
        if wall <= before or len(self._marks) == 1:
            return used
        after, used_after = self._marks[1]
        gap = after - before
        if cautious and gap > self._window / DENSE:
            return max(used, used_after - self._parallel * (after - wall))
        return used + (used_after - used) * min(1.0, (wall - before) / gap)


def step(level: float, window: float) -> float:
    """Consumption in seconds between two looks, for a level in percent over `window` seconds."""
    return max(level / 100 * window / STEPS, SHORTEST_STEP)
