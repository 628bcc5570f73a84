"""One object file at work: which hooks it found, its watches, and the records that come of them.

An engine is loaded when it is first tried, and stays so; its hooks are attached only while somebody is armed.
"""

import ctypes
import itertools
import logging
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from limitfs.hearing.bpf import libbpf
from limitfs.hearing.bpf.layout import (
    EVERY,
    WATCHES,
    Config,
    Control,
    Member,
    Record,
    Seed,
    SeedError,
    State,
    Watch,
    What,
)
from limitfs.hearing.bpf.libbpf import BPF_NOEXIST, BpfError
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Refused

log = logging.getLogger(__name__)

_OBJECTS = Path(__file__).parent
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO of linux/proc_ns.h."""

_CULPRIT = re.compile(r"prog '(\w+)': (?:BPF program load failed|failed to load)")


@dataclass(frozen=True)
class Hooks:
    """One way to hear what an object hears.

    Attributes:
        name: shown as `source`.
        cost: whom it costs what, in words.
        needed: sets of programs; of each set at least one must load and attach.
        optional: programs that are taken along where they load and attach.
        probe: something that it slows down, to measure by how much.
        prepare: called once when all is loaded; raises BpfError.
        run: programs that `prepare` runs.
    """

    name: str
    cost: str
    needed: tuple[frozenset[str], ...]
    optional: frozenset[str] = frozenset()
    probe: Callable[[], object] | None = None
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

    def overran(self) -> None:
        """Records were lost; the maps still know."""


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
        self._births: list[Callable[[Record], None]] = []
        self._sums: Counter[int] = Counter()
        self._reactor = reactor
        self._path = directory / f"{name}.bpf.o"
        self._ways = ways
        self._missing: str | None = None
        self._tried = False
        self._object: libbpf.Object | None = None
        self._control: Control | None = None
        self._programs: set[str] = set()
        self._links = libbpf.Links()
        self._detaching: threading.Thread | None = None
        self._users = 0
        self._ids = itertools.count(1)
        self._clients: dict[int, Client] = {}
        self._configs: dict[int, tuple[int, list[Watch]]] = {}
        self._dropped = 0

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
        called = {"seed", *hooks.run}
        programs = called.union(hooks.optional, *hooks.needed)
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
        before = _nanoseconds(hooks.probe)
        self._attach(hooks)
        after = _nanoseconds(hooks.probe)
        self._detach()
        self.cost = hooks.cost if hooks.probe is None else f"{hooks.cost}: {max(0, after - before):.0f} ns here"

    # Attached while used

    def use(self) -> None:
        """Attach, if nobody has done so; `release` is its counterpart.

        Raises:
            Refused: it does not work any more.
        """
        if self.missing() is not None or self._object is None or self.hooks is None:
            raise Refused(self._missing or "closed")
        if self._users == 0:
            try:
                self._attach(self.hooks)
                self._ring = libbpf.Ring(self._object.map_fd("records"), self._receive)
            except BpfError as error:
                self._detach()
                raise Refused(str(error)) from error
            self._pending: list[Record] = []
            self._dropped = self.control.dropped
            self._reactor.add_reader(self._ring.fd, self._drain)
        self._users += 1

    def release(self) -> None:
        """Detach, if nobody else uses it."""
        self._users -= 1
        if self._users == 0:
            self._reactor.remove_reader(self._ring.fd)
            self._ring.drain()  # or its records would be the next user's
            self._ring.close()
            self._pending.clear()
            self._detach()

    def close(self) -> None:
        """Unload; nobody may use it any more."""
        self.wait_detached()
        self._unload()
        self._tried = False

    def _attach(self, hooks: Hooks) -> None:
        assert self._object is not None
        self.wait_detached()
        attached = set()
        for name in sorted(self._programs):
            try:
                self._object.attach(name, self._links)
                attached.add(name)
            except BpfError as error:
                log.debug("%s", error)
        if not hooks.suffice(attached):
            self._detach()
            raise BpfError(0, "the kernel does not let the hooks be attached")

    def _detach(self) -> None:
        # fexit takes up to half a second, in which the event loop must go on.
        links, self._links = self._links, libbpf.Links()
        self._detaching = threading.Thread(target=links.destroy, name="limitfs-detach", daemon=True)
        self._detaching.start()

    def wait_detached(self) -> None:
        """Until the hooks are gone; a program cannot be attached again to the same function before that."""
        if self._detaching is not None:
            self._detaching.join()
            self._detaching = None

    def _unload(self) -> None:
        self.wait_detached()
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

    def add(self, client: Client, tgid: int, start: int, watches: list[Watch]) -> None:
        """Watch one process, or every process (EVERY, 0).

        Raises:
            Refused: there are too many watches on it, or watched processes.
        """
        start_now, present = self._configs.get(tgid, (start, []))
        if start_now != start:
            present = []  # of a process that had this number before
        if len(present) + len(watches) > WATCHES:
            raise Refused(f"{WATCHES} watches already")
        for watch in watches:
            watch.id = next(self._ids)
            self._clients[watch.id] = client
        self._store(tgid, start, present + watches)

    def remove(self, tgid: int, start: int, watches: list[Watch]) -> None:
        """Undo `add`; harmless where the process has ended meanwhile."""
        ids = {watch.id for watch in watches}
        for number in ids:
            self._clients.pop(number, None)
        start_now, present = self._configs.get(tgid, (None, []))
        if start_now == start:
            self._store(tgid, start, [watch for watch in present if watch.id not in ids])
        for key in self._states().keys(Member) if tgid == EVERY else [Member(n, tgid, start) for n in ids]:
            if key.watch in ids:
                self._states().delete(key)

    def forget(self, tgid: int, start: int) -> None:
        """The process has ended: the kernel has dropped its watches by itself."""
        if self._configs.get(tgid, (None, []))[0] == start:
            del self._configs[tgid]

    def _store(self, tgid: int, start: int, watches: list[Watch]) -> None:
        assert self._object is not None
        configs = self._object.map("configs")
        if watches:
            self._configs[tgid] = start, watches
            config = Config(start=start, count=len(watches))
            config.watches[: len(watches)] = watches
            try:
                configs.update(ctypes.c_uint32(tgid), config)
            except BpfError as error:
                raise Refused(str(error)) from error
        else:
            self._configs.pop(tgid, None)
            configs.delete(ctypes.c_uint32(tgid))
        self._set_every()

    def _set_every(self) -> None:
        self.control.every = len(self._configs.get(EVERY, (0, []))[1]) + sum(self._sums.values())

    # States

    def seed(self, config: int, member: Member, value: int, flips: int, limit: int) -> tuple[SeedError, int]:
        """Take in a value that was read while the state was at `flips`; returns where it is now.

        Raises:
            Refused: the program does not run.
        """
        assert self._object is not None
        argument = Seed(member=member, value=value, flips=flips, limit=limit, config=config)
        try:
            self._object.run("seed", argument)
        except BpfError as error:
            raise Refused(str(error)) from error
        return SeedError(argument.error), argument.flips

    def state(self, member: Member) -> State:
        """The state of a member; all zero where it has none yet."""
        state = State()
        self._states().lookup(member, state)
        return state

    def states(self) -> list[tuple[Member, State]]:
        """Every state that there is."""
        return [(member, self._steady(member)) for member in self._states().keys(Member)]

    def _steady(self, member: Member) -> State:
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

    def count_in(self, kind: int, values: Callable[[], Iterable[tuple[int, int, int]]]) -> None:
        """Keep the total of `kind`; `values` are (tgid, start, value) of every process, read when needed."""
        assert self._object is not None
        self._sums[kind] += 1
        if self._sums[kind] > 1:
            return
        self._set_sums()
        # Events count from now on; whoever has had none yet is counted here.
        shares = self._object.map("shares")
        for tgid, start, value in values():
            if shares.update(Member(kind, tgid, start), ctypes.c_int64(value), BPF_NOEXIST):
                self.control.base[kind] += value

    def count_out(self, kind: int) -> None:
        """Undo `count_in`."""
        assert self._object is not None
        self._sums[kind] -= 1
        if self._sums[kind]:
            return
        self._set_sums()
        shares = self._object.map("shares")
        for member in shares.keys(Member):
            if member.watch == kind:
                shares.delete(member)
        self.control.base[kind] = self.control.total[kind] = 0

    def total(self, kind: int) -> int:
        """The sum now."""
        control = self.control
        return int(control.total[kind] + control.base[kind])

    def _set_sums(self) -> None:
        self.control.sums = sum(1 << kind for kind, users in self._sums.items() if users)
        self._set_every()

    # Births

    def subscribe(self, callback: Callable[[Record], None]) -> Callable[[], None]:
        """Have FORK, EXEC and EXIT records; returns what ends that.

        Raises:
            Refused: as `use`.
        """
        self.use()
        self._births.append(callback)
        self.control.births = len(self._births)

        def end() -> None:
            if callback in self._births:
                self._births.remove(callback)
                self.control.births = len(self._births)
                self.release()

        return end

    def _states(self) -> libbpf.Map:
        assert self._object is not None
        return self._object.map("states")

    # Records

    def _receive(self, data: bytes) -> None:
        self._pending.append(Record.from_buffer_copy(data))

    def _drain(self) -> None:
        self._ring.drain()
        records, self._pending = self._pending, []
        for record in _in_order(records):
            self._deliver(record)
        if self._users and self.control.dropped != self._dropped:
            self._dropped = self.control.dropped
            for client in set(self._clients.values()):
                _guarded(client.overran)

    def _deliver(self, record: Record) -> None:
        if record.what in (What.FORK, What.EXEC, What.EXIT):
            for callback in tuple(self._births):
                _guarded(lambda callback=callback: callback(record))  # type: ignore[misc]
            return
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
            key = record.watch, record.tgid, record.start
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


def _nanoseconds(call: Callable[[], object] | None, rounds: int = 10, calls: int = 200) -> float:
    """What a call costs when nothing disturbs it: the least of some measurements."""
    if call is None:
        return 0.0
    best = math.inf
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter_ns() - begin) / calls)
    return best
