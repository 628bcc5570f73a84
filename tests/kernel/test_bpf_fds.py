"""Descriptors, heard by the kernel's own hooks."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_bpf_kit import Alarmed, base_fds, links, loaded, settle

from conftest import EXCURSIONS
from kernelkit import Goer, Turned, begin, turned, want
from limitfs.errors import Gone
from limitfs.hearing.bpf.layout import Kind
from limitfs.hearing.bpf.source import BpfFds
from limitfs.resources import members, procfs
from limitfs.resources.fds import Fds
from limitfs.resources.model import Process, Processes

FDS = Fds()

MakeHelper = Callable[..., Any]


@pytest.fixture(scope="module")
def loaded_once() -> Iterator[BpfFds]:
    """As in a daemon: loading takes an emulated machine longer than a test."""
    with turned() as reactor, loaded(BpfFds, reactor) as source:
        yield source


@pytest.fixture
def source(reactor: Turned, loaded_once: BpfFds) -> Iterator[BpfFds]:
    loaded_once.engine._reactor = reactor
    yield loaded_once
    loaded_once.engine.wait_detached()


WAYS = {
    "open": "os.close(os.open('/dev/null', 0))",
    "dup": "os.close(os.dup(0))",
    "dup2": "os.dup2(0, 900); os.close(900)",
    "socket": "socket.socket().close()",
    "memfd": "os.close(os.memfd_create('m'))",
    "eventfd": "os.close(os.eventfd(0))",
    "pidfd": "os.close(os.pidfd_open(os.getpid()))",
    "opendir": "os.listdir('/dev/shm')",
    "SCM_RIGHTS": "socket.send_fds(a, [b'x'], [0]); os.close(socket.recv_fds(b, 1, 1)[1][0])",
}


@pytest.mark.parametrize("way", WAYS)
def test_every_excursion_counts(reactor: Turned, source: BpfFds, helper: MakeHelper, way: str) -> None:
    child = helper("a, b = socket.socketpair()")
    child.do(f"for _ in range(10): {WAYS[way]}")
    base = base_fds(child.pid)
    heard = Alarmed(level=base + 1)
    armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {base + 1}"), heard)
    child.do(f"for _ in range({EXCURSIONS}): {WAYS[way]}")
    settle(reactor)
    armed.disarm()
    assert heard.total == EXCURSIONS
    assert heard.values()[-1] == base


RARE_WAYS = (
    "ioctl",
    "terminal",
    "pidfd_getfd",
    "int80",
    "int80_dup2",
    "int80_dup3",
    "shared",
    "io_uring",
    "io_uring_worker",
    "io_uring_polled",
    "io_uring_batch",
    "io_uring_linked",
)


@pytest.mark.parametrize("way", RARE_WAYS)
def test_every_rare_excursion_counts(
    reactor: Turned, source: BpfFds, goer: Callable[[str], Goer], way: str
) -> None:
    """And one level higher none."""
    child = goer(way)
    base = base_fds(child.pid)
    heard, above = Alarmed(level=base + 1), Alarmed(level=base + 2)
    listeners = (heard, above)
    target = procfs.identify(child.pid)
    armed = [source.arm(want(FDS, target, f">= {int(one.level)}"), one) for one in listeners]
    child.go(EXCURSIONS)
    settle(reactor)
    for one in armed:
        one.disarm()
    assert heard.total == EXCURSIONS
    assert heard.values()[-1] == base
    assert above.total == 0


def test_both_that_share_a_table_have_it(reactor: Turned, source: BpfFds, goer: Callable[[str], Goer]) -> None:
    child = goer("shared")
    partner = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text())
    both = [procfs.identify(child.pid), procfs.identify(partner)]
    level = base_fds(child.pid) + 1
    heard = Alarmed(level=level)
    armed = source.arm(want(FDS, Processes(), f">= {level}", each=True), heard)
    child.go(EXCURSIONS)
    settle(reactor)
    armed.disarm()
    assert [heard.alarms.get(member) for member in both] == [EXCURSIONS, EXCURSIONS]


def test_born_with_the_table_of_another(reactor: Turned, source: BpfFds, goer: Callable[[str], Goer]) -> None:
    child = goer("birth")
    heard = Alarmed(level=3000)
    armed = source.arm(want(FDS, Processes(), ">= 3000", each=True), heard)
    born = child.go(EXCURSIONS)
    settle(reactor)
    armed.disarm()
    assert len(born) == EXCURSIONS
    assert alarms_of(heard, [child.pid]) == [1]
    assert alarms_of(heard, born) == [1] * EXCURSIONS


def test_a_table_of_its_own_is_nobody_elses(reactor: Turned, source: BpfFds, goer: Callable[[str], Goer]) -> None:
    """The silent twin of `shared`."""
    child = goer("unshared")
    base = base_fds(child.pid)
    heard = Alarmed(level=base + 1)
    armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {base + 1}"), heard)
    child.go(EXCURSIONS)
    settle(reactor)
    armed.disarm()
    assert heard.total == 0


@pytest.mark.parametrize("make", ["os.pipe()", "[s.detach() for s in socket.socketpair()]"])
def test_two_at_once(reactor: Turned, source: BpfFds, helper: MakeHelper, make: str) -> None:
    child = helper()
    base = base_fds(child.pid)
    heard = Alarmed(level=base + 2)
    armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {base + 2}"), heard)
    child.do(f"for _ in range({EXCURSIONS}): [os.close(fd) for fd in {make}]")
    settle(reactor)
    armed.disarm()
    assert heard.total == EXCURSIONS


def test_four_threads_in_turn(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper(
        "lock = threading.Lock()\n"
        "def work(count):\n"
        "    for _ in range(count):\n"
        "        with lock: os.close(os.dup(0))\n"
        "def all(count):\n"
        "    threads = [threading.Thread(target=work, args=(count,)) for _ in range(4)]\n"
        "    [t.start() for t in threads]; [t.join() for t in threads]"
    )
    base = base_fds(child.pid)
    heard = Alarmed(level=base + 1)
    armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {base + 1}"), heard)
    child.do(f"all({EXCURSIONS // 4})")
    settle(reactor)
    armed.disarm()
    assert heard.total == EXCURSIONS


def test_four_threads_at_will_end_in_the_true_state(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper(
        "def work():\n"
        "    for _ in range(5000): os.close(os.dup(0))\n"
        "def all():\n"
        "    threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "    [t.start() for t in threads]; [t.join() for t in threads]"
    )
    base = base_fds(child.pid)
    heard = Alarmed(level=base + 3)
    armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {base + 3}"), heard)
    child.do("all()")
    settle(reactor)
    armed.disarm()
    assert heard.values()[-1] < base + 3


def alarms_of(heard: Alarmed, pids: list[int]) -> list[int]:
    """Other processes of the machine may have many descriptors too."""
    wanted = set(pids)
    return [count for who, count in heard.alarms.items() if isinstance(who, Process) and who.pid in wanted]


def test_children_inherit(reactor: Turned, source: BpfFds, helper: MakeHelper, tmp_path: Path) -> None:
    child = helper("born = []")
    child.open_files(3000)  # as hardly anybody else here has
    heard = Alarmed(level=3000)
    armed = source.arm(want(FDS, Processes(), ">= 3000", each=True), heard)
    child.do(f"for _ in range({EXCURSIONS}): born.append(os.fork() or os._exit(0)); os.waitpid(born[-1], 0)")
    settle(reactor)
    armed.disarm()
    child.do(f"open({str(tmp_path / 'born')!r}, 'w').write(' '.join(map(str, born)))")
    born = [int(pid) for pid in (tmp_path / "born").read_text().split()]
    assert len(born) == EXCURSIONS
    assert alarms_of(heard, [child.pid]) == [1]
    assert alarms_of(heard, born) == [1] * EXCURSIONS
    assert set(born) <= {who.pid for who in heard.ended if isinstance(who, Process)}


def test_one_below_is_silent_and_wakes_nobody(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    base = base_fds(child.pid)
    heard = Alarmed(level=base + 2)
    armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {base + 2}"), heard)
    settle(reactor)
    child.do(f"for _ in range({EXCURSIONS}): os.close(os.dup(0))")
    quiet = reactor.quiet(0.2)
    armed.disarm()
    assert quiet == 0
    assert heard.values() == [base]


def test_beyond_when_armed(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    base = base_fds(child.pid)
    heard = Alarmed(level=base)
    armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {base}"), heard)
    settle(reactor)
    armed.disarm()
    assert heard.values() == [base]


@pytest.mark.parametrize(
    ("condition", "turns"),
    [
        (">= {base} + 5", [5, 4]),
        ("> {base} + 4", [5, 4]),
        (">= {base} + 5 clear {base} + 2", [5, 2]),
        ("< {base} + 1", [0, 1, 0]),
        ("<= {base}", [0, 1, 0]),
    ],
)
def test_operators_and_hysteresis(
    reactor: Turned, source: BpfFds, helper: MakeHelper, condition: str, turns: list[int]
) -> None:
    child = helper()
    base = base_fds(child.pid)
    text = " ".join(condition.format(base=base).replace(" + ", "+").split())
    text = " ".join(str(sum(map(int, word.split("+")))) if "+" in word else word for word in text.split())
    heard = Alarmed()
    armed = source.arm(want(FDS, procfs.identify(child.pid), text), heard)
    settle(reactor)
    child.open_files(6)
    child.close_files(6)
    settle(reactor)
    armed.disarm()
    first = [] if turns[0] == 0 else [0]
    assert [value - base for value in heard.values()] == first + turns


def test_percent_of_each_limit(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    heard = Alarmed(level=80)
    armed = source.arm(want(FDS, Processes(), ">= 80%", each=True), heard)
    child = helper("import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))")
    base = base_fds(child.pid)
    child.open_files(79 - base)
    settle(reactor)
    member = procfs.identify(child.pid)
    assert member not in heard.alarms
    child.open_files(1)
    settle(reactor)
    armed.disarm()
    assert heard.values(member) == [80]


def test_change(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    base = base_fds(child.pid)
    heard = Alarmed()
    armed = source.arm(want(FDS, procfs.identify(child.pid), "change"), heard)
    child.open_files(2)
    child.close_files(1)
    settle(reactor)
    armed.disarm()
    assert heard.values() == [base, base + 1, base + 2, base + 1]


def test_hold_hears_the_level_and_the_clear_level(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    base = base_fds(child.pid)
    heard = Alarmed()
    text = f">= {base + 5} clear {base + 2} for 10s"
    armed = source.arm(want(FDS, procfs.identify(child.pid), text), heard)
    child.open_files(6)
    child.close_files(6)
    settle(reactor)
    armed.disarm()
    seen = [value - base for value in heard.values()]
    assert 5 in seen
    assert 4 in seen
    assert 2 in seen


def test_born_later(reactor: Turned, source: BpfFds) -> None:
    heard = Alarmed(level=200)
    armed = source.arm(want(FDS, Processes(), ">= 200", each=True), heard)
    code = "import os\nfor _ in range(200): os.dup(0)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code])
    child.wait()
    reactor.until(lambda: any(member.pid == child.pid for member in heard.ended if isinstance(member, Process)))
    armed.disarm()
    [member] = [m for m in heard.alarms if isinstance(m, Process) and m.pid == child.pid]
    assert heard.alarms[member] == 1
    assert heard.witnesses[-1].tid == child.pid
    assert heard.witnesses[-1].comm.startswith("python")


def test_sum_over_all(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    """The kernel's running total is that of /proc, whatever else the machine does meanwhile."""

    def agrees() -> bool:
        before = source.engine.total(Kind.FDS)
        truth = members.usage(FDS, Processes())
        return before == truth == source.engine.total(Kind.FDS)

    child = helper()
    heard = Alarmed()
    armed = source.arm(want(FDS, Processes(), "change"), heard)
    try:
        reactor.until(agrees)
        child.open_files(5000)
        reactor.until(agrees)
        settle(reactor)
        assert heard.values()[-1] >= 5000
        child.end()
        reactor.until(agrees)
    finally:
        armed.disarm()


