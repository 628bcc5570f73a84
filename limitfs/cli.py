"""The `limitfs` command.

Every command ends with 0 for success, 1 for failure, 2 for wrong usage and 130 when interrupted; `wait` adds
124 for its time limit, as timeout(1).
"""

import contextlib
import errno
import faulthandler
import logging
import logging.handlers
import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

import click

from limitfs import __version__, mounting, service
from limitfs.errors import LimitsError
from limitfs.mounting import Health, MountError
from limitfs.rules import Fate

if TYPE_CHECKING:
    from limitfs.options import Options

EXIT_TIMED_OUT = 124
EXIT_INTERRUPTED = 130
DEFAULT_LOG = "/var/log/limitfs.log"
SYSLOG_SOCKET = "/dev/log"
RELOAD_PATIENCE = 60.0
"""Seconds; arming a thousand rules takes one or two."""

EXIT_CODES = "Exit codes: 0 ok, 1 failed, 2 wrong usage, 130 interrupted."


_log = logging.getLogger(__name__)


class Failure(click.ClickException):
    """What went wrong, and what would help, in the form `limitfs: message`."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"limitfs: {self.message}", file=file or sys.stderr)


class Commands(click.Group):
    """Turns the project's own errors and Ctrl-C into messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (MountError, LimitsError) as error:
            raise Failure(mounting.explain(error)) from error
        except BaseExceptionGroup as group:
            if group.subgroup(KeyboardInterrupt) is None:
                raise
            ctx.exit(EXIT_INTERRUPTED)
        except KeyboardInterrupt:
            ctx.exit(EXIT_INTERRUPTED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="limitfs")
def main() -> None:
    """Resource thresholds as files.

    limitfs shows processes, threads, cgroups and the whole system as directories. Write a threshold into one
    file, and another file tells you when it is crossed: who, when, and at what value.

    \b
    Try it, as root:
      mkdir -p /limits && limitfs mount /limits -o allow_other
      cat /limits/README
      echo 200 > /limits/process/$$/fds/threshold
      limitfs wait /limits/process/$$/fds
      limitfs umount /limits

    \b
    Exit codes: 0 ok, 1 failed, 2 wrong usage, 124 timed out (wait only), 130 interrupted.
    """


# --- mount


@main.command(epilog=EXIT_CODES)
@click.argument("directory", metavar="DIR")
@click.option("options", "-o", multiple=True, metavar="OPT[,OPT…]", help="Mount options, as for mount(8).")
@click.option("-f", "--foreground", is_flag=True, help="Do not become a daemon; log to standard error.")
@click.option("--mkdir", is_flag=True, help="Make DIR if it does not exist.")
@click.option("--respawn", is_flag=True, help="Start the daemon again when it crashed or hangs.")
@click.option("--pid-file", metavar="FILE", help="With --respawn: write the number of the process that does so.")
@click.option("-v", "--verbose", count=True, help="Log more: -v what happens, -vv everything.")
def mount(
    directory: str,
    options: tuple[str, ...],
    foreground: bool,
    mkdir: bool,
    respawn: bool,
    pid_file: str | None,
    verbose: int,
) -> None:
    """Mount limitfs at DIR, an existing directory.

    Returns when the mount answers, with a daemon behind it. The daemon logs to syslog; where there is none, to
    the file of -o log=FILE or else to /var/log/limitfs.log. A mount that a dead daemon left behind at DIR is
    detached first. Where limitfs is mounted already, it says so and exits 1.

    With --respawn the daemon has a parent that starts it again, for machines whose service manager does not; what
    was armed comes back. It ends with the daemon, after an unmount or SIGTERM.

    \b
    Examples:
      limitfs mount /limits -o allow_other      let every user in (each sees what is theirs)
      limitfs mount ~/limits                    for yourself, without root
      limitfs mount /limits -f -v               watch it work; Ctrl-C unmounts
    """
    if foreground and respawn:
        raise click.UsageError("--respawn is for a daemon, not with --foreground")
    if pid_file is not None and not respawn:
        raise click.UsageError("--pid-file goes with --respawn")
    chosen = _parse_options(options)
    mountpoint = mounting.resolve(directory)
    make_way(mountpoint, mkdir=mkdir)
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    if foreground:
        _log_to(_foreground_handler(), level)
        _finish(_serve_here(mountpoint, chosen))
        return
    start(mountpoint, chosen, level, respawn=respawn, pid_file=os.path.abspath(pid_file) if pid_file else None)


