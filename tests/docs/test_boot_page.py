"""docs/boot.md and mount.limitfs(8): what they show that needs no systemd, run as a reader would."""

import doctest
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machinekit import CHECKOUT, Machine, machine_at
from test_tour import Shell, steps

BOOT = CHECKOUT / "docs/boot.md"
MANUAL = CHECKOUT / "docs/man/mount.limitfs.8"
WITHOUT_SYSTEMD = "<!-- in a machine without systemd -->\n"
EXAMPLES = sorted((CHECKOUT / "mount/examples").glob("*.[ps]*[eh]"))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine_at(tmp_path_factory.mktemp("machine") / "root") as machine:
        machine.install()
        machine.run(f"mkdir -p /etc/init.d; cp {CHECKOUT}/mount/limitfs.init /etc/init.d/limitfs; : > /etc/fstab")
        yield machine


def test_what_it_shows_without_systemd(machine: Machine) -> None:
    parts = BOOT.read_text(encoding="utf-8").split(WITHOUT_SYSTEMD)[1:]
    shown = [step for part in parts for step in steps(part.partition("```\n")[0] + "```\n")]
    assert len(shown) > 12
    shell = Shell(command=machine.command("bash", "--norc", "--noprofile"))
    try:
        for command, want in shown:
            got = shell.run(command)
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(want, got, flags), f"$ {command}\n{got}"
    finally:
        shell.end()


def test_the_examples_of_the_manual(machine: Machine) -> None:
    text = MANUAL.read_text().partition(".Sh EXAMPLES")[2].partition(".Sh SEE ALSO")[0]
    command, line, lazy = re.findall(r"^\.Bd -literal -offset indent\n(.*?)^\.Ed$", text, re.MULTILINE | re.DOTALL)
    machine.run(f"mkdir -p /limits && {command}")
    assert machine.limits() == ["/limits"]
    for entry in (line, lazy):
        machine.run("umount /limits")
        machine.wait_for_none()
        machine.path("/etc/fstab").write_text(entry)
        machine.run("mount /limits")
        assert machine.limits() == ["/limits"]
    machine.run("umount /limits")


@pytest.mark.parametrize("unit", [CHECKOUT / "mount/limitfs.service", *EXAMPLES], ids=lambda unit: unit.name)
def test_units_are_well_formed(machine: Machine, unit: Path) -> None:
    # Together, as some are bound to others; the manual is not installed here.
    machine.run(
        f"mkdir -p /run/units; cp {CHECKOUT}/mount/limitfs.service {CHECKOUT}/mount/examples/*.* /run/units"
    )
    said = machine.run(f"SYSTEMD_UNIT_PATH=/run/units: systemd-analyze verify --man=no /run/units/{unit.name}")
    assert said == ""


def test_the_score_of_the_sandbox_is_what_the_page_says() -> None:
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", CHECKOUT / "mount/limitfs.service"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    score = re.search(r"Overall exposure level for limitfs.service: (\S+) OK", said)
    assert score
    assert f"says {score[1]}, OK" in BOOT.read_text(encoding="utf-8")


def test_nothing_gives_the_service_a_mount_namespace() -> None:
    """What it mounts must be seen by all; see systemd.exec(5)."""
    unit = (CHECKOUT / "mount/limitfs.service").read_text()
    chosen = set(re.findall(r"^([A-Z]\w+)=", unit, re.MULTILINE))
    assert chosen.isdisjoint(
        {
            *(
                "ProtectSystem",
                "ProtectHome",
                "PrivateTmp",
                "PrivateDevices",
                "PrivateMounts",
                "ProtectKernelTunables",
            ),
            *("ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ProtectProc", "ProcSubset"),
            *("ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths", "RootDirectory"),
            *(
                "BindPaths",
                "BindReadOnlyPaths",
                "TemporaryFileSystem",
                "DynamicUser",
                "LogNamespace",
                "MountFlags",
            ),
            *("ProtectHostname", "PrivateNetwork", "PrivateUsers", "PrivateIPC", "RootImage", "ExtensionImages"),
        }
    )
