"""Hearing from the kernel's own hooks: descriptors, memory, threads; exactly, and asleep until something crosses.

Thresholds, hysteresis and counters live in the kernel (limitfs.h, judge.bpf.h). A record comes only when a state
turned; the ring that brings it is no more than a wake-up, so when it overruns nothing is lost but details: the
alarms without a line are counted from the map and told by `missed`.
"""

import math
import mmap
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

from limitfs.errors import Gone, LimitsError
from limitfs.hearing.bpf.engine import Engine, Hooks
from limitfs.hearing.bpf.layout import (
    EVERY,
    HIGHEST,
    SHARE,
    Control,
    Flag,
    Kind,
    Member,
    Processors,
    Record,
    SeedError,
    State,
    Watch,
    What,
    alarms,
)
from limitfs.hearing.bpf.libbpf import BpfError, Object
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Guarantee, Listener, Refused, Want, Witness
from limitfs.resources import members, procfs
from limitfs.resources.model import Process, Processes, Resource, Target
from limitfs.watching.condition import Amount, Condition, Op

_SEED_ATTEMPTS = 1000
"""A value that changes each time it is read is heard by its events anyway."""


def _witness(record: Record) -> Witness:
    return Witness(record.time, record.tid, record.comm.decode("utf-8", "surrogateescape"), record.uid)


class _Scale(NamedTuple):
    """How a resource is counted in the kernel: its kind, and base units in one of its units."""

    kind: Kind
    unit: int


# From conditions to watches


def watches_for(want: Want, scale: _Scale, level: float, clear: float) -> list[Watch]:
    """The kernel's form of a condition.

    A `for` is held against the level, an alarm against the clear level: with both, every crossing of either is
    needed, and that takes two watches.
    """
    condition = want.condition
    watch = Watch(kind=scale.kind, flags=_flags(condition))
    if condition.op is Op.CHANGE:
        return [watch]
    _set_levels(watch, condition.op, level / scale.unit, clear / scale.unit)
    _set_shares(watch, want)
    if condition.hold is None or condition.clear is None:
        return [watch]
    other = Watch.from_buffer_copy(watch)
    watch.leave = watch.enter + (1 if watch.flags & Flag.DOWN else -1)
    watch.flags &= ~Flag.LEAVE_SHARE
    if watch.flags & Flag.ENTER_SHARE:
        # The kernel keeps the two apart by one.
        watch.flags |= Flag.LEAVE_SHARE
        watch.leave = watch.enter
    other.enter = other.leave + (-1 if other.flags & Flag.DOWN else 1)
    if other.flags & Flag.LEAVE_SHARE:
        other.flags |= Flag.ENTER_SHARE | Flag.STRICT
        other.enter = other.leave
    return [watch, other]


def _flags(condition: Condition) -> Flag:
    flags = Flag(0)
    if condition.op in (Op.LE, Op.LT):
        flags |= Flag.DOWN
    if condition.op in (Op.GT, Op.LT):
        flags |= Flag.STRICT
    if condition.op is Op.CHANGE:
        flags |= Flag.CHANGE
    return flags


def _set_levels(watch: Watch, op: Op, level: float, clear: float) -> None:
    """Whole numbers: `enter` is the first that is beyond, `leave` the first that ends the alarm."""
    if op in (Op.GE, Op.GT):
        watch.enter = _whole(level, up=True) if op is Op.GE else _whole(level, up=False) + 1
        watch.leave = min(_whole(clear, up=False), watch.enter - 1)
    else:
        watch.enter = _whole(level, up=False) if op is Op.LE else _whole(level, up=True) - 1
        watch.leave = max(_whole(clear, up=True), watch.enter + 1)


def _whole(number: float, up: bool) -> int:
    if number >= HIGHEST:
        return HIGHEST - 1
    return math.ceil(number) if up else math.floor(number)


def _set_shares(watch: Watch, want: Want) -> None:
    """A percentage of what each process may have: the kernel looks its limit up, also when that changes."""
    if want.resource.rlimit is None:
        return
    watch.rlimit = want.resource.rlimit
    amount, clear = want.condition.amount, want.condition.clear or want.condition.amount
    if _is_share(amount):
        watch.flags |= Flag.ENTER_SHARE
        watch.enter = _billionths(amount)
    if _is_share(clear):
        watch.flags |= Flag.LEAVE_SHARE
        watch.leave = _billionths(clear)


