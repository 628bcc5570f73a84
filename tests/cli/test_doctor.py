"""What `limitfs doctor` says of machines that lack something."""

import importlib.metadata
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from limitfs import doctor
from limitfs.cli import main
from limitfs.doctor import Check, Machine, Verdict

LINE = re.compile(r"(ok  |warn|fail)  \S.*  — \S.*")


@pytest.fixture
def bare(tmp_path: Path) -> Machine:
    """A machine with nothing, as seen by a user."""
    return Machine(root=tmp_path, uid=1000)


def put(machine: Machine, path: str, text: str = "") -> None:
    (machine.root / path).parent.mkdir(parents=True, exist_ok=True)
    (machine.root / path).write_text(text)


def test_each_check_is_one_line() -> None:
    for check in doctor.examine(Machine()):
        assert LINE.fullmatch(str(check))


def test_nothing_at_all_is_reported_and_not_raised(bare: Machine) -> None:
    checks = list(doctor.examine(bare))
    assert all(LINE.fullmatch(str(check)) for check in checks)
    assert checks[0].verdict is Verdict.FAIL
    assert all(check.remedy for check in checks if check.verdict is not Verdict.OK)


def test_a_line() -> None:
    assert str(Check(Verdict.OK, "fuse", "opens")) == "ok    fuse  — opens"
    assert str(Check(Verdict.FAIL, "fuse", "does not", "modprobe")) == "fail  fuse  — does not; modprobe"


def test_fuse_device(bare: Machine) -> None:
    assert doctor.fuse_device(bare).verdict is Verdict.FAIL
    put(bare, "dev/fuse")
    assert doctor.fuse_device(bare).verdict is Verdict.OK


def test_fusermount_matters_to_users_only(bare: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert doctor.fusermount(bare).verdict is Verdict.FAIL
    assert doctor.fusermount(Machine(bare.root, uid=0)).verdict is Verdict.WARN


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("# user_allow_other\n", Verdict.WARN),
        ("user_allow_other\n", Verdict.OK),
        ("mount_max = 5\n user_allow_other # yes\n", Verdict.OK),
        ("user_allow_others\n", Verdict.WARN),
    ],
)
def test_allow_other(bare: Machine, text: str, verdict: Verdict) -> None:
    put(bare, "etc/fuse.conf", text)
    assert doctor.allow_other(bare).verdict is verdict
    assert doctor.allow_other(Machine(bare.root, uid=0)).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("3.4.0", Verdict.FAIL),
        ("3.5.0", Verdict.OK),
        ("3.10.1", Verdict.OK),
        ("4.0", Verdict.OK),
        ("2.9", Verdict.FAIL),
    ],
)
def test_pyfuse3(version: str, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert doctor.pyfuse3_version().verdict is verdict


def test_pressure_and_btf(bare: Machine) -> None:
    assert doctor.pressure(bare).verdict is doctor.btf(bare).verdict is Verdict.WARN
    put(bare, "proc/pressure/memory", "some avg10=0.00\n")
    put(bare, "sys/kernel/btf/vmlinux")
    assert doctor.pressure(bare).verdict is doctor.btf(bare).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("value", "verdict"), [("-1", Verdict.OK), ("1", Verdict.OK), ("2", Verdict.WARN), ("3", Verdict.WARN)]
)
def test_perf_paranoid(bare: Machine, value: str, verdict: Verdict) -> None:
    put(bare, "proc/sys/kernel/perf_event_paranoid", value + "\n")
    assert doctor.perf_paranoid(bare).verdict is verdict
    assert doctor.perf_paranoid(Machine(bare.root, uid=0)).verdict is Verdict.OK


def test_capabilities(bare: Machine) -> None:
    put(bare, "proc/self/status", f"Name:\tx\nCapPrm:\t{'f' * 16}\nCapEff:\t{1 << 39 | 1 << 12:016x}\n")
    held = [check.what for check in doctor.capabilities(bare) if check.verdict is Verdict.OK]
    assert held == ["CAP_BPF", "CAP_NET_ADMIN"]


def test_cpu_timers_are_tried() -> None:
    assert doctor.cpu_timers().verdict is Verdict.OK


@pytest.mark.parametrize(
    ("hard", "verdict"), [(1024, Verdict.WARN), (4096, Verdict.OK), (resource.RLIM_INFINITY, Verdict.OK)]
)
def test_few_open_files(hard: int, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, hard))
    assert doctor.open_files().verdict is verdict


@pytest.mark.parametrize(("verdict", "code"), [(Verdict.OK, 0), (Verdict.WARN, 0), (Verdict.FAIL, 1)])
def test_exit_code(verdict: Verdict, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda _: iter([Check(Verdict.OK, "a", "b"), Check(verdict, "c", "d")]))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == code
    assert result.output.count(os.linesep) == 2
