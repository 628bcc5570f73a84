"""Mounts seen from outside the daemon: the kernel's table, whether a mount answers, starting and ending one.

A mount whose daemon hangs blocks whoever touches it, and once the daemon has taken the request not even SIGKILL
frees the caller. So nothing here touches a mount in this process: places come from mountinfo, and questions
are asked by a child that can be left behind.
"""

import contextlib
import enum
import errno
import fcntl
import logging
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

FSTYPE = "fuse.limitfs"
FUSECTL = "/sys/fs/fuse/connections"
READY = b"\0"
RESPAWN_PAUSE = 1.0
"""Seconds before a daemon that crashed is started again; twice as long each time that this does not help."""
LONGEST_RESPAWN_PAUSE = 10.0
WATCHDOG_USEC = 30_000_000
"""As the service has it; see `limitfs.service.attend`."""
START_PATIENCE = 300.0
"""Seconds for a daemon to get ready: a machine that is too busy, or emulated, takes minutes to load the hooks."""

_log = logging.getLogger(__name__)


class MountError(Exception):
    """A mount that cannot be made, asked or taken away.

    Args:
        message: what is wrong, in a few words.
        hint: what would help, if that can be said.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    mountpoint: str
    fstype: str
    source: str
    device: str = field(default="", compare=False)
    """Major and minor number, the same for all mounts of one filesystem."""


class Health(enum.StrEnum):
    """What a mount does when it is asked."""

    ANSWERS = "answers"
    STALE = "stale: its daemon is gone"
    SILENT = "does not answer"
    PRIVATE = "mounted by another user, for that user only"
    ABSENT = "has no such file"
    EXCESSIVE = "says more than anybody would read"


_MOST_LINKS = 40
"""That path_resolution(7) follows."""


# --- the kernel's table


def unescape(field: str) -> str:
    r"""Undo mountinfo's octal escapes, `\040` for a space; other bytes as in `os.fsdecode`."""
    raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8) & 0xFF]), os.fsencode(field))
    return os.fsdecode(raw)


def parse_mountinfo(text: str) -> Iterator[Mount]:
    """Give the mounts in the order of the table; lines that are not mountinfo are passed over."""
    for line in text.split("\n"):
        # Optional fields stand before " - ", as many as the kernel likes; a path cannot hold a bare space.
        left, dash, right = line.partition(" - ")
        here, there = left.split(" "), right.split(" ")
        if dash and len(here) >= 6 and len(there) >= 2:
            yield Mount(unescape(here[4]), unescape(there[0]), unescape(there[1]), here[2])


def table(path: str = "/proc/self/mountinfo") -> list[Mount]:
    """Every mount of this namespace.

    Raises:
        OSError: there is no /proc.
    """
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(parse_mountinfo(file.read()))


def limitfs_mounts() -> list[Mount]:
    """The mounts of limitfs, oldest first."""
    return [mount for mount in table() if mount.fstype == FSTYPE]


def top_mount(mountpoint: str) -> Mount | None:
    """What a look-up of `mountpoint` meets: the newest mount there, None where nothing is mounted."""
    return next((mount for mount in reversed(table()) if mount.mountpoint == mountpoint), None)


def is_mounted(mountpoint: str) -> bool:
    """Whether limitfs is what a look-up of `mountpoint` meets."""
    mount = top_mount(mountpoint)
    return mount is not None and mount.fstype == FSTYPE


def resolve(directory: str) -> str:
    """The path as mountinfo has it. Does not touch what `directory` is, or links to, where that is a limitfs."""
    place = os.path.abspath(directory)
    for _link in range(_MOST_LINKS):
        parent, name = os.path.split(place)
        place = os.path.join(os.path.realpath(parent), name)
        if is_mounted(place):
            return place
        try:
            target = os.readlink(place).rstrip("/")
        except OSError:
            return place
        if os.path.basename(target) in ("", ".", ".."):
            break
        place = os.path.join(os.path.dirname(place), target)
    return os.path.realpath(place)