def _is_share(amount: Amount | None) -> bool:
    return amount is not None and amount.percent


def _billionths(amount: Amount | None) -> int:
    return 0 if amount is None else round(amount.number / 100 * SHARE)


# Armed


class _Armed(ABC):
    """What all of them have: watches, and what was told of each member."""

    guarantee = Guarantee.EXACT
    period: float | None = None

    def __init__(self, engine: Engine, want: Want, listener: Listener, scale: _Scale) -> None:
        assert engine.hooks is not None
        self.source = engine.hooks.name
        self._engine = engine
        self._want = want
        self._listener = listener
        self._scale = scale
        self._watches: list[Watch] = []
        self._told: dict[tuple[int, int, int], int] = {}
        self._skipped = 0
        self._armed = False

    def disarm(self) -> None:
        """Forget the watches; detach if these were the last."""
        if self._armed:
            self._armed = False
            self._remove()
            self._told.clear()
            self._engine.release()

    def _begin(self) -> None:
        """Attach, watch, and only then read: what happens meanwhile is heard."""
        self._engine.use()
        self._armed = True
        try:
            self._start()
        except BaseException:
            self.disarm()
            raise

    @abstractmethod
    def _start(self) -> None:
        """Hand the watches to the kernel, and have the present judged."""

    @abstractmethod
    def _remove(self) -> None:
        """Take the watches back."""

    @abstractmethod
    def _target_of(self, tgid: int, start: int) -> Target:
        """Whom a record of the kernel is about."""

    # From the kernel

    def crossed(self, record: Record) -> None:
        """A state turned."""
        member = self._target_of(record.tgid, record.start)
        if not self._follow(member, _key(record), record.flips):
            return
        if record.tid:
            self._listener.witnessed(member, _witness(record))
        self._tell(member, record.value, record.flips)

    def ended(self, record: Record) -> None:
        """The process of a member ended."""
        member = self._target_of(record.tgid, record.start)
        self._follow(member, _key(record), record.flips)
        self._told.pop(_key(record), None)
        self._end(member, record.watch, record.tgid, record.start)

    def overran(self) -> None:
        """Tell what the ring could not: from the states, which are always true."""
        readings, ended = [], []
        for key, state in self._my_states():
            member = self._target_of(key.tgid, key.start)
            if self._follow(member, (key.watch, key.tgid, key.start), state.flips):
                self._skipped += 1  # the last one too came without details
                readings.append((member, state.value, state.flips))
            if state.gone:
                ended.append((member, key))
        lost, self._skipped = self._skipped + len(ended), 0
        if lost:
            self._listener.lost(lost)
        for member, value, flips in readings:
            self._tell(member, value, flips)
        for member, key in ended:
            self._told.pop((key.watch, key.tgid, key.start), None)
            self._engine.drop_state(key)
            self._end(member, key.watch, key.tgid, key.start)

    def _tell(self, member: Target, value: int, flips: int) -> None:
        try:
            self._listener.reading(member, float(value * self._scale.unit))
        except LimitsError:
            # It ended before its limit could be read for the line: the alarm counts all the same.
            if flips & 1 and self._counts_alarms():
                self._listener.missed(member, 1)

    def _end(self, member: Target, watch: int, tgid: int, start: int) -> None:
        """Of several watches for one condition, the first tells."""
        self._engine.forget(tgid, start)
        if self._watches and watch == self._watches[0].id:
            self._listener.gone(member)

    def _follow(self, member: Target, key: tuple[int, int, int], flips: int) -> bool:
        """Note where a state is now, and count the alarms between that were not told; False: that is no news."""
        before = self._told.get(key, 0)
        if flips <= before:
            return False
        self._told[key] = flips
        self._skipped += flips - before - 1
        heard = 1 if flips & 1 and not before & 1 else 0
        missed = alarms(flips) - alarms(before) - heard
        if missed and self._counts_alarms():
            self._listener.missed(member, missed)
        return True

    def _counts_alarms(self) -> bool:
        """With `for`, whether it was an alarm is decided elsewhere; with `change` there are none."""
        return self._want.condition.hold is None and self._want.condition.op is not Op.CHANGE

    def _my_states(self) -> Iterator[tuple[Member, State]]:
        ids = {watch.id for watch in self._watches}
        return ((member, state) for member, state in self._engine.states() if member.watch in ids)

    # At arming

    def _plant(self, process: Process, config: int) -> None:
        """Judge what `process` has now, by every watch.

        Raises:
            Gone: it has ended.
            Refused: there is no room for its state.
        """
        value = 0.0
        turned = False
        for watch in self._watches:
            key = Member(watch.id, process.pid, process.start)
            flips, value = self._plant_one(watch, key, process, config)
            turned = turned or flips > 0
        if not turned:
            self._listener.reading(process, value)

    def _plant_one(self, watch: Watch, key: Member, process: Process, config: int) -> tuple[int, float]:
        usage, unit = self._want.resource.usage, self._scale.unit
        limit = self._limit(watch, process)
        flips = self._engine.state(key).flips
        value = usage(process)
        for _ in range(_SEED_ATTEMPTS):
            error, now = self._engine.seed(config, key, int(value / unit), flips, limit)
            if error is SeedError.NO_ROOM:
                raise Refused("too many members in alarm")
            if error is SeedError.NO_WATCH:
                raise Gone(f"process {process.pid} has ended")
            before, flips = value, now
            try:
                value = usage(process)
            except Gone:
                # Its end may have come before its state was there: then nobody else removes it.
                self._engine.drop_state(key)
                raise
            if error is SeedError.DONE and value == before:
                break
        return flips, value

    def _limit(self, watch: Watch, process: Process) -> int:
        if not watch.flags & (Flag.ENTER_SHARE | Flag.LEAVE_SHARE):
            return 0
        soft = self._want.resource.limit(process).soft
        return 0 if math.isinf(soft) else int(soft)


