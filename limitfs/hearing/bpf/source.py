"""Hearing from the kernel's own hooks: descriptors, memory, threads; exactly, and asleep until something crosses.

Thresholds, hysteresis and counters live in the kernel (limitfs.h, judge.bpf.h). A record comes only when a state
turned; the ring that brings it is no more than a wake-up, so when it overruns nothing is lost but details: the
alarms without a line are counted from the map and told by `missed`.
"""

import ctypes
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar, NamedTuple

from limitfs.errors import Gone, LimitsError
from limitfs.hearing.births import Birth, birth_lost
from limitfs.hearing.bpf.cost import Probe
from limitfs.hearing.bpf.engine import CGROUP_HOOKS, Engine, Hooks, key_of, own_member
from limitfs.hearing.bpf.layout import (
    DEPTH,
    EVERY,
    EVERY_CGROUP,
    GROUP,
    HIGHEST,
    PROCESS,
    SHARE,
    Control,
    Ending,
    Flag,
    Kind,
    Member,
    Processors,
    Record,
    State,
    Watch,
    What,
    alarms,
)
from limitfs.hearing.bpf.libbpf import BpfError, Object
from limitfs.hearing.eachpartition import EachArmed, EachPartition
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Armed, Guarantee, Listener, Refused, Want, Witness
from limitfs.resources import cgroups, procfs
from limitfs.resources.model import (
    Group,
    Partition,
    Partitions,
    Process,
    Processes,
    Resource,
    Target,
)
from limitfs.watching.condition import Amount, Condition, Op


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
    if want.resource.rlimit is None or not _about_processes(want):
        return
    watch.rlimit = want.resource.rlimit
    amount, clear = want.condition.amount, want.condition.clear or want.condition.amount
    if _is_share(amount):
        watch.flags |= Flag.ENTER_SHARE
        watch.enter = _billionths(amount)
    if _is_share(clear):
        watch.flags |= Flag.LEAVE_SHARE
        watch.leave = _billionths(clear)


def _about_processes(want: Want) -> bool:
    """Not about a total, which has no limit of a process."""
    return isinstance(want.target, Process) or (want.each and isinstance(want.target, Processes))


def _is_share(amount: Amount | None) -> bool:
    return amount is not None and amount.percent


def _billionths(amount: Amount | None) -> int:
    return 0 if amount is None else round(amount.number / 100 * SHARE)


# Armed


class _Place(NamedTuple):
    """Where a condition is held.

    Attributes:
        scope: whose processes.
        start: of a single process.
        group: of a group.
        total: about their sum.
    """

    scope: int
    start: int = 0
    group: Group | None = None
    total: bool = False

    def programs(self) -> frozenset[str]:
        """What is needed beyond what is attached for every condition."""
        by_cgroup = self.total or (self.scope < GROUP and self.scope != EVERY)
        return CGROUP_HOOKS if by_cgroup else frozenset()


