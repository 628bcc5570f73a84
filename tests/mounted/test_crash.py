"""The daemon is killed, and comes back; and it ends when it is told to."""

import contextlib
import errno
import json
import os
import platform
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cgroupkit import cgroup
from crashkit import Service, exists, hooks_of, service
from mountkit import Watching, crossings, events, other, refused

from conftest import NOBODY, PATIENCE, Helper, lines_of, poll_for
from limitfs import mounting
from limitfs.mounting import Health

Make = Callable[..., Helper]
ENDED = ("ENOTCONN", "ECONNABORTED")


@pytest.fixture
def limits(tmp_path: Path) -> Iterator[Service]:
    for parent in (tmp_path, *tmp_path.parents):
        if str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    with service(tmp_path) as made:
        yield made


# What comes back


def test_what_was_set_by_hand_comes_back(limits: Service, helper: Make) -> None:
    child = helper()
    here = f"process/{child.pid}"
    limits.write(f"{here}/fds/threshold", f">= {child.fds() + 5} clear {child.fds() + 2}")
    os.mkdir(limits / f"{here}/memory/mine")
    limits.write(f"{here}/memory/mine/hearing", "sampled")
    limits.write(f"{here}/memory/mine/threshold", "1G for 30s")
    os.mkdir(limits / f"{here}/threads/unarmed")
    limits.write("process/fds/mode", "sum")
    limits.write("process/fds/threshold", "900000")
    limits.write("process/threads/threshold", "9000")
    limits.write("system/fds/mode", "each")
    limits.write("system/cpu/threshold", "90000%")
    limits.write("system/cpu/threshold", "off")
    armed = limits.armed()
    limits.restart()
    assert limits.armed() == armed
    assert set(armed) == {f"{here}/fds", f"{here}/memory/mine", "process/fds", "process/threads"}
    assert limits.read("process/fds/mode") == "each [sum]\n"
    assert limits.read("process/threads/mode") == "[each] sum\n"
    assert limits.read("system/fds/mode") == "[each] sum\n"
    assert limits.read(f"{here}/memory/mine/hearing") == "auto [sampled]\n"
    assert limits.read(f"{here}/threads/unarmed/threshold") == "off\n"
    assert limits.read("system/cpu/threshold") == "off\n"
    assert "5 places set up again, 0 lost" not in limits.said()
    assert "6 places set up again, 0 lost" in limits.said()
    # They hear as before.
    child.open_files(5)
    limits.wait_for(lambda: "alarm" in crossings(events(limits, f"{here}/fds")))
    # And once more: what came back is kept.
    limits.restart()
    assert limits.armed() == armed


def test_groups_come_back(limits: Service, helper: Make) -> None:
    child = helper("open('/proc/self/comm', 'w').write('member')")
    os.mkdir(limits / "group/mine")
    limits.write("group/mine/select", 'comm == "member"')
    limits.write("group/mine/fds/threshold", str(child.fds() + 5))
    os.mkdir(limits / "group/mine/fds/far")
    limits.write("group/mine/fds/far/threshold", "900")
    os.mkdir(limits / "group/gone")
    os.rmdir(limits / "group/gone")
    armed = limits.armed()
    limits.restart()
    assert limits.armed() == armed
    assert os.listdir(limits / "group") == ["mine"]
    assert limits.read("group/mine/select") == 'comm == "member"\n'
    assert "3 places set up again, 0 lost" in limits.said()
    child.open_files(5)
    limits.wait_for(lambda: "alarm" in crossings(events(limits, "group/mine/fds")))
    assert events(limits, "group/mine/fds")[-1]["pid"] == str(child.pid)
    assert crossings(events(limits, "group/mine/fds/far")) == ["lost"]