@contextlib.contextmanager
def alone(mountpoint: str) -> Iterator[None]:
    """Keep others from mounting limitfs there: two who looked at the same moment would stack their mounts.

    The directory is locked, flock(2), where it may be opened for reading and its filesystem can.

    Raises:
        MountError: somebody was faster.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            directory = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, directory)
            fcntl.flock(directory, fcntl.LOCK_EX)
        if is_mounted(mountpoint):
            raise MountError(f"{mountpoint} is already mounted")
        yield


# --- asking

# statvfs is never answered from a cache. Exit code: the errno, 0 for an answer.
_QUESTION = """
import errno, os, sys
path, longest, command = sys.argv[1:]
try:
    os.statvfs(path)
    if command:
        os.write(os.open(path, os.O_WRONLY), command.encode())
    if int(longest):
        text = open(path, "rb").read(int(longest) + 1)
        if len(text) > int(longest):
            sys.exit(errno.EFBIG)
        os.write(1, text)
except OSError as error:
    sys.exit(error.errno)
"""
_HEALTH = {
    0: Health.ANSWERS,
    errno.ENOTCONN: Health.STALE,
    errno.ECONNABORTED: Health.STALE,
    errno.EACCES: Health.PRIVATE,
    errno.ENOENT: Health.ABSENT,
    errno.EFBIG: Health.EXCESSIVE,
}
LONGEST_ANSWER = 64 << 20
"""Bytes; what a user mounted may well be no limitfs of ours, and give text without end."""


def ask(path: str, *, text: bool = False, command: str = "", patience: float = 2.0) -> tuple[Health, str]:
    """Touch `path` from a child process.

    Args:
        path: the mount point, or a file below it.
        text: also read the file, all of it.
        command: is written to the file before.
        patience: seconds to wait for the answer.

    Returns:
        How it went, and the text (empty without an answer).
    """
    deadline = time.monotonic() + patience
    reader, writer = os.pipe()
    try:
        try:
            child = _spawn_question(path, text, command, writer)
        finally:
            os.close(writer)
        # Read while it writes: it does not end before a text that is longer than the pipe has been taken.
        answer = _drain(reader, deadline)
        code = _exit_code(child, max(0.0, deadline - time.monotonic()))
    finally:
        os.close(reader)
    if answer is None or code is None:
        return Health.SILENT, ""
    return _HEALTH.get(code, Health.SILENT), answer.decode(errors="replace") if code == 0 else ""


def _spawn_question(path: str, text: bool, command: str, writer: int) -> int:
    # The child may outlive us in an uninterruptible wait: it must not hold our caller's pipes.
    quiet = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 2)]
    longest = str(LONGEST_ANSWER if text else 0)
    argv = [sys.executable, "-I", "-S", "-c", _QUESTION, path, longest, command]
    actions = [*quiet, (os.POSIX_SPAWN_DUP2, writer, 1)]
    return os.posix_spawn(sys.executable, argv, os.environ, file_actions=actions)


def _drain(reader: int, deadline: float) -> bytes | None:
    """All that is written there until the last writer is gone; None where that takes until `deadline`."""
    heard = bytearray()
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    while poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        chunk = os.read(reader, 65536)
        if not chunk:
            return bytes(heard)
        heard += chunk
    return None


def _exit_code(child: int, patience: float) -> int | None:
    pidfd = os.pidfd_open(child)
    try:
        if not _ends(pidfd, patience):
            os.kill(child, signal.SIGKILL)
            # A child in the kernel's grip ends when the daemon does; init reaps it then.
            _ends(pidfd, 0.1)
            os.waitpid(child, os.WNOHANG)
            return None
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _ends(pidfd: int, patience: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(patience * 1000))


def facts(mountpoint: str) -> dict[str, str]:
    """The daemon's own `state` file as key and value; empty where there is none."""
    _, text = ask(os.path.join(mountpoint, "state"), text=True)
    pairs = (line.partition(" ") for line in text.splitlines())
    return {key: value for key, _, value in pairs if key}


# --- starting


