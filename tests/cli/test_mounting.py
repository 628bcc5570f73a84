"""The kernel's table of mounts, questions to a mount that may hang, and the start of a daemon."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import PATIENCE
from limitfs import mounting
from limitfs.errors import Impossible
from limitfs.mounting import Health, Mount, MountError

TABLE = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
30 27 0:40 / /limits rw,nosuid,nodev,relatime shared:7 master:1 - fuse.limitfs limitfs rw,user_id=0
31 27 0:41 / /srv/a\040b\011c\012d\134e rw - fuse.limitfs limitfs rw
32 27 0:42 / /srv/caf\303\251 rw - ext4 /dev/disk\040one rw
not a line of mountinfo
"""


@pytest.mark.parametrize(
    ("escaped", "plain"),
    [
        ("/plain", "/plain"),
        (r"/a\040b", "/a b"),
        (r"\011\012\134", "\t\n\\"),
        (r"\134040", r"\040"),
        (r"/caf\303\251", "/café"),
        ("/café", "/café"),
        (r"/\377", "/\udcff"),
        (r"/\04", r"/\04"),
        (r"/\999", r"/\999"),
        ("", ""),
    ],
)
def test_octal_escapes_are_undone(escaped: str, plain: str) -> None:
    assert mounting.unescape(escaped) == plain


def test_mountinfo_with_and_without_optional_fields() -> None:
    assert list(mounting.parse_mountinfo(TABLE)) == [
        Mount("/proc", "proc", "proc"),
        Mount("/limits", "fuse.limitfs", "limitfs"),
        Mount("/srv/a b\tc\nd\\e", "fuse.limitfs", "limitfs"),
        Mount("/srv/café", "ext4", "/dev/disk one"),
    ]


def test_every_mount_of_this_machine_is_understood() -> None:
    lines = Path("/proc/self/mountinfo").read_bytes().count(b"\n")
    assert len(mounting.table()) == lines


def test_the_newest_mount_covers_the_older(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [Mount("/limits", "fuse.limitfs", "limitfs"), Mount("/limits", "tmpfs", "tmpfs")]
    monkeypatch.setattr(mounting, "table", lambda: mounts)
    assert not mounting.is_mounted("/limits")
    mounts.reverse()
    assert mounting.is_mounted("/limits")
    assert not mounting.is_mounted("/elsewhere")


def test_resolve_follows_links_in_the_parent_and_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "real" / "here").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "last").symlink_to("here")
    assert mounting.resolve(f"{tmp_path}/link/last/") == f"{tmp_path.resolve()}/real/here"


def test_resolve_does_not_touch_a_mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = f"{tmp_path.resolve()}/mounted"
    os.symlink("/nowhere", place)
    (tmp_path / "link").symlink_to("further")
    (tmp_path / "further").symlink_to(f"../{tmp_path.name}/mounted/")
    monkeypatch.setattr(mounting, "table", lambda: [Mount(place, "fuse.limitfs", "limitfs")])
    assert mounting.resolve(place) == place
    assert mounting.resolve(f"{tmp_path}/link") == place


