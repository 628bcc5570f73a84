"""Sums are what a fresh count gives, after every step, whatever processes do: open, fork, execute, move, exit."""

import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroupkit import Cgroup, cgroup
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from conftest import Helper, Mount, mounted
from limitfs.resources import cgroups, memory

STEPS = int(os.environ.get("LIMITFS_STEPS", 25))
EXAMPLES = int(os.environ.get("LIMITFS_EXAMPLES", 8))
RESOURCES = ("fds", "threads", "processes")
BATCH = 4 * 64 * (os.cpu_count() or 1) * mmap.PAGESIZE
"""Bytes of a process that the kernel may not have added up yet; lib/percpu_counter.c."""
CHOSEN = "group/chosen"
"""Who is in the first cgroup or below, and has not executed another program."""
MOST = 12
"""Workers and their children at a time."""


def listed(directory: str) -> int:
    try:
        return len(os.listdir(directory))
    except OSError:
        return 0


def members(group: Cgroup) -> list[int]:
    """Counted afresh, by the kernel's own files."""
    found = [int(pid) for pid in group.read("cgroup.procs").split()]
    for entry in os.scandir(group.directory):
        if entry.is_dir():
            found += members(Cgroup(group.hierarchy, f"{group.path}/{entry.name}"))
    return found


def fresh(pids: list[int]) -> dict[str, int]:
    return {
        "fds": sum(listed(f"/proc/{pid}/fd") for pid in pids),
        "threads": sum(listed(f"/proc/{pid}/task") for pid in pids),
        "processes": len(pids),
    }


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except OSError:
        return ""


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with mounted(tmp_path_factory.mktemp("mount")) as mount:
        yield mount


class Trees(RuleBasedStateMachine):
    """Workers that are told what to do, and children of theirs that only hold what they inherited."""

    limits: Mount

    def __init__(self) -> None:
        super().__init__()
        self.workers: list[Helper] = []
        self.children: dict[int, Helper] = {}
        self._cgroups = [cgroup(name="a"), cgroup(name="b")]
        a, b = (made.__enter__() for made in self._cgroups)
        self.groups = [a, a.below("sub"), b]

    @initialize()
    def arm(self) -> None:
        os.mkdir(self.limits / CHOSEN)
        self.limits.write(f"{CHOSEN}/select", f'partition ~ "^{self.groups[0].path}" && comm != "sleep"')
        for resource in ("fds", "threads"):
            self.limits.write(f"{CHOSEN}/{resource}/mode", "sum")
        for path in (CHOSEN, *(group.tree for group in self.groups)):
            for resource in RESOURCES:
                self.limits.write(f"{path}/{resource}/threshold", "change")

    # What can happen

    def _pids(self) -> list[int]:
        return [worker.pid for worker in self.workers] + list(self.children)

    @precondition(lambda self: len(self._pids()) < MOST)
    @rule(where=st.integers(0, 3))
    def start(self, where: int) -> None:
        self.workers.append(Helper())
        self._move(self.workers[-1].pid, where)

    def _move(self, pid: int, where: int) -> None:
        if where < len(self.groups):
            self.groups[where].take(pid)
        else:
            Cgroup(self.groups[0].hierarchy, "/").take(pid)

    @precondition(lambda self: self._pids())
    @rule(which=st.integers(0, MOST), where=st.integers(0, 3))
    def move(self, which: int, where: int) -> None:
        self._move(self._pids()[which % len(self._pids())], where)

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, MOST), count=st.integers(1, 40))
    def open(self, which: int, count: int) -> None:
        self.workers[which % len(self.workers)].open_files(count)

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, MOST), count=st.integers(1, 40))
    def close(self, which: int, count: int) -> None:
        self.workers[which % len(self.workers)].do(f"[os.close(held.pop()) for _ in held[:{count}]]")

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, MOST), megabytes=st.integers(1, 16))
    def touch(self, which: int, megabytes: int) -> None:
        self.workers[which % len(self.workers)].do(f"held_memory = bytearray(b'x' * ({megabytes} << 20))")

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, MOST))
    def thread(self, which: int) -> None:
        self.workers[which % len(self.workers)].do(
            "threading.Thread(target=time.sleep, args=(1e6,), daemon=True).start()"
        )

    @precondition(lambda self: self.workers and len(self._pids()) < MOST)
    @rule(which=st.integers(0, MOST), execute=st.booleans())
    def fork(self, which: int, execute: bool) -> None:
        worker = self.workers[which % len(self.workers)]
        child = "os.execv('/bin/sleep', ['sleep', '1000'])" if execute else "time.sleep(1000)"
        worker.do(f"born = os.fork() or {child}")
        pid = int(Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()[-1])
        self.children[pid] = worker
        if execute:
            self.limits.wait_for(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")

    @precondition(lambda self: self.children)
    @rule(which=st.integers(0, MOST))
    def kill_child(self, which: int) -> None:
        pid = list(self.children)[which % len(self.children)]
        os.kill(pid, signal.SIGKILL)
        self.children.pop(pid).do(f"os.waitpid({pid}, 0)")

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, MOST))
    def kill_worker(self, which: int) -> None:
        worker = self.workers.pop(which % len(self.workers))
        for pid in [pid for pid, parent in self.children.items() if parent is worker]:
            os.kill(pid, signal.SIGKILL)
            self.children.pop(pid)
        worker.end()

    # What must hold

    @invariant()
    def sums_are_exact(self) -> None:
        for group in self.groups:
            for resource in RESOURCES:
                self.limits.wait_for(lambda: self._agree(group.tree, resource, members(group)))  # noqa: B023

    @invariant()
    def sums_of_a_group_are_exact(self) -> None:
        for resource in RESOURCES:
            self.limits.wait_for(lambda: self._agree(CHOSEN, resource, self._chosen()))  # noqa: B023

    def _chosen(self) -> list[int]:
        return [pid for pid in members(self.groups[0]) if comm(pid) != "sleep"]

    @invariant()
    def memory_is_exact_but_for_batches(self) -> None:
        """Where no controller counts it, it is the sum; the kernel keeps some pages apart on each processor."""
        for group in self.groups:
            if not cgroups.has(group.partition, memory.USAGE):
                self.limits.wait_for(lambda: self._about_the_same(group))  # noqa: B023

    def _about_the_same(self, group: Cgroup) -> bool:
        pids = members(group)
        told = int(self.limits.read(f"{group.tree}/memory/usage"))
        return abs(told - sum(map(resident, pids))) <= BATCH * len(pids)

    def _agree(self, tree: str, resource: str, pids: list[int]) -> bool:
        path = f"{tree}/{resource}"
        expected = fresh(pids)[resource]
        told = self.limits.state(f"{path}/state")["value"]
        return int(self.limits.read(f"{path}/usage")) == expected and told == str(expected)

    def teardown(self) -> None:
        while self.workers:
            self.kill_worker(0)
        for resource in RESOURCES:
            self.limits.write(f"{CHOSEN}/{resource}/threshold", "off")
        os.rmdir(self.limits / CHOSEN)
        for made in reversed(self._cgroups):
            made.__exit__(None, None, None)


def test_sums(limits: Mount) -> None:
    Trees.limits = limits
    run_state_machine_as_test(
        Trees,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