def test_a_name_that_is_no_utf8_comes_back_and_hinders_nobody(limits: Service, helper: Make) -> None:
    child = helper()
    with cgroup() as group:
        odd = group.below("odd\udcff")
        odd.take(child.pid)
        limits.write(f"{odd.tree}/fds/threshold", "900")
        limits.write("process/fds/threshold", "900000")
        armed = limits.armed()
        assert set(armed) == {json.dumps(f"{odd.tree}/fds"), "process/fds"}
        assert limits.state("state")["kept"] == "2"
        limits.restart()
        assert limits.armed() == armed
        assert "2 places set up again, 0 lost" in limits.said()
        limits.write(f"{odd.tree}/fds/threshold", "off")
        limits.restart()
        assert set(limits.armed()) == {"process/fds"}


def test_the_gap_is_told_and_what_is_beyond_rings(limits: Service, helper: Make) -> None:
    beyond, below = helper(), helper()
    for child in (beyond, below):
        limits.write(f"process/{child.pid}/fds/threshold", str(child.fds() + 5))
    limits.kill()
    beyond.open_files(5)
    limits.start()
    first, second = (events(limits, f"process/{child.pid}/fds") for child in (beyond, below))
    limits.wait_for(lambda: len(events(limits, f"process/{beyond.pid}/fds")) == 2)
    first = events(limits, f"process/{beyond.pid}/fds")
    assert crossings(first) == ["lost", "alarm"]
    assert (first[0]["threshold"], first[0]["pid"]) == (f">= {beyond.fds()}", str(beyond.pid))
    # Nobody knows how many there were.
    assert limits.read(f"process/{beyond.pid}/fds/event").split("\n")[0].endswith(" count=-")
    assert crossings(second) == ["lost"]
    assert limits.state(f"process/{beyond.pid}/fds/state")["alarms"] == "1"
    assert limits.state(f"process/{below.pid}/fds/state")["alarms"] == "0"
    # Counters count from here.
    armed = limits.state(f"process/{beyond.pid}/fds/state")["armed"]
    assert first[0]["time"] <= armed <= first[1]["time"]
    assert crossings(lines_of(limits.read("event"))).count("lost") == 2


def test_a_first_start_tells_of_no_gap(limits: Service, helper: Make) -> None:
    child = helper()
    limits.write(f"process/{child.pid}/fds/threshold", "500")
    assert events(limits, f"process/{child.pid}/fds") == []
    assert limits.read("event") == ""
    assert "set up again" not in limits.said()


def test_who_has_gone_meanwhile_is_said_and_dropped(limits: Service, helper: Make) -> None:
    gone, there = helper(), helper()
    for child in (gone, there):
        limits.write(f"process/{child.pid}/fds/threshold", "500")
    os.mkdir(limits / f"process/{gone.pid}/fds/mine")
    limits.kill()
    gone.end()
    limits.start()
    assert set(limits.armed()) == {f"process/{there.pid}/fds"}
    assert "1 places set up again, 2 lost" in limits.said()
    assert f"'process/{gone.pid}/fds' is lost: " in limits.said()
    told = [line for line in lines_of(limits.read("event")) if line["crossing"] == "gone"]
    assert [(line["path"], line["threshold"]) for line in told] == [(f"process/{gone.pid}/fds", ">= 500")]
    limits.restart()
    assert "1 places set up again, 0 lost" in limits.said()


def test_a_number_used_again_is_not_armed(limits: Service, helper: Make) -> None:
    child = helper()
    limits.write(f"process/{child.pid}/fds/threshold", "500")
    os.mkdir(limits / f"process/{child.pid}/fds/mine")
    limits.kill()
    child.end()
    deadline = time.monotonic() + PATIENCE
    while True:
        # The next process of that number, made as the kernel lets root choose it.
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(child.pid - 1))
        again = helper()
        if again.pid == child.pid:
            break
        again.end()
        assert time.monotonic() < deadline, "the number was not given again"
    limits.start()
    assert limits.armed() == {}
    assert "mine" not in os.listdir(limits / f"process/{again.pid}/fds")
    assert "0 places set up again, 2 lost" in limits.said()


