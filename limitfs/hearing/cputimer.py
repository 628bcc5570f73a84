"""The kernel's own alarm on the CPU time of another process: POSIX CPU timers.

timer_create(2) takes the CPU clock of any process, without privilege; the signal of the timer is blocked
everywhere and read from one signalfd(2). The kernel compares at its ticks while the process runs, so nothing at
all happens while it is idle, and a timer is late by a tick (1 to 10 ms) at most. What a process consumes in its
last tick is read when it ends, as long as its parent has not waited for it.

Kernel threads never return to user space, where the kernel looks at these timers: they are not heard here.
"""

import contextlib
import itertools
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import ClassVar

from limitfs.errors import Gone
from limitfs.hearing import syscalls
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.membership import Membership
from limitfs.hearing.meter import NAMES, Clock, Metered, refuse_unheard
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Guarantee, Listener, Refused, Want
from limitfs.resources import procfs
from limitfs.resources.model import Measured, Process, Processes, Resource, Target

log = logging.getLogger(__name__)

Callback = Callable[[], None]

SIGNAL = signal.SIGRTMIN + 5
"""Of the timers. By default it kills who does not block it; see `block_signal`."""

_BATCH = 128
_BATCHES = 8
"""Signals read per call, and calls per turn of the event loop; the rest wait for the next turn."""


def block_signal() -> None:
    """Block the timers' signal in this thread and those that it starts; call it before any other is started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})


class CpuTimer:
    """A timer on the CPU clock of one process. Fires once each time it is set."""

    __slots__ = ("_callback", "_clock", "_key", "_process", "_timer", "_timers")

    def __init__(self, timers: "CpuTimers", process: Process, key: int, callback: Callback) -> None:
        self._timers = timers
        self._process = process
        self._key = key
        self._callback = callback
        self._clock = syscalls.cpu_clock(process.pid)
        self._timer: int | None = syscalls.timer_create(self._clock, SIGNAL, key)

    def set(self, cpu_seconds: float) -> None:
        """Fire when the process has consumed `cpu_seconds` in all; at once where it has.

        Raises:
            Gone: it has ended.
        """
        self._set(max(cpu_seconds, 1e-9))

    ring_at = set

    def rest(self) -> None:
        """Do not fire. Raises Gone."""
        self._set(0.0)

    def now(self) -> float:
        """CPU seconds of the process, those of ended threads included. Raises Gone."""
        try:
            return time.clock_gettime(self._clock)
        except OSError as error:
            raise Gone(f"process {self._process.pid} has ended") from error

    def close(self) -> None:
        """Free it; may be called twice."""
        if self._timer is None:
            return
        timer, self._timer = self._timer, None
        syscalls.timer_delete(timer)
        self._timers._forget(self._key)

    def _set(self, seconds: float) -> None:
        if self._timer is None:
            return
        try:
            syscalls.timer_set(self._timer, seconds)
        except OSError as error:
            raise Gone(f"process {self._process.pid} has ended") from error

    def _fire(self) -> None:
        try:
            self._callback()
        except Exception:  # the other timers of this batch must be heard all the same
            log.exception("the timer of %s failed", self._process)


class CpuTimers:
    """All timers, and the descriptor through which they are heard; it is open while there is one."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._keys = itertools.count(1)
        # Keys are never used again, so a signal that outlives its timer finds nothing.
        self._timers: dict[int, CpuTimer] = {}
        self._fd: int | None = None

    def arm_at(self, process: Process, cpu_seconds: float, callback: Callback) -> CpuTimer:
        """Call `callback` from the event loop when `process` has consumed `cpu_seconds`.

        Raises:
            Gone: it has ended, or its number is now another process'.
            Refused: no timer is left (RLIMIT_SIGPENDING), or a thread does not block the signal.
        """
        timer = self.open(process, callback)
        try:
            timer.set(cpu_seconds)
        except BaseException:
            timer.close()
            raise
        return timer

    def open(self, process: Process, callback: Callback) -> CpuTimer:
        """As `arm_at`, but not set yet."""
        self._listen()
        key = next(self._keys)
        timer = self._create(process, key, callback)
        self._timers[key] = timer
        try:
            procfs.check(process)  # after creation, so that it cannot be about another process of that number
        except BaseException:
            timer.close()
            raise
        return timer

    def __len__(self) -> int:
        """How many timers there are."""
        return len(self._timers)

    def _create(self, process: Process, key: int, callback: Callback) -> CpuTimer:
        try:
            return CpuTimer(self, process, key, callback)
        except OSError as error:
            self._stop_if_unused()
            procfs.check(process)  # EINVAL is also what the kernel says of a process that is no more
            raise Refused(f"timer_create: {error.strerror} (RLIMIT_SIGPENDING counts the timers)") from error

    def _forget(self, key: int) -> None:
        self._timers.pop(key, None)
        self._stop_if_unused()

    def _listen(self) -> None:
        if self._fd is not None:
            return
        careless = syscalls.threads_without(SIGNAL)
        if careless:
            raise Refused(f"threads {careless} do not block signal {SIGNAL}; block_signal() came too late")
        try:
            self._fd = syscalls.signalfd([SIGNAL])
        except OSError as error:
            raise Refused(f"signalfd: {error.strerror}") from error
        self._reactor.add_reader(self._fd, self._drain)

    def _stop_if_unused(self) -> None:
        if self._timers or self._fd is None:
            return
        self._reactor.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = None

    def _drain(self) -> None:
        for _ in range(_BATCHES):
            if self._fd is None:
                return
            try:
                signals = os.read(self._fd, _BATCH * syscalls.SIGINFO_SIZE)
            except BlockingIOError:
                return
            for key in syscalls.signal_values(signals):
                timer = self._timers.get(key)
                if timer is not None:
                    timer._fire()
            if len(signals) < _BATCH * syscalls.SIGINFO_SIZE:
                return


