"""The only place that parses /proc.

A reader is three system calls (open, read, close) and the least parsing that will do; all are called for
thousands of processes in a row. Readers of one process raise `Gone` where it ended before, during or after the
read, and `Unsupported` where the kernel does not show the file to us (ptrace access mode, hidepid). Readers of
the machine raise `Unsupported` where the kernel has no such file or line.

`pid` may be a thread's number too where a reader says "of the process": procfs answers /proc/TID without
listing it.

See proc(5), proc_pid_stat(5), proc_pid_status(5) and Documentation/filesystems/proc.rst.
"""

import errno
import functools
import math
import os
import time
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

from limitfs.errors import Gone, Unsupported
from limitfs.resources.model import Process, System, Thread

ROOT = "/proc"
"""Where procfs is mounted; parser tests put a made-up tree here."""

TICKS = os.sysconf("SC_CLK_TCK")
"""Clock ticks a second, the unit of utime, stime and start."""

PAGE = os.sysconf("SC_PAGE_SIZE")
_SIZE = 4096
_KIB = 1024

P = ParamSpec("P")
T = TypeVar("T")


class Stat(NamedTuple):
    """The fields in use of proc_pid_stat(5). utime, stime, start: clock ticks."""

    pid: int
    comm: str
    state: str
    ppid: int
    utime: int
    stime: int
    threads: int
    start: int
    leader: bool
    """False for /proc/TID of a thread that is not its process' first."""

    @property
    def zombie(self) -> bool:
        """The process has ended and waits for its parent: it exists, and uses nothing.

        A first thread that ended before the others is in state Z too, but its process lives.
        """
        return self.state == "Z" and self.threads <= 1


class Statm(NamedTuple):
    """proc_pid_statm(5), in bytes."""

    virtual: int
    resident: int
    shared: int


class Meminfo(NamedTuple):
    """The fields in use of proc_meminfo(5), in bytes."""

    total: int
    available: int
    shared: int
    swap_total: int
    swap_free: int


class Loadavg(NamedTuple):
    """proc_loadavg(5); running and total count threads."""

    one: float
    five: float
    fifteen: float
    running: int
    total: int


class Psi(NamedTuple):
    """One line of a pressure file (Documentation/accounting/psi.rst): percent, percent, percent, seconds."""

    avg10: float
    avg60: float
    avg300: float
    total: float


class FileNr(NamedTuple):
    """/proc/sys/fs/file-nr, see proc_sys_fs(5)."""

    used: int
    maximum: float


class Status:
    """proc_pid_status(5); a field is looked for only when asked for.

    The kernel escapes newlines in the Name line, so a process cannot forge a field.
    """

    __slots__ = ("_text",)

    def __init__(self, text: bytes) -> None:
        self._text = text

    def field(self, name: bytes) -> bytes | None:
        """The text after `name` and a colon, or None where the kernel prints no such line."""
        at = self._text.find(b"\n" + name + b":")
        if at < 0:
            return None
        return self._text[at + len(name) + 2 : self._text.find(b"\n", at + 1)]

    def size(self, name: bytes) -> int:
        """A "kB" field in bytes; 0 for what has no memory of its own (kernel threads, zombies)."""
        text = self.field(name)
        return 0 if text is None else int(text[:-3]) * _KIB

    @property
    def uids(self) -> tuple[int, int]:
        """Real and effective user."""
        real, effective, *_ = (self.field(b"Uid") or b"").split()
        return int(real), int(effective)

    @property
    def tgid(self) -> int:
        """The process that this thread belongs to."""
        return int(self.field(b"Tgid") or b"")

    @property
    def queued(self) -> tuple[int, float]:
        """SigQ: signals queued for the real user, and the most there may be."""
        count, _, most = (self.field(b"SigQ") or b"").partition(b"/")
        return int(count), _unbounded(int(most))


