"""What was found out by trying, of kernel, libfuse and pyfuse3: docs/architecture.md lists it by these numbers."""

import os
import select
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import pytest
from mountkit import Watching, in_threads, refused

from conftest import PATIENCE, Helper, Mount, poll_for

Make = Callable[..., Helper]


def test_1_poll_is_answered_by_us(limits: Mount, helper: Make) -> None:
    """Without Operations.poll the kernel says of every descriptor that it is ready."""
    assert hasattr(pyfuse3.Operations, "poll")
    with (limits / f"process/{helper().pid}/fds/event").open("rb") as event:
        assert poll_for(event.fileno(), 0, select.POLLIN | select.POLLPRI | select.POLLOUT) == 0


def test_1_the_newest_poll_of_each_open_file_is_kept(limits: Mount, helper: Make) -> None:
    """Many polls before the event, of two open files in turns: both wake, and only once each."""
    child = helper()
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", str(child.fds() + 1))
    with (limits / path / "event").open("rb") as one, (limits / path / "event").open("rb") as two:
        for _ in range(100):
            assert poll_for(one.fileno(), 0) == 0
            assert poll_for(two.fileno(), 0) == 0
        child.open_files(1)
        for file in (one, two):
            assert poll_for(file.fileno())
            os.pread(file.fileno(), 1, 0)
            assert poll_for(file.fileno(), 0) == 0


def test_2_our_own_touch_is_seen_once_and_nothing_else_is(limits: Mount, helper: Make) -> None:
    child = helper()
    path = limits / f"process/{child.pid}/fds"
    (path / "threshold").write_text(str(child.fds() + 1))
    with Watching(path, path / "event", path / "state") as watching:
        child.open_files(1)
        assert watching.next() == [(str(path), "MODIFY", "event"), (str(path / "event"), "MODIFY", "")]


def test_2_mkdir_and_rmdir_are_seen(limits: Mount, helper: Make) -> None:
    path = limits / f"process/{helper().pid}/fds"
    with Watching(path) as watching:
        os.mkdir(path / "warn")
        os.rmdir(path / "warn")
        seen = watching.next()
    assert (str(path), "CREATE", "warn") in seen
    assert (str(path), "DELETE", "warn") in seen


def test_3_no_deadlock_between_our_touches_and_other_requests(limits: Mount, helper: Make) -> None:
    """Thousands of crossings, of which each touches its file, while all the handlers of that inode are in use."""
    paths = [limits / f"process/{helper().pid}/fds" for _ in range(4)]
    done = threading.Event()

    def ring(path: Path) -> None:
        for _ in range(300):
            (path / "threshold").write_text(">= 1")

    def look(path: Path) -> None:
        while not done.is_set():
            os.listdir(path)
            (path / "event").stat()
            (path / "event").read_bytes()
            os.utime(path / "event")

    def work(number: int) -> None:
        if number < len(paths):
            ring(paths[number])
            if number == 0:
                done.set()
        else:
            look(paths[number % len(paths)])

    in_threads(3 * len(paths), work)
    assert limits.read("README")


def test_4_a_read_never_waits(limits: Mount, helper: Make) -> None:
    """So many readers that each would hold a request, if reading were waiting; and the mount still answers."""
    path = limits / f"process/{helper().pid}/fds/event"
    in_threads(200, lambda _number: path.read_bytes())
    assert limits.read("README")


def test_4_a_poller_can_be_killed(limits: Mount, helper: Make) -> None:
    path = limits / f"process/{helper().pid}/fds/event"
    code = "import select, sys; f = open(sys.argv[1]); p = select.poll(); p.register(f, select.POLLPRI)"
    code += "; print(flush=True); p.poll()"
    with subprocess.Popen(["python3", "-S", "-c", code, path], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        client.stdout.readline()
        client.kill()
        assert client.wait(PATIENCE) == -9


def test_5_a_bad_request_does_not_end_the_mount(limits: Mount, helper: Make) -> None:
    """What raises in a handler is answered; see also test_operations.py."""
    child = helper()
    path = f"process/{child.pid}/fds"
    for text in ("rubbish", "\x00\x01", "9" * 4000, "%" * 100):
        assert refused(lambda text=text: limits.write(f"{path}/threshold", text)) in ("EINVAL", "ERANGE")
    assert limits.read(f"{path}/usage") == f"{child.fds()}\n"


def test_6_self_is_the_process_not_the_thread(limits: Mount) -> None:
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(os.readlink(limits / "process/self")))
    thread.start()
    thread.join()
    assert answers == [os.readlink(limits / "process/self")] == [str(os.getpid())]
    assert limits.read("process/self/threads/usage")


def test_7_statfs(limits: Mount) -> None:
    about = os.statvfs(limits.root)
    assert about.f_namemax == 255
    assert about.f_bsize > 0
    subprocess.run(["df", limits.root], check=True, stdout=subprocess.DEVNULL)


def test_7_eperm_not_enosys(limits: Mount) -> None:
    for call in (
        lambda: os.symlink("a", limits / "b"),
        lambda: os.link(limits / "README", limits / "b"),
        lambda: os.rename(limits / "README", limits / "b"),
        lambda: os.unlink(limits / "README"),
        lambda: os.mknod(limits / "b"),
    ):
        assert refused(call) == "EPERM"


def test_9_size_is_honest(limits: Mount, helper: Make) -> None:
    """What tail -f goes by: it grows by every line, and a read from there gives that line."""
    child = helper()
    path = limits / f"process/{child.pid}/fds"
    sizes = [0]
    with (path / "event").open("rb", buffering=0) as event:
        for _ in range(5):
            (path / "threshold").write_text(">= 1")
            limits.wait_for(lambda: (path / "event").stat().st_size > sizes[-1])
            size = (path / "event").stat().st_size
            assert os.pread(event.fileno(), 4096, sizes[-1]).count(b"\n") == 1
            sizes.append(size)
        assert len(os.pread(event.fileno(), 1 << 16, 0)) == sizes[-1]


def test_10_a_timer_on_anothers_cpu_clock(limits: Mount, helper: Make) -> None:
    child = helper()
    limits.write(f"process/{child.pid}/cputime/threshold", ">= 1h")
    state = limits.state(f"process/{child.pid}/cputime/state")
    assert state["guarantee"] == "exact"
    assert state["period"] == "-"


def test_11_counting_descriptors(limits: Mount, helper: Make) -> None:
    child = helper()
    for _ in range(3):
        assert limits.read(f"process/{child.pid}/fds/usage") == f"{child.fds()}\n"
        child.open_files(7)


def test_nothing_armed_no_wake_ups(limits: Mount, helper: Make) -> None:
    """The daemon sleeps while nothing is armed; its twin, while something is sampled, does not."""
    path = f"process/{helper().pid}/fds"
    limits.wait_for(lambda: limits.state("state")["armed"] == "0")
    before = int(limits.state("state")["wakeups"])
    time.sleep(1.0)
    assert int(limits.state("state")["wakeups"]) - before <= 1
    limits.write(f"{path}/hearing", "sampled")
    limits.write(f"{path}/threshold", "9000")
    limits.wait_for(lambda: int(limits.state("state")["wakeups"]) - before > 2)


@pytest.mark.parametrize("path", ["system/memory/event", "event"])
def test_events_of_the_machine_never_hang_up(limits: Mount, path: str) -> None:
    with (limits / path).open("rb") as event:
        assert poll_for(event.fileno(), 0.1) == 0