class _One(_Armed):
    """One process."""

    def __init__(self, engine: Engine, want: Want, listener: Listener, scale: _Scale, process: Process) -> None:
        super().__init__(engine, want, listener, scale)
        self._process = process
        self._begin()

    def _start(self) -> None:
        level, clear = self._want.levels(self._process)
        self._watches = watches_for(self._want, self._scale, level, clear)
        self._engine.add(self, self._process.pid, self._process.start, self._watches)
        self.look_again(self._process)

    def look_again(self, process: Process) -> None:
        """See `LooksAgain`."""
        self._plant(process, process.pid)

    def _remove(self) -> None:
        self._engine.remove(self._process.pid, self._process.start, self._watches)

    def _target_of(self, tgid: int, start: int) -> Target:
        del tgid, start
        return self._want.target


class _Each(_Armed):
    """Every process, present and future."""

    def __init__(self, engine: Engine, want: Want, listener: Listener, scale: _Scale) -> None:
        super().__init__(engine, want, listener, scale)
        self._begin()

    def _start(self) -> None:
        level, clear = _common_levels(self._want)
        self._watches = watches_for(self._want, self._scale, level, clear)
        self._engine.add(self, EVERY, 0, self._watches)
        for process in members.members(self._want.target):
            if isinstance(process, Process):
                self.look_again(process)

    def look_again(self, process: Process) -> None:
        """See `LooksAgain`."""
        try:
            self._plant(process, EVERY)
        except Gone:
            self._listener.gone(process)

    def _remove(self) -> None:
        self._engine.remove(EVERY, 0, self._watches)

    def _target_of(self, tgid: int, start: int) -> Target:
        return Process(tgid, start)


class _Sum(_Armed):
    """All processes together.

    No event tells the sum; each tells the new value of one process, and the kernel adds the difference. So it
    needs a first value of every process: the kernel's own where it had an event since, else ours.
    """

    def __init__(self, engine: Engine, want: Want, listener: Listener, scale: _Scale) -> None:
        super().__init__(engine, want, listener, scale)
        self._begin()

    def _start(self) -> None:
        level, clear = _common_levels(self._want)
        watches = watches_for(self._want, self._scale, level, clear)
        for watch in watches:
            watch.flags |= Flag.SUM
        self._engine.count_in(self._scale.kind, self._first_values)
        self._watches = watches
        self._engine.add(self, EVERY, 0, self._watches)
        self._plant_sum()

    def _first_values(self) -> Iterator[tuple[int, int, int]]:
        for member, value in members.usages(self._want.resource, Processes()):
            if isinstance(member, Process):
                yield member.pid, member.start, int(value / self._scale.unit)

    def _plant_sum(self) -> None:
        turned = False
        for watch in self._watches:
            key, flips = Member(watch.id, 0, 0), 0
            for _ in range(_SEED_ATTEMPTS):
                value = self._engine.total(self._scale.kind)
                _error, flips = self._engine.seed(EVERY, key, value, self._engine.state(key).flips, 0)
                if self._engine.total(self._scale.kind) == value:
                    break
            turned = turned or flips > 0
        if not turned:
            self._listener.reading(self._want.target, float(value * self._scale.unit))

    def _remove(self) -> None:
        self._engine.remove(EVERY, 0, self._watches)
        self._engine.count_out(self._scale.kind)

    def _target_of(self, tgid: int, start: int) -> Target:
        del tgid, start
        return self._want.target


