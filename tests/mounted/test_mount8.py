"""mount(8), its helper, fstab and the init script, in a machine of our own."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machinekit import CHECKOUT, Machine, machine_at

from conftest import NOBODY

MOUNT = "mount -t limitfs limitfs /limits"
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
    pid = machine.run("sed -n 's/^pid //p' /limits/state")
    for action in ("restart", "force-reload", "try-restart"):
        init(machine, action)
        assert machine.run("sed -n 's/^pid //p' /limits/state") != pid
    init(machine, "stop")
    init(machine, "stop")
    assert machine.limits() == []
    assert "usage: " in init(machine, "nonsense", 2)


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
    machine.run("kill -9 $(sed -n 's/^pid //p' /limits/state)")
    assert "does not answer" in init(machine, "status", 1)
    init(machine, "start")
    assert machine.limits() == ["/limits"]
    init(machine, "status")
