"""What limitfs costs, as ratios in one run: `python tests/bench/run.py [--minute SECONDS] [PART…]`.

Parts: requests, thousand, arming, kept, latency, wakeups. Every figure in docs/performance.md is a line of this
program's output. Times are medians; a ratio compares with the same call on /proc, measured in turns with it.
Needs root, and the packages of the test environment. See docs/performance.md for what bounds the figures.
"""

import argparse
import contextlib
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from conftest import Helper, Mount, mounted

ROUNDS = 7


def median_us(call: Callable[[], object], times: int) -> float:
    """Microseconds for one call, the median of several rounds."""
    rounds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(times):
            call()
        rounds.append((time.perf_counter() - begun) / times * 1e6)
    return statistics.median(rounds)


def pair(name: str, ours: Callable[[], object], theirs: Callable[[], object], times: int) -> None:
    """One line: our call, the same on /proc, and the ratio."""
    ours(), theirs()
    rows = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(times):
            ours()
        middle = time.perf_counter()
        for _ in range(times):
            theirs()
        end = time.perf_counter()
        rows.append(((middle - begun) / times * 1e6, (end - middle) / times * 1e6))
    mine, kernel = (statistics.median(row[i] for row in rows) for i in (0, 1))
    ratio = statistics.median(row[0] / row[1] for row in rows)
    print(f"{name:<44} {mine:9.1f} us   /proc {kernel:8.1f} us   ratio {ratio:7.1f}")


