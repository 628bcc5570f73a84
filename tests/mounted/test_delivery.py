"""How a crossing reaches who waits: poll, epoll, select, inotify, and reading. Each with a silent twin."""

import contextlib
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mountkit import Lines, Watching, crossings, events, in_threads, other, private_mount, refused

from conftest import NOBODY, PATIENCE, Helper, Mount, lines_of, poll_for
from limitfs.hearing.connector import missing as connector_missing
from limitfs.space.eventlog import RETAINED

Make = Callable[..., Helper]

QUIET = 0.5
"""Seconds in which nothing may come."""


@pytest.fixture
def fds(limits: Mount, helper: Make) -> tuple[Helper, Path]:
    """A process and its fds/, armed; opening two files more rings."""
    child = helper()
    path = limits / f"process/{child.pid}/fds"
    (path / "threshold").write_text(str(child.fds() + 2))
    return child, path


def rewound(fd: int) -> Lines:
    return lines_of(os.pread(fd, 1 << 20, 0).decode())


@contextlib.contextmanager
def opened(path: Path | str, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


# poll, epoll, select


def by_poll(fd: int, seconds: float) -> bool:
    return poll_for(fd, seconds, select.POLLIN | select.POLLPRI) == select.POLLIN | select.POLLPRI


def by_epoll(fd: int, seconds: float) -> bool:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLPRI | select.EPOLLIN)
        return epoll.poll(seconds) == [(fd, select.EPOLLPRI | select.EPOLLIN)]


def by_epoll_edge(fd: int, seconds: float) -> bool:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLPRI | select.EPOLLET)
        return bool(epoll.poll(seconds))


def by_select_for_reading(fd: int, seconds: float) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def by_select_for_exceptions(fd: int, seconds: float) -> bool:
    return bool(select.select([], [], [fd], seconds)[2])


WAYS = (by_poll, by_epoll, by_epoll_edge, by_select_for_reading, by_select_for_exceptions)


@pytest.mark.parametrize("wait", WAYS)
def test_a_crossing_wakes(fds: tuple[Helper, Path], wait: Callable[[int, float], bool]) -> None:
    child, path = fds
    with opened(path / "event") as fd:
        os.read(fd, 4096)
        assert not wait(fd, 0)
        timer = threading.Timer(0.1, child.open_files, (2,))
        timer.start()
        assert wait(fd, PATIENCE)
        timer.join()
        # Until it is read, it is ready; then not any more.
        assert wait(fd, 0)
        assert crossings(rewound(fd)) == ["alarm"]
        assert not wait(fd, 0)


@pytest.mark.parametrize("wait", WAYS)
def test_without_a_crossing_nothing_wakes(fds: tuple[Helper, Path], wait: Callable[[int, float], bool]) -> None:
    child, path = fds
    with opened(path / "event") as fd:
        child.open_files(1)
        assert not wait(fd, QUIET)