def test_watchers_belong_to_who_made_them(limits: Service, helper: Make) -> None:
    child = helper(uid=NOBODY)
    with other() as nobody:
        fds = f"{limits.root}/process/{child.pid}/fds"
        nobody.ask(f"os.mkdir({fds!r} + '/mine')")
        nobody.ask(f"write({fds!r} + '/mine/threshold', '500')")
        nobody.ask(f"write({fds!r} + '/threshold', '400')")
        limits.restart()
        assert os.stat(f"{fds}/mine").st_uid == NOBODY
        assert nobody.ask(f"read({fds!r} + '/mine/threshold')") == ">= 500\n"
        # He reads the line of the gap, in the file of all too, and can remove what is his.
        assert "crossing=lost" in str(nobody.ask(f"read({fds!r} + '/event')"))
        assert str(nobody.ask(f"read('{limits.root}/event')")).count("crossing=lost") == 2
        nobody.ask(f"os.rmdir({fds!r} + '/mine')")
    # Root's file, which nobody else may look into.
    assert (limits.kept.stat().st_mode & 0o777, limits.kept.stat().st_uid) == (0o700, 0)


def test_a_private_watcher_ends_with_its_file(limits: Service, helper: Make) -> None:
    child = helper()
    fd = os.open(limits / f"process/{child.pid}/fds/event", os.O_RDWR)
    os.write(fd, b"500")
    assert limits.state("state")["armed"] == "1"
    limits.restart()
    assert limits.state("state")["armed"] == "0"
    assert refused(lambda: os.read(fd, 1)) in ENDED
    with contextlib.suppress(OSError):
        os.close(fd)


def test_once_that_has_rung_does_not_come_back(limits: Service, helper: Make) -> None:
    rung, waiting = helper(), helper()
    for child in (rung, waiting):
        limits.write(f"process/{child.pid}/fds/threshold", f"{child.fds() + 5} once")
    rung.open_files(5)
    limits.wait_for(lambda: limits.read(f"process/{rung.pid}/fds/threshold") == "off\n")
    limits.restart()
    assert set(limits.armed()) == {f"process/{waiting.pid}/fds"}
    # One that rings as it comes back is off, and stays so.
    limits.kill()
    waiting.open_files(5)
    limits.start()
    limits.wait_for(lambda: limits.read(f"process/{waiting.pid}/fds/threshold") == "off\n")
    assert crossings(events(limits, f"process/{waiting.pid}/fds")) == ["lost", "alarm"]
    limits.restart()
    assert limits.armed() == {}


# Who forgets, who keeps


def test_a_service_manager_that_restarts_it_keeps_all(limits: Service, helper: Make) -> None:
    """SIGTERM, as for an upgrade in place."""
    child = helper()
    limits.write(f"process/{child.pid}/fds/threshold", "500")
    limits.daemon.terminate()
    assert limits.daemon.wait(PATIENCE) == 0
    assert not os.path.ismount(limits.root)
    limits.start()
    assert limits.armed() == {f"process/{child.pid}/fds": ">= 500"}
    assert crossings(events(limits, f"process/{child.pid}/fds")) == ["lost"]


@pytest.mark.parametrize("how", ["umount", "umount -l", "Ctrl-C"])
def test_who_unmounts_means_it(limits: Service, helper: Make, how: str) -> None:
    child = helper()
    limits.write(f"process/{child.pid}/fds/threshold", "500")
    assert list(limits.kept.iterdir()) != []
    if how == "Ctrl-C":
        limits.daemon.send_signal(signal.SIGINT)
    else:
        subprocess.run([*how.split(), limits.root], check=True)
    assert limits.daemon.wait(PATIENCE) == 0
    assert list(limits.kept.iterdir()) == []
    limits.start()
    assert limits.armed() == {}


