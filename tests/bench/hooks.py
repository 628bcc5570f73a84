"""What the kernel's hooks cost, and how fast they ring: `python tests/bench/hooks.py [--rounds N] [PART…]`.

Parts: cost, latency, idle. `cost` compares short runs of one operation in turns: limitfs not mounted, mounted and
nothing armed, armed on another process, armed on the process itself; also next to hooks of the descriptor table
that do nothing, and where there is auditctl(8), to one audit rule that is never triggered, as the rlimit-events
patches measured it. Medians, and the median of the differences within one round. Needs root and gcc.
"""

import argparse
import contextlib
import os
import select
import shutil
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

from run import Cost, sleepers

from conftest import Helper, Mount, mounted
from limitfs.hearing.bpf import libbpf
from limitfs.hearing.bpf.build import compile_program

COUNTS = {
    "getppid": 20000,
    "dup_close": 10000,
    "open_hot": 5000,
    "open_cold": 300,
    "page_fault": 200,
    "fork_exit": 50,
    "fork_exec": 20,
}
RESOURCES = {
    "fds": ("getppid", "dup_close", "open_hot", "open_cold", "fork_exit"),
    "memory": ("page_fault", "fork_exit"),
}
RESOURCES["threads"] = ("getppid", "fork_exit")
NEVER = {"fds": "100000", "memory": "1000G", "threads": "100000"}


class Worker:
    """A process that does what is measured."""

    def __init__(self, program: Path, *arguments: str) -> None:
        command = [program, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, name: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name} {COUNTS[name]}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def compiled(directory: Path, name: str) -> Path:
    """A program of this directory."""
    program = directory / name
    subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).parent / f"{name}.c"], check=True)
    return program


@contextlib.contextmanager
def worker(directory: Path, *arguments: str) -> Iterator[Worker]:
    made = Worker(compiled(directory, "strokes"), *arguments)
    try:
        yield made
    finally:
        made.end()


def cost(directory: Path, rounds: int) -> None:
    """Nanoseconds more for one operation, and in percent of it."""
    with worker(directory) as work, worker(directory) as other:
        before = {name: statistics.median(work(name) for _ in range(rounds)) for name in COUNTS}
        with mounted(directory) as limits:
            for resource, names in RESOURCES.items():
                _cost_of(limits, resource, names, work, other, rounds, before)
    _nothing(directory, rounds)
    _audit(directory, rounds)


def _cost_of(
    limits: Mount,
    resource: str,
    names: tuple[str, ...],
    work: Worker,
    other: Worker,
    rounds: int,
    before: dict[str, float],
) -> None:
    for name in names:
        off, elsewhere, watched = [], [], []
        for _ in range(rounds):
            off.append(work(name))
            with armed(limits, other.process.pid, resource) as source:
                elsewhere.append(work(name))
            with armed(limits, work.process.pid, resource):
                watched.append(work(name))
        base = statistics.median(off)
        print(
            f"{resource + ' by ' + source:<22} {name:<11} disarmed {base:9.0f} ns"
            f" ({base / before[name] * 100 - 100:+5.1f} % of not mounted)"
            f"   elsewhere {_more(off, elsewhere)}   watched {_more(off, watched)}"
        )


def _more(base: list[float], loaded: list[float]) -> str:
    more = statistics.median(b - a for a, b in zip(base, loaded, strict=True))
    return f"{more:+7.0f} ns {more / statistics.median(base) * 100:+6.1f} %"


@contextlib.contextmanager
def armed(limits: Mount, pid: int, resource: str) -> Iterator[str]:
    path = f"process/{pid}/{resource}"
    limits.write(f"{path}/threshold", NEVER[resource])
    yield limits.state(f"{path}/state")["source"]
    limits.write(f"{path}/threshold", "off")
    wait_detached(limits.daemon.pid)


def wait_detached(pid: int) -> None:
    """Until the daemon has no hooks in force; disarming does not wait for that."""
    while _links(pid):
        time.sleep(0.05)
    time.sleep(1)  # the last link has no descriptor any more, but may have a hook


def _links(pid: int) -> int:
    """How many programs it has attached, proc_pid_fdinfo(5)."""
    count = 0
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            count += "link_type" in info.read_text()
    return count


def _nothing(directory: Path, rounds: int) -> None:
    """The same next to programs that do nothing: less than that no hook can cost."""
    if not compile_program(Path(__file__).parent / "nothing.bpf.c", directory):
        return
    programs = libbpf.Object(directory / "nothing.bpf.o")
    links = libbpf.Links()
    names = {name for name, section in programs.sections().items() if libbpf.kernel_has(section)}
    try:
        programs.load(names)
        with worker(directory) as work:
            for name in ("getppid", "dup_close", "open_hot", "open_cold"):
                off, on = [], []
                for _ in range(rounds):
                    off.append(work(name))
                    for program in names:
                        programs.attach(program, links)
                    on.append(work(name))
                    links.destroy()
                    time.sleep(1)  # the last may still have its hook
                base = statistics.median(off)
                print(f"{'hooks that do nothing':<22} {name:<11} without {base:9.0f} ns   with {_more(off, on)}")
    except libbpf.BpfError as error:
        print(f"hooks that do nothing: not compared: {error}")
    finally:
        links.destroy()
        programs.close()