def _common_levels(want: Want) -> tuple[float, float]:
    """(level, clear) for processes in general; those in shares of a limit are looked up by the kernel."""
    amounts = (want.condition.amount, want.condition.clear)
    if want.resource.rlimit is not None or not any(_is_share(amount) for amount in amounts):
        return want.condition.levels(math.inf if not any(map(_is_share, amounts)) else 100.0)
    # Of something that is the same for all: ask of ourselves.
    return want.levels(procfs.identify(os.getpid()))


def _key(record: Record) -> tuple[int, int, int]:
    return record.watch, record.tgid, record.start


# Sources


class _BpfSource:
    """What the three have in common.

    Args:
        reactor: calls when something crossed.
        directory: where the objects are; tests pass their own.
    """

    name: ClassVar[str] = "bpf"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[str] = ""
    _object: ClassVar[str]
    _ways: ClassVar[tuple[Hooks, ...]]
    _scales: ClassVar[dict[str, _Scale]]

    def __init__(self, reactor: Reactor, directory: Path | None = None) -> None:
        self.engine = Engine(reactor, self._object, self._ways, directory or Path(__file__).parent)

    def missing(self) -> str | None:
        """Tried once, which takes up to a second; afterwards `name` and `cost` are those of the hook in force."""
        missing = self.engine.missing()
        if missing is None and self.engine.hooks is not None:
            type(self).name = self.engine.hooks.name
            type(self).cost = self.engine.cost
        return missing

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """One process; every process; all processes together where they can be added up."""
        if resource.name not in self._scales:
            return False
        if isinstance(target, Process):
            return not each
        return isinstance(target, Processes) and (each or self._adds_up(resource))

    def arm(self, want: Want, listener: Listener) -> _Armed:
        """Attach the hooks, unless they are, and judge the present.

        Raises:
            Refused: the hooks do not attach any more, or there are 16 watches on the target.
            Gone: the target has ended.
            LimitsError: as `want.levels`.
        """
        scale = self._scales[want.resource.name]
        if isinstance(want.target, Process):
            return _One(self.engine, want, listener, scale, want.target)
        return (_Each if want.each else _Sum)(self.engine, want, listener, scale)

    def close(self) -> None:
        """Unload the programs; everything must be disarmed."""
        self.engine.close()

    def _adds_up(self, resource: Resource) -> bool:
        return resource.summable


def _one(*names: str) -> frozenset[str]:
    return frozenset(names)


_LIFE = (_one("sched_process_fork"), _one("sched_process_exec"), _one("sched_process_exit"))
"""Descriptors and threads come and go with these too."""


def _table_hooks(before: str, after: str) -> tuple[frozenset[str], ...]:
    """Programs on the functions of the descriptor table, `before` they run and `after`.

    Their names differ between kernels.
    """
    return (
        _one(f"{before}fd_install"),
        _one(f"{after}close_fd", f"{after}__close_fd"),
        _one(f"{after}ksys_dup3", f"{after}__x64_sys_dup3", f"{after}__arm64_sys_dup3"),
        _one(f"{after}__close_range", f"{after}__x64_sys_close_range", f"{after}__arm64_sys_close_range"),
        *_LIFE,
    )


def _more_table_hooks(after: str) -> frozenset[str]:
    """Functions that some kernels have, and that see what the others do not."""
    names = ("put_unused_fd", "replace_fd", "__x64_sys_dup2", "file_close_fd", "file_close_fd_locked")
    return frozenset(after + name for name in (*names, "close_fd_get_file", "__close_fd_get_file"))


def _dup_and_close() -> None:
    os.close(os.dup(0))