def test_what_came_before_the_open_does_not_wake(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with opened(path / "event") as first:
        child.open_files(2)
        assert poll_for(first)
    with opened(path / "event") as later:
        assert poll_for(later, 0) == 0
        assert crossings(rewound(later)) == ["alarm"]


def test_each_open_file_has_its_own_place(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with opened(path / "event") as one, opened(path / "event") as two:
        child.open_files(2)
        assert poll_for(one)
        assert crossings(rewound(one)) == ["alarm"]
        # Nobody took the other's line, nor his wake-up.
        assert poll_for(two, 0)
        assert crossings(rewound(two)) == ["alarm"]
        child.close_files(1)
        assert poll_for(one)
        assert poll_for(two)
        assert crossings(lines_of(os.read(one, 1 << 16).decode())) == ["alarm", "clear"]


def test_500_pollers_all_wake(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with contextlib.ExitStack() as stack, select.epoll() as epoll:
        opened_files = {stack.enter_context(opened(path / "event")) for _ in range(500)}
        for fd in opened_files:
            epoll.register(fd, select.EPOLLPRI)
        assert epoll.poll(0.1) == []
        child.open_files(2)
        woken: set[int] = set()
        while woken != opened_files:
            ready = {fd for fd, _ in epoll.poll(PATIENCE)}
            assert ready - woken or ready == opened_files, f"only {len(woken)} woke"
            woken |= ready
        assert all(crossings(rewound(fd)) == ["alarm"] for fd in opened_files)


def test_500_threads_that_poll_one_open_file_all_wake(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    waiting = threading.Barrier(501)

    def ring() -> None:
        waiting.wait(PATIENCE)
        child.open_files(2)

    with opened(path / "event") as fd:

        def wait(_number: int) -> None:
            waiting.wait(PATIENCE)
            assert poll_for(fd)

        ringer = threading.Thread(target=ring)
        ringer.start()
        in_threads(500, wait)
        ringer.join()


def test_a_poller_is_still_heard_after_a_private_condition_was_written(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with opened(path / "event", os.O_RDWR) as fd:
        woken: list[int] = []
        poller = threading.Thread(target=lambda: woken.append(poll_for(fd)))
        poller.start()
        assert poll_for(fd, 0.2) == 0
        os.write(fd, f"{child.fds() + 1}".encode())
        child.open_files(1)
        poller.join(PATIENCE)
        assert woken[0] & select.POLLPRI
        assert [line["watcher"] for line in rewound(fd)] == ["(private)"]


# inotify


def test_inotify_sees_one_modify_on_file_and_directory(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    file, directory = str(path / "event"), str(path)
    with Watching(file, directory) as watching:
        child.open_files(2)
        assert watching.next() == [(directory, "MODIFY", "event"), (file, "MODIFY", "")]
        child.close_files(2)
        assert watching.next() == [(directory, "MODIFY", "event"), (file, "MODIFY", "")]


def test_inotify_is_silent_without_a_crossing(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with Watching(path / "event", path) as watching:
        child.open_files(1)
        assert watching.next(QUIET) == []


def test_inotify_of_a_named_watcher(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with Watching(path) as watching:
        os.mkdir(path / "warn")
        assert (str(path), "CREATE", "warn") in watching.next()
        (path / "warn/threshold").write_text(str(child.fds() + 1))
        with Watching(path / "warn") as inside:
            child.open_files(1)
            assert inside.next() == [(str(path / "warn"), "MODIFY", "event")]
        os.rmdir(path / "warn")
        assert (str(path), "DELETE", "warn") in watching.next()


def test_inotify_sees_the_last_line(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with Watching(path / "event") as watching:
        child.end()
        assert (str(path / "event"), "MODIFY", "") in watching.next()


def test_a_private_watcher_is_nobody_elses_noise(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with opened(path / "event", os.O_RDWR) as fd, Watching(path) as watching:
        os.write(fd, f"{child.fds() + 1}".encode())
        watching.next(QUIET)
        child.open_files(1)
        assert poll_for(fd)
        assert watching.next(QUIET) == []


def test_inotifywait(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    command = ["inotifywait", "-m", "-e", "modify,open,close,attrib", "--format", "%w %e %f", path / "event"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        assert waiting.stderr is not None
        while "established" not in waiting.stderr.readline():
            pass
        child.open_files(2)
        first = waiting.stdout.readline()
        child.close_files(2)
        second = waiting.stdout.readline()
        waiting.terminate()
        rest = waiting.stdout.read()
    assert first == second == f"{path / 'event'} MODIFY \n"
    assert rest == ""


# Reading


def test_a_read_at_0_is_a_snapshot_and_reading_on_ends(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with opened(path / "event") as fd:
        assert os.read(fd, 4096) == b""
        child.open_files(2)
        assert poll_for(fd)
        start = os.pread(fd, 10, 0)
        # In small pieces it is the same line, and no piece of the next.
        child.close_files(1)
        text = start
        while piece := os.pread(fd, 7, len(text)):
            text += piece
        assert crossings(lines_of(text.decode())[:1]) == ["alarm"]
        assert text.endswith(b"\n")


def test_reading_on_gives_what_came_since(limits: Mount, fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with (path / "event").open("rb", buffering=0) as file:
        child.open_files(2)
        assert poll_for(file.fileno())
        assert crossings(lines_of(file.read().decode())) == ["alarm"]
        assert file.read() == b""
        child.close_files(2)
        limits.wait_for(lambda: len(events(limits, str(path.relative_to(limits.root)))) == 2)
        assert crossings(lines_of(file.read().decode())) == ["clear"]
        assert file.read() == b""


def test_a_shell_writes_and_reads_on_one_descriptor(fds: tuple[Helper, Path]) -> None:
    _child, path = fds
    (path / "hearing").write_text("sampled")  # which looks before the write returns
    script = f"exec 3<>{path}/event; echo '>= 1' >&3; cat <&3"
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    (line,) = lines_of(done.stdout)
    assert line["watcher"] == "(private)"
    assert line["crossing"] == "alarm"


def test_tail_follows(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    with opened(path / "event") as fd:
        child.open_files(2)
        assert poll_for(fd)
    command = ["tail", "-n", "+1", "-f", path / "event"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        lines = [tail.stdout.readline()]
        child.close_files(1)
        lines.append(tail.stdout.readline())
        child.open_files(1)
        lines.append(tail.stdout.readline())
        tail.terminate()
        lines.append(tail.stdout.read())
    assert crossings(lines_of("".join(lines))) == ["alarm", "clear", "alarm"]


def test_the_size_grows_by_what_is_written(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    assert (path / "event").stat().st_size == 0
    with opened(path / "event") as fd:
        child.open_files(2)
        assert poll_for(fd)
        assert os.fstat(fd).st_size == len(os.pread(fd, 4096, 0)) > 0


def ring_often(limits: Mount, path: Path, times: int) -> None:
    """Arm with what is met at once, again and again: a line each."""
    with opened(path / "threshold", os.O_WRONLY) as fd:
        for _ in range(times):
            os.write(fd, b">= 1")
    limits.wait_for(lambda: crossings(events(limits, str(path.relative_to(limits.root))))[-1] == "alarm")


def memory_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_reader_that_never_reads_costs_little_and_is_told_what_it_missed(limits: Mount, helper: Make) -> None:
    child = helper()
    path = limits / f"process/{child.pid}/fds"
    (path / "hearing").write_text("sampled")  # which looks before the write returns
    with opened(path / "event") as never, opened(path / "event") as once:
        ring_often(limits, path, 2 * RETAINED)
        os.pread(once, 1, 0)
        before = memory_of(limits.daemon.pid)
        ring_often(limits, path, 10_000 - 2 * RETAINED)
        assert memory_of(limits.daemon.pid) - before < 8 << 20
        lost, *kept = rewound(never)
        assert len(kept) == RETAINED
        assert (lost["crossing"], lost["count"]) == ("lost", str(10_000 - RETAINED))
        lost, *kept = rewound(once)
        assert (lost["crossing"], lost["count"]) == ("lost", str(10_000 - 2 * RETAINED - RETAINED))
        # It is told once, and whoever comes later has missed nothing.
        assert crossings(rewound(once)) == ["alarm"] * RETAINED
    with opened(path / "event") as later:
        lines = rewound(later)
        assert crossings(lines) == ["alarm"] * RETAINED
        assert [int(line["seq"]) for line in lines] == sorted(int(line["seq"]) for line in lines)


# The end


def test_who_reads_is_hung_up_on_though_nothing_was_armed(limits: Mount, helper: Make) -> None:
    child = helper()
    path = limits / f"process/{child.pid}/fds/event"
    with opened(path) as fd, opened(path) as polled_before:
        poller = select.poll()
        poller.register(polled_before, select.POLLPRI)
        assert poller.poll(0) == []
        child.end()
        assert poll_for(fd) & select.POLLHUP
        assert poller.poll(PATIENCE * 1000) == [(polled_before, select.POLLHUP)]
        assert os.read(fd, 100) == b""


def test_gone_hangs_up_every_reader_and_leaves_the_lines(fds: tuple[Helper, Path]) -> None:
    child, path = fds
    os.mkdir(path / "warn")
    (path / "warn/threshold").write_text("1000")
    with (
        opened(path / "event") as own,
        opened(path / "warn/event") as named,
        opened(path / "event", os.O_RDWR) as mine,
    ):
        os.write(mine, b">= 1")
        child.open_files(2)
        assert poll_for(own)
        assert poll_for(mine)
        child.end()
        for fd, expected in ((own, ["alarm", "gone"]), (named, ["gone"]), (mine, ["alarm", "gone"])):
            while not poll_for(fd) & select.POLLHUP:
                pass
            assert crossings(rewound(fd)) == expected
            assert crossings(rewound(fd)) == expected
            assert poll_for(fd) & select.POLLHUP
    assert refused(lambda: os.open(path / "event", os.O_RDONLY)) in ("ENOENT", "ESRCH")


def test_rmdir_hangs_up(fds: tuple[Helper, Path]) -> None:
    _child, path = fds
    os.mkdir(path / "warn")
    with opened(path / "warn/event") as fd, opened(path / "warn/state") as state:
        os.rmdir(path / "warn")
        assert poll_for(fd) & select.POLLHUP
        assert refused(lambda: os.read(state, 100)) == "ESRCH"
        # A new one of that name is another one.
        os.mkdir(path / "warn")
        assert poll_for(fd) & select.POLLHUP
        with opened(path / "warn/event") as new:
            assert poll_for(new, 0) == 0


# The root's event


def test_the_root_event_gives_each_user_his_own(tmp_path: Path, helper: Make) -> None:
    mine, his = helper(), helper(uid=NOBODY)
    with private_mount(tmp_path) as limits, other() as nobody, opened(limits / "event") as fd:
        nobody.ask(
            f"globals().update(fd=os.open('{limits / 'event'}', os.O_RDONLY), p=select.poll())"
            " or p.register(fd, select.POLLPRI)"
        )
        limits.write(f"process/{mine.pid}/fds/threshold", ">= 1")
        assert poll_for(fd)
        assert nobody.ask(f"p.poll({int(QUIET * 1000)})") == []
        assert nobody.ask("os.pread(fd, 4096, 0)") == b""
        limits.write(f"process/{his.pid}/fds/threshold", ">= 1")
        assert len(list(nobody.ask(f"p.poll({int(PATIENCE * 1000)})"))) == 1
        (line,) = lines_of(bytes(nobody.ask("os.pread(fd, 4096, 0)")).decode())
        assert line["pid"] == str(his.pid)
        assert line["path"] == f"process/{his.pid}/fds"
        assert [line["pid"] for line in rewound(fd)] == [str(mine.pid), str(his.pid)]
        with Watching(limits / "event") as watching:
            watching.next(QUIET)  # the touch for the line above
            limits.write(f"process/{mine.pid}/fds/threshold", ">= 2")
            assert watching.next() == [(str(limits / "event"), "MODIFY", "")]


# births


def test_births(limits: Mount) -> None:
    if connector_missing() is not None:
        assert refused(lambda: os.open(limits / "births", os.O_RDONLY)) == "EOPNOTSUPP"
        assert limits.last_error().startswith("births: ")
        assert any(line.startswith("# ") for line in limits.read("features").splitlines())
        return
    with opened(limits / "births") as fd:
        assert poll_for(fd, 0.1) == 0 or os.pread(fd, 1, 0)
        child = subprocess.Popen(["sh", "-c", "exit 3"])
        child.wait()
        found: Lines = []
        while "exit" not in [line["birth"] for line in found]:
            assert poll_for(fd)
            found = [line for line in rewound(fd) if line["pid"] == str(child.pid)]
    assert found[0]["birth"] == "fork"
    assert "exec" in [line["birth"] for line in found]
    assert found[-1]["status"] == "3"


# Pressures, as programs for /proc/pressure use them


TRIGGER = b"some 150000 2000000"


def pressed(limits: Mount) -> Path:
    path = limits / "system/cpu_pressure/event"
    if not path.exists():
        pytest.skip("this kernel has no pressure stall information")
    return path


@contextlib.contextmanager
def more_work_than_processors() -> Iterator[None]:
    busy = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize("data", [TRIGGER, TRIGGER + b"\0", TRIGGER + b"\n"])
def test_a_pressure_takes_the_kernels_own_form(limits: Mount, data: bytes) -> None:
    with opened(pressed(limits), os.O_RDWR | os.O_NONBLOCK) as fd:
        assert os.write(fd, data) == len(data)
        assert refused(lambda: os.write(fd, data)) == "EBUSY"


@pytest.mark.parametrize(
    ("data", "errno"),
    [
        (b"some 150000 20000000", "ERANGE"),
        (b"some 150000 1000", "ERANGE"),
        (b"some 3000000 2000000", "ERANGE"),
        (b"some 0 2000000", "ERANGE"),
        (b"most 150000 2000000", "EINVAL"),
        (b"some 150000", "EINVAL"),
    ],
)
def test_a_bad_trigger(limits: Mount, data: bytes, errno: str) -> None:
    with opened(pressed(limits), os.O_RDWR) as fd:
        assert refused(lambda: os.write(fd, data)) == errno
        assert "system/cpu_pressure/event" in limits.last_error()
        os.write(fd, TRIGGER)


def test_a_trigger_is_no_word_for_other_resources(limits: Mount) -> None:
    with opened(limits / "system/memory/event", os.O_RDWR) as fd:
        assert refused(lambda: os.write(fd, TRIGGER)) == "EINVAL"


def test_pressure_wakes(limits: Mount) -> None:
    path = pressed(limits)
    calm = limits / "system/memory_pressure/event"
    with opened(path, os.O_RDWR | os.O_NONBLOCK) as fd, opened(calm, os.O_RDWR) as unlikely:
        os.write(fd, TRIGGER)
        # The twin: the same load, and a stall that does not come of it.
        os.write(unlikely, b"full 2000000 2000000")
        with more_work_than_processors():
            assert poll_for(fd) == select.POLLPRI
        assert poll_for(unlikely, 0) == 0
        line = rewound(fd)[0]
        assert line["crossing"] == "alarm"
        assert line["threshold"] == TRIGGER.decode()
        assert line["source"] == "psi"
        assert rewound(unlikely) == []


# Clients that die


PRELUDE = """
import os, select, sys, time
def arm(condition):
    fd = os.open(sys.argv[1] + "/event", os.O_RDWR)
    os.write(fd, condition)
    return fd
"""


@pytest.mark.parametrize(
    "program",
    [
        "f = open(sys.argv[1] + '/event'); p = select.poll(); p.register(f, 2); print(flush=True); p.poll()",
        "f = open(sys.argv[1] + '/usage'); print(flush=True)\nwhile True: f.seek(0); f.read()",
        "print(flush=True)\nwhile True: os.listdir(sys.argv[1] + '/../..')",
        "fd = arm(b'9000'); print(flush=True); time.sleep(1000)",
        "print(flush=True)\nwhile True: os.close(arm(b'>= 1'))",
    ],
    ids=["poll", "read", "readdir", "private", "arm"],
)
def test_a_killed_client_leaves_nothing(limits: Mount, helper: Make, program: str) -> None:
    path = limits / f"process/{helper().pid}/fds"
    armed = limits.state("state")["armed"]
    clients = [
        subprocess.Popen(["python3", "-S", "-c", PRELUDE + program, path], stdout=subprocess.PIPE)
        for _ in range(5)
    ]
    for client in clients:
        assert client.stdout is not None
        client.stdout.readline()
        client.send_signal(signal.SIGKILL)
    for client in clients:
        assert client.wait(PATIENCE) == -signal.SIGKILL
        assert client.stdout is not None
        client.stdout.close()
    limits.wait_for(lambda: limits.state("state")["armed"] == armed)
    assert (path / "threshold").read_text() == "off\n"