def _audit(directory: Path, rounds: int) -> None:
    """The same operations next to one audit rule that no call matches."""
    look = ["auditctl", "-s"]
    status = shutil.which("auditctl") and subprocess.run(look, capture_output=True, text=True).stdout
    if not status or subprocess.run(["auditctl", "-e", "1"], capture_output=True).returncode:
        print("audit: no auditctl(8), or a kernel without audit: not compared")
        return
    rule = ["-a", "always,exit", "-F", "arch=b64", "-S", "openat", "-F", "uid=65533"]
    # A process has what audit needs only if it was born while audit was on.
    with worker(directory) as work:
        for name in ("getppid", "dup_close", "open_hot", "open_cold"):
            off, on = [], []
            for _ in range(rounds):
                off.append(work(name))
                subprocess.run(["auditctl", *rule], check=True, capture_output=True)
                on.append(work(name))
                subprocess.run(["auditctl", "-D"], check=True, capture_output=True)
            base = statistics.median(off)
            print(f"{'one audit rule':<22} {name:<11} without {base:9.0f} ns   with {_more(off, on)}")
    if "enabled 0" in status:
        subprocess.run(["auditctl", "-e", "0"], check=True, capture_output=True)


def latency(directory: Path, rounds: int) -> None:
    """From a crossing in the kernel to the reader's wake, by poll(2) and by inotify."""
    with mounted(directory) as limits:
        helper = Helper()
        try:
            path = f"process/{helper.pid}/fds"
            limits.write(f"{path}/threshold", str(helper.fds() + 1))
            source = limits.state(f"{path}/state")["source"]
            for how, wait in (("poll", _poll), ("inotify", _inotify)):
                delays = sorted(_delay(limits, path, helper, wait) for _ in range(rounds * 20))
                print(
                    f"crossing to {how:<8} by {source:<12} median {statistics.median(delays):8.0f} us"
                    f"   p99 {delays[int(len(delays) * 0.99)]:8.0f} us"
                )
        finally:
            helper.end()


def _delay(limits: Mount, path: str, helper: Helper, wait: Callable[[Mount, str], Callable[[], int]]) -> float:
    woken: list[int] = []
    waiting = wait(limits, path)
    thread = threading.Thread(target=lambda: woken.append(waiting()))
    thread.start()
    time.sleep(0.01)
    with tempfile.NamedTemporaryFile("r") as told:
        helper.do(f"t = time.monotonic_ns(); os.close(os.dup(0)); open({told.name!r}, 'w').write(str(t))")
        thread.join()
        return (woken[0] - int(told.read())) / 1000


def _poll(limits: Mount, path: str) -> Callable[[], int]:
    fd = os.open(limits / path / "event", os.O_RDONLY)
    os.pread(fd, 1 << 20, 0)
    poller = select.poll()
    poller.register(fd, select.POLLPRI)

    def wait() -> int:
        assert poller.poll(20_000)
        now = time.monotonic_ns()
        os.close(fd)
        return now

    return wait


def _inotify(limits: Mount, path: str) -> Callable[[], int]:
    import inotify_simple

    watch = inotify_simple.INotify()
    watch.add_watch(limits / path / "event", inotify_simple.flags.MODIFY)

    def wait() -> int:
        assert watch.read(20_000)
        now = time.monotonic_ns()
        watch.close()
        return now

    return wait


def idle(directory: Path, rounds: int) -> None:
    """Wake-ups of the daemon in a minute: 1,000 exact thresholds on a busy machine that never crosses."""
    with worker(directory) as busy, mounted(directory) as limits, sleepers(1000) as pids:
        for pid in pids:
            limits.write(f"process/{pid}/fds/threshold", "1000")
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                busy("open_hot")
                busy("fork_exit")

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(12)
        used = Cost(limits.daemon.pid)
        time.sleep(rounds * 8)
        cpu, switches = used.since()
        stop.set()
        thread.join()
        print(
            f"1,000 fds thresholds by {limits.state(f'process/{pids[0]}/fds/state')['source']}, busy machine,"
            f" {rounds * 8} s: {switches} wake-ups, {cpu * 1000:.1f} ms of CPU"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=8)
    chosen = parser.parse_args()
    parts: dict[str, Callable[[Path, int], None]] = {"cost": cost, "latency": latency, "idle": idle}
    for part in chosen.parts or parts:
        with tempfile.TemporaryDirectory() as directory:
            print(f"== {part}")
            parts[part](Path(directory), chosen.rounds)


if __name__ == "__main__":
    main()