class _Armed:
    """Watches in one scope, and what was told of each member."""

    guarantee = Guarantee.EXACT
    period: float | None = None

    def __init__(self, engine: Engine, want: Want, listener: Listener, scale: _Scale, place: _Place) -> None:
        assert engine.hooks is not None
        self.source = engine.hooks.name
        self._engine = engine
        self._want = want
        self._listener = listener
        self._scale = scale
        self._place = place
        self._watches: list[Watch] = []
        self._told: dict[tuple[int, int, int], int] = {}
        self._partitions: dict[int, Partition] = {}
        self._skipped = 0
        self._undo: list[Callable[[], None]] = []
        self._begin()

    def disarm(self) -> None:
        """Forget the watches; detach if these were the last."""
        while self._undo:
            self._undo.pop()()
        self._told.clear()

    def _begin(self) -> None:
        """Attach, watch, and only then read: what happens meanwhile is heard."""
        more = self._place.programs()
        self._engine.use(more)
        self._undo.append(lambda: self._engine.release(more))
        try:
            self._start()
        except BaseException:
            self.disarm()
            raise

    def _start(self) -> None:
        level, clear = self._levels()
        watches = watches_for(self._want, self._scale, level, clear)
        place, engine = self._place, self._engine
        if place.group is not None:
            engine.enter(place.group, self._crowded)
            self._undo.append(lambda group=place.group: engine.exit(group, self._crowded))  # type: ignore[misc]
        if place.total:
            self._begin_sum(watches)
        engine.add(self, place.scope, place.start, watches)
        self._watches = watches
        self._undo.append(lambda: engine.remove(place.scope, place.start, watches))
        if place.total:
            for scope in self._totals():
                engine.plant(place.scope, scope, watches[0].id)
        else:
            self._look(watches[0].id)
        self._tell_present()

    def _levels(self) -> tuple[float, float]:
        if self._want.each:
            return _common_levels(self._want)
        return self._want.levels(self._want.target)

    def _begin_sum(self, watches: list[Watch]) -> None:
        """Have the kernel count whoever has no event."""
        for watch in watches:
            watch.flags |= Flag.SUM
        begins = self._engine.count_in(self._scale.kind)
        self._undo.append(lambda: self._engine.count_out(self._scale.kind))
        if begins or self._place.group is not None:
            self._engine.look()

    def _look(self, plant: int | None = None) -> None:
        """Have the present judged. Raises Gone."""
        process = self._want.target if isinstance(self._want.target, Process) else None
        args = () if plant is None else (plant,)
        if not self._engine.look(process, *args) and process is not None:
            raise Gone(f"process {process.pid} has ended")

    def _totals(self) -> Iterable[int]:
        """The scopes whose totals are judged."""
        if self._place.scope != EVERY_CGROUP:
            return (self._place.scope,)
        self._find_partitions()
        return self._partitions

    def _find_partitions(self) -> None:
        found = ((cgroups.unified_id(partition), partition) for partition in cgroups.partitions())
        self._partitions = {number: partition for number, partition in found if number is not None}

    def _tell_present(self) -> None:
        """What was judged without a record; of a single value also that it is calm."""
        told = False
        for key, state in self._own_states():
            member = self._member_of(key.tgid, key.start)
            if member is None:
                continue
            turned = self._follow(member, key, state.flips)
            if turned or self._want.condition.op is Op.CHANGE:
                told = True
                self._tell(member, state.value, state.flips)
        if not told and not self._want.each:
            self._listener.reading(self._want.target, self._value())

    def _own_states(self) -> Iterable[tuple[Member, State]]:
        if self._want.each:
            return self._engine.states({watch.id for watch in self._watches})
        place = self._place
        keys = (own_member(watch, place.scope, place.start) for watch in self._watches)
        return [(key, state) for key in keys if (state := self._engine.state(key)).told]

    def _value(self) -> float:
        if not self._place.total:
            return self._want.resource.usage(self._want.target)  # type: ignore[arg-type]
        return float(self._engine.total(self._scale.kind, self._place.scope) * self._scale.unit)

    def look_again(self, process: Process) -> None:
        """See `LooksAgain`."""
        if not self._engine.look(process):
            raise Gone(f"process {process.pid} has ended")

    def _member_of(self, tgid: int, start: int) -> Target | None:
        """Whom a record of the kernel is about; None: a partition that came and went before we looked."""
        if not self._want.each:
            return self._want.target
        if self._place.scope != EVERY_CGROUP:
            return Process(tgid, start)
        if start not in self._partitions:
            self._find_partitions()
        return self._partitions.get(start)

    # From the kernel

    def crossed(self, record: Record) -> None:
        """A state turned."""
        member = self._member_of(record.tgid, record.start)
        if not self._follow(member, record, record.flips):
            return
        if member is None:
            self._count_nameless(record.flips)
            return
        self._tell(member, record.value, record.flips, record)

    def ended(self, record: Record) -> None:
        """A member ended, or left."""
        member = self._member_of(record.tgid, record.start)
        self._follow(member, record, record.flips, told=False)
        self._end(member, record, record.value)

    def overran(self, states: list[tuple[Member, State]]) -> None:
        """Tell what the ring could not: from the states, which are always true."""
        readings, ended = [], []
        for key, state in states:
            if not state.gone and state.flips <= self._told.get(key_of(key), 0):
                continue
            untold = state.gone == Ending.UNTOLD
            if not untold and (state := self._engine.steady(key)).gone:
                continue  # that it has ended is still to be heard
            member = self._member_of(key.tgid, key.start)
            if self._follow(member, key, state.flips):
                self._skipped += 1  # the last one too came without details
                readings.append((member, state.value, state.flips))
            if untold:
                self._skipped += 1
                ended.append((member, key, state.peak))
        lost, self._skipped = self._skipped, 0
        if lost:
            self._listener.lost(lost)
        for member, value, flips in readings:
            if member is None:
                self._count_nameless(flips)
            else:
                self._tell(member, value, flips)
        for member, key, peak in ended:
            self._engine.drop_state(key)
            self._end(member, key, peak)

    def lacks(self, count: int) -> None:
        """The kernel had no room for so many, perhaps of ours."""
        self._listener.lost(count)

    def _crowded(self) -> None:
        """The kernel does not know of a member of our group."""
        self._listener.lost(1)
        self._listener.lapsed()

    def _count_nameless(self, flips: int) -> None:
        if flips & 1 and self._counts_alarms():
            self._listener.missed(self._want.target, 1)

    def _tell(self, member: Target, value: int, flips: int, record: Record | None = None) -> None:
        try:
            if record is not None and record.tid:
                self._listener.witnessed(member, _witness(record))
            else:
                self._want.levels(member)  # a listener without a witness does not say that they are no more
            self._listener.reading(member, float(value * self._scale.unit))
        except LimitsError:
            # It ended before its limit could be read for the line: the alarm counts all the same.
            if flips & 1 and self._counts_alarms():
                self._listener.missed(member, 1)

    def _end(self, member: Target | None, key: Record | Member, peak: int) -> None:
        """Of several watches for one condition, the first tells."""
        self._told.pop(key_of(key), None)
        if self._place.scope & PROCESS and key.tgid:
            self._engine.forget(self._place.scope, key.start)
        if member is not None and self._watches and key.watch == self._watches[0].id:
            # Totals keep no peak, and where less is worse it is of no interest.
            known = key.tgid and self._want.condition.upward
            self._listener.gone(member, float(peak * self._scale.unit) if known else None)
        if isinstance(member, Partition):
            self._partitions.pop(key.start, None)

    def _follow(self, member: Target | None, of: Record | Member, flips: int, told: bool = True) -> bool:
        """Note where a state is now, and count the alarms that are not told; False: that is no news.

        Args:
            member: whose state; None: nameless.
            of: the same, as the kernel has it.
            flips: the turns of the state so far.
            told: the last of them is told by a reading.
        """
        key = key_of(of)
        before = self._told.get(key, 0)
        if flips <= before:
            return False
        self._told[key] = flips
        self._skipped += flips - before - told
        heard = 1 if told and flips & 1 and not before & 1 else 0
        missed = alarms(flips) - alarms(before) - heard
        if missed and self._counts_alarms():
            self._listener.missed(member or self._want.target, missed)
        return True

    def _counts_alarms(self) -> bool:
        """With `for`, whether it was an alarm is decided elsewhere; with `change` there are none."""
        return self._want.condition.hold is None and self._want.condition.op is not Op.CHANGE