@pytest.mark.parametrize("target", [".", "real/..", "/", "link", "nowhere/x"])
def test_resolve_ends_whatever_a_link_says(tmp_path: Path, target: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(target)
    assert mounting.resolve(f"{tmp_path}/link") == os.path.realpath(tmp_path / "link")


# --- asking


def test_a_place_that_answers_gives_its_text(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("pid 12\nversion 1.2 beta\n\n")
    assert mounting.ask(str(tmp_path)) == (Health.ANSWERS, "")
    assert mounting.ask(str(tmp_path / "state"), text=True) == (Health.ANSWERS, "pid 12\nversion 1.2 beta\n\n")
    assert mounting.facts(str(tmp_path)) == {"pid": "12", "version": "1.2 beta"}


def test_a_text_that_no_pipe_holds_comes_whole(tmp_path: Path) -> None:
    # Twice what a pipe holds, and not a multiple of what is read at once.
    said = "".join(f"10.conf:{number}: kept: process/fds/r{number}/threshold = 900000\n" for number in range(2500))
    assert len(said) > 131072
    (tmp_path / "rules").write_text(said)
    assert mounting.ask(str(tmp_path / "rules"), text=True, patience=30) == (Health.ANSWERS, said)


def test_a_text_without_end_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").write_text("x" * 1001)
    monkeypatch.setattr(mounting, "LONGEST_ANSWER", 1000)
    assert mounting.ask(str(tmp_path / "state"), text=True, patience=30) == (Health.EXCESSIVE, "")
    monkeypatch.setattr(mounting, "LONGEST_ANSWER", 1001)
    assert mounting.ask(str(tmp_path / "state"), text=True, patience=30) == (Health.ANSWERS, "x" * 1001)


def test_who_begins_and_does_not_end_is_left_behind(tmp_path: Path) -> None:
    """Half of a text is no answer."""
    os.mkfifo(tmp_path / "begins")
    writer = os.open(tmp_path / "begins", os.O_RDWR)
    try:
        os.write(writer, b"pid 12\n")
        assert mounting.ask(str(tmp_path / "begins"), text=True, patience=1) == (Health.SILENT, "")
    finally:
        os.close(writer)


def test_an_absent_file_is_an_answer(tmp_path: Path) -> None:
    assert mounting.ask(str(tmp_path / "none")) == (Health.ABSENT, "")
    assert mounting.facts(str(tmp_path)) == {}


def test_who_does_not_answer_is_left_behind(tmp_path: Path) -> None:
    # Opening a FIFO that nobody writes blocks as a hung daemon does.
    os.mkfifo(tmp_path / "hangs")
    start = time.monotonic()
    assert mounting.ask(str(tmp_path / "hangs"), text=True, patience=0.2) == (Health.SILENT, "")
    assert time.monotonic() - start < 2


# --- starting; in a process of its own, because launch forks

LAUNCH = """
import os, sys, time
from limitfs import mounting
from limitfs.errors import Impossible
def serve(ready):
    {body}
try:
    print("said", repr(mounting.launch(serve, patience={patience})))
except mounting.MountError as error:
    print("failed", repr(error.message))
"""


def launch(body: str, patience: float = 10) -> str:
    """Run `launch` with a `serve` of this body; gives what the caller printed.

    It returns only at the end of file of its output, that is: when the daemon holds nothing of it.
    """
    code = LAUNCH.format(body=body.replace("\n", "\n    "), patience=patience)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def test_launch_returns_when_ready_and_the_daemon_lets_go_of_everything(tmp_path: Path) -> None:
    out = tmp_path / "daemon"
    extra = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(extra, True)
    body = f"""before = os.getpgrp()
ready()
links = [f"/proc/self/fd/{{fd}}" for fd in os.listdir("/proc/self/fd")]
fds = [os.readlink(link) for link in links if os.path.lexists(link)]
lines = [os.getcwd(), str(os.getpid()), str(os.getsid(0)), str(os.getpgrp()), str(before), *fds]
open({str(out)!r} + ".new", "w").write("\\n".join(lines))
os.rename({str(out)!r} + ".new", {str(out)!r})
time.sleep(60)"""
    start = time.monotonic()
    code = LAUNCH.format(body=body.replace("\n", "\n    "), patience=10)
    done = subprocess.run(
        [sys.executable, "-c", code], pass_fds=[extra], capture_output=True, text=True, timeout=20
    )
    os.close(extra)
    assert done.stdout.strip() == "said ''"
    assert time.monotonic() - start < 10
    cwd, pid, session, group, before, *fds = wait_for(out).read_text().split("\n")
    try:
        assert cwd == "/"
        assert session == group == pid, "a session of its own"
        assert before == str(os.getpgrp()), "until it is ready, the group of who started it: autofs asks for that"
        assert fds.count("/dev/null") == 3
        assert "/dev/zero" not in fds
        assert not [fd for fd in fds if fd.startswith("pipe:")]
    finally:
        os.kill(int(pid), signal.SIGKILL)


def wait_for(path: Path) -> Path:
    deadline = time.monotonic() + 5
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)
    return path


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.write(2, b'careful\\n'); ready()", "said 'careful'"),
        ("return 1", "failed 'the daemon ended before the mount was ready'"),
        ("os.system('echo fusermount3: no >&2'); raise RuntimeError('mount failed')", "no\\nmount failed'"),
        ("raise Impossible('too many', 'fewer')", "failed 'too many\\n  fewer'"),
        ("time.sleep(5)", "failed 'the daemon was not ready within 0.5 s'"),
    ],
)
def test_launch_tells_what_the_daemon_said(body: str, said: str) -> None:
    assert said in launch(body, patience=0.5 if "sleep" in body else 10)


def test_a_daemon_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    body = f"""time.sleep(0.6)
try:
    ready()
except BrokenPipeError:
    open({str(tmp_path / "ended")!r}, "w")
    raise"""
    assert launch(body, patience=0.1).startswith("failed")
    wait_for(tmp_path / "ended")


KEEP = """
import logging, os, signal, time
from limitfs import mounting
logging.basicConfig(format="%(message)s")
mounting.RESPAWN_PAUSE = {pause}
def serve(ready):
    print("serves", flush=True)
    ready()
    {body}
try:
    print("ends with", mounting.keep(serve, lambda: None), flush=True)
finally:
    print("leaves", flush=True)
"""


