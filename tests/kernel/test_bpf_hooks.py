"""Which hooks are attached for whom, how they come and go, and what they are said to cost."""

import contextlib
import ctypes
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_bpf_kit import Alarmed, AnySource, base_fds, links, loaded, settle
from test_bpf_scopes import FDS, MEMORY, PROCESSES, THREADS, Chosen, Tree, agrees
from test_bpf_scopes import source as source
from test_bpf_scopes import tasks as tasks
from test_bpf_scopes import tree as tree

from conftest import EXCURSIONS, PATIENCE
from kernelkit import Turned, want
from limitfs.hearing.bpf import libbpf
from limitfs.hearing.bpf.cost import PAIRS, in_words
from limitfs.hearing.bpf.layout import Kind
from limitfs.hearing.bpf.source import BpfFds, BpfRss, BpfTasks
from limitfs.resources import procfs
from limitfs.resources.model import Partitions, Processes, Resource, Target

MakeHelper = Callable[..., Any]

KINDS = pytest.mark.parametrize(
    ("kind", "resource"), [(BpfFds, FDS), (BpfRss, MEMORY), (BpfTasks, THREADS)], ids=["fds", "rss", "tasks"]
)

OF_CGROUPS = {"cgroup_attach_task", "cgroup_mkdir", "cgroup_rmdir"}


def hooked() -> set[str]:
    """The tracepoints that this process has programs on, proc_pid_fdinfo(5)."""
    found: set[str] = set()
    for name in os.listdir("/proc/self/fdinfo"):
        with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{name}") as info:
            found.update(re.findall(r"^tp_name:\s*(\w+)", info.read(), re.MULTILINE))
    return found


# On request


def wants(tree: Tree) -> list[tuple[bool, Target, bool]]:
    """(whether it needs to be known who is in which cgroup, target, each)."""
    partition = tree.make("a")
    return [
        (False, procfs.identify(os.getpid()), False),
        (False, Processes(), True),
        (False, Processes(Chosen()), True),
        (True, Processes(partition), True),
        (True, Processes(), False),
        (True, Processes(Chosen()), False),
        (True, Processes(partition), False),
        (True, Partitions(), True),
    ]


@KINDS
def test_cgroups_are_hooked_for_whom_they_matter(
    kind: type[AnySource], resource: Resource, reactor: Turned, tree: Tree
) -> None:
    with loaded(kind, reactor) as source:
        for by_cgroup, target, each in wants(tree):
            if not source.hears(resource, target, each):
                continue
            armed = source.arm(want(resource, target, ">= 1000000000000", each=each), Alarmed())
            assert hooked(), target
            assert hooked() & OF_CGROUPS == (OF_CGROUPS if by_cgroup else set()), (target, each)
            armed.disarm()
            source.engine.wait_detached()
            assert hooked() == set()