def slurp(path: str | Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


class Cost:
    """What the daemon used between two looks: CPU seconds, voluntary switches (wake-ups)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.cpu, self.switches = self._look()

    def _look(self) -> tuple[float, int]:
        cpu = switches = 0.0
        for task in os.listdir(f"/proc/{self.pid}/task"):
            try:
                cpu += int(Path(f"/proc/{self.pid}/task/{task}/schedstat").read_text().split()[0]) / 1e9
                status = Path(f"/proc/{self.pid}/task/{task}/status").read_text()
            except OSError:
                continue
            switches += int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
        return cpu, int(switches)

    def since(self) -> tuple[float, int]:
        cpu, switches = self._look()
        return cpu - self.cpu, switches - self.switches


def resident(pid: int) -> float:
    """MiB, without what is shared with other processes (VmRSS − RssFile counts libraries once)."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return int(fields["VmRSS"].split()[0]) / 1024


@contextlib.contextmanager
def sleepers(count: int) -> Iterator[list[int]]:
    """That many idle processes."""
    with tempfile.NamedTemporaryFile("w+") as pids:
        shell = subprocess.Popen(
            ["sh", "-c", f"for i in $(seq {count}); do sleep 100000 & echo $!; done >{pids.name}; echo; wait"],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert shell.stdout is not None
        shell.stdout.readline()
        try:
            yield [int(line) for line in Path(pids.name).read_text().split()]
        finally:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
            shell.stdout.close()


def requests(limits: Mount) -> None:
    pid = os.getpid()
    root = limits.root
    pair(
        "open-read-close process/PID/fds/usage",
        lambda: slurp(f"{root}/process/{pid}/fds/usage"),
        lambda: slurp(f"/proc/{pid}/status"),
        300,
    )
    pair(
        "open-read-close system/available/usage",
        lambda: slurp(f"{root}/system/available/usage"),
        lambda: slurp("/proc/meminfo"),
        300,
    )
    pair(
        "stat process/PID/fds/usage",
        lambda: os.stat(f"{root}/process/{pid}/fds/usage"),
        lambda: os.stat(f"/proc/{pid}/status"),
        300,
    )
    pair(
        "stat system/available/usage",
        lambda: os.stat(f"{root}/system/available/usage"),
        lambda: os.stat("/proc/meminfo"),
        1000,
    )
    pair(
        "readdir process/PID", lambda: os.listdir(f"{root}/process/{pid}"), lambda: os.listdir(f"/proc/{pid}"), 100
    )


def thousand(limits: Mount) -> None:
    with sleepers(1000) as pids:
        pair("ls process, 1,000 processes", lambda: os.listdir(limits / "process"), lambda: os.listdir("/proc"), 3)
        pair(
            "read process/*/fds/usage, 1,000 processes",
            lambda: [slurp(f"{limits.root}/process/{pid}/fds/usage") for pid in pids],
            lambda: [os.stat(f"/proc/{pid}/fd").st_size for pid in pids],
            1,
        )
        top = median_us(lambda: slurp(limits / "process/fds/top"), 3)
        print(f"{'read process/fds/top, 1,000 processes':<44} {top:9.1f} us")
    print(f"{'resident after that':<44} {resident(limits.daemon.pid):9.1f} MiB")


def arming(limits: Mount) -> None:
    """10,000 thresholds: ten named watchers on each of 1,000 processes."""
    with sleepers(1000) as pids:
        begun = time.perf_counter()
        for pid in pids:
            limits.write(f"process/{pid}/cputime/threshold", "1h")
        own = time.perf_counter() - begun
        print(f"{'arming 1,000 cputime thresholds':<44} {1000 / own:9.0f} a second")
        cost = Cost(limits.daemon.pid)
        begun = time.perf_counter()
        for pid in pids:
            for name in range(9):
                os.mkdir(f"{limits.root}/process/{pid}/cputime/w{name}")
                limits.write(f"process/{pid}/cputime/w{name}/threshold", "1h")
        took = time.perf_counter() - begun
        print(f"{'making and arming 9,000 named watchers':<44} {9000 / took:9.0f} a second")
        print(f"{'  daemon CPU for each':<44} {cost.since()[0] / 9000 * 1e6:9.1f} us")
        print(f"{'armed':<44} {limits.state('state')['armed']:>9}")
        print(f"{'resident with 10,000 armed':<44} {resident(limits.daemon.pid):9.1f} MiB")


def kept(limits: Mount) -> None:
    """What it costs to keep thresholds for after a crash: armed in turns with a mount that keeps nothing."""
    with (
        tempfile.TemporaryDirectory() as directory,
        mounted(Path(directory), "state=none") as forgets,
        sleepers(100) as pids,
    ):
        rows = []
        for turn in range(3 * ROUNDS):
            took = []
            for mount in (limits, forgets):
                cost = Cost(mount.daemon.pid)
                begun = time.perf_counter()
                for pid in pids:
                    mount.write(f"process/{pid}/cputime/threshold", f"{turn + 1}h")
                took += [(time.perf_counter() - begun) / len(pids) * 1e6, cost.since()[0] / len(pids) * 1e6]
            rows.append(took)
    with_, cpu_with, without, cpu_without = (statistics.median(row[i] for row in rows) for i in range(4))
    ratio = statistics.median(row[0] / row[2] for row in rows)
    print(f"{'arming, kept for after a crash':<44} {with_:9.1f} us   not {without:8.1f} us   ratio {ratio:7.2f}")
    print(f"{'  daemon CPU':<44} {cpu_with:9.1f} us   not {cpu_without:8.1f} us")
    begun = time.perf_counter()
    limits.daemon.terminate()
    limits.daemon.wait()
    print(f"{'from SIGTERM to the end, 100 armed':<44} {(time.perf_counter() - begun) * 1000:9.1f} ms")


def clocked(helper: Helper, code: str, before: str = "") -> int:
    """Have `before` and then `code` done there; when `code` began, CLOCK_MONOTONIC ns."""
    with tempfile.NamedTemporaryFile("r") as told:
        helper.do(f"{before or None}; t = time.monotonic_ns(); {code}; open({told.name!r}, 'w').write(str(t))")
        return int(told.read())


def _wait_for_alarm(fd: int, poller: select.poll, woke: list[int]) -> None:
    while True:
        assert poller.poll(20_000), "no wake"
        now = time.monotonic_ns()
        if b"crossing=clear" not in os.pread(fd, 1 << 20, 0).splitlines()[-1]:
            woke.append(now)
            return


def _wake_us(
    limits: Mount, path: str, before: Callable[[], object], cross: Callable[[], int], times: int = 15
) -> None:
    """Microseconds from `cross` (which returns CLOCK_MONOTONIC ns of the crossing) to the poller's wake."""
    fd = os.open(limits / path, os.O_RDONLY)
    poller = select.poll()
    poller.register(fd, select.POLLPRI)
    delays = []
    for _ in range(times):
        before()
        os.pread(fd, 1 << 20, 0)
        woke: list[int] = []
        waiter = threading.Thread(target=_wait_for_alarm, args=(fd, poller, woke))
        waiter.start()
        crossed = cross()
        waiter.join()
        delays.append((woke[0] - crossed) / 1000)
    os.close(fd)
    state = path.replace("event", "state")
    told(path.split("/", 2)[-1], limits.state(state)["source"], delays)


def told(what: str, source: str, delays: list[float]) -> None:
    """One line of latencies, in microseconds."""
    delays.sort()
    print(
        f"{f'latency {what} by {source}':<44} median {statistics.median(delays):9.0f} us"
        f"   worst {delays[-1]:9.0f} us"
    )


def latency(limits: Mount) -> None:
    """From the moment of crossing to the return of poll(2), for each source."""
    helper = Helper()
    process = f"process/{helper.pid}"
    try:
        for hearing in ("auto", "sampled"):
            limits.write(f"{process}/fds/hearing", hearing)
            _fds_latency(limits, helper, f"{process}/fds")
        _cputime_latency(limits, helper, f"{process}/cputime")
        _cputime_latency(limits, helper, f"{process}/thread/{helper.pid}/cputime")
        _threads_latency(limits, helper, f"{process}/threads")
        _threads_latency(limits, helper, "system/threads")
        _psi_latency(limits)
    finally:
        helper.end()


def _fds_latency(limits: Mount, helper: Helper, path: str) -> None:
    limits.write(f"{path}/threshold", str(helper.fds() + 1))

    def back() -> None:
        helper.do("[os.close(held.pop()) for _ in range(len(held))]")
        time.sleep(0.6)

    _wake_us(limits, f"{path}/event", back, lambda: clocked(helper, "held.append(os.open('/dev/null', 0))"))
    back()
    limits.write(f"{path}/threshold", "off")


def _cputime_latency(limits: Mount, helper: Helper, path: str) -> None:
    clock = "thread_time" if "/thread/" in path else "process_time"
    burn = f"exec('while time.{clock}() < {{}}: pass')"
    level = 0.0

    def arm() -> None:
        nonlocal level
        level = round(float(limits.read(f"{path}/usage")) + 0.05, 3)
        limits.write(f"{path}/threshold", f"{level:.3f}s")

    def cross() -> int:
        # The kernel looks at CPU timers at its tick, so the process must still run then.
        return clocked(helper, burn.format(level + 0.1), burn.format(level))

    _wake_us(limits, f"{path}/event", arm, cross)
    limits.write(f"{path}/threshold", "off")


def _threads_latency(limits: Mount, helper: Helper, path: str) -> None:
    """Any change: thus also on a machine whose other threads come and go."""
    limits.write(f"{path}/threshold", "change")
    helper.do("stop = threading.Event()")

    def back() -> None:
        helper.do("stop.set(); time.sleep(0.2); stop.clear()")

    _wake_us(limits, f"{path}/event", back, lambda: clocked(helper, "threading.Thread(target=stop.wait).start()"))
    helper.do("stop.set()")
    limits.write(f"{path}/threshold", "off")


def _psi_latency(limits: Mount) -> None:
    """How much later limitfs' poller wakes than one of /proc/pressure itself, with the same trigger."""
    paths = ("/proc/pressure/cpu", limits / "system/cpu_pressure/event")
    fds = [os.open(path, os.O_RDWR | os.O_NONBLOCK) for path in paths]
    for fd in fds:
        os.write(fd, b"some 100000 2000000\0")
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    woke: list[list[int]] = [[], []]
    try:
        waiters = [threading.Thread(target=_count_triggers, args=pair) for pair in zip(fds, woke, strict=True)]
        for waiter in waiters:
            waiter.start()
        for waiter in waiters:
            waiter.join()
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
        for fd in fds:
            os.close(fd)
    told("cpu_pressure after /proc", "psi", [(ours - theirs) / 1000 for theirs, ours in zip(*woke, strict=True)])


def _count_triggers(fd: int, woke: list[int]) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLPRI)
    while len(woke) < 6:
        assert poller.poll(20_000), "no trigger"
        woke.append(time.monotonic_ns())


def wakeups(limits: Mount, seconds: float) -> None:
    """Over a minute of idling: with nothing, then 1, 100 and 1,000 thresholds armed."""
    for resource, condition in (("cputime", "1h"), ("fds", "1000"), ("virtual", "1000G")):
        with sleepers(1000) as pids:
            for armed in (0, 1, 100, 1000):
                for pid in pids[:armed]:
                    limits.write(f"process/{pid}/{resource}/threshold", condition)
                source = limits.state(f"process/{pids[0]}/{resource}/state")["source"]
                time.sleep(12)  # idle worker threads end after 10 s
                cost = Cost(limits.daemon.pid)
                time.sleep(seconds)
                cpu, switches = cost.since()
                print(
                    f"{f'{armed} armed, {resource} by {source}, {seconds:g} s':<44} {switches:6} wake-ups"
                    f"  {cpu / seconds * 100:8.4f} % CPU  {resident(limits.daemon.pid):6.1f} MiB"
                )
        time.sleep(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--minute", type=float, default=60.0, help="seconds to idle for each wake-up figure")
    parser.add_argument("-o", dest="options", action="append", default=[], help="mount option")
    chosen = parser.parse_args()
    parts: dict[str, Callable[[Mount], None]] = {
        "requests": requests,
        "thousand": thousand,
        "arming": arming,
        "kept": kept,
        "latency": latency,
        "wakeups": lambda limits: wakeups(limits, chosen.minute),
    }
    for part in chosen.parts or parts:
        with tempfile.TemporaryDirectory() as directory, mounted(Path(directory), *chosen.options) as limits:
            print(f"== {part}")
            print(f"{'resident at start':<44} {resident(limits.daemon.pid):9.1f} MiB")
            parts[part](limits)


if __name__ == "__main__":
    main()
