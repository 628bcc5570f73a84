"""mount(8), its helper, fstab and the init script, in a machine of our own."""

import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from machinekit import CHECKOUT, Machine, machine_at

from conftest import NOBODY, PATIENCE, poll_for

MOUNT = "mount -t limitfs limitfs /limits"
PTRACE_ATTACH = 16
T = TypeVar("T")
RULE = "process/fds/threshold = 12345\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine_at(tmp_path_factory.mktemp("machine") / "root") as machine:
        machine.install()
        machine.run("mkdir -p /limits /etc/limitfs.d")
        machine.path("/etc/limitfs.d/test.conf").write_text(RULE)
        yield machine


@pytest.fixture
def machine(installed: Machine) -> Iterator[Machine]:
    """With limitfs at hand, and mounted nowhere; a rule, and the directory /limits."""
    yield installed
    installed.run("umount -a -t fuse.limitfs; rm -f /etc/fstab /etc/default/limitfs")
    installed.wait_for_none()


def wait_until(what: Callable[[], T]) -> T:
    """Until it is true; gives it."""
    deadline = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def options(machine: Machine) -> set[str]:
    """Of limitfs, those in force."""
    return set(machine.run("sed -n 's/^options //p' /limits/state").strip().split(","))


def flags(machine: Machine) -> set[str]:
    """Of the kernel."""
    return set(
        machine.run("sed -n 's,^[^ ]* /limits fuse.limitfs \\([^ ]*\\) .*,\\1,p' /proc/self/mounts")
        .strip()
        .split(",")
    )


# --- mounting


@pytest.mark.parametrize("source", ["limitfs", "none", "/dev/null"])
@pytest.mark.parametrize("fstype", ["limitfs", "fuse.limitfs"])
def test_it_answers_with_its_rules_armed_when_mount_returns(machine: Machine, source: str, fstype: str) -> None:
    said = machine.run(
        f"mount -t {fstype} {source} /limits && cat /limits/process/fds/threshold && umount /limits"
    )
    assert said == ">= 12345\n"
    assert machine.limits() == []


def test_its_own_options_arrive(machine: Machine, tmp_path: Path) -> None:
    asked = {
        "hidepid=2",
        "max_open=77",
        "max_watchers=78",
        "hearing=sampled",
        "rules=none",
        "state=none",
        "noallow_other",
    }
    machine.run(f"{MOUNT} -o {','.join(asked)} -o log={tmp_path}/log")
    assert asked | {f"log={tmp_path}/log"} <= options(machine)
    assert machine.run("cat /limits/process/fds/threshold") == "off\n"


@pytest.mark.parametrize("flag", ["nosuid", "nodev", "noexec", "noatime"])
def test_flags_reach_the_kernel(machine: Machine, flag: str) -> None:
    machine.run(f"{MOUNT} -o {flag}")
    assert {flag, "nosuid", "nodev"} <= flags(machine)


def test_flags_not_asked_for_are_not_set(machine: Machine) -> None:
    machine.run(f"{MOUNT} -o suid,dev,exec")
    assert {"noexec", "noatime"}.isdisjoint(flags(machine))
    assert {"nosuid", "nodev"} <= flags(machine)


@pytest.mark.parametrize(
    "option",
    [
        "auto",
        "noauto",
        "nofail",
        "_netdev",
        "defaults",
        "user",
        "users",
        "x-any=1",
        "X-mount.mkdir",
        "comment=mine",
    ],
)
def test_options_for_others_are_accepted(machine: Machine, option: str) -> None:
    machine.run(f"{MOUNT} -o {option}")


# --- refusals; exit codes as mount(8) lists them


@pytest.mark.parametrize("option", ["sizelimit=3", "ro", "hidepid=9", "max_open=few", "loop", "hearing"])
@pytest.mark.parametrize("fake", ["", "-f"])
def test_a_wrong_option_is_refused_by_name(machine: Machine, option: str, fake: str) -> None:
    said = machine.run(f"mount.limitfs limitfs /limits {fake} -o nofail,{option}", code=1)
    assert option.partition("=")[0] in said or option == "ro"
    assert said.startswith("mount.limitfs: ")
    assert "Traceback" not in said
    assert machine.limits() == []


def test_an_unknown_option_tells_which_there_are(machine: Machine) -> None:
    said = machine.run(f"{MOUNT} -o sizelimits=3", code=1)
    assert "unknown mount option 'sizelimits'" in said
    assert "one of: allow_other, hearing, hidepid" in said


def test_sloppy_passes_it_over(machine: Machine) -> None:
    machine.run(f"{MOUNT} -s -o sizelimits=3,hidepid=1")
    assert "hidepid=1" in options(machine)