class BpfFds(_BpfSource):
    """Descriptors: the functions of the descriptor table, else the exit of every system call."""

    _object = "fds"
    _scales: ClassVar[dict[str, _Scale]] = {"fds": _Scale(Kind.FDS, 1)}
    _ways = (
        Hooks(
            "fd_install",
            "descriptor calls of all processes",
            _table_hooks("fentry_", "fexit_"),
            _more_table_hooks("fexit_"),
            probe=_dup_and_close,
        ),
        Hooks(
            "fd_install",
            "descriptor calls of all processes",
            _table_hooks("table@", "table@%"),
            _more_table_hooks("table@%"),
            probe=_dup_and_close,
        ),
        Hooks(
            "sys_exit",
            "every system call of all processes",
            (_one("sys_exit"), *_LIFE),
            _one("io_uring_complete"),
            probe=os.getppid,
        ),
    )


def _touch_pages() -> None:
    with mmap.mmap(-1, 16 * mmap.PAGESIZE) as memory:
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1


def _possible_processors() -> int:
    """One more than the highest number a processor can have."""
    text = Path("/sys/devices/system/cpu/possible").read_text()
    return int(re.split("[-,]", text.strip())[-1]) + 1


def _find_processors(loaded: Object, control: Control) -> None:
    """Tell the programs where each processor keeps its part of a counter, and how much that can be."""
    count = _possible_processors()
    argument = Processors(count=count)
    loaded.run("find_processors", argument)
    if argument.found < count:
        raise BpfError(0, f"only {argument.found} of {count} processors found")
    control.processors = count
    # lib/percpu_counter.c: a processor keeps less than a batch for itself.
    control.margin = count * max(32, 2 * count)


class BpfRss(_BpfSource):
    """Resident, shared and swapped memory. Sums are declined: they would count exactly at each page fault."""

    _object = "rss"
    _scales: ClassVar[dict[str, _Scale]] = {
        "memory": _Scale(Kind.MEMORY, mmap.PAGESIZE),
        "shared": _Scale(Kind.SHARED, mmap.PAGESIZE),
        "swap": _Scale(Kind.SWAP, mmap.PAGESIZE),
    }
    _ways = (
        Hooks(
            "rss_stat",
            "page faults of all processes (per 16)",
            (_one("rss_stat"), _one("sched_process_exit")),
            probe=_touch_pages,
            prepare=_find_processors,
            run=_one("find_processors"),
        ),
    )

    def _adds_up(self, resource: Resource) -> bool:
        del resource
        return False


class Birth(NamedTuple):
    """A process was born, executes another program, or ended.

    Attributes:
        what: "fork", "exec" or "exit".
        process: which.
        witness: of the process itself.
        parent: its number; fork only.
        status: as wait(2) has it; exit only.
        memory, virtual: the peaks in bytes; exit only; 0 where the kernel does not tell.
    """

    what: str
    process: Process
    witness: Witness
    parent: int | None = None
    status: int | None = None
    memory: int = 0
    virtual: int = 0


class BpfTasks(_BpfSource):
    """Threads, and the lives of processes with their peaks."""

    _object = "tasks"
    _scales: ClassVar[dict[str, _Scale]] = {"threads": _Scale(Kind.THREADS, 1)}
    _ways = (
        Hooks(
            "sched_process",
            "fork, exec and exit of all processes",
            _LIFE,
            _one("fentry_taskstats_exit"),
        ),
        Hooks("sched_process", "fork, exec and exit of all processes", _LIFE),
    )

    def births(self, callback: Callable[[Birth], None]) -> Callable[[], None]:
        """Call back for each fork, exec and exit of a process; returns what ends that.

        Raises:
            Refused: it does not work here.
        """
        return self.engine.subscribe(lambda record: callback(_birth(record)))


def _birth(record: Record) -> Birth:
    process = Process(record.tgid, record.start)
    witness = _witness(record)
    kind = record.what
    if kind == What.FORK:
        return Birth("fork", process, witness, parent=record.value)
    if kind == What.EXEC:
        return Birth("exec", process, witness)
    page = mmap.PAGESIZE
    return Birth(
        "exit", process, witness, status=record.watch, memory=record.value * page, virtual=record.flips * page
    )


def sources(reactor: Reactor) -> tuple[BpfFds, BpfRss, BpfTasks]:
    """One of each."""
    return BpfFds(reactor), BpfRss(reactor), BpfTasks(reactor)
