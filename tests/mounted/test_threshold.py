"""Arming from a shell, and being woken: the spine, on a real mount with real processes."""

import os
import select
import subprocess
from collections.abc import Callable

import pytest

from conftest import Helper, Mount, lines_of, poll_for

Make = Callable[..., Helper]


def events(limits: Mount, path: str) -> list[dict[str, str]]:
    return lines_of(limits.read(f"{path}/event"))


def test_shell_arms_and_reads_state(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    subprocess.run(f"echo {child.fds() + 5} > {limits.root}/{path}/threshold", shell=True, check=True)
    state = limits.state(f"{path}/state")
    assert state["state"] == "clear"
    assert state["threshold"] == f">= {child.fds() + 5}"
    assert state["alarms"] == "0"


def test_crossing_wakes_a_poller_and_names_the_process(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    level = child.fds() + 5
    limits.write(f"{path}/threshold", str(level))
    with (limits / path / "event").open("rb") as event:
        assert event.read() == b""
        child.open_files(5)
        assert poll_for(event.fileno()) & select.POLLPRI
        event.seek(0)
        (line,) = lines_of(event.read().decode())
    assert line["crossing"] == "alarm"
    assert line["path"] == path
    assert line["pid"] == str(child.pid)
    assert line["value"] == str(level)
    assert line["threshold"] == f">= {level}"
    assert line["comm"].startswith("python")
    assert limits.state(f"{path}/state")["state"] == "alarm"


def test_one_below_is_silent(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", str(child.fds() + 5))
    with (limits / path / "event").open("rb") as event:
        child.open_files(4)
        assert poll_for(event.fileno(), 1.0) == 0
    assert events(limits, path) == []
    assert limits.state(f"{path}/state")["alarms"] == "0"


def test_already_beyond_rings_at_once_and_clears(limits: Mount, helper: Make) -> None:
    child = helper()
    child.open_files(10)
    path = f"process/{child.pid}/fds"
    now = child.fds()
    limits.write(f"{path}/threshold", f">= {now} clear {now - 5}")
    assert [line["crossing"] for line in events(limits, path)] == ["alarm"]
    child.close_files(3)
    child.close_files(5)
    limits.wait_for(lambda: len(events(limits, path)) == 2)
    assert [line["crossing"] for line in events(limits, path)] == ["alarm", "clear"]


def test_once_disarms_after_the_first_alarm(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", ">= 1 once")
    assert limits.read(f"{path}/threshold") == "off\n"
    assert [line["crossing"] for line in events(limits, path)] == ["alarm"]
    assert limits.state(f"{path}/state")["alarms"] == "1"


def test_off_disarms(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", str(child.fds() + 1))
    limits.write(f"{path}/threshold", "off")
    child.open_files(5)
    with (limits / path / "event").open("rb") as event:
        assert poll_for(event.fileno(), 1.0) == 0
    assert limits.state(f"{path}/state")["source"] == "-"


def test_change_tells_every_new_value(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", "change")
    child.open_files(1)
    limits.wait_for(lambda: events(limits, path))
    assert events(limits, path)[0]["crossing"] == "change"


def test_system_available(limits: Mount) -> None:
    limits.write("system/available/threshold", "< 99.9%")
    limits.wait_for(lambda: events(limits, "system/available"))
    limits.write("system/available/threshold", "< 0.01%")
    assert limits.state("system/available/state")["state"] == "clear"
    limits.write("system/available/threshold", "off")


def test_named_watchers_stand_beside_each_other(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    os.mkdir(limits / path / "warn")
    os.mkdir(limits / path / "panic")
    limits.write(f"{path}/warn/threshold", str(child.fds() + 2))
    limits.write(f"{path}/panic/threshold", str(child.fds() + 20))
    child.open_files(3)
    limits.wait_for(lambda: limits.read(f"{path}/warn/event"))
    (line,) = lines_of(limits.read(f"{path}/warn/event"))
    assert line["watcher"] == "warn"
    assert limits.read(f"{path}/panic/event") == ""
    assert {"warn", "panic"} <= set(os.listdir(limits / path))
    os.rmdir(limits / path / "warn")
    assert "warn" not in os.listdir(limits / path)
    with pytest.raises(FileNotFoundError):
        limits.read(f"{path}/warn/state")


def test_private_watcher_lives_with_its_file(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    fd = os.open(limits / path / "event", os.O_RDWR)
    os.write(fd, f"{child.fds() + 2}".encode())
    armed = int(limits.state("state")["armed"])
    with pytest.raises(OSError, match="busy"):
        os.write(fd, b"7")
    assert "has its watcher already" in limits.last_error()
    child.open_files(3)
    assert poll_for(fd) & select.POLLPRI
    text = os.read(fd, 4096).decode()
    assert lines_of(text)[0]["watcher"] == "(private)"
    # Nobody else hears it, and no shared watcher was armed.
    assert limits.read(f"{path}/event") == ""
    assert limits.read(f"{path}/threshold") == "off\n"
    os.close(fd)
    limits.wait_for(lambda: int(limits.state("state")["armed"]) == armed - 1)


def test_gone_is_the_last_line_and_hangs_up(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", "1000")
    with (limits / path / "event").open("rb") as event:
        event.read()
        child.end()
        assert poll_for(event.fileno()) & select.POLLHUP
        event.seek(0)
        lines = lines_of(event.read().decode())
    assert [line["crossing"] for line in lines] == ["gone"]
    assert lines[0]["pid"] == str(child.pid)
    limits.wait_for(lambda: not (limits / f"process/{child.pid}").exists())


def test_open_file_of_an_ended_process_says_esrch(limits: Mount, helper: Make) -> None:
    child = helper()
    with (limits / f"process/{child.pid}/fds/usage").open("rb", buffering=0) as usage:
        assert usage.read()
        child.end()
        usage.seek(0)
        with pytest.raises(ProcessLookupError):
            usage.read()


def test_each_names_the_member_and_takes_in_the_newborn(limits: Mount, helper: Make) -> None:
    limits.write("process/fds/threshold", "150")
    try:
        assert limits.read("process/fds/mode") == "[each] sum\n"
        born_later = helper()
        born_later.open_files(160)
        limits.wait_for(lambda: any(line["pid"] == str(born_later.pid) for line in events(limits, "process/fds")))
        assert f"member {born_later.pid}" in limits.read("process/fds/state")
        born_later.end()
        limits.wait_for(
            lambda: (
                ("gone", str(born_later.pid))
                in [(line["crossing"], line["pid"]) for line in events(limits, "process/fds")]
            )
        )
    finally:
        limits.write("process/fds/threshold", "off")


def test_sum_is_the_total(limits: Mount, helper: Make) -> None:
    limits.write("process/fds/mode", "sum")
    try:
        child = helper()
        total = int(limits.read("process/fds/usage"))
        limits.write("process/fds/threshold", str(total + 300))
        before = len(events(limits, "process/fds"))
        child.open_files(600)
        limits.wait_for(lambda: len(events(limits, "process/fds")) > before)
        assert "pid" not in events(limits, "process/fds")[-1]
    finally:
        limits.write("process/fds/threshold", "off")
        limits.write("process/fds/mode", "each")


def test_cpu_over_a_window(limits: Mount, helper: Make) -> None:
    busy, idle = helper(), helper()
    for child in (busy, idle):
        limits.write(f"process/{child.pid}/cpu/threshold", "10% per 500ms")
    busy.do("end = time.process_time() + 1.0")
    busy.do("while time.process_time() < end: pass")
    limits.wait_for(lambda: events(limits, f"process/{busy.pid}/cpu"))
    line = events(limits, f"process/{busy.pid}/cpu")[0]
    assert line["crossing"] == "alarm"
    assert float(line["value"]) >= 9
    assert line["guarantee"] == "exact"
    limits.wait_for(lambda: len(events(limits, f"process/{busy.pid}/cpu")) == 2)
    assert events(limits, f"process/{busy.pid}/cpu")[1]["crossing"] == "clear"
    assert events(limits, f"process/{idle.pid}/cpu") == []


def test_thread_cputime(limits: Mount, helper: Make) -> None:
    child = helper("go, stay = threading.Event(), threading.Event()\nids = []")
    child.do(
        "work = lambda: (ids.append(threading.get_native_id()), go.wait(), sum(range(30_000_000)), stay.wait())"
    )
    child.do("workers = [threading.Thread(target=work, daemon=True) for _ in range(2)]")
    child.do("[w.start() for w in workers]")
    tids = [t for t in os.listdir(f"/proc/{child.pid}/task") if int(t) != child.pid]
    for tid in tids:
        limits.write(f"process/{child.pid}/thread/{tid}/cputime/threshold", "50ms")
    child.do("go.set()")
    limits.wait_for(lambda: all(events(limits, f"process/{child.pid}/thread/{tid}/cputime") for tid in tids))
    line = events(limits, f"process/{child.pid}/thread/{tids[0]}/cputime")[0]
    assert line["tid"] == tids[0]


def test_memory_peak_is_heard_though_it_is_over(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/memory"
    limits.write(f"{path}/threshold", ">= 300M")
    assert limits.state(f"{path}/state")["guarantee"] in ("peak", "exact")
    child.do("area = mmap.mmap(-1, 400 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)")
    child.do("area.write(b'x' * (400 << 20)); area.close()")
    limits.wait_for(lambda: len(events(limits, path)) == 2)
    assert [line["crossing"] for line in events(limits, path)] == ["alarm", "clear"]
    assert int(events(limits, path)[0]["value"]) >= 300 << 20


def test_for_needs_to_last(limits: Mount, helper: Make) -> None:
    child = helper()
    path = f"process/{child.pid}/fds"
    limits.write(f"{path}/threshold", ">= 1 for 1s")
    assert events(limits, path) == []
    limits.wait_for(lambda: events(limits, path))


def test_limit_can_be_set(limits: Mount, helper: Make) -> None:
    child = helper()
    limits.write(f"process/{child.pid}/fds/limit", "100 200")
    assert limits.read(f"process/{child.pid}/fds/limit") == "100 200\n"
    limits.write(f"process/{child.pid}/fds/threshold", "80%")
    child.open_files(85 - child.fds())
    limits.wait_for(lambda: events(limits, f"process/{child.pid}/fds"))
