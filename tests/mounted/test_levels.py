"""Every level, each and sum: thresholds that nothing else crosses, on a real mount with real processes.

Each threshold has its silent twin: all come to one below, which another level or mode would hear; then one goes
the last step.
"""

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cgroupkit import Cgroup, cgroup
from mountkit import Lines, events, in_threads

from conftest import EXCURSIONS, PATIENCE, Helper, Mount

Make = Callable[..., Helper]

NOISE = min(6_000, EXCURSIONS)
"""Descriptors that others on this machine may open or close meanwhile; an emulated one is ours alone."""

FAR = 2_000
"""Descriptors that few others on this machine have."""

MANY = min(500, EXCURSIONS // 8)

QUIET = 0.7
"""Seconds in which nothing must be heard; samples are taken more often."""


# Two members of whatever stands at a level


class Pair(ABC):
    """The first and the second, which both can use more."""

    least: float
    """The smallest step."""

    @abstractmethod
    def use(self, which: int) -> float:
        """What it uses now."""

    @abstractmethod
    def take(self, which: int, amount: float) -> None:
        """Use so much more."""

    @abstractmethod
    def single(self) -> "Pair":
        """The first, twice."""


class Descriptors(Pair):
    """Of two processes."""

    least = 1

    def __init__(self, *children: Helper) -> None:
        self.children = children

    def use(self, which: int) -> float:
        return self.children[which].fds()

    def take(self, which: int, amount: float) -> None:
        self.children[which].open_files(int(amount))

    def single(self) -> Pair:
        return Descriptors(self.children[0], self.children[0])


class Clocks(Pair):
    """CPU time of two threads of a process."""

    least = 0.2 * max(1, PATIENCE / 30)  # on an emulated machine an order by itself takes a while of CPU time
    CODE = """
import queue
class Worker:
    def __init__(self, name):
        self.orders, self.done, self.name = queue.Queue(), queue.Queue(), name
        threading.Thread(target=self.work, daemon=True).start()
        self.done.get()
    def work(self):
        open(f'/proc/self/task/{threading.get_native_id()}/comm', 'w').write(self.name)
        self.done.put(None)
        while True:
            until = time.thread_time() + self.orders.get()
            while time.thread_time() < until:
                pass
            self.done.put(None)
    def burn(self, seconds):
        self.orders.put(seconds)
        self.done.get()
workers = {name: Worker(name) for name in ('first', 'second')}
"""

    def __init__(self, child: Helper, *names: str) -> None:
        self.child = child
        self.names = names
        tasks = [task.parent for task in Path(f"/proc/{child.pid}/task").glob("*/comm")]
        self.tids = {(task / "comm").read_text().strip(): int(task.name) for task in tasks}

    def tid(self, which: int) -> int:
        return self.tids[self.names[which]]

    def use(self, which: int) -> float:
        ran = Path(f"/proc/{self.child.pid}/task/{self.tid(which)}/schedstat").read_text().split()[0]
        return int(ran) / 1e9

    def take(self, which: int, amount: float) -> None:
        # A little more: what is read is rounded.
        self.child.do(f"workers[{self.names[which]!r}].burn({1.1 * amount})")

    def single(self) -> Pair:
        return Clocks(self.child, self.names[0], self.names[0])


@dataclass
class World:
    """Two processes in a partition and the one below it, or in two partitions; and a group of both."""

    limits: Mount
    one: Helper
    two: Helper
    partitions: tuple[Cgroup, Cgroup]
    group: str

    @property
    def partition(self) -> Cgroup:
        return self.partitions[0]

    def concerned(self, line: dict[str, str], case: "Case") -> bool:
        """Whether a line is about these, and not about a stranger on this machine that is beyond, too."""
        if case.mode == "sum" or not case.shared:
            return True
        ours = {str(self.one.pid), str(self.two.pid), *(partition.path for partition in self.partitions)}
        return line[case.named[0]] in ours

    def pair(self, resource: str) -> Pair:
        if resource == "cputime":
            return Clocks(self.one, "first", "second")
        return Descriptors(self.one, self.two)

    def path(self, template: str, pair: Pair) -> str:
        tid = pair.tid(0) if isinstance(pair, Clocks) else 0
        return template.format(pid=self.one.pid, tid=tid, partition=self.partition.tree, group=self.group)


@contextlib.contextmanager
def world(limits: Mount, helper: Make, apart: bool = False) -> Iterator[World]:
    one, two = helper(Clocks.CODE), helper()
    with cgroup(name="one") as first, cgroup(name="two") as second:
        first.take(one.pid)
        (second if apart else first.below("sub")).take(two.pid)
        group = f"group/both-{one.pid}"
        os.mkdir(limits / group)
        limits.write(f"{group}/select", f"pid == {one.pid} || pid == {two.pid}")
        try:
            yield World(limits, one, two, (first, second), group)
        finally:
            os.rmdir(limits / group)


@contextlib.contextmanager
def watcher(limits: Mount, path: str, mode: str, name: str = "level") -> Iterator[str]:
    """A further watcher, which takes its alarms with it."""
    made = f"{path}/{name}"
    os.mkdir(limits / made)
    try:
        if (limits / made / "mode").exists():
            limits.write(f"{made}/mode", mode)
        yield made
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(limits / made)


def alarms(limits: Mount, path: str) -> int:
    return int(limits.state(f"{path}/state")["alarms"])


def alarm_lines(limits: Mount, path: str) -> Lines:
    return [line for line in events(limits, path) if line["crossing"] == "alarm"]


# The table


@dataclass(frozen=True)
class Case:
    """One level and mode.

    Attributes:
        named: the keys by which the line says who crossed.
        single: it stands for the first alone; the second is beside it.
        shared: others on this machine count, too.
    """

    path: str
    mode: str
    resource: str
    named: tuple[str, ...] = ()
    single: bool = False
    shared: bool = False

    def __str__(self) -> str:
        return f"{self.path}{self.resource} {self.mode}".replace("{", "").replace("}", "").replace("/", " ")


CASES = [
    Case("process/{pid}/thread/{tid}/", "sum", "cputime", ("pid", "tid"), single=True),
    Case("process/{pid}/thread/", "each", "cputime", ("pid", "tid")),
    Case("process/{pid}/thread/", "sum", "cputime", ("pid",)),
    Case("process/{pid}/", "each", "cputime", ("pid", "tid")),
    Case("process/{pid}/", "sum", "cputime", ("pid",)),
    Case("process/{pid}/", "sum", "fds", ("pid",), single=True),
    Case("process/", "each", "fds", ("pid",), shared=True),
    Case("process/", "sum", "fds", shared=True),
    Case("{partition}/", "each", "fds", ("pid",)),
    Case("{partition}/", "sum", "fds", ("partition",)),
    Case("partition/", "each", "fds", ("partition",), shared=True),
    Case("partition/", "sum", "fds", shared=True),
    Case("{group}/", "each", "fds", ("pid",)),
    Case("{group}/", "sum", "fds"),
    Case("system/", "each", "fds", ("pid",), shared=True),
    Case("system/", "sum", "fds", shared=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_below_is_silent_and_then_it_rings(limits: Mount, helper: Make, case: Case) -> None:
    with world(limits, helper, apart=case.path == "partition/") as there:
        pair = there.pair(case.resource)
        path = there.path(case.path, pair) + case.resource
        with watcher(limits, path, case.mode) as armed:
            if case.mode == "each":
                last = _both_nearly(limits, armed, pair, FAR if case.shared else 4 * pair.least)
            else:
                last = _together_nearly(limits, path, armed, pair, case.single, NOISE if case.shared else 0)

            def rang() -> Lines:
                return [line for line in alarm_lines(limits, armed) if there.concerned(line, case)]

            time.sleep(QUIET)
            assert rang() == []
            pair.take(0, last)
            limits.wait_for(rang)
            (line,) = rang()
            assert line["path"] == path
            _names(line, case, there, pair)
            if not case.shared:
                assert alarms(limits, armed) == 1


def _both_nearly(limits: Mount, armed: str, pair: Pair, more: float) -> float:
    """Each of them comes to one below, so that their sum is far beyond; returns what is missing."""
    level = max(pair.use(0), pair.use(1)) + more
    limits.write(f"{armed}/threshold", str(level))
    for which in (0, 1):
        pair.take(which, level - pair.use(which) - pair.least)
    return pair.least


def _together_nearly(limits: Mount, path: str, armed: str, pair: Pair, single: bool, noise: int) -> float:
    """Both come to one below together, each alone to half of it; returns what is missing."""
    step = 2 * pair.least + noise
    level = float(limits.read(f"{path}/usage")) + 2 * step
    limits.write(f"{armed}/threshold", str(level))
    if single:
        pair.take(1, 3 * step)  # which is not counted
        pair = pair.single()
    pair.take(0, step - pair.least)
    pair.take(1, step - noise)
    return pair.least + 2 * noise


def _names(line: dict[str, str], case: Case, there: World, pair: Pair) -> None:
    who = {"pid": str(there.one.pid), "partition": there.partition.path}
    if isinstance(pair, Clocks):
        who["tid"] = str(pair.tid(0))
    assert {key: line[key] for key in case.named} == {key: who[key] for key in case.named}
    assert not ({"pid", "tid"} - set(case.named)) & line.keys()
    if not case.named:
        assert "partition" not in line


# What the kernel keeps for a partition

MEMORY = "held.append(bytearray(b'x') * ({} << 20))"
SLEEPERS = "[threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start() for _ in range({})]"
BURN = "workers['first'].burn({})"


@dataclass(frozen=True)
class Kept:
    """A number of the kernel's, and how it comes near a level and beyond.

    Attributes:
        more: what is added to the use now; of a rate, the level itself.
    """

    controller: str
    resource: str
    more: float
    nearly: str
    beyond: str


KEPT = [
    Kept("memory", "memory", 32 << 20, MEMORY.format(24), MEMORY.format(16)),
    Kept("pids", "threads", 8, SLEEPERS.format(7), SLEEPERS.format(1)),
    Kept("cpuacct", "cputime", 0.6, BURN.format(0.3), BURN.format(0.5)),
    # It may get little of a busy machine, but not nothing.
    Kept("cpuacct", "cpu", 5, "time.sleep(1)", BURN.format(1)),
]


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.resource)
def test_the_kernel_s_own_number(limits: Mount, helper: Make, kept: Kept) -> None:
    child = helper(Clocks.CODE)
    with cgroup(kept.controller) as made, cgroup(kept.controller) as outside:
        made.take(child.pid)
        far = helper(Clocks.CODE)
        outside.take(far.pid)
        path = f"{made.tree}/{kept.resource}"
        with watcher(limits, path, "sum") as armed:
            now = 0 if kept.resource == "cpu" else float(limits.read(f"{path}/usage"))
            limits.write(f"{armed}/threshold", str(now + kept.more))
            far.do(kept.nearly)
            far.do(kept.beyond)
            child.do(kept.nearly)
            time.sleep(QUIET)
            assert events(limits, armed) == []
            child.do(kept.beyond)
            limits.wait_for(lambda: alarm_lines(limits, armed))
            line = alarm_lines(limits, armed)[0]
            assert line["partition"] == made.path
            assert "pid" not in line


ADD = {
    "threads": SLEEPERS,
    "processes": "held += [os.fork() or time.sleep(1e6) for _ in range({})]",
    "fds": "held += [os.dup(0) for _ in range({})]",
}


@pytest.mark.parametrize("resource", ADD)
def test_each_partition_of_one_hierarchy(limits: Mount, helper: Make, resource: str) -> None:
    """Where hierarchies stand side by side, also of those that the hooks know nothing of."""
    with contextlib.ExitStack() as stack:
        partitions = [stack.enter_context(cgroup("pids", name=name)) for name in ("one", "two")]
        children = [helper(), helper()]
        for partition, child in zip(partitions, children, strict=True):
            partition.take(child.pid)
        path = f"partition/{resource}"
        armed = stack.enter_context(watcher(limits, path, "each"))
        level = 50  # which others may have long since: they are other members
        limits.write(f"{armed}/threshold", str(level))
        if resource == "processes":
            for child in children:
                stack.callback(child.do, "[(os.kill(pid, 9), os.waitpid(pid, 0)) for pid in held]")
        for partition, child in zip(partitions, children, strict=True):
            child.do(ADD[resource].format(level - 1 - int(limits.read(f"{partition.tree}/{resource}/usage"))))

        def rang() -> list[str]:
            paths = [line["partition"] for line in alarm_lines(limits, armed)]
            return [path for path in paths if path in [partition.path for partition in partitions]]

        time.sleep(2 * QUIET)
        assert rang() == []
        children[0].do(ADD[resource].format(1))
        limits.wait_for(rang)
        assert rang() == [partitions[0].path]


# Several at once


def hooks_of(limits: Mount) -> list[str]:
    """Numbers of the kernel's links to programs of the daemon: what it has attached."""
    found = []
    for entry in Path(f"/proc/{limits.daemon.pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            fields = dict(line.split(":", 1) for line in entry.read_text().splitlines() if ":" in line)
            if "link_type" in fields:
                found.append(fields["prog_id"].strip())
    return sorted(found)


def exact(limits: Mount) -> bool:
    """Whether descriptors are hooked here."""
    (line,) = (one for one in limits.read("features").splitlines() if one.startswith("fds\tprocess/PID\tsum"))
    return "\texact\t" in line


def test_several_levels_at_once(limits: Mount, helper: Make) -> None:
    """The same descriptors, counted for nine watchers: each hears its own, and all share the hooks."""
    if not exact(limits):
        pytest.skip("nothing is hooked here")
    with world(limits, helper) as there, contextlib.ExitStack() as stack:
        limits.wait_for(lambda: not hooks_of(limits))  # of earlier tests
        one, two = there.one, there.two
        process = f"process/{one.pid}/fds"
        total = one.fds() + two.fds()
        most = max(one.fds(), two.fds())
        far = 1_000_000
        placed = {
            # path, mode, threshold, and how often it is beyond in MANY times one and MANY times two more.
            "process": (process, "sum", one.fds() + 1, 2 * MANY),
            "two": (process, "sum", one.fds() + 2, MANY),
            "partition": (f"{there.partition.tree}/fds", "sum", total + 1, 2 * MANY),
            "partition each": (f"{there.partition.tree}/fds", "each", most + 2, MANY),
            "below": (f"{there.partition.tree}/sub/fds", "sum", two.fds() + 1, 0),
            "group": (f"{there.group}/fds", "sum", total + 2, MANY),
            "group each": (f"{there.group}/fds", "each", most + 3, 0),
            "processes": ("process/fds", "each", 15_000, 0),
            "all": ("process/fds", "sum", far, 0),
        }
        attached: list[list[str]] = []
        for name, (path, mode, level, _times) in placed.items():
            armed = stack.enter_context(watcher(limits, path, mode, name))
            limits.write(f"{armed}/threshold", str(level))
            attached.append(hooks_of(limits))
        assert attached[0] != []
        by_cgroup = attached[2]
        assert set(attached[0]) <= set(by_cgroup), "a partition needs to be told of cgroups, besides"
        assert attached[2:] == [by_cgroup] * len(attached[2:]), "one watcher more attaches nothing more"

        one.do(f"exec('for _ in range({MANY}): os.close(os.dup(0))')")
        one.do(f"exec('for _ in range({MANY}): a = os.dup(0); b = os.dup(0); os.close(a); os.close(b)')")
        _each_has_its_own(limits, {f"{path}/{name}": times for name, (path, _m, _l, times) in placed.items()})

        # One less disturbs nobody.
        limits.write(f"{process}/two/threshold", "off")
        one.do("os.close(os.dup(0))")
        more = {name: 1 if times == 2 * MANY else 0 for name, (_p, _m, _l, times) in placed.items()}
        del placed["two"]
        _each_has_its_own(
            limits, {f"{path}/{name}": times + more[name] for name, (path, _m, _l, times) in placed.items()}
        )


def _each_has_its_own(limits: Mount, expected: dict[str, int]) -> None:
    limits.wait_for(lambda: {path: alarms(limits, path) for path in expected} == expected)


def test_a_sum_of_eight_counts_every_spike(limits: Mount, helper: Make, tmp_path: Path) -> None:
    """Each process goes beyond for microseconds, while none other does: as many alarms as spikes."""
    if not exact(limits):
        pytest.skip("nothing is hooked here")
    lock = tmp_path / "turn"
    lock.touch()
    children = [helper(f"import fcntl\nturn = open({str(lock)!r})") for _ in range(8)]
    spike = f"for _ in range({MANY}):\n fcntl.flock(turn, 2)\n os.close(os.dup(0))\n fcntl.flock(turn, 8)"
    with cgroup() as made:
        places = [made, made.below("a"), made.below("b")]
        for number, child in enumerate(children):
            places[number % 3].take(child.pid)
        path = f"{made.tree}/fds"
        total = sum(child.fds() for child in children)
        for level, spikes in ((total + 2, 0), (total + 1, 8 * MANY)):
            limits.write(f"{path}/threshold", str(level))
            in_threads(8, lambda number: children[number].do(f"exec({spike!r})"))
            limits.wait_for(lambda: alarms(limits, path) >= spikes)  # noqa: B023
            state = limits.state(f"{path}/state")
            assert int(state["alarms"]) == spikes
            assert state["state"] == "clear"
            assert len(alarm_lines(limits, path)) <= spikes
            if int(state["lost"]) == 0 and spikes <= 500:
                assert len(alarm_lines(limits, path)) == spikes
        assert {line["partition"] for line in alarm_lines(limits, path)} == {made.path}
