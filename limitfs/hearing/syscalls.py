"""The system calls that Python 3.11 does not wrap: POSIX timers, signalfd, perf events.

Thin declarations only: every function raises OSError with the kernel's errno, and decides nothing. See
timer_create(2), signalfd(2), perf_event_open(2).
"""

import ctypes
import fcntl
import os
import platform
import signal
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)

_SIGEV_SIGNAL = 0
_TIMER_ABSTIME = 1
_SFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
SIGINFO_SIZE = 128
"""Bytes of one struct signalfd_siginfo."""


class _Sigevent(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_size_t),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("padding", ctypes.c_byte * 48),
    )


class _Itimerspec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class _Sigset(ctypes.Structure):
    _fields_ = (("bits", ctypes.c_ulong * (1024 // (8 * ctypes.sizeof(ctypes.c_ulong)))),)


# POSIX timers on CPU clocks


def cpu_clock(pid: int) -> int:
    """The clock id of the CPU time of process `pid`; clock_getcpuclockid(3) makes the same, after a check."""
    return (~pid << 3) | 2


def timer_create(clock: int, signo: int, value: int) -> int:
    """A disarmed timer that sends `signo` with `value` to this process; returns its id."""
    event = _Sigevent(value, signo, _SIGEV_SIGNAL)
    # A timer_t is a pointer, but for a signal it holds the kernel's number, and 0 is one.
    timer = ctypes.c_size_t()
    _check(_libc.timer_create(ctypes.c_int(clock), ctypes.byref(event), ctypes.byref(timer)))
    return timer.value


def timer_set(timer: int, seconds: float) -> None:
    """Fire once when the clock shows `seconds`; 0 disarms."""
    whole, nanoseconds = divmod(round(seconds * 1e9), 1_000_000_000)
    spec = _Itimerspec(0, 0, whole, nanoseconds)
    _check(_libc.timer_settime(ctypes.c_size_t(timer), _TIMER_ABSTIME, ctypes.byref(spec), None))


def timer_delete(timer: int) -> None:
    """Free the timer."""
    _check(_libc.timer_delete(ctypes.c_size_t(timer)))


# Signals as data


def signalfd(signals: Iterable[int]) -> int:
    """A non-blocking descriptor from which the (blocked) `signals` are read."""
    chosen = _Sigset()
    for signo in signals:
        _check(_libc.sigaddset(ctypes.byref(chosen), signo))
    return _check(_libc.signalfd(-1, ctypes.byref(chosen), _SFD_FLAGS))


def signal_values(siginfos: bytes) -> list[int]:
    """The sigev_value of each signal in what was read from a signalfd."""
    # ssi_ptr stands at offset 48.
    return [struct.unpack_from("=Q", siginfos, at + 48)[0] for at in range(0, len(siginfos), SIGINFO_SIZE)]


def threads_without(signo: int) -> list[int]:
    """Threads of this process that do not block `signo`; such a one would be killed by it."""
    found = []
    for tid in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{tid}/status", encoding="ascii", errors="replace") as status:
                blocked = next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk:"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if not blocked >> (signo - 1) & 1:
            found.append(int(tid))
    return found


def block_all_signals() -> None:
    """For a thread of our own: leave every signal to the others."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


# perf events

_PERF_EVENT_OPEN = {"x86_64": 298, "i386": 336, "i686": 336, "armv7l": 364, "ppc64le": 319, "s390x": 331}.get(
    platform.machine(), 241
)  # 241: the generic table of arm64, riscv64 and loongarch64
_ATTR_SIZE = 128
_TYPE_SOFTWARE = 1
_COUNT_SW_CPU_CLOCK = 0
_COUNT_SW_TASK_CLOCK = 1
_FLAG_PID_CGROUP = 4
_FLAG_FD_CLOEXEC = 8
_IOC_PERIOD = 0x40082404
_PROT_READ = 1
_MAP_SHARED = 1
_MAP_FAILED = ctypes.c_void_p(-1).value
_PERF_MAP_SIZE = 2 * os.sysconf("SC_PAGESIZE")

_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.syscall.restype = ctypes.c_long


def perf_task_clock(tid: int, period_ns: int) -> int:
    """A descriptor that counts the CPU nanoseconds of thread `tid`, woken every `period_ns` of them."""
    return _perf_open(_COUNT_SW_TASK_CLOCK, period_ns, tid, -1, _FLAG_FD_CLOEXEC)


def perf_cgroup_clock(directory: int, cpu: int, period_ns: int) -> int:
    """A descriptor that counts the nanoseconds in which a cgroup has one CPU, woken every `period_ns` of them.

    `directory`: a descriptor of the cgroup's; what is below it counts too.
    """
    return _perf_open(_COUNT_SW_CPU_CLOCK, period_ns, directory, cpu, _FLAG_PID_CGROUP | _FLAG_FD_CLOEXEC)


def _perf_open(config: int, period_ns: int, whom: int, cpu: int, flags: int) -> int:
    # struct perf_event_attr: type, size, config, period, sample_type, read_format, flags, wakeup_events.
    attr = struct.pack("=IIQQQQQI", _TYPE_SOFTWARE, _ATTR_SIZE, config, period_ns, 0, 0, 0, 1)
    buffer = ctypes.create_string_buffer(attr, _ATTR_SIZE)
    which = ctypes.c_int(whom), ctypes.c_int(cpu), ctypes.c_int(-1), ctypes.c_ulong(flags)
    return _check(_libc.syscall(ctypes.c_long(_PERF_EVENT_OPEN), buffer, *which))


def perf_set_period(fd: int, period_ns: int) -> None:
    """Wake after `period_ns` more CPU nanoseconds, and every `period_ns` from then on."""
    fcntl.ioctl(fd, _IOC_PERIOD, struct.pack("=Q", period_ns))


def perf_map(fd: int) -> int:
    """Map the smallest ring, without which a perf event never wakes anybody; returns its address."""
    address = _libc.mmap(None, _PERF_MAP_SIZE, _PROT_READ, _MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise _error()
    return int(address)


def perf_unmap(address: int) -> None:
    """Undo `perf_map`."""
    _check(_libc.munmap(address, _PERF_MAP_SIZE))


def _check(result: int) -> int:
    if result < 0:
        raise _error()
    return result


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