def test_a_directory_that_is_none(machine: Machine) -> None:
    assert "/none does not exist" in machine.run("mount.limitfs limitfs /none", code=32)
    assert "/etc/passwd is not a directory" in machine.run("mount.limitfs limitfs /etc/passwd", code=32)
    assert "/none is not a directory" in machine.run("mount.limitfs limitfs /none -f", code=32)


def test_it_is_not_mounted_twice(machine: Machine) -> None:
    machine.run(MOUNT)
    assert "/limits is already mounted" in machine.run(MOUNT, code=32)
    assert machine.limits() == ["/limits"]


@pytest.mark.parametrize(
    "arguments",
    ["", "limitfs", "limitfs /limits more", "limitfs /limits -x", "limitfs /limits -t ext4"],
)
def test_wrong_usage(machine: Machine, arguments: str) -> None:
    assert "Usage: mount.limitfs" in machine.run(f"mount.limitfs {arguments}", code=1)


def test_another_namespace_is_refused_by_name(machine: Machine) -> None:
    assert "-N: not here; use nsenter" in machine.run("mount.limitfs limitfs /limits -N /proc/1/ns/mnt", code=1)


# --- its other options


def test_fake_mounts_nothing(machine: Machine) -> None:
    assert "/limits could be mounted" in machine.run(f"{MOUNT} -f -v")
    assert machine.limits() == []


def test_verbose_says_what_was_done_and_the_others_nothing(machine: Machine) -> None:
    assert machine.run(f"{MOUNT} -v") == "mount.limitfs: /limits mounted.\n"
    machine.run("umount /limits")
    machine.wait_for_none()
    assert machine.run("mount.limitfs limitfs /limits -n -t limitfs") == ""
    assert machine.limits() == ["/limits"]


def test_a_user_mounts_by_an_fstab_line_for_users(machine: Machine) -> None:
    machine.path("/etc/fstab").write_text("limitfs /home/limits limitfs user,noauto 0 0\n")
    machine.run(f"mkdir -p /home/limits && chown {NOBODY} /home/limits")
    user = f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups"
    machine.run(f"{user} mount /home/limits")
    assert f"user_id={NOBODY}" in machine.run("grep ' /home/limits ' /proc/self/mounts")
    machine.run(f"{user} umount /home/limits")
    assert machine.limits() == []


# --- remounting


def test_a_remount_changes_the_flags_of_the_kernel_both_ways(machine: Machine) -> None:
    machine.run(MOUNT)
    machine.run("mount -o remount,noexec,noatime /limits")
    assert {"noexec", "noatime", "nosuid", "nodev"} <= flags(machine)
    machine.run("mount -o remount,exec,relatime /limits")
    assert {"noexec", "noatime"}.isdisjoint(flags(machine))
    assert {"nosuid", "nodev"} <= flags(machine)


def test_a_remount_keeps_what_is_armed(machine: Machine) -> None:
    machine.run(f"{MOUNT} && echo 54321 > /limits/process/threads/threshold && mount -o remount,noexec /limits")
    assert machine.run("cat /limits/process/threads/threshold") == ">= 54321\n"


def test_a_remount_refuses_to_change_what_a_daemon_is_started_with(machine: Machine) -> None:
    machine.run(f"{MOUNT} -o hidepid=1")
    said = machine.run("mount -o remount,hidepid=2,noexec /limits", code=32)
    assert "cannot change while it is mounted: hidepid=2" in said
    assert "now it is hidepid=1" in said
    assert "noexec" not in flags(machine)
    machine.run("mount -o remount,hidepid=1 /limits")


@pytest.mark.parametrize(("option", "code"), [("sizelimits=3", 1), ("ro", 1), ("hidepid=9", 1)])
def test_a_remount_refuses_what_a_mount_does(machine: Machine, option: str, code: int) -> None:
    machine.run(MOUNT)
    machine.run(f"mount -o remount,{option} /limits", code=code)


def test_a_remount_of_nothing(machine: Machine) -> None:
    assert "is not mounted at /limits" in machine.run("mount.limitfs limitfs /limits -o remount", code=32)


# --- fstab


def test_fstab_as_in_the_examples(machine: Machine) -> None:
    machine.path("/etc/fstab").write_text((CHECKOUT / "mount/examples/fstab").read_text())
    machine.run("mount -a")
    assert machine.limits() == ["/limits"]
    machine.run("mount -a")
    assert machine.limits() == ["/limits"], "not twice"
    machine.run("mount -o remount /limits")
    machine.run("umount /limits")