class _EveryPartition:
    """Each partition: by the hooks, or in another way where these cannot tell who is in it."""

    def __init__(self, hooked: _Armed, rest: EachArmed) -> None:
        self._hooked = hooked
        self._rest = rest

    @property
    def source(self) -> str:
        """The hooks', and of the rest, if there is one."""
        return f"{self._hooked.source},{self._rest.source}" if self._rest else self._hooked.source

    @property
    def guarantee(self) -> Guarantee:
        """Of the partition that is heard least surely."""
        return self._rest.guarantee if self._rest else self._hooked.guarantee

    @property
    def period(self) -> float | None:
        """The shortest of the rest."""
        return self._rest.period

    def disarm(self) -> None:
        """Disarm both."""
        self._rest.disarm()
        self._hooked.disarm()


def _is_told(partition: Partition) -> bool:
    """Whether the hooks can tell who is in a partition."""
    return cgroups.unified_id(partition) is not None and partition.path.count("/") < DEPTH


def _common_levels(want: Want) -> tuple[float, float]:
    """(level, clear) for processes in general; those in shares of a limit are looked up by the kernel."""
    amounts = (want.condition.amount, want.condition.clear)
    if want.resource.rlimit is not None or not any(_is_share(amount) for amount in amounts):
        return want.condition.levels(math.inf if not any(map(_is_share, amounts)) else 100.0)
    # Of something that is the same for all: ask of ourselves.
    return want.levels(procfs.identify(os.getpid()))


