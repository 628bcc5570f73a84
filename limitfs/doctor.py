"""What this machine offers limitfs, found out by trying.

Every check is one function of a `Machine` that gives one `Check`: a verdict, what was looked at, what follows
from it, and what would bring it if it is missing.
"""

import contextlib
import ctypes
import enum
import importlib
import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

OLDEST_PYFUSE3 = (3, 5, 0)
FEW_FILES = 4096
FEW_TIMERS = 1024


class Verdict(enum.StrEnum):
    """`ok`; `warn`: limitfs works, but hears less or less surely; `fail`: it cannot be mounted."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `limitfs doctor`."""

    verdict: Verdict
    what: str
    means: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.verdict:<4}  {self.what}  — {self.means}{remedy}"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where to look, and as whom.

    Attributes:
        root: what stands for `/`.
        uid: who will mount.
    """

    root: Path = Path("/")
    uid: int = field(default_factory=os.geteuid)

    def text(self, path: str) -> str | None:
        """The text of a file below the root; None if it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return None


def examine(machine: Machine) -> Iterator[Check]:
    """Every check, what is needed first."""
    yield fuse_device(machine)
    yield fusermount(machine)
    yield allow_other(machine)
    yield pyfuse3_version()
    yield kernel(machine)
    yield proc_connector()
    yield pressure(machine)
    yield sockets()
    yield cpu_timers()
    yield perf_paranoid(machine)
    yield btf(machine)
    yield from kernel_hooks()
    yield from capabilities(machine)
    yield open_files()
    yield pending_signals()


# --- needed to mount