# --- the init script


def init(machine: Machine, action: str, code: int = 0) -> str:
    return machine.run(f"{CHECKOUT}/mount/limitfs.init {action}", code)


def test_the_init_script(machine: Machine) -> None:
    assert "not mounted" in init(machine, "status", 3)
    init(machine, "reload", 7)
    init(machine, "try-restart")
    assert machine.limits() == []
    init(machine, "start")
    init(machine, "start")
    assert machine.limits() == ["/limits"], "once"
    assert "is mounted at /limits" in init(machine, "status")
    assert machine.run("cat /limits/process/fds/threshold") == ">= 12345\n"
    machine.path("/etc/limitfs.d/test.conf").write_text(RULE.replace("12345", "23456"))
    init(machine, "reload")
    assert machine.run("cat /limits/process/fds/threshold") == ">= 23456\n"
    machine.path("/etc/limitfs.d/test.conf").write_text(RULE)
    init(machine, "force-reload")
    init(machine, "stop")
    init(machine, "stop")
    assert machine.limits() == []
    assert "usage: " in init(machine, "nonsense", 2)


def daemon(machine: Machine) -> int:
    """The process behind /limits."""
    return int(machine.run("sed -n 's/^pid //p' /limits/state"))


def with_something_by_hand(machine: Machine) -> int:
    """Started by the init script, with a watcher that somebody made; gives the daemon."""
    init(machine, "start")
    machine.run("mkdir /limits/system/fds/mine; echo 1234567 > /limits/system/fds/mine/threshold")
    return daemon(machine)


def comes_back(machine: Machine, pid: int) -> int:
    """Another daemon, with what was armed; gives it."""
    now = wait_until(lambda: machine.run("sed -n 's/^pid //p' /limits/state 2>/dev/null || :").strip())
    assert now != str(pid)
    assert machine.run("cat /limits/process/fds/threshold") == ">= 12345\n"
    assert machine.run("cat /limits/system/fds/mine/threshold") == ">= 1234567\n"
    return int(now)