def test_rules_go_on_from_where_they_were(limits: Service) -> None:
    file = limits.rules / "10.conf"
    file.write_text(
        "system/fds/threshold = 500000\nsystem/fds/made/threshold = 600000\nsystem/threads/threshold = 90000\n"
    )
    limits.write("rules", "reload")
    limits.write("system/threads/threshold", "80000")
    limits.kill()
    file.write_text("system/fds/threshold = 550000\nsystem/threads/threshold = 90000\n")
    limits.start()
    # What changed is armed, what went is gone, what was changed by hand stays, as on any other reading.
    assert limits.armed() == {"system/fds": ">= 550000", "system/threads": ">= 80000"}
    assert "made" not in os.listdir(limits / "system/fds")
    assert limits.read("rules").endswith(
        "1 applied, 1 kept, 0 waiting, 1 undone, 0 left, 0 tolerated, 0 refused\n"
    )
    file.write_text("")
    limits.write("rules", "reload")
    assert limits.armed() == {"system/threads": ">= 80000"}


# At any moment


class Writer:
    """Arms, disarms, makes and removes watchers until the daemon is gone; knows what it was told to be done.

    Attributes:
        told: threshold by path, of all that is armed.
        made: named watchers.
        open: what was under way when the daemon went: paths of which nobody can know.
    """

    LEVELS = (100, 200, 300, 5)

    def __init__(self, limits: Service, places: list[str], seed: int) -> None:
        self._limits = limits
        self._places = places
        self._random = random.Random(seed)
        self.told: dict[str, str] = {}
        self.made: set[str] = set()
        self.open: set[str] = set()
        self.steps = 0

    def run(self) -> None:
        self.open = set()
        while True:
            place = self._random.choice(self._places)
            named = f"{place}/{self._random.choice('abc')}"
            path = self._random.choice((place, named))
            try:
                self._step(path, path == named)
            except OSError as error:
                if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
                    raise
                self.open = {path}
                return
            self.steps += 1

    def _step(self, path: str, named: bool) -> None:
        if named and path not in self.made:
            os.mkdir(self._limits / path)
            self.made.add(path)
        elif named and self._random.random() < 0.2:
            os.rmdir(self._limits / path)
            self.made.discard(path)
            self.told.pop(path, None)
        elif path in self.told and self._random.random() < 0.3:
            self._limits.write(f"{path}/threshold", "off")
            self.told.pop(path)
        else:
            level = self._random.choice(self.LEVELS)
            self._limits.write(f"{path}/threshold", str(level))
            self.told[path] = f">= {level}"


def test_killed_at_any_moment_it_comes_back_as_it_was(limits: Service, helper: Make) -> None:
    children = [helper() for _ in range(3)]
    places = [f"process/{child.pid}/{resource}" for child in children for resource in ("fds", "threads")]
    writer = Writer(limits, [*places, "process/threads"], seed=1)
    stop = threading.Event()

    def ring() -> None:
        while not stop.is_set():
            children[0].open_files(20)
            children[0].close_files(20)

    ringing = threading.Thread(target=ring, daemon=True)
    ringing.start()
    delays = random.Random(2)
    try:
        for _round in range(12):
            writing = threading.Thread(target=writer.run, daemon=True)
            writing.start()
            time.sleep(delays.uniform(0.02, 0.6))
            limits.kill()
            writing.join(PATIENCE)
            assert not writing.is_alive(), "a client hangs"
            limits.start()
            armed = limits.armed()
            for path in writer.open:
                # Done or not: nobody was told.
                _settle(writer, path, armed.get(path), (limits / path).exists())
            assert armed == writer.told
            assert set(_named(limits, places)) == {
                path for path in writer.made if not path.startswith("process/threads/")
            }
            for path in armed:
                # The one that rings all the time may have no room for it any more.
                if not path.startswith(places[0]):
                    assert crossings(events(limits, path))[0] == "lost"
    finally:
        stop.set()
        ringing.join(PATIENCE)
    assert writer.steps > 100