class CpuTimerSource:
    """Hears `cputime` and `cpu` of a process, and of every process: of the machine, a partition, a group.

    `cputime` rings at the level. `cpu` rings at the latest when the window holds 6.25 % more than the level,
    and no earlier than 3.125 % below it (see limitfs/hearing/window.py); both bounds are wider for windows in
    which the level is less than 128 ms of CPU time.
    """

    name: ClassVar[str] = "cpu-timer"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[str] = "nothing while idle; up to 32 wake-ups per window's worth of CPU time"

    def __init__(self, reactor: Reactor, timers: CpuTimers, deaths: Deaths, membership: Membership) -> None:
        self._reactor = reactor
        self._timers = timers
        self._deaths = deaths
        self._membership = membership

    def missing(self) -> str | None:
        """None where a timer on our own clock, looked at from outside, can be made."""
        try:
            self._timers.open(procfs.identify(os.getpid()), lambda: None).close()
        except Refused as refusal:
            return str(refusal)
        return None

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """`cpu` and `cputime`, of one process or of each."""
        if resource.name not in NAMES:
            return False
        return isinstance(target, Processes if each else Process)

    def arm(self, want: Want, listener: Listener) -> Metered:
        """Set the timers.

        Raises:
            Refused: the condition is not one of growth, the process is a kernel thread, or no timer is left;
                for each process also: births cannot be heard.
            Gone: the process has ended.
        """
        refuse_unheard(want)
        armed = Metered(
            self.name, self._reactor, want, listener, self._open_clock, parallel=float(os.cpu_count() or 1)
        )
        follow = self._follow_each if want.each else self._follow_one
        return armed.begin(lambda armed: follow(want, armed))

    def _open_clock(self, member: Measured, callback: Callback) -> Clock:
        assert isinstance(member, Process)
        return self._timers.open(member, callback)

    def _follow_one(self, want: Want, armed: Metered) -> Callback:
        process = want.target
        assert isinstance(process, Process)
        if procfs.statm(process.pid).virtual == 0:
            procfs.check(process)
            raise Refused("a kernel thread never comes to where the kernel looks at CPU timers")
        with contextlib.ExitStack() as undo:
            death = self._deaths.watch(process, lambda: armed.ended(process))
            undo.callback(death.cancel)
            armed.add(process)
            return undo.pop_all().close

    def _follow_each(self, want: Want, armed: Metered) -> Callback:
        assert isinstance(want.target, Processes)
        end = self._membership.follow(want.target, armed)
        armed.period = self._membership.period(want.target)
        return end