def test_hooks_on_cgroups_go_before_the_others(
    tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    child = helper()
    base = base_fds(child.pid)
    heard = Alarmed(level=base + 1)
    stays = source.arm(want(FDS, procfs.identify(child.pid), f">= {base + 1}"), heard)
    partition = tree.make("a")
    tree.put(child.pid, partition)
    for each in (True, False):
        goes = source.arm(want(FDS, Processes(partition), ">= 1", each=each), Alarmed(level=1))
        assert hooked() >= OF_CGROUPS
        goes.disarm()
        for name in ("shares", "totals", "containers"):
            assert source.engine._object.map(name).keys(ctypes.c_uint64 * 3) == [], name  # type: ignore[union-attr]
        reactor.until(lambda: not hooked() & OF_CGROUPS)
        assert hooked()
    child.do(f"for _ in range({EXCURSIONS}): os.close(os.dup(0))")
    settle(reactor)
    stays.disarm()
    assert heard.total == EXCURSIONS


def test_a_partition_is_heard_that_is_armed_beside_a_process(
    tree: Tree, reactor: Turned, source: BpfFds, helper: MakeHelper
) -> None:
    """Also where the process was in another one when partitions were last followed."""
    a, b = tree.make("a"), tree.make("b")
    child = helper()
    tree.put(child.pid, a)
    base = base_fds(child.pid)
    member = procfs.identify(child.pid)
    single = source.arm(want(FDS, member, f">= {base + 1}"), Alarmed(level=base + 1))
    before = source.arm(want(FDS, Processes(a), ">= 1", each=True), Alarmed(level=1))
    before.disarm()
    source.engine.wait_detached()
    tree.put(child.pid, b)
    in_a, in_b, sum_b = Alarmed(level=base + 1), Alarmed(level=base + 1), Alarmed(level=base + 1)
    armed = [
        source.arm(want(FDS, Processes(a), f">= {base + 1}", each=True), in_a),
        source.arm(want(FDS, Processes(b), f">= {base + 1}", each=True), in_b),
        source.arm(want(FDS, Processes(b), f">= {base + 1}"), sum_b),
    ]
    child.do("for _ in range(10): os.close(os.dup(0))")
    settle(reactor)
    assert (in_a.total, in_b.total, sum_b.total) == (0, 10, 10)
    tree.put(child.pid, a)
    child.do("for _ in range(10): os.close(os.dup(0))")
    settle(reactor)
    assert (in_a.total, in_b.total, sum_b.total) == (10, 10, 10)
    assert agrees(source, Kind.FDS, FDS, a, b)
    for one in (*armed, single):
        one.disarm()


def test_moves_are_hooked_for_whom_they_matter(reactor: Turned, tasks: BpfTasks) -> None:
    end = tasks.births(lambda _birth: None)
    assert "sched_process_fork" in hooked()
    assert not [name for name in hooked() if name.startswith("cgroup_")]
    end_moves = tasks.moves(lambda _process: None, lambda: None)
    assert {name for name in hooked() if name.startswith("cgroup_")} == {
        "cgroup_attach_task",
        "cgroup_transfer_tasks",
    }
    end_moves()
    reactor.until(lambda: not [name for name in hooked() if name.startswith("cgroup_")])
    assert "sched_process_fork" in hooked()
    end()


# While some are being detached


class Held:
    """Detaching stops at the first link, until `go`; `left`: how many there were still to detach then."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        self.left = -1
        original = libbpf.Links.destroy

        def destroy(links: libbpf.Links) -> None:
            name = next(iter(links))
            in_hand = libbpf.Links()
            in_hand.take_back(links, {name})
            self.began.set()
            # Who waits for it does so for so long, and is seen to.
            self.go.wait(PATIENCE)
            self.left = len(links)
            original(in_hand)
            original(links)

        patch.setattr(libbpf.Links, "destroy", destroy)

    def go_soon(self) -> None:
        """In a moment, in which somebody arms."""
        threading.Timer(0.3, self.go.set).start()


@pytest.fixture
def held(source: BpfFds, tasks: BpfTasks) -> Iterator[Held]:
    """After what is tried and measured, which detaches as well."""
    with pytest.MonkeyPatch.context() as patch:
        held = Held(patch)
        yield held
        held.go.set()
        source.engine.wait_detached()
        tasks.engine.wait_detached()


def test_arming_takes_back_what_is_still_attached(
    reactor: Turned, source: BpfFds, helper: MakeHelper, held: Held
) -> None:
    child = helper()
    base = base_fds(child.pid)
    condition = want(FDS, procfs.identify(child.pid), f">= {base + 1}")
    source.arm(condition, Alarmed()).disarm()
    attached = links()
    reactor.until(held.began.is_set)
    held.go_soon()
    heard = Alarmed(level=base + 1)
    armed = source.arm(condition, heard)
    assert links() == attached
    assert held.left == 0, "only what was in hand had to be attached again"
    child.do(f"for _ in range({EXCURSIONS}): os.close(os.dup(0))")
    settle(reactor)
    armed.disarm()
    assert heard.total == EXCURSIONS


def test_without_arming_all_is_detached(reactor: Turned, source: BpfFds, held: Held) -> None:
    source.arm(want(FDS, procfs.identify(os.getpid()), ">= 100000"), Alarmed()).disarm()
    attached = links()
    reactor.until(held.began.is_set)
    held.go_soon()
    reactor.until(lambda: links() == 0)
    assert held.left == attached - 1


def test_disarming_meanwhile_leaves_no_hook(reactor: Turned, source: BpfFds, held: Held) -> None:
    condition = want(FDS, procfs.identify(os.getpid()), ">= 100000")
    source.arm(condition, Alarmed()).disarm()
    reactor.until(held.began.is_set)
    held.go_soon()
    source.arm(condition, Alarmed()).disarm()
    reactor.until(lambda: links() == 0)
    assert reactor.next_time() == math.inf


def test_a_sum_armed_while_detaching(tree: Tree, reactor: Turned, tasks: BpfTasks, held: Held) -> None:
    partition = tree.make("a")
    single = tasks.arm(want(THREADS, procfs.identify(os.getpid()), ">= 1000000"), Alarmed())
    tasks.arm(want(PROCESSES, Processes(partition), ">= 1000000"), Alarmed()).disarm()
    reactor.until(held.began.is_set)
    held.go_soon()
    armed = tasks.arm(want(PROCESSES, Processes(partition), ">= 1000000"), Alarmed())
    settle(reactor)
    assert hooked() >= OF_CGROUPS
    assert agrees(tasks, Kind.PROCESSES, PROCESSES, partition)
    armed.disarm()
    single.disarm()


# Cost


@pytest.mark.parametrize("kind", [BpfFds, BpfRss, BpfTasks])
def test_the_cost_of_what_is_attached_is_told(kind: type[AnySource], reactor: Turned) -> None:
    with loaded(kind, reactor) as source:
        assert re.search(r": (< )?[1-9]\d* ns here$", source.cost), source.cost
        assert not any(source.engine.control.marks), "what was watched to measure is forgotten"
        assert source.engine._configs == {}
        assert hooked() == set()


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([100.0] * PAIRS, "100 ns here"),
        ([float(100 + number) for number in range(PAIRS)], f"{100 + PAIRS // 2} ns here"),
        ([-1e6, 1e9, *[100.0] * (PAIRS - 2)], "100 ns here"),
        ([0.2] * PAIRS, "1 ns here"),
        ([0.0] * PAIRS, "< 1 ns here"),
        ([-50.0] * PAIRS, "< 50 ns here"),
        ([-300.0] * (PAIRS // 2) + [400.0] * (PAIRS - PAIRS // 2), "< 400 ns here"),
    ],
)
def test_noise_is_told_from_a_cost(differences: list[float], words: str) -> None:
    assert in_words(differences) == words
