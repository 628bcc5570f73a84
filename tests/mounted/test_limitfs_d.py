"""Rules on a real mount: read again while others look, from the command line, and as they are shipped."""

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crashkit import Service, service
from mountkit import Watching, events, other, refused

from conftest import PATIENCE, Helper, poll_for

Make = Callable[..., Helper]
SHIPPED = Path(__file__).parents[2] / "mount/limitfs.d/limitfs.conf"


@pytest.fixture
def limits(tmp_path: Path) -> Iterator[Service]:
    for parent in (tmp_path, *tmp_path.parents):
        if str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    with service(tmp_path) as made:
        yield made


def put(limits: Service, *lines: str) -> None:
    (limits.rules / "10.conf").write_text("".join(f"{line}\n" for line in lines))


def limitfs(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "limitfs", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 2, check=False)


def test_rules_are_armed_when_it_is_mounted(limits: Service, helper: Make) -> None:
    child = helper()
    put(limits, f"process/{child.pid}/fds/rule/threshold = {child.fds() + 5}")
    limits.daemon.send_signal(signal.SIGINT)
    limits.daemon.wait(PATIENCE)
    limits.start()
    directory = f"process/{child.pid}/fds/rule"
    with (limits / f"{directory}/event").open("rb", buffering=0) as event:
        event.read()
        child.open_files(4)
        assert poll_for(event.fileno(), 1) == 0
        child.open_files(1)
        assert poll_for(event.fileno()) & select.POLLPRI
    (line,) = events(limits, directory)
    assert (line["crossing"], line["watcher"], line["pid"]) == ("alarm", "rule", str(child.pid))


def test_readers_of_what_stayed_notice_nothing(limits: Service, helper: Make) -> None:
    child = helper()
    here = f"process/{child.pid}/fds"
    level = child.fds() + 5
    put(limits, f"{here}/threshold = {level}", f"{here}/goes/threshold = 900", "system/fds/threshold = 900000")
    limits.write("rules", "reload")
    child.open_files(5)
    limits.wait_for(lambda: events(limits, here))
    before = limits.read(f"{here}/state")
    path = limits / f"{here}/event"
    with Watching(path) as watching, path.open("rb", buffering=0) as event:
        seen = event.read()
        put(
            limits, "system/fds/threshold = 800000", f"{here}/threshold = {level}", f"{here}/comes/threshold = 900"
        )
        limits.daemon.send_signal(signal.SIGHUP)
        limits.wait_for(lambda: limits.read("system/fds/threshold") == ">= 800000\n")
        assert limits.read(f"{here}/state") == before
        assert poll_for(event.fileno(), 0.5) == 0
        assert [name for name in watching.next(0.1) if name[1] == "MODIFY"] == []
        # And they hear what comes.
        child.close_files(1)
        assert poll_for(event.fileno()) & select.POLLPRI
        event.seek(0)
        lines = event.read()
        assert lines.startswith(seen)
        assert b"crossing=clear" in lines.removeprefix(seen)
    assert {"comes", "goes"} & set(os.listdir(limits / here)) == {"comes"}


def test_the_kernel_forgets_a_directory_whose_rule_went(limits: Service) -> None:
    put(limits, "system/fds/goes/threshold = 900000")
    limits.write("rules", "reload")
    with (limits / "system/fds/goes/event").open("rb") as event:
        assert (limits / "system/fds/goes/threshold").read_text() == ">= 900000\n"
        put(limits)
        limits.write("rules", "reload")
        limits.wait_for(lambda: refused(lambda: os.stat(limits / "system/fds/goes")) == "ENOENT")
        # An open file in it hangs up.
        assert poll_for(event.fileno()) & select.POLLHUP
    os.mkdir(limits / "system/fds/goes")
    assert limits.read("system/fds/goes/threshold") == "off\n"


def test_rules_are_roots(limits: Service) -> None:
    assert os.stat(limits / "rules").st_mode & 0o777 == 0o600
    with other() as nobody:
        assert nobody.refused(f"read('{limits.root}/rules')") == "EACCES"
        assert nobody.refused(f"write('{limits.root}/rules', 'reload')") == "EACCES"
    assert refused(lambda: limits.write("rules", "apply")) == "EINVAL"
    assert limits.last_error() == "rules: 'apply' 'apply' is no command here; reload"


