"""How long a daemon that was killed is away: from SIGKILL until its successor answers, with all armed again.

    tests/bench/restart.py [--sizes N…] [--rounds N] [--resource NAME] [--rules]

Of N watchers, ten named ones are on each of N/10 processes; with --rules they are made by rules, else by hand. The
successor is started at once, so what a service manager waits is not in it. Medians of the rounds. Needs root.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "mounted"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import crashkit
import psutil
from crashkit import Service
from run import resident, sleepers

NAMED = 10
"""Watchers on each process."""
NEVER = {"fds": 1000, "memory": "1T", "threads": 1000, "cputime": "1000h"}
"""Thresholds that nothing comes near to."""


@contextlib.contextmanager
def armed(directory: Path, size: int, resource: str, *, rules: bool) -> Iterator[Service]:
    """A daemon with that many watchers, and how long it took to arm them."""
    with sleepers(size // NAMED) as pids, crashkit.service(directory) as limits:
        paths = [f"process/{pid}/{resource}/w{number}" for pid in pids for number in range(NAMED)]
        if rules:
            lines = "".join(f"{path}/threshold = {NEVER[resource]}\n" for path in paths)
            (limits.rules / "10.conf").write_text(lines)
            limits.write("rules", "reload")
        else:
            for path in paths:
                os.mkdir(limits / path)
                limits.write(f"{path}/threshold", str(NEVER[resource]))
        assert limits.state("state")["armed"] == str(size)
        yield limits


def away(limits: Service) -> tuple[float, float]:
    """Seconds from the kill to the first answer, and of CPU that the successor used."""
    begun = time.perf_counter()
    limits.restart()
    took = time.perf_counter() - begun
    return took, sum(psutil.Process(limits.daemon.pid).cpu_times()[:2])


def measure(size: int, chosen: argparse.Namespace) -> None:
    """Print one row."""
    # What waits for an answer to this must not give up.
    crashkit.PATIENCE = 600
    with (
        tempfile.TemporaryDirectory() as directory,
        armed(Path(directory), size, chosen.resource, rules=chosen.rules) as limits,
    ):
        rows = []
        for _round in range(chosen.rounds):
            rows.append(away(limits))
            assert limits.state("state")["armed"] == str(size)
        took, cpu = (statistics.median(row[column] for row in rows) for column in range(2))
        print(f"{size:>6} {took:8.1f} s {cpu:8.1f} s CPU {resident(limits.daemon.pid):8.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resource", choices=NEVER, default="fds")
    parser.add_argument("--rules", action="store_true", help="made by rules, not by hand")
    chosen = parser.parse_args()
    for size in chosen.sizes:
        measure(size, chosen)


if __name__ == "__main__":
    main()
