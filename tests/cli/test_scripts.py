"""The shell scripts: their syntax, usage and what they do without touching the system."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    *("mount/up", "mount/down", "mount/lib.sh", "mount/deb", "mount/mount.limitfs", "mount/limitfs.init"),
    *("mount/debian/limitfs.prerm", "mount/debian/limitfs.postrm", "tests/run", "tests/vm/boot", ".ci/run"),
]


def sh(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run shell code with mount/lib.sh read in."""
    text = f"set -eu; checkout={ROOT}; . {ROOT}/mount/lib.sh; {code}"
    return subprocess.run(["sh", "-c", text], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script: str) -> None:
    shell = (ROOT / script).read_text().split("\n")[0]
    interpreter = "bash" if "bash" in shell else "sh"
    subprocess.run([interpreter, "-n", ROOT / script], check=True)


def test_shellcheck() -> None:
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.parametrize("script", ["mount/up", "mount/down"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(script: str, option: str) -> None:
    done = subprocess.run([ROOT / script, option], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {script} [--at DIR] [--boot]")


@pytest.mark.parametrize("script", ["mount/up", "mount/down"])
@pytest.mark.parametrize("arguments", [["--nonsense"], ["/limits"], ["--at"], ["--at="]])
def test_wrong_usage_exits_2(script: str, arguments: list[str]) -> None:
    done = subprocess.run([ROOT / script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: mount/" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code"), [(["-h"], 0), (["--nonsense"], 2), ([".", "."], 2), (["/none"], 1)]
)
def test_usage_of_deb(arguments: list[str], code: int) -> None:
    done = subprocess.run([ROOT / "mount/deb", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("usage: mount/deb [DIR]" in done.stdout + done.stderr) == (code != 1)


def test_only_down_purges() -> None:
    assert subprocess.run([ROOT / "mount/up", "--purge"], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize("script", ["mount/up", "mount/down", "tests/run", "tests/vm/boot"])
def test_root_is_asked_for(script: str, tmp_path: Path) -> None:
    # An `id` of our own stands for another user.
    fake = tmp_path / "id"
    fake.write_text("#!/bin/sh\necho 1000\n")
    fake.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run([ROOT / script], env={"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this needs root" in done.stderr


def test_output_is_shown_only_of_what_fails() -> None:
    assert sh("quietly work echo fine").stdout == ""
    done = sh("quietly work sh -c 'echo broken; exit 3'")
    assert done.returncode == 1
    assert "broken" in done.stderr
    assert "work failed" in done.stderr


def test_absent_packages_are_named() -> None:
    assert sh("absent coreutils no-such-package-x").stdout == "no-such-package-x "
    assert sh("install_packages coreutils").stdout == ""


def test_a_fingerprint_follows_the_sources(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return sh("fingerprint limitfs pyproject.toml absent.py", tmp_path).stdout

    (tmp_path / "limitfs" / "__pycache__").mkdir(parents=True)
    (tmp_path / "limitfs" / "a.py").write_text("1")
    (tmp_path / "pyproject.toml").write_text("")
    first = fingerprint()
    (tmp_path / "limitfs" / "__pycache__" / "a.pyc").write_text("x")
    (tmp_path / "elsewhere").write_text("x")
    assert fingerprint() == first
    (tmp_path / "limitfs" / "a.py").write_text("2")
    second = fingerprint()
    assert second != first
    (tmp_path / "limitfs" / "a.py").rename(tmp_path / "limitfs" / "b.py")
    assert fingerprint() not in (first, second)


@pytest.mark.parametrize(
    ("given", "meant"), [("/", "/"), ("/a/", "/a"), ("/a b", "/a b"), ("a", "{cwd}/a"), ("a/b/", "{cwd}/a/b")]
)
def test_absolute(given: str, meant: str, tmp_path: Path) -> None:
    assert sh(f"absolute '{given}'", tmp_path).stdout == meant.format(cwd=tmp_path)


def test_a_link_to_a_mount_point_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert sh(f"canonical {tmp_path}/link").stdout == f"{tmp_path.resolve()}/real"
    assert sh(f"canonical {tmp_path}/none/x").stdout == f"{tmp_path.resolve()}/none/x"


def test_mounts_are_found_in_mountinfo() -> None:
    assert sh("mount_entry /proc").returncode == 0
    assert sh("mount_entry /pro").returncode == 1
