"""In the machine that tests/vm/boot boots: that limitfs came up by itself, and stays. Python's own modules only.

Reports in the Test Anything Protocol; the checks run in the order in which they stand here.
"""

import contextlib
import ctypes
import difflib
import doctest
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

LIMITS = Path("/limits")
PATIENCE = 300.0
"""Seconds for what must happen; an emulated machine is slow."""

MANUAL = Path("/root/boot.md").read_text()

PTRACE_ATTACH = 16

CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(function)
    return function


def run(*command: str, code: int = 0) -> str:
    """What a command says, both ways; it must end with `code`."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == code, f"{command} ended with {done.returncode}: {done.stdout}"
    return done.stdout


def wait_for(what: Callable[[], object], meaning: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, f"in vain: {meaning}"
        time.sleep(0.2)


def show(unit: str, *names: str) -> list[str]:
    """Properties of a unit."""
    said = run("systemctl", "show", unit, *(f"--property={name}" for name in names))
    found = dict(line.split("=", 1) for line in said.splitlines())
    return [found[name] for name in names]


def journal(unit: str) -> str:
    return run("journalctl", "--boot", "--no-pager", "--output=cat", f"--unit={unit}")


def write(path: str, text: str) -> None:
    (LIMITS / path).write_text(text + "\n")


def read(path: str) -> str:
    return (LIMITS / path).read_text()


def answers() -> bool:
    return subprocess.run(["limitfs", "status", LIMITS], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def hog(files: int, comm: str = "python3") -> Iterator[int]:
    """A process that holds so many descriptors; gives its pid."""
    program = (
        f"open('/proc/self/comm', 'w').write('{comm}')\nheld = [os.open('/dev/null', 0) for _ in range({files})]"
    )
    program = f"import os, time\n{program}\nprint(flush=True)\ntime.sleep(9999)"
    with subprocess.Popen([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield child.pid
        finally:
            child.kill()


def rings(path: str, pid: int) -> bool:
    lines = read(f"{path}/event").splitlines()
    return any("crossing=alarm" in line and f" pid={pid} " in line for line in lines)


def daemon() -> int:
    return int(show("limitfs.service", "MainPID")[0])


def limitfs_runs() -> bool:
    """Whether there is a daemon of any mount."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if re.search(rb"/limitfs\0mount", cmdline.read_bytes()):
                return True
    return False


def restarted(old: int) -> bool:
    state, pid = show("limitfs.service", "ActiveState", "MainPID")
    return state == "active" and pid not in ("0", str(old))


def armed() -> None:
    """As the rules have it."""
    assert read("process/fds/threshold") == ">= 400\n"
    assert read("process/fds/many/threshold") == ">= 450\n"
    assert read("system/available/threshold") == "< 1%\n"
    assert read("group/hogs/fds/threshold") == ">= 60\n"


# --- what the boot did


@check
def it_is_up_before_multi_user() -> None:
    (service,) = show("limitfs.service", "ActiveEnterTimestampMonotonic")
    (target,) = show("multi-user.target", "ActiveEnterTimestampMonotonic")
    assert 0 < int(service) <= int(target), (service, target)
    assert show("limitfs.service", "ActiveState", "Result") == ["active", "success"]
    assert show("limits.mount", "ActiveState") == ["active"], "seen in the namespace of everybody"
    print(f"# ready after {int(service) / 1e6:.1f} s, multi-user.target after {int(target) / 1e6:.1f} s")


@check
def nothing_else_is_broken() -> None:
    assert run("systemctl", "--failed", "--no-legend", "--plain") == ""


@check
def no_unit_was_left_out() -> None:
    assert "ordering cycle" not in run("journalctl", "--boot", "--no-pager", "_PID=1")
    assert show("limitfs-alarm.path", "ActiveState") == ["active"]
    assert show("limitfs-wait.service", "ActiveState") == ["active"]


@check
def the_rules_are_armed() -> None:
    armed()


def features(root: Path) -> list[str]:
    """Without what each daemon measured for itself."""
    return re.sub(r": (< )?\d+ ns here", "", (root / "features").read_text()).splitlines()


@check
def the_sandbox_takes_nothing_away() -> None:
    with tempfile.TemporaryDirectory() as free:
        run("systemd-run", "--unit=free", "--property=Type=notify", "limitfs", "mount", "--foreground", free)
        try:
            boxed, unboxed = features(LIMITS), features(Path(free))
            assert boxed == unboxed, "\n".join(difflib.unified_diff(unboxed, boxed, lineterm="", n=0))
        finally:
            run("systemctl", "stop", "free")
    said = journal("limitfs.service")
    assert not re.search("(?i)traceback|error|warning", said), said


@check
def a_process_that_starts_later_is_watched_and_a_unit_started() -> None:
    with hog(460) as pid:
        wait_for(lambda: rings("process/fds", pid), "process/fds rings")
        wait_for(lambda: rings("process/fds/many", pid), "process/fds/many rings")
        wait_for(lambda: f"pid={pid} " in journal("limitfs-alarm.service"), "the path unit's service tells")
        wait_for(lambda: f"pid={pid} " in journal("limitfs-wait.service"), "the waiting service tells")