def start(
    mountpoint: str, options: "Options", level: int, *, respawn: bool = False, pid_file: str | None = None
) -> None:
    """Start a daemon for `mountpoint`, where nothing is in the way, and return when the mount answers.

    Args:
        mountpoint: as mountinfo has it.
        options: of the mount.
        level: of what is logged.
        respawn: give it a parent that starts it again when it crashed.
        pid_file: where that parent's number is kept while it runs.

    Raises:
        MountError: it cannot be mounted, or does not answer.
    """
    log_file = os.path.abspath(options.log) if options.log else None

    def run(ready: Callable[[], None]) -> int:
        _log_to(_daemon_handler(log_file), level)
        return _serve(mountpoint, options, ready)

    def run_again(ready: Callable[[], None]) -> int:
        if mounting.is_mounted(mountpoint) and mounting.ask(mountpoint)[0] is Health.ANSWERS:
            _log.critical("%s was mounted by somebody else", mountpoint)
            return 0
        make_way(mountpoint)
        return run(ready)

    def keep(ready: Callable[[], None]) -> int:
        _log_to(_daemon_handler(log_file), level)
        with _pid_in(pid_file):
            return mounting.keep(run_again, ready)

    if said := mounting.launch(keep if respawn else run):
        click.echo(f"limitfs: {said}", err=True)
    health, _ = mounting.ask(os.path.join(mountpoint, "features"), patience=10)
    if health is not Health.ANSWERS:
        raise MountError(
            f"{mountpoint} is mounted, but its file `features` {health}", "the daemon's log may tell why"
        )


@contextlib.contextmanager
def _pid_in(path: str | None) -> Iterator[None]:
    """Keep the number of this process in a file. Raises OSError."""
    if path is None:
        yield
        return
    with open(path, "w") as file:
        file.write(f"{os.getpid()}\n")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _parse_options(options: Iterable[str]) -> "Options":
    from limitfs.options import Options

    words = [word for group in options for word in group.split(",") if word]
    try:
        return Options.parse(words)
    except LimitsError as error:
        raise click.UsageError(mounting.explain(error)) from error


def make_way(mountpoint: str, *, mkdir: bool = False) -> None:
    """See that limitfs can be mounted there, detaching what a dead daemon left; one that lives is let be.

    Raises:
        MountError: it is mounted already, or this is no directory that one can mount at.
    """
    while mounting.is_mounted(mountpoint):
        health, _ = mounting.ask(mountpoint)
        if health is Health.SILENT and not mounting.is_orphaned(mountpoint):
            raise MountError(
                f"{mountpoint} is already mounted, but does not answer",
                f"take it away with `limitfs umount --lazy {mountpoint}`",
            )
        if health not in (Health.STALE, Health.SILENT):
            raise MountError(f"{mountpoint} is already mounted")
        mounting.unmount(mountpoint, lazy=True)
        click.echo(f"limitfs: detached the mount that a dead daemon left at {mountpoint}", err=True)
    try:
        if mkdir:
            os.makedirs(mountpoint, exist_ok=True)
        if not stat.S_ISDIR(os.stat(mountpoint).st_mode):
            raise MountError(f"{mountpoint} is not a directory")
    except FileNotFoundError:
        raise MountError(f"{mountpoint} does not exist", f"make it first: mkdir -p {mountpoint}") from None
    except OSError as error:
        raise MountError(f"{mountpoint}: {error.strerror}") from error


def _serve(mountpoint: str, options: "Options", ready: Callable[[], None]) -> int:
    # Imported this late because the daemon forks: nothing of trio or libfuse may exist before.
    from limitfs.daemon import serve

    return serve(mountpoint, options, ready)


def _serve_here(mountpoint: str, options: "Options") -> int:
    # The watchdog of a service manager sends SIGABRT: show where it hangs.
    faulthandler.enable(2)
    try:
        return _serve(mountpoint, options, lambda: _log.info("mounted at %s", mountpoint))
    except Exception as error:
        _log.debug("the daemon failed", exc_info=True)
        raise Failure(mounting.explain(error)) from error


def _finish(status: int) -> None:
    click.get_current_context().exit(status)