def test_without_rules(tmp_path: Path) -> None:
    with service(tmp_path, "rules=none") as limits:
        put(limits, "system/fds/threshold = 900000")
        limits.write("rules", "reload")
        assert limits.armed() == {}


# limitfs reload, check, status


def test_reload_says_what_it_did(limits: Service) -> None:
    file = limits.rules / "10.conf"
    put(limits, "system/fds/threshold = 900000", "system/cpu/threshold = 90000%")
    done = limitfs("reload", limits.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{file}:1: applied: system/fds/threshold = 900000\n"
        f"{file}:2: applied: system/cpu/threshold = 90000%\n"
        "2 applied, 0 kept, 0 undone, 0 left, 0 tolerated, 0 refused\n"
    )
    put(limits, "system/fds/threshold = 900000", "system/fds/treshold = 5", "-system/fds/usage = 5")
    done = limitfs("reload", limits.root)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == (
        f"{file}:2: refused: system/fds/treshold = 5: no 'treshold' in system/fds\n"
        "-: undone: system/cpu/threshold = 90000%\n"
        f"{file}:3: tolerated: system/fds/usage = 5: this file cannot be written\n"
        "0 applied, 1 kept, 1 undone, 0 left, 1 tolerated, 1 refused\n"
    )
    # Those who look are told too.
    refusal = f"{file}:2: refused: system/fds/treshold = 5: no 'treshold' in system/fds"
    assert f"  refused_rule {refusal}\n" in limitfs("status", limits.root).stdout
    assert refusal in limits.said()
    limits.daemon.send_signal(signal.SIGSTOP)
    try:
        assert limitfs("status", limits.root).returncode == 1
    finally:
        limits.daemon.send_signal(signal.SIGCONT)


def test_reload_where_nothing_is_mounted(tmp_path: Path) -> None:
    done = limitfs("reload", tmp_path)
    assert done.returncode == 1
    assert "limitfs is not mounted at" in done.stderr


# What is shipped


def shipped() -> list[str]:
    """The rules of the shipped file; those that come after a group's `select` need it."""
    return [line[1:] for line in SHIPPED.read_text().splitlines() if re.match(r"#[a-z]\S* = ", line)]


def test_the_shipped_file_is_all_comment() -> None:
    done = limitfs("check", SHIPPED)
    assert (done.returncode, done.stdout) == (0, "")
    lines = SHIPPED.read_text().splitlines()
    assert all(line.startswith("#") or not line for line in lines)
    assert len(shipped()) >= 10


@pytest.mark.parametrize("rule", shipped())
def test_each_shipped_rule_is_good(rule: str, limits: Service) -> None:
    group = re.match(r"group/\w+/", rule)
    before = [other for other in shipped() if group and other.startswith(f"{group[0]}select")]
    lines = list(dict.fromkeys([*before, rule]))
    put(limits, *lines)
    done = limitfs("reload", limits.root)
    assert done.returncode == 0, done.stdout
    assert f"{len(lines)} applied" in done.stdout
    done = limitfs("check", limits.rules / "10.conf")
    assert (done.returncode, done.stdout) == (0, "")
    # Taken back, nothing is left.
    put(limits)
    done = limitfs("reload", limits.root)
    assert f"{len(lines)} undone" in done.stdout
    assert limits.armed() == {}
    assert not group or os.listdir(limits / "group") == []


def in_the_manual() -> list[str]:
    """The rules that limitfs.d(5) gives as examples."""
    page = (Path(__file__).parents[2] / "docs/man/limitfs.d.5").read_text().partition(".Sh EXAMPLES")[2]
    blocks = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if " = " in line]


def test_the_examples_of_the_manual(limits: Service) -> None:
    rules = in_the_manual()
    assert len(rules) == 4
    put(limits, *rules)
    # As its last example has it.
    check, reload = limitfs("check", limits.rules / "10.conf"), limitfs("reload", limits.root)
    assert (check.returncode, reload.returncode) == (0, 0), check.stdout + reload.stdout
    tolerated = sum(": tolerated: " in line for line in reload.stdout.splitlines())
    assert len(limits.armed()) == 4 - tolerated
    assert tolerated == (not Path("/proc/pressure/memory").exists())