def child_of(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ends(pid: int) -> bool:
    """Whether a process ends within a patient time."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(poll_for(pidfd, events=select.POLLIN))
    finally:
        os.close(pidfd)


def kill(pid: int) -> None:
    """As the kernel's out-of-memory killer does; it is over then."""
    os.kill(pid, signal.SIGKILL)
    assert ends(pid)


@pytest.mark.parametrize("action", ["restart", "try-restart"])
def test_a_restart_keeps_what_was_made_by_hand(machine: Machine, action: str) -> None:
    pid = with_something_by_hand(machine)
    init(machine, action)
    comes_back(machine, pid)
    # Whoever is told to stop it means it: the next one begins anew.
    init(machine, "stop")
    init(machine, "start")
    assert "mine" not in machine.run("ls /limits/system/fds")


def test_it_is_started_again_when_it_was_killed(machine: Machine) -> None:
    pid = with_something_by_hand(machine)
    for _time in range(3):
        kill(pid)
        pid = comes_back(machine, pid)
    assert "is mounted at /limits" in init(machine, "status")
    assert machine.limits() == ["/limits"], "one mount"
    # Its parent goes with it.
    parent = parent_of(pid)
    assert b"limitfs" in Path(f"/proc/{parent}/cmdline").read_bytes()
    init(machine, "stop")
    assert ends(pid)
    assert ends(parent)
    assert machine.limits() == []


def test_it_is_started_again_when_it_was_killed_at_any_moment(machine: Machine) -> None:
    """Also while it comes up."""
    pid = with_something_by_hand(machine)
    parent = parent_of(pid)
    child = ""
    for pause in (0.0, 0.0, 0.3, 0.7):
        (child,) = wait_until(lambda before=child: child_of(parent) - {before})
        time.sleep(pause)
        kill(int(child))
    comes_back(machine, pid)
    # A signal to the parent is for the daemon.
    machine.path("/etc/limitfs.d/test.conf").write_text(RULE.replace("12345", "23456"))
    os.kill(parent, signal.SIGHUP)
    wait_until(lambda: machine.run("cat /limits/process/fds/threshold") == ">= 23456\n")
    machine.path("/etc/limitfs.d/test.conf").write_text(RULE)
    os.kill(parent, signal.SIGTERM)
    assert ends(parent)
    machine.wait_for_none()


def test_one_that_hangs_is_started_again(machine: Machine) -> None:
    pid = with_something_by_hand(machine)
    # Stops the thread of the event loop alone, as a deadlock would; the thread that counts lives on.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    assert libc.ptrace(PTRACE_ATTACH, pid, None, None) == 0
    while not os.WIFEXITED(os.waitpid(pid, 0)[1]):
        pass
    comes_back(machine, pid)


def test_what_cannot_be_mounted_is_not_tried_again(machine: Machine) -> None:
    machine.path("/etc/default/limitfs").write_text("LIMITFS_OPTIONS=sizelimit=3\n")
    assert "unknown mount option 'sizelimit'" in init(machine, "start", 2)
    machine.path("/etc/default/limitfs").write_text("LIMITFS_DIRECTORY=/etc/passwd\n")
    assert "/etc/passwd" in init(machine, "start", 1)
    assert machine.limits() == []
    said = machine.run("limitfs mount -f --respawn /limits", 2)
    assert "--respawn is for a daemon" in said
    assert "--pid-file goes with --respawn" in machine.run("limitfs mount --pid-file /x /limits", 2)


def test_what_is_stopped_after_a_crash_stays_away(machine: Machine) -> None:
    pid = with_something_by_hand(machine)
    parent = parent_of(pid)
    assert machine.run("cat /run/limitfs.pid") == f"{parent}\n"
    kill(pid)
    # At once, while it waits.
    init(machine, "start")
    init(machine, "stop")
    assert ends(parent)
    assert machine.limits() == []
    assert "not mounted" in init(machine, "status", 3)
    # The file of one that was killed, too, names nobody, or somebody else.
    machine.run("echo 1 > /run/limitfs.pid")
    init(machine, "start")
    assert machine.limits() == ["/limits"]
    assert machine.run("cat /run/limitfs.pid") != "1\n"
    init(machine, "stop")
    assert machine.run("ls /run/limitfs.pid || :").endswith("No such file or directory\n")


def test_another_mount_in_its_place_is_left_alone(machine: Machine) -> None:
    pid = with_something_by_hand(machine)
    parent = parent_of(pid)
    os.kill(parent, signal.SIGSTOP)
    kill(pid)
    machine.run("limitfs mount /limits")
    os.kill(parent, signal.SIGCONT)
    assert ends(parent)
    assert machine.limits() == ["/limits"]


def test_the_init_script_mounts_where_and_how_the_settings_say(machine: Machine) -> None:
    settings = (CHECKOUT / "mount/limitfs.default").read_text()
    settings = settings.replace("=/limits", "='/srv/my limits'").replace(
        "OPTIONS=", "OPTIONS=hidepid=1,max_open=55"
    )
    machine.path("/etc/default/limitfs").write_text(settings)
    init(machine, "start")
    said = machine.run("sed -n 's/^options //p' '/srv/my limits/state'")
    assert {"hidepid=1", "max_open=55"} <= set(said.strip().split(","))
    init(machine, "status")
    init(machine, "stop")
    assert machine.limits() == []


@pytest.mark.parametrize("directory", ["/limits/", "/srv/../limits", "/srv/link"])
def test_the_init_script_knows_its_directory_however_it_is_written(directory: str, machine: Machine) -> None:
    machine.run("ln -sfn /limits /srv/link")
    machine.path("/etc/default/limitfs").write_text(f"LIMITFS_DIRECTORY={directory}\n")
    init(machine, "start")
    assert machine.limits() == ["/limits"]
    machine.run("echo 1234567 > /limits/system/fds/threshold")
    init(machine, "stop")
    assert machine.limits() == []
    init(machine, "start")
    assert machine.run("cat /limits/system/fds/threshold") == "off\n", "it was an unmount"
    pid = daemon(machine)
    kill(parent_of(pid))
    kill(pid)
    assert "does not answer" in init(machine, "status", 1)
    init(machine, "stop")
    assert machine.limits() == []
    assert "is not mounted" in init(machine, "status", 3)


def test_the_init_script_stops_what_is_busy(machine: Machine) -> None:
    init(machine, "start")
    with subprocess.Popen(
        machine.command("tail", "-f", "/limits/system/fds/event"), stdout=subprocess.PIPE
    ) as reader:
        try:
            assert reader.stdout is not None
            os.set_blocking(reader.stdout.fileno(), False)
            init(machine, "stop")
            machine.wait_for_none()
        finally:
            reader.kill()


def test_the_init_script_takes_away_what_a_dead_daemon_left(machine: Machine) -> None:
    init(machine, "start")
    pid = daemon(machine)
    # Both, or its parent would start it again.
    kill(parent_of(pid))
    kill(pid)
    assert "does not answer" in init(machine, "status", 1)
    init(machine, "start")
    assert machine.limits() == ["/limits"]
    init(machine, "status")