def fuse_device(machine: Machine) -> Check:
    what = "/dev/fuse"
    try:
        os.close(os.open(machine.root / "dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        remedy = "`modprobe fuse`, or in a container --device /dev/fuse"
        return Check(Verdict.FAIL, what, "nothing can be mounted: it does not exist", remedy)
    except OSError as error:
        remedy = "Debian's package fuse3 sets its mode to 0666; in a container add the device and CAP_SYS_ADMIN"
        return Check(Verdict.FAIL, what, f"nothing can be mounted: {error.strerror}", remedy)
    return Check(Verdict.OK, what, "opens")


def fusermount(machine: Machine) -> Check:
    found = shutil.which("fusermount3")
    if found:
        return Check(Verdict.OK, "fusermount3", f"users other than root can mount and unmount ({found})")
    verdict = Verdict.WARN if machine.uid == 0 else Verdict.FAIL
    return Check(verdict, "fusermount3", "only root can mount", "Debian's package fuse3")


def allow_other(machine: Machine) -> Check:
    what = "user_allow_other"
    lines = (machine.text("etc/fuse.conf") or "").splitlines()
    if machine.uid == 0:
        return Check(Verdict.OK, what, "root needs no permission for -o allow_other")
    if any(line.split("#")[0].strip() == what for line in lines):
        return Check(Verdict.OK, what, "you may mount with -o allow_other")
    remedy = f"a line `{what}` in /etc/fuse.conf"
    return Check(Verdict.WARN, what, "what you mount is for you alone: -o allow_other is refused", remedy)


def pyfuse3_version() -> Check:
    try:
        version = importlib.metadata.version("pyfuse3")
    except importlib.metadata.PackageNotFoundError:
        return Check(Verdict.FAIL, "pyfuse3", "nothing can be mounted: it is not installed", "pip install pyfuse3")
    what = f"pyfuse3 {version}"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < OLDEST_PYFUSE3:
        return Check(Verdict.FAIL, what, "event files could not be polled", "pip install 'pyfuse3>=3.5.0'")
    try:
        import pyfuse3  # noqa: F401
    except ImportError as error:
        return Check(
            Verdict.FAIL, what, f"nothing can be mounted: {error}", "Debian's package libfuse3-3 or libfuse3-4"
        )
    return Check(Verdict.OK, what, "event files can be polled")


# --- what can be heard


def kernel(machine: Machine) -> Check:
    release = (machine.text("proc/sys/kernel/osrelease") or os.uname().release).strip()
    what = f"kernel {release}"
    # Since Linux 6.2 the size of /proc/PID/fd is the number of descriptors; before, it is 0.
    with contextlib.suppress(OSError):
        if (machine.root / "proc/self/fd").stat().st_size > 0:
            return Check(Verdict.OK, what, "tells a process' descriptor count in one call")
    return Check(Verdict.WARN, what, "descriptors are counted one by one, which is slower", "Linux 6.2 or later")


def proc_connector() -> Check:
    what = "process connector"
    lost = "births and deaths are found by sampling: short-lived processes can be missed"
    try:
        if importlib.util.find_spec("limitfs.hearing.connector") is None:
            return Check(Verdict.WARN, what, lost, "this limitfs does not have it")
        connector = importlib.import_module("limitfs.hearing.connector")
        missing = connector.missing()
    except Exception as error:
        # A source that cannot even be asked must not hide the other checks.
        return Check(Verdict.WARN, what, lost, f"it could not be tried: {error}")
    if missing:
        return Check(Verdict.WARN, what, lost, missing)
    return Check(Verdict.OK, what, "every fork, exec and exit is heard")


def pressure(machine: Machine) -> Check:
    what = "/proc/pressure"
    if machine.text("proc/pressure/memory") is not None:
        return Check(Verdict.OK, what, "memory, cpu and io pressure are heard")
    remedy = "boot with psi=1, on a kernel with CONFIG_PSI"
    return Check(Verdict.WARN, what, "no pressure resources, and low memory is found by sampling", remedy)


def sockets() -> Check:
    from limitfs.resources import ABSENT

    missing = ABSENT.get("channels") or ABSENT.get("connections")
    if missing:
        return Check(Verdict.WARN, "sock_diag", "no channels and no connections", missing)
    return Check(Verdict.OK, "sock_diag", "channels and connections are counted")


class _SigEvent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("padding", ctypes.c_char * 48),
    )


_SIGEV_NONE = 1


def cpu_timers() -> Check:
    """Try a timer on the CPU clock of another process."""
    what = "CPU timers"
    libc = ctypes.CDLL(None, use_errno=True)
    # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED); a parent outside this pid namespace shows as 0.
    clock = (~(os.getppid() or 1) << 3) | 2
    timer = ctypes.c_void_p()
    event = _SigEvent(notify=_SIGEV_NONE)
    if libc.timer_create(ctypes.c_int(clock), ctypes.byref(event), ctypes.byref(timer)) == 0:
        libc.timer_delete(timer)
        return Check(Verdict.OK, what, "cpu and cputime of any process are heard exactly")
    reason = os.strerror(ctypes.get_errno())
    return Check(Verdict.WARN, what, "cpu and cputime are sampled", f"timer_create says: {reason}")


def perf_paranoid(machine: Machine) -> Check:
    text = machine.text("proc/sys/kernel/perf_event_paranoid")
    if text is None:
        return Check(
            Verdict.WARN, "perf_event_paranoid", "threads' CPU time is sampled", "a kernel with CONFIG_PERF_EVENTS"
        )
    what = f"perf_event_paranoid {text.strip()}"
    if machine.uid == 0 or int(text) <= 1:
        return Check(Verdict.OK, what, "threads' CPU time can be heard exactly")
    remedy = "`sysctl kernel.perf_event_paranoid=1`, or mount as root"
    return Check(Verdict.WARN, what, "threads' CPU time is sampled", remedy)


def btf(machine: Machine) -> Check:
    what = "/sys/kernel/btf/vmlinux"
    if (machine.root / "sys/kernel/btf/vmlinux").exists():
        return Check(Verdict.OK, what, "kernel hooks can find their way in this kernel")
    remedy = "a kernel with CONFIG_DEBUG_INFO_BTF"
    return Check(Verdict.WARN, what, "no kernel hooks: what they would hear exactly is sampled", remedy)


def kernel_hooks() -> Iterator[Check]:
    """Whether each of the kernel programs loads and attaches, found out by doing it."""
    from limitfs.hearing.bpf.source import BpfFds, BpfRss, BpfTasks
    from limitfs.hearing.reactor import Reactor

    heard = {BpfFds: "descriptors", BpfRss: "memory, shared and swap", BpfTasks: "threads"}
    reactor = Reactor()
    for kind, what in heard.items():
        source = kind(reactor)
        missing = source.missing()
        if missing is None:
            yield Check(Verdict.OK, f"hook {source.name}", f"{what} are heard exactly, at a cost to {source.cost}")
        else:
            yield Check(Verdict.WARN, f"hook for {what}", f"{what} are sampled", missing)
        source.close()
    reactor.close()


# --- privileges and limits

_CAPABILITIES = (
    (21, "CAP_SYS_ADMIN", "no mount without fusermount3, no hooks on older kernels"),
    (39, "CAP_BPF", "no kernel hooks: what they would hear exactly is sampled"),
    (38, "CAP_PERFMON", "no kernel hooks on tracepoints and probes"),
    (24, "CAP_SYS_RESOURCE", "limits cannot be raised, and pressure windows are multiples of 2 s"),
    (12, "CAP_NET_ADMIN", "before Linux 6.6 no process connector: births and deaths are found by sampling"),
)


def capabilities(machine: Machine) -> Iterator[Check]:
    """One check for each capability of interest."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", machine.text("proc/self/status") or "", re.MULTILINE)
    held = int(found[1], 16) if found else 0
    for bit, name, lost in _CAPABILITIES:
        if held >> bit & 1:
            yield Check(Verdict.OK, name, "held")
        else:
            yield Check(Verdict.WARN, name, lost, "mount as root, or give the container or unit this capability")


def open_files() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _limit("RLIMIT_NOFILE", hard, FEW_FILES, "open files and exact watchers", "LimitNOFILE=, or ulimit -Hn")


def pending_signals() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    return _limit("RLIMIT_SIGPENDING", soft, FEW_TIMERS, "CPU timers", "LimitSIGPENDING=, or ulimit -i")


def _limit(name: str, value: int, few: int, uses: str, remedy: str) -> Check:
    if value == resource.RLIM_INFINITY:
        return Check(Verdict.OK, f"{name} unlimited", f"as many {uses} as memory holds")
    if value >= few:
        return Check(Verdict.OK, f"{name} {value}", f"enough for as many {uses}")
    return Check(Verdict.WARN, f"{name} {value}", f"at most so many {uses}; beyond that, sampling", remedy)