def launch(serve: Callable[[Callable[[], None]], int], patience: float = START_PATIENCE) -> str:
    """Run `serve` as a daemon, and return once it has called its `ready`.

    Until then the daemon's standard error comes here, so that what libfuse and its helper print is not lost;
    afterwards it holds nothing of its caller's. If nobody waits any more when it gets ready, `ready` raises
    BrokenPipeError in it, and it ends.

    Args:
        serve: called in the daemon with `ready`; its result is the daemon's exit code.
        patience: seconds until `ready`.

    Returns:
        What the daemon printed on its way.

    Raises:
        MountError: it ended, or was not ready in time.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _become_daemon(serve, writer)
    os.close(writer)
    try:
        os.waitpid(child, 0)
        return _await_ready(reader, patience)
    finally:
        os.close(reader)


def _become_daemon(serve: Callable[[Callable[[], None]], int], writer: int) -> NoReturn:
    try:
        # A child of init's: nobody waits for it, and it leads no group of processes.
        if os.fork():
            os._exit(0)
        _let_go(writer)
    except BaseException as error:
        os.write(writer, explain(error).encode(errors="replace") + b"\n")
        os._exit(1)
    _serve_and_exit(serve, _ready)


def _serve_and_exit(serve: Callable[[Callable[[], None]], int], ready: Callable[[], None]) -> NoReturn:
    """All that this process does from now on; why it failed goes to the log and to standard error."""
    status = 1
    try:
        status = serve(ready)
    except BaseException as error:
        # Without a handler, logging would print the traceback where the user expects words.
        if _log.hasHandlers():
            _log.critical("the daemon failed", exc_info=True)
        with contextlib.suppress(OSError):
            os.write(2, explain(error).encode(errors="replace") + b"\n")
    finally:
        logging.shutdown()
        os._exit(status)


def _let_go(writer: int) -> None:
    os.chdir("/")
    os.umask(0o022)
    os.dup2(writer, 2)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.closerange(3, max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1)


def _ready() -> None:
    # Not earlier: while systemd mounts what somebody looked for, autofs lets in only its own process group.
    os.setsid()
    os.write(2, READY)
    os.dup2(0, 2)


def keep(serve: Callable[[Callable[[], None]], int], ready: Callable[[], None]) -> int:
    """Run `serve` in a child, and in another one whenever that crashed: where no service manager does so.

    A child that hangs ends itself, as it does under systemd. Signals that end or reload a daemon are passed on.
    Between two children the former end this, and the latter are for nobody: each child reads the rules anyway.

    Args:
        serve: as for `launch`.
        ready: called here once the first child is ready; one that ends before is not started again.

    Returns:
        The exit code of the last child: it ended because somebody wanted it to.
    """
    code, was_ready = _serve_apart(serve, ready)
    pause = RESPAWN_PAUSE
    while was_ready and code not in _MEANT:
        _log.critical(
            "the daemon %s: starting it again", f"was killed by signal {-code}" if code < 0 else "failed"
        )
        if _told_to_end(pause):
            return 0
        began = time.monotonic()
        code, _ = _serve_apart(serve, _nothing)
        lived = time.monotonic() - began
        pause = RESPAWN_PAUSE if lived > LONGEST_RESPAWN_PAUSE else min(pause * 2, LONGEST_RESPAWN_PAUSE)
    return max(code, 0)


_MEANT = (0, -signal.SIGTERM, -signal.SIGINT)
"""Exit codes of a daemon that is to be no more; the last two until it listens for these signals."""
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _told_to_end(pause: float) -> bool:
    """Wait so many seconds, with these signals blocked; whether one of those that end a daemon came."""
    deadline = time.monotonic() + pause
    while told := signal.sigtimedwait(_PASSED_ON, max(0.0, deadline - time.monotonic())):
        if told.si_signo != signal.SIGHUP:
            return True
    return False


def _serve_apart(serve: Callable[[Callable[[], None]], int], ready: Callable[[], None]) -> tuple[int, bool]:
    """Run `serve` in a child until it ends; gives its exit code (a signal: negative), and whether it got ready.

    Leaves the signals that are passed on blocked, for whoever has no child to pass them on to.
    """
    reader, writer = os.pipe()
    # What comes before somebody is there to pass it on to waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    child = os.fork()
    if child == 0:
        os.close(reader)
        # Until it listens, it has not read the rules either.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        os.environ["WATCHDOG_USEC"] = str(WATCHDOG_USEC)
        _serve_and_exit(serve, lambda: _tell_ready(writer))
    os.close(writer)
    meant: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        if number != signal.SIGHUP:
            meant.append(number)
        os.kill(child, number)

    pidfd = os.pidfd_open(child)
    with _signals_taken(pass_on) as taken:
        _await(reader, taken)
        was_ready = bool(os.read(reader, 1))
        os.close(reader)
        if was_ready:
            ready()
        # It keeps its number until it is waited for: no signal goes to another process.
        _await(pidfd, taken)
    os.close(pidfd)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # Also one that hung, and then ended in another way.
    return 0 if meant else code, was_ready


@contextlib.contextmanager
def _signals_taken(pass_on: Callable[[int, FrameType | None], None]) -> Iterator[int]:
    """Let the signals through that were blocked, to `pass_on`; gives what can be read when one came."""
    taken, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    try:
        yield taken
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        for number in _PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.close(told)
        os.close(taken)


def _await(fd: int, taken: int) -> None:
    """Until `fd` can be read. A call that waits for it alone would sleep through a signal that came before."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.register(taken, select.POLLIN)
    while fd not in (ready for ready, _events in poller.poll()):
        with contextlib.suppress(BlockingIOError):
            os.read(taken, 64)


