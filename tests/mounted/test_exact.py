"""No crossing is missed, however short: counts through a real mount, by kernel hooks.

Every case drives a process to its threshold and straight back many times; `alarms` must count each time, and
each has its line or is counted in `lost`. One below the threshold is the silent twin.
"""

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import EXCURSIONS, Helper, Mount, lines_of
from limitfs.space.eventlog import RETAINED

Make = Callable[..., Helper]

BURSTS = min(1000, EXCURSIONS)
"""Of threads and processes."""


@pytest.fixture(autouse=True)
def hooks(limits: Mount) -> None:
    """Where this kernel lets nothing be hooked, `features` says so; then there is nothing to count."""
    exact = [line for line in limits.read("features").splitlines() if line.startswith("fds\tprocess/PID\t")]
    if "\texact\t" not in exact[0]:
        pytest.skip(
            next((line for line in limits.read("features").splitlines() if line.startswith("# bpf")), "no hooks")
        )


WAYS = {
    "open": ("", "os.close(os.open('/dev/null', 0))"),
    "dup": ("", "os.close(os.dup(0))"),
    "socket": ("", "socket.socket().close()"),
    "eventfd": ("", "os.close(os.eventfd(0))"),
    "memfd": ("", "os.close(os.memfd_create('x'))"),
    "accept-like pair": ("", "a, b = socket.socketpair(); a.close(); b.close()"),
    "passed": (
        "left, right = socket.socketpair()\nnull = os.open('/dev/null', 0)",
        "socket.send_fds(left, [b'x'], [null]); m = socket.recv_fds(right, 1, 1); os.close(m[1][0])",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_excursion_counts(limits: Mount, helper: Make, way: str) -> None:
    setup, once = WAYS[way]
    child = helper(setup)
    path = f"process/{child.pid}/fds"
    width = 2 if "pair" in way else 1
    limits.write(f"{path}/threshold", str(child.fds() + width))
    child.do(f"exec({f'for _ in range({EXCURSIONS}): {once}'!r})")
    _expect(limits, path, EXCURSIONS)


def test_each_alarm_has_its_line(limits: Mount, helper: Make) -> None:
    """In bursts that the event file can retain."""
    child = helper()
    path = f"process/{child.pid}/fds"
    for _ in range(4):
        limits.write(f"{path}/threshold", "off")
        limits.write(f"{path}/threshold", str(child.fds() + 1))
        before = {line["seq"] for line in lines_of(limits.read(f"{path}/event"))}
        child.do("exec('for _ in range(250): os.close(os.dup(0))')")
        limits.wait_for(lambda: limits.state(f"{path}/state")["alarms"] == "250")
        new = [line for line in lines_of(limits.read(f"{path}/event")) if line["seq"] not in before]
        lost = int(limits.state(f"{path}/state")["lost"])
        assert [line["crossing"] for line in new].count("alarm") + lost == 250


def test_a_storm_that_nobody_keeps_up_with_counts(limits: Mount, helper: Make) -> None:
    """More at once than the ring takes, and the daemon is stopped meanwhile."""
    child = helper()
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", str(child.fds() + 1))
    limits.daemon.send_signal(signal.SIGSTOP)
    try:
        child.do("exec('for _ in range(5000): os.close(os.dup(0))')")
    finally:
        limits.daemon.send_signal(signal.SIGCONT)
    _expect(limits, path, 5000)
    assert int(limits.state(f"{path}/state")["lost"]) > 0


@pytest.mark.parametrize("way", WAYS)
def test_one_below_never_counts(limits: Mount, helper: Make, way: str) -> None:
    setup, once = WAYS[way]
    child = helper(setup)
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", str(child.fds() + (2 if "pair" in way else 1) + 1))
    child.do(f"exec({f'for _ in range({EXCURSIONS}): {once}'!r})")
    _expect(limits, path, 0)


def test_four_threads_at_once(limits: Mount, helper: Make) -> None:
    """Each thread holds its descriptor while it is alone at the level, so the excursions are countable."""
    child = helper("turn = threading.Lock()")
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", str(child.fds() + 1))
    quarter = EXCURSIONS // 4
    child.do(f"exec('def work():\\n for _ in range({quarter}):\\n  with turn: os.close(os.dup(0))')")
    child.do("workers = [threading.Thread(target=work) for _ in range(4)]")
    child.do("[w.start() for w in workers]; [w.join() for w in workers]")
    _expect(limits, path, quarter * 4)


def test_inherited_by_fork(limits: Mount, helper: Make) -> None:
    """A child that is born with as many as the threshold is heard, though it lives for a moment."""
    child = helper()
    child.open_files(3000)  # as nobody else here has
    limits.write("process/fds/threshold", "3000")
    try:
        child.do(f"for _ in range({EXCURSIONS}): os.waitpid(os.fork() or os._exit(0), 0)")
        limits.wait_for(lambda: int(limits.state("process/fds/state")["alarms"]) >= EXCURSIONS + 1)
        assert int(limits.state("process/fds/state")["alarms"]) == EXCURSIONS + 1
        lines = lines_of(limits.read("process/fds/event"))
        born = [line for line in lines if line["crossing"] == "alarm" and line.get("pid") != str(child.pid)]
        assert {line["comm"] for line in born[-100:]} == {born[-1]["comm"]}
        assert int(born[-1]["value"]) >= 3000
    finally:
        limits.write("process/fds/threshold", "off")


def test_short_lives_are_heard_with_name_and_value(limits: Mount, helper: Make) -> None:
    """Processes that live for a few milliseconds, each crossing once; the last line has the peak."""
    child = helper()
    limits.write("process/fds/threshold", "90")
    try:
        start = int(limits.state("process/fds/state")["alarms"])
        child.do(
            f"exec('for _ in range({BURSTS}):\\n pid = os.fork()\\n"
            " if not pid: [os.dup(0) for _ in range(100)]; os._exit(0)\\n os.waitpid(pid, 0)')"
        )
        limits.wait_for(lambda: int(limits.state("process/fds/state")["alarms"]) - start >= BURSTS)
        assert int(limits.state("process/fds/state")["alarms"]) - start == BURSTS
        lines = lines_of(limits.read("process/fds/event"))
        alarm = [one for one in lines if one["crossing"] == "alarm"][-1]
        limits.wait_for(lambda: "crossing=gone" in _last(limits, "process/fds", alarm["pid"]))
        (gone,) = lines_of(_last(limits, "process/fds", alarm["pid"]))
        assert alarm["value"] == "90"
        assert gone["value"] == str(child.fds() + 100)
        for line in (alarm, gone):
            assert line["comm"].startswith("python")
            assert line["guarantee"] == "exact"
    finally:
        limits.write("process/fds/threshold", "off")


def test_thread_bursts(limits: Mount, helper: Make) -> None:
    """join() of a thread returns before the kernel's thread is gone, so the child waits for that."""
    child = helper()
    path = f"process/{child.pid}/threads"
    child.do("alone = lambda: len(os.listdir('/proc/self/task')) == 1")
    burst = "t = threading.Thread(target=int); t.start(); t.join()\n while not alone(): pass"
    for level, alarms in ((3, 0), (2, BURSTS)):
        limits.write(f"{path}/threshold", str(level))
        child.do(f"exec({f'for _ in range({BURSTS}):{chr(10)} {burst}'!r})")
        _expect(limits, path, alarms)


def test_memory_bursts(limits: Mount, helper: Make) -> None:
    """8 MiB come and go, in far less than any sampling period."""
    bursts = BURSTS // 2
    child = helper("size = 8 << 20")
    path = f"process/{child.pid}/memory"
    now = int(limits.read(f"{path}/usage"))
    limits.write(f"{path}/threshold", f">= {now + (6 << 20)} clear {now + (2 << 20)}")
    assert limits.state(f"{path}/state")["guarantee"] == "exact"
    child.do("page = b'x' * 4096")
    child.do("private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS")
    burst = "a = mmap.mmap(-1, size, private); [a.write(page) for _ in range(2048)]; a.close()"
    child.do(f"exec({f'for _ in range({bursts}): {burst}'!r})")
    _expect(limits, path, bursts)


def test_declined_hooks_are_not_used(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/hearing", "sampled")
    limits.write(f"{path}/threshold", str(child.fds() + 1))
    state = limits.state(f"{path}/state")
    assert state["source"] == "sampled"
    assert state["guarantee"] == "sampled"


def test_not_armed_is_silent(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    child.do("[os.close(os.dup(0)) for _ in range(1000)]")
    assert limits.read(f"{path}/event") == ""
    assert limits.state(f"{path}/state")["alarms"] == "0"


def _expect(limits: Mount, path: str, alarms: int) -> None:
    """Every alarm is counted; each has its line, or is counted as without one."""
    limits.wait_for(lambda: int(limits.state(f"{path}/state")["alarms"]) >= alarms)
    state = limits.state(f"{path}/state")
    assert int(state["alarms"]) == alarms
    assert state["state"] == "clear"
    lines = lines_of(limits.read(f"{path}/event"))
    written = [line for line in lines if line["crossing"] == "alarm"]
    assert len(written) + int(state["lost"]) <= alarms
    if len(lines) < RETAINED:
        assert len(written) + int(state["lost"]) == alarms


def _last(limits: Mount, path: str, pid: str) -> str:
    """The last line about a process."""
    return [line for line in limits.read(f"{path}/event").splitlines() if f" pid={pid} " in line][-1]


SWAP_MIB = 64


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[None]:
    """Room to swap to, which many machines have not."""
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        yield
        return
    room = tmp_path / "swap"
    room.touch(0o600)
    # Without holes, as swapon(8) wants it.
    room.write_bytes(bytes(SWAP_MIB << 20))
    subprocess.run(["mkswap", room], check=True, capture_output=True)
    done = subprocess.run(["swapon", room], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no swap can be had here: {done.stderr.strip()}")
    yield
    subprocess.run(["swapoff", room], check=True)


@pytest.mark.usefixtures("swap")
def test_swap(limits: Mount, helper: Make) -> None:
    """Pages that are pushed out, see MADV_PAGEOUT in madvise(2), and come back."""
    child = helper(
        "m = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nm.write(b'x' * len(m))"
    )
    path = f"process/{child.pid}/swap"
    limits.write(f"{path}/threshold", "8M clear 4M")
    (limits / f"{path}/above").mkdir()
    limits.write(f"{path}/above/threshold", "20M")
    for _ in range(5):
        child.do("m.madvise(21)")
        child.do("held = [m[at] for at in range(0, len(m), 4096)]")
    _expect(limits, path, 5)
    _expect(limits, f"{path}/above", 0)
    lines = [(line["crossing"], line["value"]) for line in lines_of(limits.read(f"{path}/event"))]
    assert lines == [("alarm", str(8 << 20)), ("clear", str(4 << 20))] * 5
