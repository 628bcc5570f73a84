"""What attached programs cost, in nanoseconds: measured once, on the machine and in the process where they run.

Off and on are measured in turn, so that what else the machine does weighs on both; what tells is the median of
the differences, and how far they lie apart. A figure that cannot be told from noise is not given.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from limitfs.hearing.bpf.layout import Kind

PAIRS = 15
"""Differences that are measured."""

_OUTER = 3
"""So many of the least and of the greatest are left out: the rest hold the true median in 96 cases of 100."""

_CHUNKS = 25
_CHUNK_NS = 30_000
"""The least of some chunks of that length is one sample: what disturbs them only adds."""


@dataclass(frozen=True)
class Probe:
    """Something that is made slower by what is attached.

    Attributes:
        call: does it once.
        kind: what is watched meanwhile on the process that does it.
    """

    call: Callable[[], object]
    kind: Kind

    def samples(self, count: int) -> list[float]:
        """Nanoseconds that a call takes, that often."""
        calls = max(1, round(_CHUNK_NS / max(1.0, self._nanoseconds(10))))
        return [min(self._nanoseconds(calls) for _ in range(_CHUNKS)) for _ in range(count)]

    def _nanoseconds(self, calls: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(calls):
            self.call()
        return (time.perf_counter_ns() - begin) / calls


def in_words(differences: Sequence[float]) -> str:
    """The median of some differences; where they do not even agree on its sign, how much it is less than."""
    inner = sorted(differences)[_OUTER:-_OUTER]
    if inner[0] > 0:
        return f"{max(1, round(statistics.median(inner)))} ns here"
    return f"< {max(1, math.ceil(max(map(abs, inner))))} ns here"
