#!/usr/bin/env python3
"""What membership of groups costs: following them, a fork, a change of name, and looking.

    tests/bench/groups.py [PROCESSES] [GROUPS]

Needs root. Prints one line for each; times are of the daemon's thread (CPU), divided by how often.
"""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from limitfs.hearing.connector import Connector  # noqa: E402
from limitfs.hearing.deaths import Deaths  # noqa: E402
from limitfs.hearing.reactor import Reactor  # noqa: E402
from limitfs.resources.model import Process  # noqa: E402
from limitfs.selecting.groups import Groups  # noqa: E402


def ignore(process: Process) -> None:
    """Follow, and do nothing."""


def child() -> int:
    """A process that waits, and takes another name on SIGUSR1."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGUSR1, lambda *_: Path("/proc/self/comm").write_text("other"))
        while True:
            signal.pause()
    return pid


def measured(what: str, count: int, work: Callable[[], None]) -> None:
    """Run `work` and say what it took."""
    begun = time.thread_time()
    work()
    print(f"{what}: {(time.thread_time() - begun) / count * 1e6:.0f} us")


def main(processes: int, how_many: int) -> None:
    reactor = Reactor()
    groups = Groups(reactor, Connector(reactor), Deaths(reactor))
    children = [child() for _ in range(processes)]
    ends: list[Callable[[], None]] = []
    try:
        for number in range(how_many):
            group = groups.make(str(number), 0)
            group.set_select(
                f'comm == nosuch{number} && memory > 1G || exe ~ "^/no/such{number}" || uid == {number}1'
            )
            follow = functools.partial(group.follow, ignore, ignore)
            measured(f"follow group {number}, a process", processes, lambda follow=follow: ends.append(follow()))
        more = [child() for _ in range(500)]
        measured("a fork", 500, lambda: turn(reactor))
        children += more
        for pid in more:
            os.kill(pid, signal.SIGUSR1)
        time.sleep(2)
        measured("a change of name", 500, lambda: turn(reactor))
        measured("a look, all groups", 1, groups.live._look)
        idle = groups.make("idle", 0)
        idle.set_select("exe ~ nosuch")
        measured("members on demand, a process", processes, lambda: list(idle.processes()) and None)
    finally:
        for end in ends:
            end()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def turn(reactor: Reactor) -> None:
    """Until nothing is left to hear."""
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < 0.5:
        before = time.thread_time()
        reactor.pump(0.1)
        if time.thread_time() - before > 0.002:
            quiet_since = time.monotonic()


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["4000", "10"][len(sys.argv) - 1 :])))
