"""A limit on a partition's memory takes as long as the kernel needs to reclaim what is too much.

Whoever sets it waits, as with the kernel's own file; nobody else does.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cgroupkit import Cgroup, cgroup
from mountkit import other, private_mount, refused

from conftest import NOBODY, PATIENCE, Helper, Mount
from limitfs.space.fuse import SLOW_AT_ONCE

Make = Callable[..., Helper]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Path]:
    """As long as it exists the kernel does not come to an end with a limit."""
    path = tmp_path / "hold"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def slow(tmp_path_factory: pytest.TempPathFactory, hold: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount]:
    """A mount on such a kernel."""
    before = shlex.split(os.environ.get("LIMITFS_TEST_DAEMON", ""))
    held_up = [sys.executable, str(Path(__file__).with_name("heldup.py")), str(hold)]
    monkeypatch.setenv("LIMITFS_TEST_DAEMON", shlex.join([*before, *held_up]))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with private_mount(tmp_path_factory.mktemp("mount")) as mount:
        yield mount
        hold.unlink(missing_ok=True)


@pytest.fixture
def made() -> Iterator[Cgroup]:
    with cgroup("memory") as made:
        yield made


class Setting:
    """`echo TEXT >limit`, under way."""

    def __init__(self, limits: Mount, path: str, text: str) -> None:
        self.process = subprocess.Popen(
            ["sh", "-c", 'echo "$1" >"$2"', "-", text, limits / path], stderr=subprocess.PIPE, text=True
        )

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def said(self) -> str:
        """What the shell said when it was through; empty when all is well."""
        return self.process.communicate(timeout=PATIENCE)[1]


def threads(limits: Mount) -> int:
    return len(os.listdir(f"/proc/{limits.daemon.pid}/task"))


def under_way(limits: Mount, path: str, text: str) -> Setting:
    """A limit that the daemon is setting: its thread is there."""
    before = threads(limits)
    setting = Setting(limits, path, text)
    limits.wait_for(lambda: threads(limits) > before or setting.ended)
    return setting


def test_others_are_served_meanwhile(slow: Mount, hold: Path, made: Cgroup, helper: Make) -> None:
    path = f"{made.tree}/memory/limit"
    setting = under_way(slow, path, "64M")
    child = helper()
    fds = f"process/{child.pid}/fds"
    slow.write(f"{fds}/threshold", str(child.fds() + 5))
    child.open_files(5)
    slow.wait_for(lambda: "crossing=alarm" in slow.read(f"{fds}/event"))
    assert slow.read(path) == "max\n"
    assert not setting.ended
    hold.unlink()
    assert setting.said() == ""
    assert slow.read(path) == f"{64 << 20}\n"
    assert slow.last_error() == "ok"


def test_when_nothing_holds_it_up_it_is_set_at_once(slow: Mount, hold: Path, made: Cgroup) -> None:
    hold.unlink()
    slow.write(f"{made.tree}/memory/limit", "64M")
    assert slow.read(f"{made.tree}/memory/limit") == f"{64 << 20}\n"


def test_what_is_known_beforehand_is_told_at_once(slow: Mount, made: Cgroup) -> None:
    path = f"{made.tree}/memory/limit"
    assert refused(lambda: slow.write(path, "much")) == "EINVAL"
    with other() as nobody:
        assert nobody.refused(f"write('{slow.root}/{path}', '64M')") == "EACCES"


def test_what_the_kernel_says_in_the_end_is_told(slow: Mount, hold: Path, made: Cgroup) -> None:
    below = made.below("goes")
    setting = under_way(slow, f"{below.tree}/memory/limit", "64M")
    below.remove()
    hold.unlink()
    assert setting.said() != ""
    assert "goes/memory/limit: '64M'" in slow.last_error()


def test_a_percentage_of_it_is_judged_anew(slow: Mount, hold: Path, made: Cgroup, helper: Make) -> None:
    child = helper()
    made.take(child.pid)
    child.do("held.append(bytearray(40 << 20))")
    memory = f"{made.tree}/memory"
    slow.write(f"{memory}/threshold", "50%")
    setting = under_way(slow, f"{memory}/limit", "64M")
    assert slow.state(f"{memory}/state")["state"] == "clear"
    hold.unlink()
    assert setting.said() == ""
    slow.wait_for(lambda: slow.state(f"{memory}/state")["state"] == "alarm")


def test_one_user_cannot_have_all_wait(slow: Mount, hold: Path, made: Cgroup) -> None:
    theirs = [made.below(str(number)) for number in range(SLOW_AT_ONCE + 1)]
    for each in theirs:
        for path in (each.directory, *each.directory.iterdir()):
            os.chown(path, NOBODY, NOBODY)
    knobs = [f"{each.tree}/memory/limit" for each in theirs]
    *writes, one_more = [f"write('{slow.root}/{knob}', '64M')" for knob in knobs]
    with other() as nobody:
        before = threads(slow)
        for number, write in enumerate(writes):
            nobody.ask(f"__import__('threading').Thread(target=lambda: {write}).start()")
            slow.wait_for(lambda number=number: threads(slow) > before + number)  # type: ignore[misc]
        assert nobody.refused(one_more) == "EBUSY"
        assert "wait for one of them" in str(nobody.ask(f"read('{slow.root}/last_error')"))
        # Another user is not held up by them.
        setting = under_way(slow, f"{made.tree}/memory/limit", "128M")
        assert not setting.ended
        hold.unlink()
        assert setting.said() == ""
        slow.wait_for(lambda: all(slow.read(knob) == f"{64 << 20}\n" for knob in knobs[:-1]))
        assert nobody.refused(one_more) == ""


@pytest.mark.parametrize("end", ["SIGTERM", "umount"])
def test_the_daemon_ends_while_one_waits(slow: Mount, made: Cgroup, end: str) -> None:
    setting = under_way(slow, f"{made.tree}/memory/limit", "64M")
    if end == "umount":
        subprocess.run(["umount", "-l", slow.root], check=True)
    else:
        slow.daemon.send_signal(signal.SIGTERM)
    assert slow.daemon.wait(PATIENCE) == 0
    assert setting.said() != ""
    assert "WARNING" in slow.log.read_text()
    slow.log.write_text("")
