"""What a threshold on each of thousands of processes and partitions costs, and how that grows.

    tests/bench/levels.py [--sizes N…] [--ways WAY…] [--rounds N] [--seconds N] [--resource NAME]

Of N processes, ten are in each cgroup of the unified hierarchy. Ways: `each` is two writes, to `process/` and to
`partition/`, which hold for all; `single` is a write to the directory of every process and of every partition.
Times of arming are medians, those of fork and exec medians of pairs, armed and not, in turns; they are of a
process that no single threshold is about. Wake-ups are counted while the processes open files and touch memory,
one after the other. Needs root and gcc.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cgroupkit import Cgroup, cgroup
from hooks import Worker, compiled, wait_detached, worker
from run import Cost, resident

from conftest import Mount, mounted

CROWD = 10
"""Processes in each cgroup."""
RATE = 1000
"""How often a second one of the processes does something."""
NEVER = {"fds": ("1000", "10000"), "memory": ("1T", "10T"), "threads": ("1000", "10000")}
"""Thresholds that nothing comes near to: of a process, of a partition."""
STROKES = ("fork_exit", "fork_exec")


class Crowd:
    """Idle processes in cgroups of their own."""

    def __init__(self, program: Path, cgroups: list[Cgroup]) -> None:
        self.cgroups = cgroups
        self._parent = subprocess.Popen(
            [program, str(CROWD), *(str(each.directory) for each in cgroups)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us, who then end them in order
        )
        self.pids = [int(word) for word in self._line().split()]

    def stir(self, seconds: int) -> None:
        """Have them do what crosses nothing."""
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"stir {RATE} {seconds}\n")
        self._parent.stdin.flush()
        assert self._line() == "done\n"

    def end(self) -> None:
        """Kill all of them, and wait for that."""
        self._parent.communicate()

    def _line(self) -> str:
        assert self._parent.stdout is not None
        return self._parent.stdout.readline()


@contextlib.contextmanager
def crowd(directory: Path, size: int) -> Iterator[Crowd]:
    """That many processes; at the end no process and no cgroup is left."""
    program = compiled(directory, "crowd")
    with cgroup(name="bench-") as top:
        made = Crowd(program, [top.below(str(number)) for number in range(size // CROWD)])
        try:
            assert len(made.pids) == size
            yield made
        finally:
            made.end()


def thresholds(way: str, resource: str, crowd: Crowd) -> list[tuple[str, str]]:
    """What is written, and where."""
    process, partition = NEVER[resource]
    if way == "each":
        return [(f"process/{resource}", process), (f"partition/{resource}", partition)]
    return [
        *((f"process/{pid}/{resource}", process) for pid in crowd.pids),
        *((f"{each.tree}/{resource}", partition) for each in crowd.cgroups),
    ]


class Round(NamedTuple):
    """Seconds of arming, of them CPU seconds of the daemon, and of disarming; nanoseconds of each stroke."""

    arming: float
    cpu: float
    disarming: float
    without: dict[str, float]
    armed: dict[str, float]


def measure(limits: Mount, crowd: Crowd, work: Worker, chosen: argparse.Namespace, way: str) -> None:
    """Print one row."""
    wanted = thresholds(way, chosen.resource, crowd)
    strokes(work)  # the first ones are slow
    before = resident(limits.daemon.pid)
    # The first round says what memory it takes; later ones find it there.
    rounds = [one_round(limits, work, wanted)]
    arm(limits, wanted)
    after = resident(limits.daemon.pid)
    sources = sorted({limits.state(f"{path}/state")["source"] for path, _threshold in (wanted[0], wanted[-1])})
    wakeups, cpu = wakes(limits, crowd, chosen.seconds)
    disarm(limits, wanted)
    rounds += [one_round(limits, work, wanted) for _ in range(chosen.rounds - 1)]
    size = len(crowd.pids) + len(crowd.cgroups)
    arming, daemon, disarming = (statistics.median(column) for column in list(zip(*rounds, strict=True))[:3])
    costs = "   ".join(_ratio(name, rounds) for name in STROKES)
    print(
        f"{way:<6} {len(crowd.pids):5} + {len(crowd.cgroups):<4} {','.join(sources):<22}"
        f" arming {arming:8.3f} s {arming / size * 1e6:7.0f} us each, daemon {daemon / size * 1e6:6.0f} us"
        f"   disarming {disarming:7.3f} s   {before:5.1f} -> {after:6.1f} MiB"
        f"   wake-ups {wakeups:5} ({cpu * 100:.2f} % CPU)   {costs}",
        flush=True,
    )


def _ratio(name: str, rounds: list[Round]) -> str:
    off = statistics.median(each.without[name] for each in rounds)
    ratio = statistics.median(each.armed[name] / each.without[name] for each in rounds)
    return f"{name} {off / 1000:6.1f} us x{ratio:.3f}"


def one_round(limits: Mount, work: Worker, wanted: list[tuple[str, str]]) -> Round:
    without = strokes(work)
    cost = Cost(limits.daemon.pid)
    arming = arm(limits, wanted)
    cpu, _switches = cost.since()
    armed = strokes(work)
    return Round(arming, cpu, disarm(limits, wanted), without, armed)


def strokes(work: Worker) -> dict[str, float]:
    return {name: statistics.median(work(name) for _ in range(5)) for name in STROKES}


def arm(limits: Mount, wanted: list[tuple[str, str]]) -> float:
    """Seconds."""
    begun = time.monotonic()
    for path, threshold in wanted:
        limits.write(f"{path}/threshold", threshold)
    return time.monotonic() - begun


def disarm(limits: Mount, wanted: list[tuple[str, str]]) -> float:
    """Seconds; the hooks are gone afterwards."""
    begun = time.monotonic()
    for path, _threshold in wanted:
        limits.write(f"{path}/threshold", "off")
    took = time.monotonic() - begun
    wait_detached(limits.daemon.pid)
    return took


def wakes(limits: Mount, crowd: Crowd, seconds: int) -> tuple[int, float]:
    """How often the sources woke the daemon meanwhile, and the part of a processor that it used."""
    time.sleep(3)
    before, cost = int(limits.state("state")["wakeups"]), Cost(limits.daemon.pid)
    begun = time.monotonic()
    crowd.stir(seconds)
    cpu, _switches = cost.since()
    took = time.monotonic() - begun
    return int(limits.state("state")["wakeups"]) - before, cpu / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000, 4000], help="processes")
    parser.add_argument("--ways", nargs="+", choices=("each", "single"), default=["each", "single"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=20, help="to count wake-ups in, about")
    parser.add_argument("--resource", choices=NEVER, default="fds")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or what was made would stay
    for way in chosen.ways:
        for size in chosen.sizes:
            with tempfile.TemporaryDirectory() as name:
                directory = Path(name)
                with (
                    crowd(directory, size) as those,
                    worker(directory, "cpu") as work,
                    mounted(directory, "state=none") as limits,
                ):
                    measure(limits, those, work, chosen, way)
    print(f"load {' '.join(f'{load:.1f}' for load in os.getloadavg())}")


if __name__ == "__main__":
    main()
