"""Installing what mounts limitfs at boot, and taking it away: mount/up --boot, and the Debian package.

In a machine without systemd; with systemd it is tests/vm/boot. Needs the package index, as any installation does.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from machinekit import CHECKOUT, Machine, machine_at

RULE = "process/fds/threshold = 12345\n"

FIND = "find /etc /usr/sbin /usr/lib/limitfs.d /lib/systemd /usr/local /var/lib/limitfs -name '*limitfs*'"
"""What an installation leaves outside of its own directories."""


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with machine_at(tmp_path / "root") as machine:
        # Whatever limitfs this machine has is not the one that is tested.
        machine.run(f"rm -rf /opt/limitfs; {FIND} -prune -exec rm -rf {{}} + 2>/dev/null || :")
        machine.path("/etc/limitfs.d").mkdir()
        machine.path("/etc/limitfs.d/test.conf").write_text(RULE)
        # Services may be started in it, whatever this machine is.
        machine.run("rm -f /usr/sbin/policy-rc.d /usr/sbin/runlevel")
        machine.path("/usr/sbin/runlevel").write_text("#!/bin/sh\necho N 2\n")
        machine.path("/usr/sbin/runlevel").chmod(0o755)
        yield machine


def files(machine: Machine) -> set[str]:
    return set(machine.run(f"{FIND} -not -path '/etc/limitfs.d/*' 2>/dev/null || :").split())


def test_up_and_down_at_boot_twice_each(machine: Machine) -> None:
    before = files(machine)
    for again in (False, True):
        said = machine.run(f"{CHECKOUT}/mount/up --boot")
        assert "will be when the machine starts" in said
        assert ("installing limitfs into" in said) == (not again)
        assert machine.limits() == ["/limits"]
        assert machine.run("cat /limits/process/fds/threshold") == ">= 12345\n"
    assert machine.run("cd /etc; ls rc2.d rc0.d | grep limitfs").split() == ["K01limitfs", "S01limitfs"]
    machine.run("/etc/init.d/limitfs restart && umount /limits")
    machine.wait_for_none()
    machine.run("mount -t limitfs limitfs /limits")
    for _time in range(2):
        machine.run(f"{CHECKOUT}/mount/down --boot")
        assert machine.limits() == []
        assert not machine.path("/limits").exists()
    assert machine.run("ls /etc/rc2.d /etc/rc0.d | grep limitfs || :") == ""
    assert machine.path("/etc/default/limitfs").exists()
    assert machine.run("limitfs --version").startswith("limitfs, version")
    machine.run(f"{CHECKOUT}/mount/down --purge")
    assert files(machine) == before == {"/etc/limitfs.d"}
    assert not machine.path("/opt/limitfs").exists()
    assert machine.path("/etc/limitfs.d/test.conf").read_text() == RULE


def test_up_at_another_place_keeps_the_other_settings(machine: Machine) -> None:
    machine.path("/etc/default/limitfs").write_text("LIMITFS_DIRECTORY=/limits\nLIMITFS_OPTIONS=hidepid=1\n")
    machine.run(f"{CHECKOUT}/mount/up --boot --at '/srv/my limits'")
    assert machine.limits() == [r"/srv/my\040limits"]
    assert "hidepid=1" in machine.run("cat '/srv/my limits/state'")
    assert "choose a directory without quotes" in machine.run(f'{CHECKOUT}/mount/up --boot --at "/a\'b"', code=1)
    machine.run(f"{CHECKOUT}/mount/down --boot --at '/srv/my limits'")
    assert machine.limits() == []


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="this is no Debian")
def test_the_package(machine: Machine) -> None:
    package = machine.run(f"{CHECKOUT}/mount/deb /root").splitlines()[-1]
    assert package.startswith("/root/limitfs_")
    assert machine.run("limitfs --version 2>&1", code=127)
    machine.run(f"dpkg --install {package}")
    assert machine.limits() == ["/limits"], "started by its init script"
    assert machine.run("cat /limits/process/fds/threshold") == ">= 12345\n"
    assert "hook for" not in machine.run("limitfs doctor | grep 'not built' || :")
    assert machine.run("mount.limitfs -f -v limitfs /limits").startswith("mount.limitfs: /limits could be")
    # An upgrade in place, with something armed by hand.
    machine.run("mkdir /limits/system/fds/mine; echo 1234567 > /limits/system/fds/mine/threshold")
    pid = machine.run("sed -n 's/^pid //p' /limits/state")
    machine.run(f"dpkg --install {package}")
    assert machine.run("sed -n 's/^pid //p' /limits/state") != pid
    assert machine.run("cat /limits/system/fds/mine/threshold") == ">= 1234567\n"
    # What somebody mounted elsewhere goes, too.
    machine.run("mkdir /root/mine && limitfs mount /root/mine")
    assert "is installed, and does this already" in machine.run(f"{CHECKOUT}/mount/up --boot", code=1)
    machine.run("dpkg --remove limitfs")
    assert machine.limits() == []
    assert machine.path("/etc/default/limitfs").exists()
    machine.run("dpkg --purge limitfs")
    left = ("/limits", "/etc/default/limitfs", "/run/limitfs", "/usr/lib/limitfs", "/etc/init.d/limitfs")
    left += ("/var/log/limitfs.log",)
    assert machine.run(f"ls -d {' '.join(left)} 2>/dev/null || :") == ""
    assert machine.path("/etc/limitfs.d/test.conf").read_text() == RULE