def _of_process(read: Callable[P, T]) -> Callable[P, T]:
    """Turn every sign of a process that is no longer there into `Gone`."""

    @functools.wraps(read)
    def reader(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise Gone(f"{_name(args)} has ended") from error
        except (IndexError, ValueError) as error:
            # The kernel prints whole files or, when the task goes away meanwhile, less.
            raise Gone(f"{_name(args)} ended while it was read") from error
        except PermissionError as error:
            raise Unsupported(f"the kernel does not show {error.filename or _name(args)}") from error
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # a path of its choice
                raise
            raise Unsupported(f"a path of {_name(args)} is too long to be shown") from error

    return reader


def _of_machine(read: Callable[P, T]) -> Callable[P, T]:
    """Turn every sign of a file or line that this kernel has not into `Unsupported`."""

    @functools.wraps(read)
    def reader(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (FileNotFoundError, PermissionError, IndexError, ValueError) as error:
            raise _untold(read.__name__, args) from error
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # a pressure file where PSI is switched off
                raise
            raise _untold(read.__name__, args) from error

    return reader


def _untold(reader: str, args: tuple[object, ...]) -> Unsupported:
    return Unsupported(f"this kernel does not tell {args[0] if args else reader}")


def _name(args: tuple[object, ...]) -> str:
    kind = "process" if len(args) < 2 or args[1] is None else "thread of process"
    return f"{kind} {args[0]}"


def _read(path: str) -> bytes:
    """The whole of a file that the kernel prints at once."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(fd, _SIZE)
        if len(text) == _SIZE:
            text += _rest(fd)
        return text
    finally:
        os.close(fd)


def _read_pages(path: str) -> bytes:
    """The whole of a file that the kernel prints page by page, where a short read is not the end."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _rest(fd)
    finally:
        os.close(fd)


def _rest(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 65_536):
        parts.append(part)
    return b"".join(parts)


def _unbounded(number: int) -> float:
    """`number`, or infinity where the kernel's "no limit" (LONG_MAX, ULONG_MAX) was printed."""
    return math.inf if number >= 2**63 - 1 else number


# One process or thread


@_of_process
def stat(pid: int, tid: int | None = None) -> Stat:
    """What /proc/PID/stat tells of the process (CPU time of all threads), or of its thread `tid` alone."""
    text = _read(f"{ROOT}/{pid}/stat" if tid is None else f"{ROOT}/{pid}/task/{tid}/stat")
    # The name stands in parentheses and may hold anything, parentheses and newlines too: the last one ends it.
    opening, closing = text.index(b"("), text.rindex(b")")
    rest = text[closing + 2 :].split(None, 36)
    return Stat(
        int(text[:opening]),
        text[opening + 1 : closing].decode("utf-8", "surrogateescape"),
        rest[0].decode(),
        int(rest[1]),
        int(rest[11]),
        int(rest[12]),
        int(rest[17]),
        int(rest[19]),
        # Field 38, exit_signal: the kernel itself tells leaders from other threads by it (thread_group_leader).
        int(rest[35]) >= 0,
    )


@_of_process
def status(pid: int, tid: int | None = None) -> Status:
    """/proc/PID/status of the process, or of its thread `tid`."""
    text = _read(f"{ROOT}/{pid}/status" if tid is None else f"{ROOT}/{pid}/task/{tid}/status")
    if not text.endswith(b"\n"):
        raise ValueError("cut short")
    return Status(text)


@_of_process
def statm(pid: int) -> Statm:
    """/proc/PID/statm of the process; all 0 for kernel threads and zombies.

    The kernel keeps parts of these counts per thread or CPU and may leave them out: tens of pages.
    """
    size, resident, shared, *_ = _read(f"{ROOT}/{pid}/statm").split()
    return Statm(int(size) * PAGE, int(resident) * PAGE, int(shared) * PAGE)


@_of_process
def limits(pid: int) -> list[tuple[float, float]]:
    """(soft, hard) of every RLIMIT_* of the process, in the order of their numbers."""
    lines = _read(f"{ROOT}/{pid}/limits").splitlines()
    if not lines:
        raise ValueError("empty")
    # Column 26 on: the names before it contain spaces (proc_pid_limits prints "%-25s %-20s %-20s").
    words = [line[26:].split() for line in lines[1:]]
    return [(_rlimit(word[0]), _rlimit(word[1])) for word in words]


def _rlimit(word: bytes) -> float:
    return math.inf if word == b"unlimited" else int(word)


@_of_process
def fds(pid: int) -> int:
    """How many file descriptors the process has open."""
    if _size_counts_fds():
        return os.stat(f"{ROOT}/{pid}/fd").st_size
    listed = len(os.listdir(f"{ROOT}/{pid}/fd"))
    return listed - 1 if pid == os.getpid() else listed  # our own listing is open while we look


@functools.cache
def _size_counts_fds() -> bool:
    """Whether st_size of /proc/PID/fd is the count, as it is since Linux 6.2; before, it was 0.

    Tried on ourselves; the listing has one more, its own. A few attempts, as other threads open files too.
    """
    return any(os.stat("/proc/self/fd").st_size == len(os.listdir("/proc/self/fd")) - 1 for _ in range(5))


@_of_process
def links(pid: int) -> dict[int, str]:
    """Every file descriptor of the process, and what it leads to: a path, or "socket:[INODE]" and the like.

    "/" for a path that is longer than the kernel shows.
    See proc_pid_fd(5).
    """
    directory, found = f"{ROOT}/{pid}/fd", {}
    for name in os.listdir(directory):
        try:
            found[int(name)] = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:  # closed meanwhile
            continue
        except PermissionError:
            os.listdir(directory)  # the kernel says that also of a process that ended meanwhile, but not here
            raise
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            found[int(name)] = "/"  # longer than any that the kernel shows, but a path
    return found


@_of_process
def network(pid: int) -> str:
    """What tells the network namespace of the process from others; network_namespaces(7)."""
    return os.readlink(f"{ROOT}/{pid}/ns/net")


@_of_process
def open_network(pid: int) -> int:
    """A descriptor of the network namespace of the process, for setns(2)."""
    return os.open(f"{ROOT}/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@_of_process
def runtime(pid: int, tid: int) -> int:
    """Nanoseconds that the thread ran on a CPU, up to the last scheduler tick; 0 where the kernel keeps none.

    /proc/PID/task/TID/schedstat, see Documentation/scheduler/sched-stats.rst.
    """
    return int(_read(f"{ROOT}/{pid}/task/{tid}/schedstat").split(None, 1)[0])


@_of_process
def stack_pointer(pid: int, tid: int) -> int | None:
    """The user stack pointer of the thread, or None while it runs or is ready to run.

    /proc/PID/task/TID/syscall, see proc_pid_syscall(5); asks for ptrace access mode ATTACH.
    """
    words = _read(f"{ROOT}/{pid}/task/{tid}/syscall").split()
    return None if words == [b"running"] else int(words[-2], 16)


@_of_process
def mapping(pid: int, address: int) -> tuple[int, int] | None:
    """First and one past the last address of the process' mapping that holds `address`."""
    for line in _read_pages(f"{ROOT}/{pid}/maps").splitlines():
        first, _, last = line[: line.index(b" ")].partition(b"-")
        if int(last, 16) > address:
            start = int(first, 16)
            return (start, int(last, 16)) if start <= address else None
    return None


@_of_process
def comm(pid: int, tid: int | None = None) -> str:
    """The name of the process, which is its first thread's, or of its thread `tid`; it may hold anything."""
    text = _read(f"{ROOT}/{pid}/comm" if tid is None else f"{ROOT}/{pid}/task/{tid}/comm")
    if not text:
        raise ValueError("empty")
    return text[:-1].decode("utf-8", "surrogateescape")


@_of_process
def cgroups(pid: int) -> dict[frozenset[str], str]:
    """The cgroup of the process in each hierarchy, by its controllers (of the unified one: none).

    A path as the kernel writes it: from the root of our cgroup namespace. See cgroups(7).
    """
    found = {}
    for line in _read_pages(f"{ROOT}/{pid}/cgroup").splitlines():
        _number, controllers, path = line.split(b":", 2)
        found[frozenset(filter(None, controllers.decode().split(",")))] = os.fsdecode(path)
    return found


@_of_process
def exe(pid: int) -> str:
    """The file that the process executes, removed or not; "" for kernel threads and zombies."""
    try:
        return os.readlink(f"{ROOT}/{pid}/exe").removesuffix(" (deleted)")
    except FileNotFoundError:
        os.stat(f"{ROOT}/{pid}")  # raises where it is the process that is not there
        return ""


@_of_process
def effective_user(pid: int) -> int:
    """The effective user of the process, to whom its directory belongs (see `owner` for what is in it)."""
    return os.stat(f"{ROOT}/{pid}").st_uid


@_of_process
def thread_group(tid: int) -> int:
    """The process that the thread belongs to."""
    return status(tid).tgid


@_of_process
def owner(pid: int) -> tuple[int, int]:
    """User and group that own /proc/PID: the effective ones, or root where the process may not be traced."""
    # Not /proc/PID itself, which is the effective user's in any case (task_dump_owner in fs/proc/base.c).
    about = os.stat(f"{ROOT}/{pid}/stat")
    if about.st_uid == 0:
        effective = os.stat(f"{ROOT}/{pid}")
        # A zombie cannot be traced either, but nothing in it needs to be kept from its user.
        if effective.st_uid != 0 and stat(pid).zombie:
            about = effective
    return about.st_uid, about.st_gid


# Which there are, and whether they still are


@_of_machine
def pids() -> list[int]:
    """Every process, zombies too."""
    return [int(name) for name in os.listdir(ROOT) if name.isdecimal()]


@_of_process
def tids(pid: int) -> list[int]:
    """Every thread of the process."""
    return [int(name) for name in os.listdir(f"{ROOT}/{pid}/task")]


def identify(pid: int) -> Process:
    """The process that has this number now; a zombie is one still.

    Raises:
        Gone: there is none, or the number is that of a thread inside a process.
    """
    now = stat(pid)
    if now.state == "X" or not now.leader:
        raise Gone(f"there is no process {pid}")
    return Process(pid, now.start)


def identify_thread(pid: int, tid: int) -> Thread:
    """The thread of this process that has this number now.

    Raises:
        Gone: there is none.
    """
    return Thread(pid, tid, stat(pid, tid).start)


def verify(target: Process | Thread) -> Stat:
    """What the kernel says of `target` now.

    Called after a value was read, not before: if the number is still `target`'s afterwards, the value was too.

    Raises:
        Gone: it ended, or its number belongs to another one.
    """
    now = stat(target.pid, target.tid) if isinstance(target, Thread) else stat(target.pid)
    if now.start != target.start or now.state == "X":
        raise Gone(f"{target.level} {now.pid} has ended; its number was used again")
    return now


def check(target: System | Process | Thread) -> None:
    """As `verify`, for any target; the machine is always there."""
    if isinstance(target, Process | Thread):
        verify(target)


def reading(target: Process, read: Callable[[int], T]) -> T:
    """`read(pid)`, sure to be of `target`.

    Where the first thread has ended before the others, /proc/PID shows no memory and no descriptors although
    the process has them; they are then read from a thread that lives.

    Raises:
        Gone: as `verify`.
    """
    value = read(target.pid)
    now = verify(target)
    if now.state == "Z" and not now.zombie:
        return _reading_by_thread(target.pid, read, value)
    return value


def _reading_by_thread(pid: int, read: Callable[[int], T], otherwise: T) -> T:
    for tid in tids(pid):
        try:
            if stat(pid, tid).state not in "ZX":
                return read(tid)
        except Gone:
            continue
    return otherwise


def started(target: System | Process | Thread) -> float:
    """When `target` started (the machine: booted), in seconds since the epoch by the clock as it is set now."""
    boot = time.time() - uptime()
    return boot if isinstance(target, System) else boot + target.start / TICKS


# The machine


@_of_machine
def meminfo() -> Meminfo:
    """What /proc/meminfo tells, in bytes."""
    text = b"\n" + _read(f"{ROOT}/meminfo")
    return Meminfo(
        *(_kib(text, name) for name in (b"MemTotal", b"MemAvailable", b"Shmem", b"SwapTotal", b"SwapFree"))
    )


def _kib(text: bytes, name: bytes) -> int:
    at = text.index(b"\n" + name + b":") + len(name) + 2
    return int(text[at : text.index(b" kB", at)]) * _KIB


@_of_machine
def cpu_time() -> float:
    """Seconds for which all CPUs together were not idle, since boot (/proc/stat, line "cpu").

    Stolen time counts, as in top(1): it was asked for and not to be had. Guest time is part of user time.
    """
    fd = os.open(f"{ROOT}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        name, *fields = os.read(fd, 512).split(b"\n", 1)[0].split()
    finally:
        os.close(fd)
    if name != b"cpu":
        raise ValueError("no line cpu")
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / TICKS


@_of_machine
def loadavg() -> Loadavg:
    """What /proc/loadavg tells; its "running/total" counts threads."""
    one, five, fifteen, entities, *_ = _read(f"{ROOT}/loadavg").split()
    running, _, total = entities.partition(b"/")
    return Loadavg(float(one), float(five), float(fifteen), int(running), int(total))


@_of_machine
def psi(path: str, line: bytes = b"some") -> Psi:
    """The line "some" or "full" of a pressure file; `path` is a whole one, as each cgroup has its own too."""
    for text in _read(path).splitlines():
        kind, *pairs = text.split()
        if kind == line:
            ten, sixty, threehundred, total = (float(pair.partition(b"=")[2]) for pair in pairs)
            return Psi(ten, sixty, threehundred, total / 1e6)
    raise ValueError(f"no line {line.decode()}")


@_of_machine
def file_nr() -> FileNr:
    """Open file handles of the machine, and the most there may be."""
    allocated, free, maximum = map(int, _read(f"{ROOT}/sys/fs/file-nr").split())
    return FileNr(allocated - free, _unbounded(maximum))


@_of_machine
def sysctl(name: str) -> int:
    """The number in /proc/sys/`name`."""
    return int(_read(f"{ROOT}/sys/{name}"))


def uptime() -> float:
    """Seconds since boot on the clock of `Stat.start` (CLOCK_BOOTTIME, time suspended included)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