# Sources


class _BpfSource:
    """What the three have in common.

    Args:
        reactor: calls when something crossed.
        directory: where the objects are; tests pass their own.
        each: hears each partition of which the hooks cannot tell who is in it; without it, nobody does.
    """

    name: ClassVar[str] = "bpf"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[str] = ""
    _object: ClassVar[str]
    _ways: ClassVar[tuple[Hooks, ...]]
    _scales: ClassVar[dict[str, _Scale]]
    _totals: ClassVar[frozenset[str]] = frozenset()
    """Of which the total of each partition is heard: what the kernel keeps for none of them."""

    def __init__(self, reactor: Reactor, directory: Path | None = None, each: EachPartition | None = None) -> None:
        self._each = each
        self.engine = Engine(reactor, self._object, self._ways, directory or Path(__file__).parent)

    def missing(self) -> str | None:
        """Tried once, which takes up to a second; afterwards `name` and `cost` are those of the hook in force."""
        missing = self.engine.missing()
        if missing is None and self.engine.hooks is not None:
            type(self).name = self.engine.hooks.name
            type(self).cost = self.engine.cost
        return missing

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """One process; processes, each or all together where they can be added up; the total of each partition."""
        if resource.name not in self._scales:
            return False
        match target:
            case Process():
                return not each
            case Processes():
                return each or self._adds_up(resource)
            case Partitions():
                return each and resource.name in self._totals
        return False

    def arm(self, want: Want, listener: Listener) -> Armed:
        """Attach the hooks, unless they are, and judge the present.

        Raises:
            Refused: the hooks do not attach any more, there are 16 watches on the target, the kernel cannot tell
                who is in the partition, or a process of the group is in 8 groups already.
            Gone: the target has ended.
            LimitsError: as `want.levels`.
        """
        if self.missing() is not None:
            raise Refused(f"{self.missing()}")
        hooked = _Armed(self.engine, want, listener, self._scales[want.resource.name], self._place(want))
        if self._each is None or not isinstance(want.target, Partitions):
            return hooked
        try:
            return _EveryPartition(hooked, self._each.arm_rest(_is_told, want, listener))
        except BaseException:
            hooked.disarm()
            raise

    def _place(self, want: Want) -> _Place:
        match want.target:
            case Process(pid=pid, start=start):
                return _Place(PROCESS | pid, start)
            case Partitions():
                self._need_cgroups()
                if any(map(_is_share, (want.condition.amount, want.condition.clear))):
                    raise Refused("each partition has a limit of its own")
                return _Place(EVERY_CGROUP, total=True)
            case Processes(of=Partition() as partition):
                return _Place(self._cgroup(partition), total=not want.each)
            case Processes(of=Group() as group):
                return _Place(GROUP | group.number, group=group, total=not want.each)
        return _Place(EVERY, total=not want.each)

    def _cgroup(self, partition: Partition) -> int:
        """The scope of a partition."""
        self._need_cgroups()
        number = cgroups.unified_id(partition)
        if number is None:
            raise Refused("not in the unified hierarchy, by which the kernel's hooks tell who is where")
        if partition.path.count("/") >= DEPTH:
            raise Refused(f"{DEPTH} levels deep, or deeper")
        return number

    def _need_cgroups(self) -> None:
        if not self.engine.follows_cgroups:
            raise Refused("the kernel does not tell who moves between cgroups")

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
    names = ["put_unused_fd", "replace_fd", "__x64_sys_dup2", "file_close_fd", "io_close"]
    names += ["close_fd_get_file", "__close_fd_get_file"]
    names += ["__ia32_sys_dup2", "__ia32_sys_dup3", "__ia32_sys_close_range"]
    return frozenset(after + name for name in names)