@check
def a_process_that_joins_a_group_later_is_watched() -> None:
    with hog(70, "hog") as pid:
        wait_for(lambda: rings("group/hogs/fds", pid), "the group rings")


@check
def a_process_with_fewer_or_outside_of_the_group_is_not_told_of() -> None:
    with hog(50, "hog") as few, hog(100) as outside:
        time.sleep(5)
        said = read("process/fds/event") + read("group/hogs/fds/event")
        assert f"pid={few} " not in said
        assert f"pid={outside} " not in said


@check
def sockets_in_another_network_namespace_are_counted() -> None:
    """The sandbox lets a thread of the daemon enter it."""
    program = "import socket, time; s = socket.create_server(('', 0)); print(flush=True); time.sleep(9999)"
    command = ["unshare", "--net", sys.executable, "-S", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            assert read(f"process/{child.pid}/channels/usage") == "1\n"
        finally:
            child.kill()


# --- reload


@check
def a_reload_arms_what_is_new() -> None:
    rule = Path("/etc/limitfs.d/later.conf")
    rule.write_text("process/threads/threshold = 300\n")
    run("systemctl", "reload", "limitfs")
    wait_for(lambda: read("process/threads/threshold") == ">= 300\n", "the new rule is armed")
    armed()
    rule.unlink()
    run("systemctl", "reload", "limitfs")
    wait_for(lambda: read("process/threads/threshold") == "off\n", "the rule that went is disarmed")
    armed()


@check
def a_rule_waits_for_its_service() -> None:
    """As its cgroup comes, goes, and comes again."""
    rule, path = Path("/etc/limitfs.d/later.conf"), "partition/system.slice/later.service/fds/threshold"

    def is_armed() -> bool:
        with contextlib.suppress(OSError):
            return read(path) == ">= 200\n"
        return False

    rule.write_text(f"{path} = 200\n")
    assert "later.conf:1: waits for partition '/system.slice/later.service'" in run("limitfs", "check")
    run("systemctl", "reload", "limitfs")
    assert f"later.conf:1: waiting: {path} = 200: " in read("rules")
    run("systemd-run", "--quiet", "--unit=later", "sleep", "99999")
    wait_for(is_armed, "it is armed when the service starts")
    run("systemctl", "restart", "later")
    wait_for(is_armed, "it is armed when the service was started again")
    run("systemctl", "stop", "later")
    wait_for(lambda: f": waiting: {path}" in read("rules"), "it waits when the service was stopped")
    rule.unlink()
    run("systemctl", "reload", "limitfs")
    armed()


@check
def the_commands_of_the_manual_work() -> None:
    """Those of docs/boot.md that need systemd; what they print may differ where it shows "..."."""
    parts = re.split(r"^<!-- in a machine without systemd -->\n```console\n.*?^```$", MANUAL, flags=re.M | re.S)
    blocks = re.findall(r"^```console\n(.*?)^```$", "".join(parts), re.M | re.S)
    shown = [step.partition("\n") for block in blocks for step in re.split(r"^\$ ", block, flags=re.M)[1:]]
    assert len(shown) > 8
    for command, _, want in shown:
        got = run("sh", "-c", command)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(want, got, flags), f"$ {command}\n{got}"


# --- crash


@check
def it_comes_back_after_a_sigkill() -> None:
    with hog(50) as pid:
        by_hand = LIMITS / f"process/{pid}/fds/mine"
        by_hand.mkdir()
        (by_hand / "threshold").write_text("70\n")
        old = daemon()
        began = time.monotonic()
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: restarted(old), "it runs again")
        print(f"# back after {time.monotonic() - began:.1f} s")
        assert answers()
        armed()
        assert (by_hand / "threshold").read_text() == ">= 70\n"
        assert show("limitfs.service", "NRestarts") == ["1"]
        assert run("findmnt", "--noheadings", "--output=FSTYPE", str(LIMITS)).split() == ["fuse.limitfs"], (
            "one mount"
        )
    with hog(430) as pid:
        wait_for(lambda: rings("process/fds", pid), "process/fds rings again")
        wait_for(lambda: f"pid={pid} " in journal("limitfs-alarm.service"), "the path unit watches the new mount")
        wait_for(lambda: f"pid={pid} " in journal("limitfs-wait.service"), "the waiting service too")


@check
def one_that_hangs_is_replaced() -> None:
    old = daemon()
    # Stops the thread of the event loop alone. A path unit may have process 1 look at the mount just now.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    assert libc.ptrace(PTRACE_ATTACH, old, None, None) == 0, os.strerror(ctypes.get_errno())
    # Who traces it is told first of its stop, then of its end.
    while not os.WIFEXITED(os.waitpid(old, 0)[1]):
        pass
    wait_for(lambda: restarted(old), "it ends itself, and is started again")
    assert "most recent call first" in journal("limitfs.service"), "a trace of where it hangs"
    armed()