def test_exec_closes(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    child.open_files(50)
    heard = Alarmed(level=50)
    armed = source.arm(want(FDS, procfs.identify(child.pid), ">= 50"), heard)
    settle(reactor)
    begin(child, "os.execv('/bin/sleep', ['sleep', '60'])")
    reactor.until(lambda: heard.values()[-1] < 50)
    armed.disarm()


def test_the_end_is_told_once(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    target = procfs.identify(child.pid)
    heard = Alarmed(level=1000)
    armed = source.arm(want(FDS, target, ">= 1000 clear 10 for 1s"), heard)
    child.end()
    reactor.until(lambda: heard.ended)
    settle(reactor)
    armed.disarm()
    assert heard.ended == [target]
    with pytest.raises(Gone):
        source.arm(want(FDS, target, ">= 1000"), heard)


def test_watches_do_not_disturb_each_other(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    base = base_fds(child.pid)
    target = procfs.identify(child.pid)
    listeners = [Alarmed(level=base + n) for n in range(1, 6)]
    armed = [source.arm(want(FDS, target, f">= {base + n}"), heard) for n, heard in enumerate(listeners, 1)]
    child.open_files(3)
    settle(reactor)
    armed[0].disarm()
    child.close_files(3)
    child.open_files(3)
    settle(reactor)
    for one in armed:
        one.disarm()
        one.disarm()
    assert [heard.total for heard in listeners] == [1, 2, 2, 0, 0]


def test_one_of_two_watches_goes(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child, other = helper(), helper()
    targets = [procfs.identify(one.pid) for one in (child, child, other)]
    heard = [Alarmed(level=base_fds(target.pid) + 1) for target in targets]
    first, second, third = (
        source.arm(want(FDS, target, f">= {who.level}"), who) for target, who in zip(targets, heard, strict=True)
    )
    first.disarm()
    child.do("os.close(os.dup(0))")
    other.end()
    settle(reactor)
    assert [who.total for who in heard] == [0, 1, 0]
    third.disarm()
    assert any(source.engine.control.marks), "one is watched"
    second.disarm()
    assert not any(source.engine.control.marks), "nobody is"


def test_disarmed_hears_nothing_and_leaves_no_hook(reactor: Turned, source: BpfFds, helper: MakeHelper) -> None:
    child = helper()
    base = base_fds(child.pid)
    assert links() == 0
    heard = Alarmed(level=base + 1)
    armed = source.arm(want(FDS, procfs.identify(child.pid), f">= {base + 1}"), heard)
    assert links() > 0
    armed.disarm()
    reactor.until(lambda: links() == 0)
    child.open_files(5)
    assert reactor.quiet(0.1) == 0
    assert heard.total == 0


def test_says_what_it_is(source: BpfFds) -> None:
    assert source.name in ("fd_install", "sys_exit")
    assert source.guarantee == "exact"
    assert source.cost.endswith("ns here")


def test_absent_objects_are_missing(reactor: Turned, tmp_path: Any) -> None:
    missing = BpfFds(reactor, tmp_path).missing()
    assert missing is not None
    assert "libbpf-dev" in missing
    assert os.listdir(tmp_path) == []