def _settle(writer: Writer, path: str, threshold: str | None, there: bool) -> None:
    if threshold is not None:
        writer.told[path] = threshold
    else:
        writer.told.pop(path, None)
    if path.count("/") == 3 or path.startswith("process/threads/"):
        (writer.made.add if there else writer.made.discard)(path)


def _named(limits: Service, places: list[str]) -> Iterator[str]:
    for place in places:
        for name in os.listdir(limits / place):
            if (limits / place / name).is_dir():
                yield f"{place}/{name}"


# While it calls into its own mount

UTIMENSAT = {"x86_64": 280, "aarch64": 88}[platform.machine()]
RINGS = """
import os, sys, time
while True:
    for text in (b"off", b">= 1"):
        fd = os.open(sys.argv[1], os.O_WRONLY)
        os.write(fd, text)
        os.close(fd)
    # The daemon shall be taking that ring's request, not one of ours.
    time.sleep(0.002)
"""


def test_killed_while_it_waits_for_itself(limits: Service, helper: Make) -> None:
    child = helper()
    arm_everything(limits, child)
    threshold = limits / f"process/{child.pid}/fds/threshold"
    for _round in range(6):
        hooks = hooks_of(limits.daemon.pid)
        client = subprocess.Popen([sys.executable, "-S", "-c", RINGS, threshold], stderr=subprocess.DEVNULL)
        try:
            # It tells inotify of a ring, and waits for an answer that will not come.
            limits.stop_in(UTIMENSAT)
            limits.kill()
        finally:
            client.kill()
            client.wait(PATIENCE)
        limits.wait_for(lambda hooks=hooks: not any(exists(hook) for hook in hooks))  # type: ignore[misc]
        limits.start()


# As above, in a daemon that dies at the worst moment for sure; it can be made to share its descriptors.
DIES = """
import os, signal, sys
from limitfs import caller
from limitfs.cli import main
from limitfs.space.fuse import Operations
async def setattr_taken(*_arguments):
    os.kill(os.getpid(), signal.SIGKILL)
Operations.setattr = setattr_taken
def refuse(fd):
    raise PermissionError(1, "refused")
if sys.argv.pop(1) == "shared":
    caller._keep_only = refuse
main()
"""


def die(limits: Service, child: Helper, table: str) -> set[tuple[str, int]]:
    """Have it ring, and die of that; gives the hooks that it had."""
    limits.kill()
    limits.program = ["-c", DIES, table]
    limits.start()
    arm_everything(limits, child)
    hooks = hooks_of(limits.daemon.pid)
    ringing = f"echo 1 > {limits.root}/process/{child.pid}/fds/threshold"
    subprocess.run(["sh", "-c", ringing], check=False, stderr=subprocess.DEVNULL, timeout=PATIENCE)
    return hooks


def _state_of(pid: int) -> str:
    return subprocess.run(["ps", "-o", "pid=,stat=", str(pid)], capture_output=True, text=True).stdout.lstrip()


def test_killed_with_its_own_request_in_hand(limits: Service, helper: Make) -> None:
    hooks = die(limits, helper(), "own")
    assert limits.daemon.wait(PATIENCE) == -signal.SIGKILL
    limits.wait_for(lambda: not any(exists(hook) for hook in hooks))


@pytest.mark.parametrize("how", ["mount -o rules=none,state=none", "umount --lazy"])
def test_one_that_waits_for_itself_is_aborted(limits: Service, helper: Make, how: str) -> None:
    hooks = die(limits, helper(), "shared")
    assert "calls into the mount share our descriptors" in limits.said()
    root = str(limits.root)
    limits.wait_for(lambda: f"{limits.daemon.pid} Z" in _state_of(limits.daemon.pid))
    assert mounting.ask(root)[0] is Health.SILENT
    if how.startswith("mount") and not mounting.is_orphaned(root):
        subprocess.run(["umount", "-f", root], check=False)
        pytest.skip("this kernel does not tell whose a descriptor of /dev/fuse is")
    assert all(exists(hook) for hook in hooks)
    subprocess.run([sys.executable, "-m", "limitfs", *how.split(), root], check=True, timeout=PATIENCE)
    assert limits.daemon.wait(PATIENCE) == -signal.SIGKILL
    assert os.path.ismount(limits.root) == how.startswith("mount")
    limits.wait_for(lambda: not any(exists(hook) for hook in hooks))