@check
def one_that_cannot_start_does_not_hold_up_the_boot() -> None:
    units = Path("/run/systemd/system")
    (units / "later.target").write_text("[Unit]\nWants=limitfs.service\nAfter=limitfs.service\n")
    drop_in = units / "limitfs.service.d/broken.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nExecStart=\nExecStart=false\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "stop", "limitfs")
    run("systemctl", "start", "--no-block", "later.target")
    wait_for(lambda: show("later.target", "ActiveState") == ["active"], "the target is reached")
    assert show("limitfs.service", "ActiveState") == ["failed"]
    print(f"# given up after {show('limitfs.service', 'NRestarts')[0]} restarts")
    drop_in.unlink()
    run("systemctl", "daemon-reload")
    run("systemctl", "reset-failed", "limitfs")
    run("systemctl", "start", "limitfs")
    armed()


# --- other ways to mount


@check
def umount_ends_the_service() -> None:
    run("umount", str(LIMITS))
    wait_for(lambda: show("limitfs.service", "ActiveState", "Result") == ["inactive", "success"], "it ends")
    assert not os.path.ismount(LIMITS)


@check
def fstab_mounts_it() -> None:
    Path("/etc/fstab").write_text(Path("/root/fstab").read_text())
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "limits.mount")
    armed()
    run("systemctl", "stop", "limits.mount")
    assert not os.path.ismount(LIMITS)
    wait_for(lambda: not limitfs_runs(), "its daemon ends")


@check
def automount_mounts_it_when_somebody_looks() -> None:
    lines = Path("/root/fstab").read_text().splitlines()
    Path("/etc/fstab").write_text("".join(f"{line[1:]}\n" for line in lines if line.startswith("#limitfs")))
    run("systemctl", "daemon-reload")
    run("systemctl", "start", "limits.automount")
    assert show("limits.mount", "ActiveState") == ["inactive"]
    armed()
    assert show("limits.mount", "ActiveState") == ["active"]
    assert "hidepid=1" in read("state")
    run("systemctl", "stop", "limits.automount", "limits.mount")
    Path("/etc/fstab").write_text("")
    run("systemctl", "daemon-reload")
    wait_for(lambda: not limitfs_runs(), "its daemon ends")


# --- the package


@check
def the_package_is_upgraded_in_place() -> None:
    run("systemctl", "start", "limitfs")
    (LIMITS / "system/fds/mine").mkdir()
    write("system/fds/mine/threshold", "100000")
    old = daemon()
    run("env", f"PATH=/root/stubs:{os.environ['PATH']}", "dpkg", "--install", "/root/limitfs.deb")
    wait_for(lambda: restarted(old), "the new one runs")
    armed()
    assert read("system/fds/mine/threshold") == ">= 100000\n"


@check
def the_package_goes_without_a_trace() -> None:
    run("dpkg", "--remove", "limitfs")
    assert not os.path.ismount(LIMITS)
    assert Path("/etc/default/limitfs").exists()
    wait_for(lambda: not limitfs_runs(), "its daemon ends")
    run("dpkg", "--purge", "limitfs")
    left = ("/limits", "/etc/default/limitfs", "/run/limitfs", "/usr/lib/limitfs", "/etc/init.d/limitfs")
    assert [path for path in left if os.path.lexists(path)] == []
    assert not Path("/etc/systemd/system/multi-user.target.wants/limitfs.service").is_symlink()


@check
def the_package_mounts_it_at_once() -> None:
    run("dpkg", "--install", "/root/limitfs.deb")
    wait_for(lambda: show("limitfs.service", "ActiveState") == ["active"], "it is started")
    assert read("system/fds/threshold") == "off\n"


@check
def somebody_keeps_it_busy_while_the_machine_goes_down() -> None:
    run("systemd-run", "--unit=busy", "tail", "-f", str(LIMITS / "system/fds/event"))


def chosen() -> list[Callable[[], None]]:
    """Those whose names have one of the words in /root/only, if there are any."""
    words = Path("/root/only").read_text().split()
    return [function for function in CHECKS if not words or any(word in function.__name__ for word in words)]


def main() -> None:
    for number, function in enumerate(checks := chosen(), 1):
        name = function.__name__.replace("_", " ")
        began = time.monotonic()
        try:
            function()
        except Exception:
            print(f"not ok {number} - {name}")
            print("".join(f"# {line}\n" for line in traceback.format_exc().splitlines()), end="")
            print("".join(f"# | {line}\n" for line in journal("limitfs.service").splitlines()[-12:]), end="")
        else:
            print(f"ok {number} - {name} ({time.monotonic() - began:.1f} s)")
    print(f"1..{len(checks)}")
    subprocess.run(["logger", "power-off is next"], check=False)


main()
