"""One object file at work: which hooks it found, its watches, and the records that come of them.

An engine is loaded when it is first tried, and stays so; its hooks are attached only while somebody is armed.
"""

import ctypes
import itertools
import logging
import os
import re
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from limitfs.hearing.bpf import libbpf
from limitfs.hearing.bpf.cost import PAIRS, Probe, in_words
from limitfs.hearing.bpf.layout import (
    EVERY,
    EVERY_CGROUP,
    GROUP,
    HIGHEST,
    MARKS,
    PROCESS,
    WATCHES,
    Config,
    Control,
    Flag,
    Leaving,
    Member,
    Membership,
    Planting,
    Record,
    Share,
    State,
    Total,
    Watch,
    What,
    Wide,
)
from limitfs.hearing.bpf.libbpf import BPF_EXIST, BPF_NOEXIST, BpfError
from limitfs.hearing.reactor import Reactor, Timer
from limitfs.hearing.source import Refused
from limitfs.resources import procfs
from limitfs.resources.model import Group, Process

log = logging.getLogger(__name__)

_OBJECTS = Path(__file__).parent
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO of linux/proc_ns.h."""

GRACE = 1.0
"""Seconds for which hooks stay attached that nobody needs any more: arming again costs nothing meanwhile."""

TURN = 0.002
"""Seconds for which the event loop is kept at once by what the kernel says."""

RECORDS = 8
"""As many are delivered without a look at the clock, or states told."""

STATES_AT_ONCE = 512
"""Read by one system call."""

NO_WATCH = 2**32 - 1
"""Higher than the number of any watch."""

CGROUP_HOOKS = frozenset({"cgroup_attach_task", "cgroup_rmdir", "cgroup_mkdir"})
"""Without them the cgroups of processes cannot be followed. Needed by what is kept by cgroup: sums, all of them,
as each share tells its cgroup, and the members of a partition."""

_LIVES = frozenset({What.FORK, What.EXEC, What.EXIT, What.MOVE})
"""What is told of every process to who wants it."""

_CALLED = frozenset({"look_at", "plant", "leave"})
"""Programs that are run by us."""

_CULPRIT = re.compile(r"prog '(\w+)': (?:BPF program load failed|failed to load)")


@dataclass(frozen=True)
class Hooks:
    """One way to hear what an object hears.

    Attributes:
        name: shown as `source`.
        cost: whom it costs what, in words.
        probe: something that it slows down, to measure by how much.
        needed: sets of programs; of each set at least one must load and attach.
        optional: programs that are taken along where they load and attach.
        on_request: the same, but attached only for who asks `Engine.use` for them.
        prepare: called once when all is loaded; raises BpfError.
        run: programs that `prepare` runs.
    """

    name: str
    cost: str
    probe: Probe
    needed: tuple[frozenset[str], ...]
    optional: frozenset[str] = frozenset()
    on_request: frozenset[str] = CGROUP_HOOKS
    prepare: Callable[[libbpf.Object, Control], None] | None = None
    run: frozenset[str] = frozenset()

    def suffice(self, programs: set[str]) -> bool:
        """Whether these programs are enough."""
        return all(some & programs for some in self.needed)


class Client(Protocol):
    """Whose watches an engine keeps."""

    def crossed(self, record: Record) -> None:
        """The state of a member turned."""

    def ended(self, record: Record) -> None:
        """A member has ended."""

    def overran(self, states: list[tuple[Member, State]]) -> None:
        """Records were lost; these are some of its states since, or none."""

    def lacks(self, count: int) -> None:
        """There was no room for so many states or shares, perhaps its own."""


@dataclass(frozen=True, eq=False)
class _Subscriber:
    """Who wants to know of the lives of all processes: see `Engine.subscribe`."""

    wanted: frozenset[What]
    callback: Callable[[Record], None]
    overran: Callable[[], None]


@dataclass
class _Followed:
    """A group whose members the kernel is told.

    Attributes:
        first: its members are told before those of others, which give way.
        users: who needs that; called where the kernel cannot be told of a member.
        cancel: ends it; None while it begins.
        full: there is a member of which the kernel cannot be told; nobody may begin to need it.
        present: those who were there at first, while nobody has looked at them.
    """

    first: bool
    users: list[Callable[[], None]]
    cancel: Callable[[], None] | None = None
    full: bool = False
    present: list[Process] = field(default_factory=list)


@dataclass(frozen=True)
class _Leaving:
    """Links that a thread detaches, one after the other."""

    links: libbpf.Links
    thread: threading.Thread


class Engine:
    """The programs of one object.

    Args:
        reactor: calls when the ring holds something.
        name: of the object: `fds`, `rss`, `tasks`.
        ways: best first.
        directory: where the objects are.
    """

    def __init__(self, reactor: Reactor, name: str, ways: tuple[Hooks, ...], directory: Path = _OBJECTS) -> None:
        self.hooks: Hooks | None = None
        self.cost = ""
        self._subscribers: list[_Subscriber] = []
        self._sums: Counter[int] = Counter()
        self._ledgers = itertools.count(1)
        self._groups: dict[int, _Followed] = {}
        self._crowded: dict[tuple[int, Process], None] = {}
        self._reactor = reactor
        self._path = directory / f"{name}.bpf.o"
        self._ways = ways
        self._missing: str | None = None
        self._tried = False
        self._object: libbpf.Object | None = None
        self._control: Control | None = None
        self._programs: set[str] = set()
        self._working: frozenset[str] = frozenset()
        self._links = libbpf.Links()
        self._leaving: list[_Leaving] = []
        self._grace: Timer | None = None
        self._users = 0
        self._requests: Counter[str] = Counter()
        self._ids = itertools.count(1)
        self._clients: dict[int, Client] = {}
        self._configs: dict[int, tuple[int, list[Watch]]] = {}
        self._marked: Counter[int] = Counter()
        # How many scopes have the hooks look for what: thousands may be watched, and each is counted once.
        self._breadths: Counter[Wide] = Counter()
        self._dropped = 0
        self._overrun: Iterator[None] | None = None
        self._ended: set[tuple[int, int, int]] = set()

    # What works here

    def missing(self) -> str | None:
        """None where one of the ways loads and attaches; else what is missing. Tried once."""
        if not self._tried:
            self._tried = True
            self._missing = self._absent() or self._try_ways()
        return self._missing

    def _absent(self) -> str | None:
        if not self._path.exists():
            return f"{self._path.name} is not here: build with clang and libbpf-dev installed"
        if os.readlink("/proc/self/ns/pid") != _INITIAL_PID_NAMESPACE:
            return "not in the initial PID namespace, whose numbers the kernel's hooks tell"
        try:
            libbpf.shared_library()
        except BpfError as error:
            return str(error.strerror)
        if not os.path.exists("/sys/kernel/btf/vmlinux"):
            return "no /sys/kernel/btf/vmlinux: the kernel needs CONFIG_DEBUG_INFO_BTF"
        return None

    def _try_ways(self) -> str | None:
        reasons = []
        for hooks in self._ways:
            try:
                self._try(hooks)
            except BpfError as error:
                self._unload()
                reasons.append(f"{hooks.name}: {error.strerror}")
                if error.errno in (1, 13) and not _is_capable():
                    reasons.append("needs CAP_BPF and CAP_PERFMON")
                continue
            self.hooks = hooks
            return None
        return "; ".join(reasons)

    def _try(self, hooks: Hooks) -> None:
        """Load and attach; what is refused is left out while the rest suffices."""
        called = {*_CALLED, *hooks.run}
        programs = called.union(hooks.on_request, hooks.optional, *hooks.needed)
        while True:
            self._object = libbpf.Object(self._path)
            sections = self._object.sections()
            programs = {name for name in programs if _is_there(sections, name)}
            if not hooks.suffice(programs):
                raise BpfError(0, "the kernel has no such functions")
            try:
                self._object.load({name.partition("@")[0] for name in programs})
                break
            except BpfError as error:
                self._unload()
                # Refused as a kind: the others of it would be as well.
                culprit = None if error.errno == 1 else _culprit()
                if culprit is None or culprit in called or not hooks.suffice(programs - {culprit}):
                    raise
                programs.discard(culprit)
        self._programs = programs - called
        self._control = self._object.variables(Control)
        if hooks.prepare is not None:
            hooks.prepare(self._object, self._control)
        self.cost = f"{hooks.cost}: {in_words(self._measure(hooks))}"
        self._attach(hooks, self._programs)
        self._working = frozenset(self._links)
        self._detach()

    def _measure(self, hooks: Hooks) -> list[float]:
        """By how many nanoseconds attaching makes the probe slower, of a process that is watched."""
        assert self._object is not None
        sections = self._object.sections()
        always = self._programs - hooks.on_request
        # What is slow to detach is attached once only, after all that is measured without.
        quick = all(libbpf.detaches_quickly(sections[name.partition("@")[0]]) for name in always)
        rounds, samples = (PAIRS, 1) if quick else (1, PAIRS)
        me = procfs.identify(os.getpid())
        scope = PROCESS | me.pid
        never = Watch(id=next(self._ids), kind=hooks.probe.kind, enter=HIGHEST, leave=HIGHEST - 1)
        differences: list[float] = []
        try:
            self._store(scope, me.start, [never])
            for _ in range(rounds):
                self._links.destroy()
                without = hooks.probe.samples(samples)
                self._attach(hooks, always)
                beside = hooks.probe.samples(samples)
                differences += (more - less for less, more in zip(without, beside, strict=True))
        except Refused as refusal:
            raise BpfError(0, str(refusal)) from refusal
        finally:
            self._store(scope, me.start, [])
        return differences

    # Attached while used

    def use(self, more: frozenset[str] = frozenset()) -> None:
        """Attach, if nobody has done so; `release` is its counterpart.

        Args:
            more: programs that are attached on request only, where they work here.

        Raises:
            Refused: it does not work any more.
        """
        if self.missing() is not None or self._object is None or self.hooks is None:
            raise Refused(self._missing or "closed")
        self._users += 1
        self._requests.update(more)
        try:
            self._attach(self.hooks, self._wanted())
            if self._users == 1:
                self._ring = libbpf.Ring(self._object.map_fd("records"), self._receive)
        except BpfError as error:
            self._users -= 1
            self._requests.subtract(more)
            self._detach()
            raise Refused(str(error)) from error
        if self._users == 1:
            self._pending: list[Record] = []
            self._dropped = self.control.dropped
            self.control.heard = self.control.full
            self._reactor.add_reader(self._ring.fd, self._drain)

    def release(self, more: frozenset[str] = frozenset()) -> None:
        """Detach after a while what nobody else uses; `more` as in `use`."""
        self._users -= 1
        self._requests.subtract(more)
        if self._users == 0:
            self._reactor.remove_reader(self._ring.fd)
            self._overrun = None
            self._ring.drain(sys.maxsize)  # or its records would be the next user's
            self._ring.close()
            self._pending.clear()
        if self._users == 0 or not all(self._requests[name] for name in more):
            self._sweep()
            self._end_grace()
            self._grace = self._reactor.call_at(self._reactor.now() + GRACE, self._detach)

    def _wanted(self) -> set[str]:
        """Which programs are needed now."""
        if not self._users or self.hooks is None:
            return set()
        asked = {name for name, users in self._requests.items() if users}
        return (self._programs - self.hooks.on_request) | asked & self._working

    def close(self) -> None:
        """Unload; nobody may use it any more."""
        self.wait_detached()
        self._unload()
        self._tried = False

    def _end_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _attach(self, hooks: Hooks, wanted: set[str]) -> None:
        """Attach what is not attached: within the time of grace, nothing. Raises BpfError."""
        if all(name in wanted for name in self._links):
            self._end_grace()
        for leaving in self._leaving:
            self._links.take_back(leaving.links, wanted)
        absent = sorted(name for name in wanted if name not in self._links)
        if absent:
            # A program cannot be attached again to the same function while it is being detached: one at most is.
            self._join()
        self._attach_now(absent)
        missed = [name for name in absent if name in hooks.on_request & self._working and name not in self._links]
        if missed or not hooks.suffice({name for name in self._programs if name in self._links}):
            self._detach()
            raise BpfError(0, "the kernel does not let the hooks be attached")

    def _attach_now(self, names: list[str]) -> None:
        assert self._object is not None
        for name in names:
            try:
                self._object.attach(name, self._links)
            except BpfError as error:
                log.debug("%s", error)

    def _detach(self) -> None:
        """Detach what nobody needs, in a thread: fexit takes up to half a second, in which others are served."""
        self._end_grace()
        links = libbpf.Links()
        wanted = self._wanted()
        links.take_back(self._links, {name for name in self._links if name not in wanted})
        if links:
            thread = threading.Thread(target=links.destroy, name="limitfs-detach", daemon=True)
            self._leaving = [one for one in self._leaving if one.thread.is_alive()]
            self._leaving.append(_Leaving(links, thread))
            thread.start()

    def wait_detached(self) -> None:
        """Until the hooks are gone that nobody needs, without grace."""
        if self._grace is not None:
            self._detach()
        self._join()

    def _join(self) -> None:
        leaving, self._leaving = self._leaving, []
        for one in leaving:
            one.thread.join()

    def _sweep(self) -> None:
        """What events that were under way have left behind, of what nobody uses any more."""
        assert self._object is not None
        keys: dict[str, Any] = {}
        if not self._users:
            keys |= {"states": Member, "memberships": Member}
        if not any(self._requests[name] for name in CGROUP_HOOKS):
            # Removed cgroups would stay there for good: nobody hears of that now.
            keys |= {"shares": Share, "totals": Total, "containers": ctypes.c_uint32}
        for name, key in keys.items():
            self._object.map(name).clear(key)

    def _unload(self) -> None:
        self._join()
        self._control = None
        if self._object is not None:
            self._object.close()
            self._object = None

    # Watches

    @property
    def control(self) -> Control:
        """The variables that the programs see at once."""
        assert self._control is not None
        return self._control

    @property
    def follows_cgroups(self) -> bool:
        """Whether it knows who is in which cgroup."""
        return self._working >= CGROUP_HOOKS

    def has(self, program: str) -> bool:
        """Whether this program works here."""
        return self.missing() is None and program in self._working

    def add(self, client: Client, scope: int, start: int, watches: list[Watch]) -> None:
        """Watch a scope; `start`: of a process, else 0.

        Raises:
            Refused: there are too many watches on it, or watched scopes.
        """
        start_now, present = self._configs.get(scope, (start, []))
        if start_now != start:
            present = []  # of a process that had this number before
        if len(present) + len(watches) > WATCHES:
            raise Refused(f"{WATCHES} watches already")
        for watch in watches:
            watch.id = next(self._ids)
        self._store(scope, start, present + watches)
        self._clients.update((watch.id, client) for watch in watches)

    def remove(self, scope: int, start: int, watches: list[Watch]) -> None:
        """Undo `add`; harmless where the process has ended meanwhile."""
        ids = {watch.id for watch in watches}
        for number in ids:
            self._clients.pop(number, None)
        start_now, present = self._configs.get(scope, (None, []))
        if start_now == start:
            self._store(scope, start, [watch for watch in present if watch.id not in ids])
        states = self._states()
        for watch in watches:
            keys = [own_member(watch, scope, start)] if _is_single(watch, scope) else states.keys(Member)
            for key in keys:
                if key.watch == watch.id:
                    states.delete(key)

    def forget(self, scope: int, start: int) -> None:
        """The process has ended: the kernel has dropped its watches by itself."""
        if self._configs.get(scope, (None, []))[0] == start:
            del self._configs[scope]
            self._mark(scope, -1)

    def _store(self, scope: int, start: int, watches: list[Watch]) -> None:
        assert self._object is not None
        configs = self._object.map("configs")
        _start, before = self._configs.get(scope, (None, []))
        if watches:
            if not before:
                self._mark(scope, 1)
            config = Config(start=start, count=len(watches))
            config.watches[: len(watches)] = watches
            try:
                configs.update(ctypes.c_uint64(scope), config)
            except BpfError as error:
                if not before:
                    self._mark(scope, -1)
                raise Refused(str(error)) from error
            self._configs[scope] = start, watches
        else:
            configs.delete(ctypes.c_uint64(scope))
            if before:
                del self._configs[scope]
                self._mark(scope, -1)
        self._breadths[_breadth(scope, before)] -= 1
        self._breadths[_breadth(scope, watches)] += 1
        self._set_wide()

    def _mark(self, scope: int, more: int) -> None:
        """Of a process: one more or one less is watched whose bit is this one."""
        if not PROCESS <= scope < EVERY_CGROUP:
            return
        slot = scope % MARKS
        self._marked[slot] += more
        word, bit = self.control.marks[slot // 32], 1 << slot % 32
        self.control.marks[slot // 32] = word | bit if self._marked[slot] else word & ~bit
        if not self._marked[slot]:
            del self._marked[slot]

    def _set_wide(self) -> None:
        """What the hooks look for beyond single processes."""
        wide = Wide(0)
        for breadth, scopes in self._breadths.items():
            if scopes:
                wide |= breadth
        if self._groups:
            wide |= Wide.GROUPS
        if any(self._sums.values()):
            wide |= Wide.SUMS
        self.control.wide = wide

    # Judging the present

    def look(self, process: Process | None = None, plant: int = NO_WATCH) -> int:
        """Have every process judged, or one, as if it had changed; how many are alive.

        Args:
            process: which; None: all.
            plant: watches from this number on turn their states without a record.

        Raises:
            Refused: the program does not run.
        """
        assert self._object is not None
        control = self.control
        control.pid, control.start = (process.pid, process.start) if process is not None else (0, 0)
        control.plant, control.seen, control.wanted = plant, 0, 1
        try:
            self._object.iterate("look_at", os.getpid())
        except BpfError as error:
            raise Refused(str(error)) from error
        if process is None:
            self._drop_unseen()
        return int(control.seen)

    def plant(self, config: int, scope: int, watch: int) -> None:
        """Have the total of `scope` judged by the watches in `config` from number `watch` on, without records."""
        self._run("plant", Planting(config=config, scope=scope, watch=watch))

    def _run(self, name: str, argument: ctypes.Structure) -> None:
        assert self._object is not None
        try:
            self._object.run(name, argument)
        except BpfError as error:
            raise Refused(str(error)) from error

    # States

    def state(self, member: Member) -> State:
        """The state of a member; all zero where it has none yet."""
        state = State()
        self._states().lookup(member, state)
        return state

    def states(self, watches: set[int]) -> list[tuple[Member, State]]:
        """Every state that there is of these watches."""
        slices = self._states().slices(Member, State, STATES_AT_ONCE)
        members = [member for found in slices for member, _ in found if member.watch in watches]
        return [(member, self.steady(member)) for member in members]

    def steady(self, member: Member) -> State:
        """A state whose value is that of its last turn: the value is written a moment earlier."""
        state = self.state(member)
        for _ in range(100):
            again = self.state(member)
            if (again.flips, again.value) == (state.flips, state.value):
                break
            state = again
        return state

    def drop_state(self, member: Member) -> None:
        self._states().delete(member)

    # Sums

    def count_in(self, kind: int) -> bool:
        """Keep the totals of `kind`; True where they begin with this: `look` then counts the present."""
        self._sums[kind] += 1
        if self._sums[kind] > 1:
            return False
        self.control.ledgers[kind] = next(self._ledgers)
        self._set_wide()
        return True

    def count_out(self, kind: int) -> None:
        """Undo `count_in`."""
        assert self._object is not None
        self._sums[kind] -= 1
        if self._sums[kind]:
            return
        # What is under way writes to a ledger that nobody reads any more.
        ledger, self.control.ledgers[kind] = self.control.ledgers[kind], 0
        self._set_wide()
        for name, key_type in (("shares", Share), ("totals", Total)):
            found = self._object.map(name)
            for key in found.keys(key_type):
                if key.ledger == ledger:
                    found.delete(key)

    def total(self, kind: int, scope: int = EVERY) -> int:
        """The sum now; 0 where nobody was in the scope yet."""
        assert self._object is not None
        value = ctypes.c_int64(0)
        self._object.map("totals").lookup(Total(ledger=self.control.ledgers[kind], scope=scope), value)
        return value.value

    # Groups

    def enter(self, group: Group, crowded: Callable[[], None]) -> None:
        """Tell the kernel who is in `group` from now on; `look` then judges the present.

        Args:
            group: who comes and goes there.
            crowded: called where a process comes that is in too many groups, or another took its place: the
                kernel does not know of it, so that not all of the group is heard any more.

        Raises:
            Refused: a process is in too many groups already.
        """
        followed = self._groups.get(group.number)
        if followed is not None:
            if followed.full:
                raise Refused("a member is in too many groups")
            followed.users.append(crowded)
            return
        followed = self._groups[group.number] = _Followed(group.all_users, [crowded])
        self._set_wide()  # first, so that children inherit
        try:
            followed.cancel = group.follow(
                lambda process: self._joined(group.number, process),
                lambda process: self.leave(group.number, process),
            )
        except BaseException:
            self.exit(group, crowded)
            raise

    def exit(self, group: Group, crowded: Callable[[], None]) -> None:
        """Undo `enter`."""
        followed = self._groups[group.number]
        followed.users.remove(crowded)
        if followed.users:
            return
        if followed.cancel is not None:
            followed.cancel()
        for key in self._memberships().keys(Member):
            self.leave(group.number, Process(key.tgid, key.start))
        del self._groups[group.number]
        self._set_wide()

    def _joined(self, number: int, process: Process) -> None:
        followed = self._groups.get(number)
        if followed is None:
            return
        if followed.cancel is None:
            self._tell_kernel(number, process)
            followed.present.append(process)
            return
        self._tell_and_look(number, process, self._crowd_out)

    def _tell_and_look(
        self, number: int, process: Process, refused: Callable[[int, Process, Refused], None]
    ) -> None:
        try:
            self._tell_kernel(number, process)
        except Refused as refusal:
            refused(number, process, refusal)
            return
        if not self.look(process):
            self._memberships().delete(_key_of(process))

    def _tell_kernel(self, number: int, process: Process) -> None:
        key, memberships = _key_of(process), self._memberships()
        while True:
            membership = Membership()
            there = memberships.lookup(key, membership)
            groups = membership.groups
            if number in groups:
                return
            at = self._slot(number, groups)
            left, groups[at] = groups[at], number
            membership.seen = 0
            try:
                # The kernel removes it at its end, and makes it for a child.
                if not memberships.update(key, membership, BPF_EXIST if there else BPF_NOEXIST):
                    continue
            except BpfError as error:
                raise Refused(str(error)) from error
            if left:
                self._crowd_out(left, process, Refused("its place was taken"))
            return

    def _slot(self, number: int, groups: Sequence[int]) -> int:
        """Where there is room for a group; whose members come first takes it from one whose do not."""
        for at, there in enumerate(groups):
            if not there:
                return at
        if self._groups[number].first:
            for at, there in enumerate(groups):
                if there not in self._groups or not self._groups[there].first:
                    return at
        raise Refused(f"in {len(groups)} groups already")

    # Members without room

    def _crowd_out(self, number: int, process: Process, refusal: Refused) -> None:
        """Try again when all that happens now is told: it may be leaving another group."""
        log.debug("process %d: %s", process.pid, refusal)
        if not self._crowded:
            self._reactor.call_at(self._reactor.now(), self._settle_crowded)
        self._crowded[number, process] = None

    def _settle_crowded(self) -> None:
        crowded, self._crowded = self._crowded, {}
        for number, process in crowded:
            if self._users and number in self._groups:
                self._tell_and_look(number, process, self._give_up)
            if self._users:
                self._forget_crowded(number, process)

    def _give_up(self, number: int, process: Process, refusal: Refused) -> None:
        log.info("process %d, of a group: %s", process.pid, refusal)
        followed = self._groups[number]
        followed.full = True
        for crowded in tuple(followed.users):
            _guarded(crowded)

    def _forget_crowded(self, number: int, process: Process) -> None:
        """Drop what the kernel still keeps of a member whose place was taken."""
        membership = Membership()
        there = self._memberships().lookup(_key_of(process), membership)
        if not there or number not in membership.groups:
            self._run("leave", Leaving(tgid=process.pid, group=number, start=process.start))

    def leave(self, number: int, process: Process) -> None:
        """`process` is not in that group (any more); harmless where it never was.

        A child is in the groups of its parent until this says otherwise.
        """
        if self._crowded.pop((number, process), 0) is None:
            self._run("leave", Leaving(tgid=process.pid, group=number, start=process.start))
        key, memberships = _key_of(process), self._memberships()
        membership = Membership()
        if not memberships.lookup(key, membership) or number not in membership.groups:
            return
        membership.groups[list(membership.groups).index(number)] = 0
        memberships.update(key, membership, BPF_EXIST)
        if not any(membership.groups):
            memberships.delete(key)
        self._run("leave", Leaving(tgid=process.pid, group=number, start=process.start))

    def _drop_unseen(self) -> None:
        """Those that have ended before they were told to the kernel."""
        for followed in self._groups.values():
            present, followed.present = followed.present, []
            for process in present:
                membership = Membership()
                if self._memberships().lookup(_key_of(process), membership) and not membership.seen:
                    self._memberships().delete(_key_of(process))

    def _memberships(self) -> libbpf.Map:
        assert self._object is not None
        return self._object.map("memberships")

    # The lives of processes

    def subscribe(
        self,
        wanted: frozenset[What],
        callback: Callable[[Record], None],
        overran: Callable[[], None],
        more: frozenset[str] = frozenset(),
    ) -> Callable[[], None]:
        """Have these of the FORK, EXEC, EXIT and MOVE records; returns what ends that.

        Args:
            wanted: which.
            callback: is given each.
            overran: called where records were lost.
            more: as in `use`.

        Raises:
            Refused: as `use`.
        """
        subscriber = _Subscriber(wanted, callback, overran)
        self.use(more)
        self._subscribers.append(subscriber)
        self._set_lives()

        def end() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)
                self._set_lives()
                self.release(more)

        return end

    def _set_lives(self) -> None:
        wanted = frozenset[What]().union(*(subscriber.wanted for subscriber in self._subscribers))
        self.control.lives = sum(1 << what for what in wanted)

    def _states(self) -> libbpf.Map:
        assert self._object is not None
        return self._object.map("states")

    # Records

    def _receive(self, data: bytes) -> None:
        self._pending.append(Record.from_buffer_copy(data))

    def _drain(self) -> None:
        """Take records for a moment; where there are more, the reactor calls again."""
        until = self._reactor.now() + TURN
        while self._users and self._take() and self._reactor.now() < until:
            pass
        self._look_for_overrun()
        if self._users and (lacking := self._lacking()):
            self._tell_lack(lacking)

    def _take(self) -> bool:
        """Deliver some records; False: there are none."""
        self._ring.drain(RECORDS)
        records, self._pending = self._pending, []
        for record in records:
            if record.what in _LIVES:
                self._tell_life(record)
        for record in _in_order([record for record in records if record.what not in _LIVES]):
            self._deliver(record)
        return bool(records)

    def _look_for_overrun(self) -> None:
        """Begin to tell what the ring did not take, if there is such."""
        if not self._users or self._overrun is not None or self.control.dropped == self._dropped:
            return
        self._dropped = self.control.dropped
        self._overrun = self._recover()
        self._reactor.call_at(self._reactor.now(), self._go_on_recovering)
        for subscriber in tuple(self._subscribers):
            _guarded(subscriber.overran)

    def _go_on_recovering(self) -> None:
        """Recover for a moment."""
        overrun, until = self._overrun, self._reactor.now() + TURN
        if overrun is None:
            return
        try:
            for _ in overrun:
                if self._overrun is not overrun:
                    return  # nobody listens any more
                if self._reactor.now() >= until:
                    self._reactor.call_at(self._reactor.now(), self._go_on_recovering)
                    return
        except BpfError as error:
            log.warning("what the ring did not take is not known: %s", error)
        self._overrun = None
        self._look_for_overrun()

    def _recover(self) -> Iterator[None]:
        """Tell what the ring did not take, from the states; yields now and then.

        The map is read once, for all clients; then the ring, up to where it was by then; and only then is anybody
        told. So who has ended by the map has no older record any more; and what records told meanwhile is newer
        than the map: of states by their count of turns, of ends by `_ended`.
        """
        self._ended.clear()
        found: defaultdict[int, list[tuple[Member, State]]] = defaultdict(list)
        for states in self._states().slices(Member, State, STATES_AT_ONCE):
            for member, state in states:
                found[member.watch].append((member, state))
            yield
        end = self._ring.filled
        while self._ring.taken < end:
            self._take()
            yield
        for watch in tuple(self._clients):
            for first in range(0, len(found[watch]) or 1, RECORDS):
                self._tell_overrun(watch, found[watch][first : first + RECORDS])
                yield
        self._ended.clear()

    def _tell_overrun(self, watch: int, states: list[tuple[Member, State]]) -> None:
        client = self._clients.get(watch)
        if client is not None:
            present = [(member, state) for member, state in states if key_of(member) not in self._ended]
            _guarded(lambda: client.overran(present))

    def _lacking(self) -> int:
        """For how much there was no room, since we looked last."""
        before = self.control.heard
        while self.control.heard != self.control.full:  # the kernel wakes us for the first beyond this
            self.control.heard = self.control.full
        return int(self.control.heard - before)

    def _tell_lack(self, count: int) -> None:
        for client in set(self._clients.values()):
            _guarded(lambda client=client: client.lacks(count))  # type: ignore[misc]

    @property
    def full(self) -> int:
        """How often a map had no room, since it was loaded."""
        return int(self._control.full) if self._control is not None else 0

    def _tell_life(self, record: Record) -> None:
        for subscriber in tuple(self._subscribers):
            if record.what in subscriber.wanted:
                _guarded(lambda subscriber=subscriber: subscriber.callback(record))  # type: ignore[misc]

    def _deliver(self, record: Record) -> None:
        if record.what == What.GONE and self._overrun is not None:
            self._ended.add(key_of(record))
        client = self._clients.get(record.watch)
        if client is not None:
            _guarded(lambda: client.ended(record) if record.what == What.GONE else client.crossed(record))


def _in_order(records: list[Record]) -> list[Record]:
    """Each member's turns in their order.

    Two processors that turn a state one after the other may reach the ring the other way round.
    """
    newest: dict[tuple[int, int, int], int] = {}
    for record in records:
        if record.what == What.CROSSED:
            key = key_of(record)
            if record.flips < newest.get(key, 0):
                return sorted(records, key=_turn)
            newest[key] = record.flips
    return records


def _turn(record: Record) -> tuple[int, int, int, int, bool, int]:
    return record.start, record.tgid, record.watch, record.flips, record.what != What.CROSSED, record.time


def _guarded(call: Callable[[], object]) -> None:
    """One broken listener must not cost the others their records."""
    try:
        call()
    except Exception:
        log.exception("a listener failed")


def key_of(of: Record | Member) -> tuple[int, int, int]:
    """Of which watch and member something is."""
    return of.watch, of.tgid, of.start


def own_member(watch: Watch, scope: int, start: int) -> Member:
    """The only member of a watch on one process, or on one total."""
    return Member(watch.id, 0, scope) if watch.flags & Flag.SUM else Member(watch.id, scope & NO_WATCH, start)


def _breadth(scope: int, watches: list[Watch]) -> Wide:
    """What the hooks look for because of these watches."""
    if scope == EVERY_CGROUP and watches:
        return Wide.TOTALS
    if scope < GROUP and not all(watch.flags & Flag.SUM for watch in watches):
        return Wide.EVERY if scope == EVERY else Wide.CGROUPS
    return Wide(0)


def _is_single(watch: Watch, scope: int) -> bool:
    return scope != EVERY_CGROUP and bool(watch.flags & Flag.SUM or scope & PROCESS)


def _key_of(process: Process) -> Member:
    return Member(tgid=process.pid, start=process.start)


def _is_there(sections: dict[str, str], name: str) -> bool:
    section = sections.get(name.partition("@")[0])
    return section is not None and libbpf.kernel_has(section)


_CAP_SYS_ADMIN, _CAP_PERFMON, _CAP_BPF = 21, 38, 39


def _is_capable() -> bool:
    """Whether this process has what bpf(2) asks for; root need not, see capabilities(7)."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        held = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return bool(held >> _CAP_SYS_ADMIN & 1 or (held >> _CAP_PERFMON & held >> _CAP_BPF & 1))


def _culprit() -> str | None:
    """The program that the kernel refused last, from what libbpf said."""
    for line in reversed(libbpf.said()):
        match = _CULPRIT.search(line)
        if match is not None:
            return match[1]
    return None