def _tell_ready(writer: int) -> None:
    os.setsid()
    os.write(writer, READY)
    os.close(writer)
    os.dup2(0, 2)


def _nothing() -> None:
    """Nobody waits for a daemon that was started again."""


def _await_ready(reader: int, patience: float) -> str:
    deadline = time.monotonic() + patience
    heard = b""
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    while READY not in heard:
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise MountError(
                f"the daemon was not ready within {patience:g} s", heard.decode(errors="replace").strip()
            )
        chunk = os.read(reader, 65536)
        if not chunk:
            text = heard.decode(errors="replace").strip()
            raise MountError(
                text or "the daemon ended before the mount was ready", "`limitfs doctor` tells what is missing"
            )
        heard += chunk
    return heard.partition(READY)[0].decode(errors="replace").strip()


def explain(error: BaseException) -> str:
    """An exception in words for a user; of a group, each member once."""
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(dict.fromkeys(explain(member) for member in error.exceptions))
    text = str(error) or type(error).__name__
    hint = getattr(error, "hint", "")
    return f"{text}\n  {hint}" if hint else text


# --- ending


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that keeps a mount busy."""

    pid: int
    comm: str
    path: str


def holders(mountpoint: str, limit: int = 10, patience: float = 2.0, proc: str = "/proc") -> list[Holder]:
    """Find processes with an open file, working or root directory at or below `mountpoint`; not this one.

    Args:
        mountpoint: as mountinfo has it.
        limit: how many to find at most.
        patience: seconds to search at most.
        proc: where procfs is.
    """
    found: list[Holder] = []
    deadline = time.monotonic() + patience
    for name in os.listdir(proc):
        if len(found) >= limit or time.monotonic() > deadline:
            break
        if not name.isdigit() or int(name) == os.getpid():
            continue
        if path := _held(f"{proc}/{name}", mountpoint):
            found.append(Holder(int(name), _comm(f"{proc}/{name}"), path))
    return sorted(found, key=lambda holder: holder.pid)


def _held(process: str, mountpoint: str) -> str | None:
    links = [f"{process}/cwd", f"{process}/root"]
    with contextlib.suppress(OSError):
        links += [f"{process}/fd/{fd}" for fd in os.listdir(f"{process}/fd")]
    for link in links:
        with contextlib.suppress(OSError):
            # readlink on procfs prints the kernel's own path: the mount is not asked.
            path = os.readlink(link)
            if path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/"):
                return path
    return None


def _comm(process: str) -> str:
    try:
        with open(f"{process}/comm", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"


def unmount(mountpoint: str, *, lazy: bool = False, patience: float = 10.0) -> None:
    """Take the mount away, and wait until it is out of the table and, unless lazy, its daemon has ended.

    Where a lazy one finds that the mount does not answer, the connection to its daemon is aborted, too: who waits
    for it gets an error, and what is left of a daemon that was killed can end.

    Raises:
        MountError: it is busy (the hint names the holders), or may not be unmounted.
    """
    silent = lazy and ask(mountpoint)[0] is Health.SILENT
    if silent:
        _abort(mountpoint)
    daemon = None if lazy else _daemon_of(mountpoint)
    try:
        _run_umount(mountpoint, lazy, patience, force=silent)
        deadline = time.monotonic() + patience
        while is_mounted(mountpoint):
            if time.monotonic() > deadline:
                raise MountError(
                    f"{mountpoint} is still mounted after {patience:g} s", "another mount may lie below it"
                )
            time.sleep(0.02)
        if daemon is not None and not _ends(daemon, patience):
            raise MountError(f"{mountpoint} is unmounted, but its daemon still runs after {patience:g} s")
    finally:
        if daemon is not None:
            os.close(daemon)


def _daemon_of(mountpoint: str) -> int | None:
    pid = facts(mountpoint).get("pid", "")
    try:
        return os.pidfd_open(int(pid))
    except (ValueError, OSError):
        return None


def _abort(mountpoint: str) -> None:
    """By fusectl, where that is mounted: root may, and who mounted it; see the kernel's page on FUSE."""
    mount = top_mount(mountpoint)
    if mount is not None:
        with contextlib.suppress(OSError), open(f"{FUSECTL}/{_minor(mount)}/abort", "wb", buffering=0) as file:
            file.write(b"1")