def _dup_and_close() -> None:
    os.close(os.dup(0))


class BpfFds(_BpfSource):
    """Descriptors: the functions of the descriptor table, else the exit of every system call."""

    _object = "fds"
    _scales: ClassVar[dict[str, _Scale]] = {"fds": _Scale(Kind.FDS, 1)}
    _totals = frozenset({"fds"})
    _ways = (
        Hooks(
            "fd_install",
            "descriptor calls of all processes",
            Probe(_dup_and_close, Kind.FDS),
            _table_hooks("fentry_", "fexit_"),
            _more_table_hooks("fexit_"),
        ),
        Hooks(
            "fd_install",
            "descriptor calls of all processes",
            Probe(_dup_and_close, Kind.FDS),
            _table_hooks("table@", "table@%"),
            _more_table_hooks("table@%"),
        ),
        Hooks(
            "sys_exit",
            "every system call of all processes",
            Probe(os.getppid, Kind.FDS),
            (_one("sys_exit"), *_LIFE),
            _one("io_uring_complete", "io_uring_submit_req", "io_uring_submit_sqe"),
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
            Probe(_touch_pages, Kind.MEMORY),
            (_one("rss_stat"), _one("sched_process_fork"), _one("sched_process_exit")),
            prepare=_find_processors,
            run=_one("find_processors"),
        ),
    )

    def _adds_up(self, resource: Resource) -> bool:
        del resource
        return False


_BIRTHS = frozenset({What.FORK, What.EXEC, What.EXIT})

_MOVES = frozenset({"record_move", "record_transfer"})
"""All ways from one cgroup to another."""

_libc = ctypes.CDLL(None)


def _start_and_end() -> None:
    """A thread, which costs as much less than a process as what is measured is seen better."""
    thread = ctypes.c_ulong()
    if _libc.pthread_create(ctypes.byref(thread), None, _libc.getpid, None) == 0:
        _libc.pthread_join(thread, None)


class BpfTasks(_BpfSource):
    """Threads, and the lives of processes with their peaks."""

    _object = "tasks"
    _scales: ClassVar[dict[str, _Scale]] = {
        "threads": _Scale(Kind.THREADS, 1),
        "processes": _Scale(Kind.PROCESSES, 1),
    }
    _totals = frozenset({"processes"})
    _ways = (
        Hooks(
            "sched_process",
            "fork, exec and exit of all processes",
            Probe(_start_and_end, Kind.THREADS),
            _LIFE,
            _one("fentry_taskstats_exit"),
            on_request=CGROUP_HOOKS | _MOVES,
        ),
        Hooks(
            "sched_process",
            "fork, exec and exit of all processes",
            Probe(_start_and_end, Kind.THREADS),
            _LIFE,
            on_request=CGROUP_HOOKS | _MOVES,
        ),
    )

    def births(self, callback: Callable[[Birth], None]) -> Callable[[], None]:
        """Call back for each fork, exec and exit of a process; returns what ends that.

        Raises:
            Refused: it does not work here.
        """

        def hear(record: Record) -> None:
            callback(_birth(record))

        return self.engine.subscribe(_BIRTHS, hear, lambda: callback(birth_lost()))

    def moves(self, moved: Callable[[Process], None], lost: Callable[[], None]) -> Callable[[], None]:
        """See `Moves` of limitfs/hearing/membership.py.

        Raises:
            Refused: it does not work here.
        """
        if not all(map(self.engine.has, _MOVES)):
            raise Refused(self.engine.missing() or "the kernel does not tell who moves between cgroups")

        def hear(record: Record) -> None:
            moved(Process(record.tgid, record.start))

        return self.engine.subscribe(frozenset({What.MOVE}), hear, lost, _MOVES)


def _birth(record: Record) -> Birth:
    exit_ = record.what == What.EXIT
    return Birth(
        What(record.what).name.lower(),
        record.time,
        record.tgid,
        record.parent,
        record.comm.decode("utf-8", "surrogateescape"),
        record.uid,
        record.watch if exit_ else None,
        record.value * mmap.PAGESIZE if exit_ else None,
    )