def _log_to(handler: logging.Handler, level: int) -> None:
    if handler.formatter is None:
        handler.setFormatter(logging.Formatter("%(asctime)s limitfs[%(process)d]: %(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _foreground_handler() -> logging.Handler:
    """Standard error; where that is the journal, with priorities instead of what the journal adds."""
    handler = logging.StreamHandler()
    if service.logs_to_journal():
        handler.setFormatter(service.JournalFormatter())
    return handler


def _daemon_handler(log_file: str | None) -> logging.Handler:
    """Where a daemon logs: syslog; where there is none, the file asked for; else the default file.

    Raises:
        OSError: the file asked for cannot be written.
    """
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.stat(SYSLOG_SOCKET).st_mode):
            return _syslog_handler()
    if log_file is not None:
        return logging.handlers.WatchedFileHandler(log_file)
    try:
        return logging.handlers.WatchedFileHandler(DEFAULT_LOG)
    except OSError as error:
        # Mounted without a log is better than not mounted, if it is said.
        os.write(2, f"nothing is logged: {DEFAULT_LOG}: {error.strerror}; choose -o log=FILE\n".encode())
        return logging.NullHandler()


def _syslog_handler() -> logging.Handler:
    handler = logging.handlers.SysLogHandler(SYSLOG_SOCKET, facility=logging.handlers.SysLogHandler.LOG_DAEMON)
    handler.ident = f"limitfs[{os.getpid()}]: "
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    return handler


@main.command(
    "mount-helper", hidden=True, add_help_option=False, context_settings={"ignore_unknown_options": True}
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def mount_helper(arguments: tuple[str, ...]) -> None:
    """What mount.limitfs is: the helper of mount(8), with its arguments and exit codes."""
    from limitfs import helper

    _finish(helper.main(arguments))


# --- umount


@main.command(epilog=EXIT_CODES)
@click.argument("directory", metavar="DIR")
@click.option("-l", "--lazy", is_flag=True, help="Also when it is busy: take it away from its users.")
def umount(directory: str, lazy: bool) -> None:
    """Unmount limitfs from DIR.

    Returns when the mount is gone and its daemon has ended. When somebody still uses it, it says who.

    \b
    Examples:
      limitfs umount /limits
      limitfs umount --lazy /limits             also when it is busy, or its daemon hangs
    """
    mountpoint = mounting.resolve(directory)
    if not mounting.is_mounted(mountpoint):
        raise MountError(f"limitfs is not mounted at {mountpoint}", _elsewhere())
    mounting.unmount(mountpoint, lazy=lazy)


def _elsewhere() -> str:
    places = [mount.mountpoint for mount in mounting.limitfs_mounts()]
    return f"it is mounted at {', '.join(places)}" if places else ""


# --- status, doctor


@main.command(epilog=EXIT_CODES)
@click.argument("directory", metavar="[DIR]", required=False)
def status(directory: str | None) -> None:
    """Show where limitfs is mounted, and whether it answers.

    Exits 0 when it is mounted (at DIR, if given) and answers, else 1. Never hangs, even if the daemon does.

    \b
    Examples:
      limitfs status
      limitfs status /limits >/dev/null || limitfs mount /limits
    """
    answers = [_show_mount(place) for place in _places(directory)]
    _finish(0 if all(answers) else 1)


def _places(directory: str | None) -> list[str]:
    """The mount point that is meant, or all there are. Raises MountError where limitfs is not mounted."""
    places = list(dict.fromkeys(mount.mountpoint for mount in mounting.limitfs_mounts()))
    if directory is not None:
        wanted = mounting.resolve(directory)
        if wanted not in places:
            raise MountError(f"limitfs is not mounted at {wanted}", _elsewhere())
        places = [wanted]
    if not places:
        raise MountError("limitfs is not mounted", "mount it with `limitfs mount DIR`")
    return places


def _show_mount(mountpoint: str) -> bool:
    # One question: between two, the mount might be taken away, and the directory below it answer.
    health, text = mounting.ask(os.path.join(mountpoint, "state"), text=True)
    click.echo(f"{mountpoint} {health}")
    if health is not Health.ANSWERS:
        return False
    for line in text.splitlines():
        click.echo(f"  {line}")
    return True


@main.command(epilog="Exit codes: 0 nothing fails, 1 something does, 2 wrong usage, 130 interrupted.")
def doctor() -> None:
    """Check what this machine offers, and what is missing.

    One line each: ok, warn (it works, but hears less, or less surely) or fail (limitfs cannot be mounted);
    what it means; and the package or setting that brings it.

    \b
    Example:
      limitfs doctor | grep -v ^ok
    """
    from limitfs import doctor as checks

    results = list(checks.examine(checks.Machine()))
    for check in results:
        click.echo(str(check))
    _finish(1 if any(check.verdict is checks.Verdict.FAIL for check in results) else 0)


# --- reload, check


@main.command(epilog="Exit codes: 0 ok, 1 failed, or a rule was refused, 2 wrong usage, 130 interrupted.")
@click.argument("directory", metavar="[DIR]", required=False)
def reload(directory: str | None) -> None:
    """Read the rules of limitfs.d again, and say what came of it.

    At DIR, or at every mount of limitfs. New and changed rules are applied, those that went are taken back, and
    the others are left alone. Prints what was done, and what was refused with file, line and reason.

    \b
    Examples:
      limitfs check && limitfs reload
      limitfs reload /limits
    """
    reports = [_reload(place) for place in _places(directory)]
    _finish(0 if all(reports) else 1)


def _reload(mountpoint: str) -> bool:
    health, text = mounting.ask(
        os.path.join(mountpoint, "rules"), text=True, command="reload", patience=RELOAD_PATIENCE
    )
    if health is Health.PRIVATE:
        raise MountError(f"{mountpoint}: only root, or who mounted it, may reload the rules")
    if health is not Health.ANSWERS:
        raise MountError(f"{mountpoint} {health}")
    lines = text.splitlines()
    for line in lines:
        if f": {Fate.KEPT}: " not in line:
            click.echo(line)
    return not any(f": {Fate.REFUSED}: " in line for line in lines)


@main.command(epilog="Exit codes: 0 nothing is wrong, 1 something is, 2 wrong usage, 130 interrupted.")
@click.argument("files", metavar="[FILE…]", nargs=-1, type=click.Path())
def check(files: tuple[str, ...]) -> None:
    """Check files of rules, without a mount.

    Those named, or all that a mount would read. Says what is wrong, as file:line: reason, with the line and a
    caret under the place; and which rules would wait, as their partition is not there now, which is no fault. What
    else depends on the machine, such as a limit to take a percentage of, only a mount can tell.

    \b
    Examples:
      limitfs check
      limitfs check ./web.conf && cp web.conf /etc/limitfs.d && limitfs reload
    """
    from limitfs import rules
    from limitfs.space import check as checks

    found = rules.Rules()
    if files:
        rules.read(files, found)
    else:
        found = rules.load(rules.DIRECTORIES)
    faults = list(checks.check(found))
    for fault in faults:
        click.echo(fault.pointed())
    for remark in checks.remarks(found):
        click.echo(remark)
    _finish(1 if faults else 0)


# --- wait


class Listening:
    """One open event file, and what of it was printed already.

    Args:
        path: an `event` or `births` file.
        retained: also give the lines that were there before.

    Raises:
        OSError: it cannot be opened or read.
    """

    def __init__(self, path: str, *, retained: bool) -> None:
        self.path = path
        self._last = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Only a read from offset 0 makes poll tell of what comes after it.
            lines = self.fresh()
        except BaseException:
            self.close()
            raise
        self.first = lines if retained else []

    def fresh(self) -> list[str]:
        """The lines not given before.

        Raises:
            OSError: the daemon ended.
        """
        lines = new_lines(self._snapshot(), self._last)
        self._last = max((seq for seq, _ in lines), default=self._last)
        return [line for _, line in lines]

    def _snapshot(self) -> str:
        text = b""
        try:
            while chunk := os.pread(self.fd, 1 << 17, len(text)):
                text += chunk
        except OSError as error:
            # The target ended, and nothing of it was retained.
            if error.errno != errno.ESRCH:
                raise
        return text.decode(errors="surrogateescape")

    def close(self) -> None:
        # On a mount that has ended, close says so too, having closed.
        with contextlib.suppress(OSError):
            os.close(self.fd)


_SEQ = re.compile(r"seq=(\d+)(?= |$)")


def new_lines(snapshot: str, last: int) -> list[tuple[int, str]]:
    """The complete lines numbered above `last`, with their numbers."""
    found = []
    # Not splitlines(): a process name may hold any of the characters that it splits at.
    for line in snapshot.split("\n")[:-1]:
        match = _SEQ.match(line)
        if match and int(match[1]) > last:
            found.append((int(match[1]), line))
    return found


@main.command(
    epilog="Exit codes: 0 --count lines were printed, or every target ended; 1 failed, or every target ended "
    "before --count lines; 2 wrong usage; 124 timed out, as timeout(1); 130 interrupted."
)
@click.argument("paths", metavar="PATH…", nargs=-1, required=True)
@click.option("-n", "--count", type=click.IntRange(min=1), metavar="N", help="Stop after N lines.")
@click.option(
    "-t",
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Stop after so many seconds, and exit 124.",
)
@click.option("-a", "--all", "retained", is_flag=True, help="Also print the lines that are retained from before.")
def wait(paths: tuple[str, ...], count: int | None, timeout: float | None, retained: bool) -> None:
    """Print crossings as they come.

    PATH is an `event` or `births` file, or a directory that has an `event`. Only crossings that come after the
    start are printed, one line each; without --count and --timeout that goes on until every target has ended.

    \b
    Examples:
      limitfs wait /limits/process/1234/fds
      limitfs wait -n 1 -t 60 /limits/system/available /limits/system/memory_pressure
      limitfs wait /limits/process/fds | while read -r line; do logger -- "$line"; done
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    events = list(dict.fromkeys(_event_file(path) for path in paths))
    with contextlib.ExitStack() as cleanup:
        waiter = Waiter(count)
        for path in events:
            listening = _listen(path, retained)
            cleanup.callback(listening.close)
            waiter.add(listening)
        try:
            code = waiter.run(deadline)
        except BrokenPipeError:
            code = _reader_left()
    _finish(code)


def _event_file(path: str) -> str:
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from error
    if is_directory:
        inside = os.path.join(path, "event")
        if not os.path.exists(inside):
            raise Failure(
                f"{path} has no file `event`\n  name a resource below it, such as {path.rstrip('/')}/fds"
            )
        return inside
    if os.path.basename(path) not in ("event", "births"):
        raise Failure(f"{path} is not an event file\n  name the directory it is in, or `event` there")
    return path


def _listen(path: str, retained: bool) -> Listening:
    try:
        return Listening(path, retained=retained)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from error


def _reader_left() -> int:
    """Whoever read our lines has had enough: not a failure. The interpreter must not flush into it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    return 0


class Waiter:
    """Waits on several event files at once and prints what is new.

    Args:
        count: how many lines are wanted; None for all.
    """

    def __init__(self, count: int | None) -> None:
        self._wanted = count
        self._printed = 0
        self._open: dict[int, Listening] = {}
        self._poller = select.poll()

    def add(self, listening: Listening) -> None:
        self._open[listening.fd] = listening
        self._poller.register(listening.fd, select.POLLIN | select.POLLPRI)

    def run(self, deadline: float | None) -> int:
        """Wait and print; give the exit code.

        Raises:
            BrokenPipeError: nobody reads standard output any more.
            Failure: the daemon ended.
        """
        # Asked for nothing, poll still tells when the reader of a pipe goes: no need to wait for a line to fail.
        with contextlib.suppress(OSError, ValueError):
            self._poller.register(sys.stdout.fileno(), 0)
        for listening in self._open.values():
            self._print(listening.first)
        while self._open and not self._enough():
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = self._poller.poll(left)
            if not ready:
                return EXIT_TIMED_OUT
            for fd, flags in ready:
                self._hear(fd, flags)
        return 0 if self._wanted is None or self._enough() else 1

    def _hear(self, fd: int, flags: int) -> None:
        listening = self._open.get(fd)
        if listening is None:
            raise BrokenPipeError
        try:
            self._print(listening.fresh())
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Failure(f"{listening.path}: {error.strerror}; was it unmounted?") from error
        if flags & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
            self._poller.unregister(fd)
            del self._open[fd]

    def _print(self, lines: list[str]) -> None:
        for line in lines:
            if self._enough():
                return
            # Bytes, because a line may hold what the locale cannot encode; at once, because a reader waits for it.
            sys.stdout.buffer.write(os.fsencode(line + "\n"))
            sys.stdout.buffer.flush()
            self._printed += 1

    def _enough(self) -> bool:
        return self._wanted is not None and self._printed >= self._wanted