@contextlib.contextmanager
def keeping(body: str, pause: float) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `keep` with a `serve` of this body once it is ready."""
    code = KEEP.format(body=body, pause=pause)
    keeper = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    # What never comes is the end of what it says.
    patience = threading.Timer(PATIENCE * 4, keeper.kill)
    with keeper:
        patience.start()
        try:
            yield keeper
        finally:
            patience.cancel()
            keeper.kill()


def said_next(keeper: subprocess.Popen[str]) -> str:
    assert keeper.stdout is not None
    return keeper.stdout.readline()


def test_between_two_daemons_a_reload_is_for_nobody() -> None:
    with keeping("os.kill(os.getpid(), signal.SIGKILL)", pause=2) as keeper:
        assert keeper.stderr is not None
        for _time in range(2):
            assert said_next(keeper) == "serves\n"
            assert keeper.stderr.readline() == "the daemon was killed by signal 9: starting it again\n"
            for _signal in range(3):
                keeper.send_signal(signal.SIGHUP)
        assert keeper.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_between_two_daemons_the_one_who_keeps_them_can_be_ended(number: signal.Signals) -> None:
    """And leaves as it should: the file with its number goes."""
    with keeping("os.kill(os.getpid(), signal.SIGKILL)", pause=600) as keeper:
        assert said_next(keeper) == "serves\n"
        assert keeper.stderr is not None
        assert keeper.stderr.readline() == "the daemon was killed by signal 9: starting it again\n"
        keeper.send_signal(signal.SIGHUP)
        keeper.send_signal(number)
        assert [said_next(keeper), said_next(keeper)] == ["ends with 0\n", "leaves\n"]
        assert keeper.wait(20) == 0


def test_signals_are_passed_on_to_each_daemon() -> None:
    body = """told = []
    signal.signal(signal.SIGHUP, lambda *_: told.append(1))
    print("listens", flush=True)
    while not told:
        time.sleep(0.01)
    print("reloads", flush=True)
    os._exit(1)"""
    with keeping(body, pause=0.1) as keeper:
        for _time in range(3):
            assert [said_next(keeper), said_next(keeper)] == ["serves\n", "listens\n"]
            keeper.send_signal(signal.SIGHUP)
            assert said_next(keeper) == "reloads\n"
        assert [said_next(keeper), said_next(keeper)] == ["serves\n", "listens\n"]
        keeper.send_signal(signal.SIGTERM)
        assert [said_next(keeper), said_next(keeper)] == ["ends with 0\n", "leaves\n"]


def test_a_reload_while_a_daemon_begins_does_not_end_it() -> None:
    body = "os.kill(os.getpid(), signal.SIGHUP); print('goes on', flush=True); time.sleep(600)"
    with keeping(body, pause=0) as keeper:
        assert [said_next(keeper), said_next(keeper)] == ["serves\n", "goes on\n"]
        keeper.send_signal(signal.SIGTERM)
        assert [said_next(keeper), said_next(keeper)] == ["ends with 0\n", "leaves\n"]


def test_a_group_of_errors_names_each_once() -> None:
    group = ExceptionGroup(
        "nursery",
        [Impossible("too many", "fewer"), Impossible("too many", "fewer"), ExceptionGroup("", [ValueError()])],
    )
    assert mounting.explain(group) == "too many\n  fewer\nValueError"


# --- ending


def test_holders_are_found_by_file_and_by_directory(tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    (below / "file").touch()
    with (
        (below / "file").open() as file,
        subprocess.Popen(["sleep", "60"], stdin=file) as reader,
        subprocess.Popen(["sleep", "60"], cwd=below) as worker,
    ):
        try:
            found = {holder.pid: holder for holder in mounting.holders(str(below))}
            assert found[reader.pid].path == str(below / "file")
            assert found[worker.pid].path == str(below)
            assert found[worker.pid].comm == "sleep"
            assert os.getpid() not in found
            assert len(mounting.holders(str(below), limit=1)) == 1
            assert mounting.holders(str(tmp_path / "bel")) == [], "a name that begins alike is another place"
        finally:
            reader.kill()
            worker.kill()


@pytest.mark.parametrize(("lazy", "option"), [(False, []), (True, ["-l"])])
def test_root_unmounts_without_touching_the_path(
    lazy: bool, option: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    mounting.unmount("/nowhere", lazy=lazy)
    assert commands == [["umount", "-c", *option, "/nowhere"]]


def test_a_busy_mount_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 32, "", "umount: /nowhere: target is busy.")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(MountError, match="/nowhere is busy") as caught:
        mounting.unmount("/nowhere")
    assert "umount --lazy" in caught.value.hint