def test_one_that_is_only_slow_is_let_be(limits: Service) -> None:
    root = str(limits.root)
    limits.daemon.send_signal(signal.SIGSTOP)
    try:
        mount = [sys.executable, "-m", "limitfs", "mount", root]
        done = subprocess.run(mount, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 1
        assert "already mounted, but does not answer" in done.stderr
        assert not mounting.is_orphaned(root)
    finally:
        limits.daemon.send_signal(signal.SIGCONT)
    assert limits.state("state")["pid"] == str(limits.daemon.pid)


@pytest.mark.parametrize("fusectl", [True, False])
def test_one_that_is_stopped_is_taken_away_when_asked(
    limits: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fusectl: bool
) -> None:
    monkeypatch.setattr(mounting, "FUSECTL", str(tmp_path / "connections"))
    reader = client(READER, limits / "features")
    limits.daemon.send_signal(signal.SIGSTOP)
    if fusectl:
        (tmp_path / "connections").mkdir()
        subprocess.run(["mount", "-t", "fusectl", "none", tmp_path / "connections"], check=True)
        # No more than anybody may who mounted it.
        mounting._abort(str(limits.root))
        subprocess.run(["umount", tmp_path / "connections"], check=True)
    else:
        mounting.unmount(str(limits.root), lazy=True)
    assert reader.communicate(timeout=PATIENCE)[0].strip() in ENDED
    assert mounting.is_mounted(str(limits.root)) == fusectl
    limits.daemon.send_signal(signal.SIGCONT)
    assert limits.daemon.wait(PATIENCE) == 0


# A disk that is full, a file that is torn


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    at = tmp_path / "state"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", at], check=True)
    yield at
    subprocess.run(["umount", "-l", at], check=True)


def test_a_full_disk_keeps_what_was_there(small: Path, tmp_path: Path, helper: Make) -> None:
    child = helper()
    here = f"process/{child.pid}/fds"
    with service(tmp_path) as limits:
        limits.write(f"{here}/threshold", "500")
        assert limits.state("state")["kept"] == "1"
        (small / "fill").write_bytes(b"")
        with contextlib.suppress(OSError), (small / "fill").open("wb", buffering=0) as fill:
            while fill.write(b"x" * 512):
                pass
        names = [f"w{number}" for number in range(40)]
        for name in names:
            os.mkdir(limits / f"{here}/{name}")
            limits.write(f"{here}/{name}/threshold", "600")
        # It goes on, and says so.
        assert len(limits.armed()) == 41
        assert "full" in limits.state("state")["kept"]
        assert "cannot be written (database or disk is full)" in limits.said()
        limits.restart()
        armed = limits.armed()
        assert armed[here] == ">= 500"
        assert len(armed) < 41
        # When there is room again, all that is there by then is kept.
        (small / "fill").unlink()
        subprocess.run(["mount", "-o", "remount,size=1m", small], check=True)
        for name in names:
            with contextlib.suppress(FileExistsError):
                os.mkdir(limits / f"{here}/{name}")
            limits.write(f"{here}/{name}/threshold", "700")
        limits.wait_for(lambda: limits.state("state")["kept"] == "41")
        limits.restart()
        assert len(limits.armed()) == 41


def test_a_garbled_file_brings_nothing_back_and_is_said(limits: Service, helper: Make) -> None:
    child = helper()
    limits.write(f"process/{child.pid}/fds/threshold", "500")
    limits.kill()
    for file in limits.kept.iterdir():
        file.write_bytes(os.urandom(20_000))
    limits.start()
    assert limits.armed() == {}
    assert "is damaged (file is not a database)" in limits.said()
    limits.write(f"process/{child.pid}/fds/threshold", "500")
    limits.restart()
    assert limits.armed() == {f"process/{child.pid}/fds": ">= 500"}


# Those who have files open


def client(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A program; it says "ready" when it is."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


POLLER = """
import errno, os, select, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.read(fd, 65536)
poller = select.poll()
poller.register(fd, select.POLLPRI)
print("ready", flush=True)
(_, flags), = poller.poll()
try:
    os.read(fd, 1)
except OSError as error:
    print(flags & select.POLLERR != 0, errno.errorcode[error.errno])
"""
READER = """
import errno, os, sys
print("ready", flush=True)
try:
    while True:
        fd = os.open(sys.argv[1], os.O_RDONLY)
        while os.read(fd, 4096):
            pass
        os.close(fd)
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def test_clients_across_a_crash(limits: Service, helper: Make) -> None:
    child = helper()
    fds = limits / f"process/{child.pid}/fds"
    limits.write(f"process/{child.pid}/fds/threshold", "500")
    pollers = [client(POLLER, path) for path in (fds / "event", limits / "event")]
    readers = [client(READER, path) for path in (limits / "process/fds/top", fds / "state", limits / "features")]
    cat = subprocess.Popen(["sh", "-c", f"while cat {fds}/usage; do :; done 2>&1"], stdout=subprocess.DEVNULL)
    with Watching(fds / "event") as watching:
        limits.kill()
        for poller in pollers:
            assert poller.communicate(timeout=PATIENCE)[0] in {f"True {name}\n" for name in ENDED}
        for reader in readers:
            assert reader.communicate(timeout=PATIENCE)[0] in {f"{name}\n" for name in ENDED}
        cat.wait(PATIENCE)
        limits.start()
        # inotify tells that there is nothing to come any more.
        assert "UNMOUNT" in {name for _path, name, _file in watching.next()}
    # Who opens it again, hears as before.
    with (fds / "event").open("rb", buffering=0) as event:
        assert crossings(lines_of(event.read().decode())) == ["lost"]
        assert poll_for(event.fileno(), 0) == 0
        child.open_files(500)
        assert poll_for(event.fileno()) & select.POLLPRI


def test_limitfs_wait_ends_with_a_message(limits: Service) -> None:
    command = [sys.executable, "-m", "limitfs", "wait", limits / "system/fds"]
    waiting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    limits.wait_for(lambda: limits.state("state")["requests"] and _holds(waiting.pid, limits.root))
    limits.kill()
    _, said = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode == 1
    assert "was it unmounted?" in said


def _holds(pid: int, root: Path) -> bool:
    with contextlib.suppress(OSError):
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        return any(link.startswith(str(root)) for link in links)
    return False


# Nothing is left in the kernel


def arm_everything(limits: Service, child: Helper) -> None:
    for resource, threshold in (("fds", "500"), ("memory", "100G"), ("threads", "900"), ("cputime", "10h")):
        limits.write(f"process/{child.pid}/{resource}/threshold", threshold)
    limits.write(f"process/{child.pid}/thread/{child.pid}/cputime/threshold", "10h")
    limits.write("process/threads/threshold", "9000")
    limits.write("system/processes/threshold", "900000")
    if Path("/proc/pressure/memory").exists():
        limits.write("system/memory_pressure/threshold", "99%")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_hook_outlives_the_daemon(limits: Service, helper: Make, end: signal.Signals) -> None:
    arm_everything(limits, helper())
    hooks = hooks_of(limits.daemon.pid)
    assert all(exists(hook) for hook in hooks)
    if not any(kind == "link_id" for kind, _number in hooks):
        pytest.skip("this kernel takes no hooks")
    limits.daemon.send_signal(end)
    limits.daemon.wait(PATIENCE)
    limits.wait_for(lambda: not any(exists(hook) for hook in hooks))


# The end


@pytest.mark.parametrize("how", ["SIGTERM", "umount -l", "limitfs umount --lazy"])
def test_it_ends_though_it_is_in_use(limits: Service, helper: Make, how: str) -> None:
    child = helper()
    arm_everything(limits, child)
    hooks = hooks_of(limits.daemon.pid)
    poller = client(POLLER, limits / "event")
    reader = client(READER, limits / "process/fds/top")
    with Watching(limits / "event"), (limits / "README").open("rb") as held:
        if how == "SIGTERM":
            limits.daemon.terminate()
        else:
            command = [sys.executable, "-m", *how.split()] if how.startswith("limitfs") else how.split()
            subprocess.run([*command, limits.root], check=True)
        # The error at the end of the file: it was there when the log told of it.
        assert limits.daemon.wait(PATIENCE) == 0
        assert not os.path.ismount(limits.root)
        assert refused(lambda: os.read(held.fileno(), 1)) in ENDED
    for process in (poller, reader):
        told, _ = process.communicate(timeout=PATIENCE)
        assert told.split()[-1] in ENDED or "ENOENT" in told
    if how == "SIGTERM":
        assert f"{os.getpid()} (" in limits.said().partition("ended while in use: ")[2]
    else:
        assert "files were open: their users get ENOTCONN" in limits.said()
    limits.wait_for(lambda: not any(exists(hook) for hook in hooks))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_told_while_it_starts(limits: Service, number: signal.Signals) -> None:
    by_hand = [f"system/fds/hand{count}" for count in range(40)]
    for path in by_hand:
        os.mkdir(limits / path)
        limits.write(f"{path}/threshold", "900000000")
    limits.kill()
    subprocess.run(["umount", "-l", limits.root], check=True)
    rules = [f"system/fds/rule{count}/threshold = 900000000\n" for count in range(100)]
    (limits.rules / "many.conf").write_text("".join(rules))
    limits.launch()
    limits.wait_for(lambda: os.path.realpath(limits.root) in Path("/proc/self/mounts").read_text())
    limits.daemon.send_signal(number)
    if number == signal.SIGHUP:
        limits.await_answer()
        limits.wait_for(lambda: "100 kept" in limits.said())
        assert limits.state("state")["armed"] == "140"
        return
    assert limits.daemon.wait(PATIENCE) == 0
    assert not os.path.ismount(limits.root)
    limits.start()
    # SIGTERM keeps what was set up by hand, however far it had come; who types Ctrl-C means the mount.
    kept = [path for path in by_hand if (limits / path).is_dir()]
    assert kept == (by_hand if number == signal.SIGTERM else [])
    assert limits.state("state")["armed"] == str(len(kept) + 100)


def test_an_idle_one_ends_without_a_word(limits: Service) -> None:
    limits.daemon.terminate()
    assert limits.daemon.wait(PATIENCE) == 0
    assert "WARNING" not in limits.said()


def test_another_mount_that_comes_and_goes_ends_nothing(limits: Service, tmp_path: Path) -> None:
    at = tmp_path / "other"
    at.mkdir()
    bound = tmp_path / "bound"
    bound.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", at], check=True)
    subprocess.run(["umount", at], check=True)
    # As long as it is mounted anywhere, somebody can open its files.
    subprocess.run(["mount", "--bind", limits.root, bound], check=True)
    with (limits / "README").open("rb"):
        subprocess.run(["umount", "-l", limits.root], check=True)
        assert (bound / "README").read_text()
        assert limits.daemon.poll() is None
        subprocess.run(["umount", "-l", bound], check=True)
        assert limits.daemon.wait(PATIENCE) == 0