def _minor(mount: Mount) -> str:
    return mount.device.partition(":")[2]


def is_orphaned(mountpoint: str, proc: str = "/proc") -> bool:
    """Whether all that holds a mount are threads of a process that has been killed, and waits for them.

    They wait for the mount: nobody but who aborts it ends that. False where it cannot be told: a kernel older than
    Linux 6.18 may not say which mount a descriptor of /dev/fuse is for.
    """
    mount = top_mount(mountpoint)
    if mount is None:
        return False
    left = False
    for name in filter(str.isdigit, os.listdir(proc)):
        process = f"{proc}/{name}"
        try:
            ended = _is_zombie(process)
            # A zombie has no descriptors, but its threads may.
            tables = [f"{process}/task/{tid}" for tid in os.listdir(f"{process}/task")] if ended else [process]
            if any(_serves(table, mount) for table in tables):
                if not ended:
                    return False
                left = True
        except OSError:
            continue  # it ended meanwhile, or we may not look into it
    return left


def _is_zombie(process: str) -> bool:
    with open(f"{process}/stat", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def _serves(table: str, mount: Mount) -> bool:
    """Whether a process or thread has the mount's /dev/fuse open."""
    for fd in os.listdir(f"{table}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"{table}/fd/{fd}") == "/dev/fuse":
                with open(f"{table}/fdinfo/{fd}") as file:
                    if f"fuse_connection:\t{_minor(mount)}\n" in file.read():
                        return True
    return False


def _run_umount(mountpoint: str, lazy: bool, patience: float, *, force: bool = False) -> None:
    # umount -c: finding the canonical path would touch a mount that may hang. -f aborts, also without fusectl.
    as_root = ["umount", "-c", *(["-l"] if lazy else []), *(["-f"] if force else []), mountpoint]
    as_user = ["fusermount3", "-u", *(["-z"] if lazy else []), mountpoint]
    command = as_root if os.geteuid() == 0 else as_user
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )
    except FileNotFoundError:
        raise MountError(
            f"{command[0]} is not installed", "Debian has it in the packages mount and fuse3"
        ) from None
    except subprocess.TimeoutExpired:
        raise MountError(f"{mountpoint}: no answer to {command[0]}", "try `limitfs umount --lazy`") from None
    if done.returncode == 0:
        return
    if "busy" in done.stderr:
        raise MountError(f"{mountpoint} is busy", _who_holds(mountpoint))
    raise MountError(done.stderr.strip() or f"{command[0]} failed")


def _who_holds(mountpoint: str) -> str:
    lines = [f"{holder.pid} ({holder.comm}) holds {holder.path}" for holder in holders(mountpoint)]
    if not lines and os.geteuid() != 0:
        lines = ["only root can see which processes of other users hold it"]
    lines.append("end them, or take it away from them with `limitfs umount --lazy`")
    return "\n  ".join(lines)
