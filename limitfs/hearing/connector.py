"""Births, deaths and changes of processes and threads: the kernel's proc connector.

The kernel sends a message for every fork, exec, exit, change of user and of name, after the fact: whoever was
born is in /proc, whoever exited is a zombie or gone. See Documentation/driver-api/connector.rst and
linux/cn_proc.h. Needs CAP_NET_ADMIN and the initial namespaces.

A socket filter drops in the kernel what nobody wants, above all the threads of other processes. Messages that
do not fit into the socket's buffer are lost; that is told as `Lost`, after all that came before it.
"""

import contextlib
import ctypes
import enum
import errno
import itertools
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import ClassVar, NamedTuple, Protocol

from limitfs.errors import Gone, LimitsError
from limitfs.hearing.deaths import Death, Deaths
from limitfs.hearing.reactor import Reactor, Timer
from limitfs.hearing.source import Armed, Guarantee, Listener, Refused, Want
from limitfs.resources import procfs
from limitfs.resources.model import Process, Processes, Resource, System, Target, Thread

log = logging.getLogger(__name__)

Callback = Callable[[], None]


class Kind(enum.IntEnum):
    """What happened; the numbers of `enum proc_cn_event`."""

    FORK = 0x1
    EXEC = 0x2
    UID = 0x4
    COMM = 0x200
    EXIT = 0x80000000


class Fork(NamedTuple):
    """A process (`tid == pid`) or a thread was born. `time_ns`: CLOCK_MONOTONIC, here and below."""

    time_ns: int
    tid: int
    pid: int
    ppid: int
    """Of a thread: the parent of its process."""


class Exec(NamedTuple):
    """A process executes another program; it has one thread now."""

    time_ns: int
    tid: int
    pid: int


class Uid(NamedTuple):
    """A thread has another user now."""

    time_ns: int
    tid: int
    pid: int
    real: int
    effective: int


class Comm(NamedTuple):
    """A thread has another name now."""

    time_ns: int
    tid: int
    pid: int
    comm: str


class Exit(NamedTuple):
    """A thread ended: with the last one, the process; the first one may end before the others."""

    time_ns: int
    tid: int
    pid: int
    ppid: int
    """0 where the parent has waited for it already."""
    status: int
    """As wait(2) gives it, for os.waitstatus_to_exitcode."""
    signal: int
    """That the parent is sent; -1 for a thread."""


class Lost(NamedTuple):
    """Messages were lost, at least so many; all before them were told, and the present is in /proc."""

    messages: int


Event = Fork | Exec | Uid | Comm | Exit | Lost
EventCallback = Callable[[Event], None]

# The message: struct nlmsghdr (16 bytes), cn_msg (20), proc_event (16 and the data).

_NETLINK_CONNECTOR = 11
_CN_IDX_PROC = 1
_CN_VAL_PROC = 1
_LISTEN = 1
_IGNORE = 2
_NLMSG_DONE = 3
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_BUFFER = 8 << 20
"""Bytes, about 10,000 messages; the kernel takes memory only for those that wait."""
_BATCH = 256
"""Messages per turn of the event loop; the rest wait for the next turn."""

_NLMSG = struct.Struct("=IHHII")
_CN_MSG = struct.Struct("=IIIIHH")
_REQUEST = struct.Struct("=I")
_WHAT = 36
_HEAD = struct.Struct("=IIQ")
_DATA = 52
_FORK = struct.Struct("=IIII")
_PAIR = struct.Struct("=II")
_UID = struct.Struct("=IIII")
_COMM = struct.Struct("=II16s")
_EXIT = struct.Struct("=IIIiII")


def _parse(message: bytes | bytearray | memoryview) -> Event | None:
    what, _cpu, time_ns = _HEAD.unpack_from(message, _WHAT)
    if what == Kind.FORK:
        _parent, ppid, tid, pid = _FORK.unpack_from(message, _DATA)
        return Fork(time_ns, tid, pid, ppid)
    if what == Kind.EXIT:
        tid, pid, status, sent, _parent, ppid = _EXIT.unpack_from(message, _DATA)
        return Exit(time_ns, tid, pid, ppid, status, sent)
    if what == Kind.EXEC:
        return Exec(time_ns, *_PAIR.unpack_from(message, _DATA))
    if what == Kind.COMM:
        tid, pid, comm = _COMM.unpack_from(message, _DATA)
        return Comm(time_ns, tid, pid, comm.partition(b"\0")[0].decode("utf-8", "surrogateescape"))
    if what == Kind.UID:
        return Uid(time_ns, *_UID.unpack_from(message, _DATA))
    return None


_KIND_OF: dict[type[Event], Kind] = {
    Fork: Kind.FORK,
    Exec: Kind.EXEC,
    Uid: Kind.UID,
    Comm: Kind.COMM,
    Exit: Kind.EXIT,
}

# The filter, in classic BPF: Documentation/networking/filter.rst. Loads turn words into host order from network
# order, which these are not in; so the constants are turned too.

_LD_WORD = 0x20
_TAX = 0x07
_JEQ_CONSTANT = 0x15
_JEQ_X = 0x1D
_RETURN = 0x06
_WHOLE = 0xFFFFFFFF
_MOST_PIDS = 32
"""Processes that the filter looks for by number; with more, it lets all pass."""

_Instruction = tuple[int, int, int, int]
_KEEP: _Instruction = (_RETURN, 0, 0, _WHOLE)
_DROP: _Instruction = (_RETURN, 0, 0, 0)


class _Wanted:
    """Which messages of one kind somebody wants."""

    def __init__(self) -> None:
        self.leaders = False
        self.threads = False
        self.pids: set[int] = set()

    def include(self, subscription: "Subscription") -> None:
        if subscription.pid is not None:
            self.pids.add(subscription.pid)
        elif subscription.threads:
            self.threads = True
        else:
            self.leaders = True

    def program(self, kind: Kind) -> list[_Instruction]:
        """Keep or drop a message of `kind`."""
        tid = _DATA + (8 if kind is Kind.FORK else 0)
        if self.threads or len(self.pids) > _MOST_PIDS:
            return [_KEEP]
        code: list[_Instruction] = [(_LD_WORD, 0, 0, tid), (_TAX, 0, 0, 0), (_LD_WORD, 0, 0, tid + 4)]
        if self.leaders:
            code += [(_JEQ_X, 0, 1, 0), _KEEP]
        for pid in sorted(self.pids):
            code += [(_JEQ_CONSTANT, 0, 1, socket.htonl(pid)), _KEEP]
        return [*code, _DROP]


def _program(subscriptions: Iterable["Subscription"]) -> list[_Instruction]:
    wanted: dict[Kind, _Wanted] = {}
    for subscription in subscriptions:
        for kind in subscription.kinds:
            wanted.setdefault(kind, _Wanted()).include(subscription)
    code: list[_Instruction] = [(_LD_WORD, 0, 0, _WHAT)]
    for kind, which in sorted(wanted.items()):
        part = which.program(kind)
        code += [(_JEQ_CONSTANT, 0, len(part), socket.htonl(kind)), *part]
    return [*code, _DROP]


def _attach(sock: socket.socket, program: list[_Instruction]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)))


class Subscription:
    """One who wants messages.

    Attributes:
        kinds: of which kinds.
        threads: False: only of whole processes, that is of their first threads.
        pid: only of this process, its threads included; None: of all.
    """

    __slots__ = ("_connector", "callback", "closed", "kinds", "pid", "threads")

    def __init__(
        self,
        connector: "Connector",
        callback: EventCallback,
        kinds: frozenset[Kind],
        threads: bool,
        pid: int | None,
    ) -> None:
        self._connector = connector
        self.callback = callback
        self.kinds = kinds
        self.threads = threads
        self.pid = pid
        self.closed = False

    def close(self) -> None:
        """Want no more; may be called twice."""
        if not self.closed:
            self.closed = True
            self._connector._remove(self)

    def tell(self, event: Event) -> None:
        """Call back, unless closed meanwhile."""
        if self.closed:
            return
        try:
            self.callback(event)
        except Exception:  # the other subscribers must hear it all the same
            log.exception("told %s, somebody failed", event)


class Connector:
    """The proc connector's socket, shared by all who listen; it is open while somebody does."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._general: dict[Subscription, None] = {}
        self._by_pid: dict[int, dict[Subscription, None]] = {}
        self._socket: socket.socket | None = None
        self._program: list[_Instruction] = []
        self._buffer = bytearray(512)
        self._overrun = False

    def subscribe(
        self, callback: EventCallback, kinds: Iterable[Kind], threads: bool = False, pid: int | None = None
    ) -> Subscription:
        """Call `callback` with every event of these kinds from now on, and with `Lost`.

        Args:
            callback: called from the event loop, in the order of the events.
            kinds: of which kinds.
            threads: of threads too; without it, only of processes.
            pid: of this process and all its threads only.

        Raises:
            Refused: see `missing`.
        """
        subscription = Subscription(self, callback, frozenset(kinds), threads or pid is not None, pid)
        group = self._general if pid is None else self._by_pid.setdefault(pid, {})
        group[subscription] = None
        try:
            if self._socket is None:
                self._open()
            self._filter()
        except OSError as error:
            subscription.close()
            raise Refused(f"proc connector: {_explain(error)}") from error
        return subscription

    def missing(self) -> str | None:
        """As the function `missing`."""
        return None if self._socket is not None else missing()

    def _remove(self, subscription: Subscription) -> None:
        if subscription.pid is None:
            self._general.pop(subscription, None)
        else:
            group = self._by_pid.get(subscription.pid, {})
            group.pop(subscription, None)
            if not group:
                self._by_pid.pop(subscription.pid, None)
        if self._general or self._by_pid:
            self._filter()
        else:
            self._close()

    def _subscriptions(self) -> list[Subscription]:
        return [*self._general, *(one for group in self._by_pid.values() for one in group)]

    def _open(self) -> None:
        self._socket = _listen()
        self._program = []
        self._overrun = False
        self._reactor.add_reader(self._socket.fileno(), self._drain)

    def _filter(self) -> None:
        program = _program(self._subscriptions())
        if self._socket is not None and program != self._program:
            _attach(self._socket, program)
            self._program = program

    def _close(self) -> None:
        if self._socket is None:
            return
        sock, self._socket = self._socket, None
        self._reactor.remove_reader(sock.fileno())
        # The kernel counts listeners by these messages only (before 6.6), and works for nobody otherwise.
        with contextlib.suppress(OSError):
            _send(sock, _IGNORE)
        sock.close()

    def _drain(self) -> None:
        for _ in range(_BATCH):
            if self._socket is None:
                return
            try:
                _size, (sender, _groups) = self._socket.recvfrom_into(self._buffer)
            except BlockingIOError:
                self._tell_lost()
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # What waits in the buffer is older than what was lost: tell that first.
                self._overrun = True
                continue
            event = _parse(self._buffer) if sender == 0 else None
            if event is not None:
                self._tell(event)

    def _tell_lost(self) -> None:
        if self._overrun:
            self._overrun = False
            for subscription in self._subscriptions():
                subscription.tell(Lost(1))

    def _tell(self, event: Fork | Exec | Uid | Comm | Exit | Lost) -> None:
        assert not isinstance(event, Lost)
        kind = _KIND_OF[type(event)]
        leader = event.tid == event.pid
        for subscription in tuple(self._general):
            if kind in subscription.kinds and (leader or subscription.threads):
                subscription.tell(event)
        for subscription in tuple(self._by_pid.get(event.pid, ())):
            if kind in subscription.kinds:
                subscription.tell(event)


def missing() -> str | None:
    """None where the kernel answers; else why not."""
    try:
        _listen().close()
    except OSError as error:
        return f"proc connector: {_explain(error)}"
    return None


def _listen() -> socket.socket:
    """A socket to which the kernel sends; raises OSError."""
    flags = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    sock = socket.socket(socket.AF_NETLINK, flags, _NETLINK_CONNECTOR)
    try:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        sock.bind((0, _CN_IDX_PROC))
        # Kept until the answer is here: it comes while the request is sent, or never.
        _attach(sock, [(_LD_WORD, 0, 0, _WHAT), (_JEQ_CONSTANT, 0, 1, 0), _KEEP, _DROP])
        _send(sock, _LISTEN)
        _await_answer(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _send(sock: socket.socket, request: int) -> None:
    body = _CN_MSG.pack(_CN_IDX_PROC, _CN_VAL_PROC, 0, os.getpid(), _REQUEST.size, 0) + _REQUEST.pack(request)
    sock.send(_NLMSG.pack(_NLMSG.size + len(body), _NLMSG_DONE, 0, 0, 0) + body)


def _await_answer(sock: socket.socket) -> None:
    for _ in range(_BATCH):
        try:
            message = sock.recv(512)
        except BlockingIOError:
            break
        what = _HEAD.unpack_from(message, _WHAT)[0]
        acknowledged = _CN_MSG.unpack_from(message, _NLMSG.size)[3]
        if what == 0 and acknowledged == os.getpid() + 1:  # others who listen are answered here too
            error = _REQUEST.unpack_from(message, _DATA)[0]
            if error:
                raise OSError(error, os.strerror(error))
            return
    raise OSError(errno.ENOTCONN, "no answer")


def _explain(error: OSError) -> str:
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return "not permitted, it needs CAP_NET_ADMIN"
        case errno.EPROTONOSUPPORT:
            return "the kernel lacks CONFIG_CONNECTOR"
        case errno.ECONNREFUSED | errno.ENOTCONN:
            return "no answer: the kernel lacks CONFIG_PROC_EVENTS, or this is not the initial namespace"
    return error.strerror or str(error)


# Who is there


class Owner(Protocol):
    """Who keeps something for every process."""

    def born(self, member: Process, /) -> None:
        """It is there; raises Refused to stop while `start` runs."""

    def ended(self, member: Process, /) -> None:
        """It is no more."""

    def lost(self, count: int, /) -> None:
        """Messages were lost; `born` and `ended` bring everything up to date next."""


class ThreadOwner(Protocol):
    """Who keeps something for every thread of a process."""

    def born(self, member: Thread, /) -> None:
        """It is there; raises Refused to stop while `start` runs."""

    def ended(self, member: Thread, /) -> None:
        """It is no more."""

    def lost(self, count: int, /) -> None:
        """See `Owner`."""


class ProcessMembers:
    """Tells an owner of every process: those that are there, then births and ends. Zombies have ended."""

    def __init__(self, connector: Connector, deaths: Deaths, owner: Owner) -> None:
        self._connector = connector
        self._deaths = deaths
        self._owner = owner
        self._known: dict[int, Process] = {}
        self._lingering: dict[int, Death] = {}
        self._subscription: Subscription | None = None

    def start(self) -> None:
        """Begin. Raises Refused, also what `Owner.born` raises."""
        # Subscribed first: who is born while we look around is told twice, not never.
        self._subscription = self._connector.subscribe(self._hear, {Kind.FORK, Kind.EXIT})
        try:
            self._look_around()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Tell no more."""
        if self._subscription is not None:
            self._subscription.close()
        for death in self._lingering.values():
            death.cancel()
        self._lingering.clear()

    def _hear(self, event: Event) -> None:
        match event:
            case Fork(pid=pid):
                self._born(pid)
            case Exit(pid=pid):
                self._leader_ended(pid)
            case Lost(messages=count):
                self._owner.lost(count)
                self._look_around()

    def _look_around(self) -> None:
        for pid in self._known.keys() - set(procfs.pids()):
            self._ended(pid)
        for pid in procfs.pids():
            self._born(pid)

    def _born(self, pid: int) -> None:
        try:
            now = procfs.stat(pid)
        except LimitsError:
            return
        process = Process(pid, now.start)
        known = self._known.get(pid)
        if known is not None and (known != process or now.zombie):
            self._ended(pid)
        elif known is not None:
            return
        if now.leader and not now.zombie and now.state != "X":
            self._known[pid] = process
            self._owner.born(process)
            if now.state == "Z":
                self._leader_ended(pid)

    def _leader_ended(self, pid: int) -> None:
        """Its first thread has; where others live on, the end of the last one is waited for."""
        process = self._known.get(pid)
        if process is None or pid in self._lingering:
            return
        try:
            if procfs.verify(process).zombie:
                raise Gone("a zombie")
            self._lingering[pid] = self._deaths.watch(process, lambda: self._ended(pid))
        except (LimitsError, Refused):
            self._ended(pid)

    def _ended(self, pid: int) -> None:
        death = self._lingering.pop(pid, None)
        if death is not None:
            death.cancel()
        process = self._known.pop(pid, None)
        if process is not None:
            self._owner.ended(process)


class ThreadMembers:
    """Tells an owner of every thread of one process: those that are there, then births and ends."""

    def __init__(self, connector: Connector, process: Process, owner: ThreadOwner) -> None:
        self._connector = connector
        self._process = process
        self._owner = owner
        self._known: dict[int, Thread] = {}
        self._subscription: Subscription | None = None

    def start(self) -> None:
        """Begin. Raises Gone, Refused, also what `ThreadOwner.born` raises."""
        kinds = {Kind.FORK, Kind.EXEC, Kind.EXIT}
        self._subscription = self._connector.subscribe(self._hear, kinds, pid=self._process.pid)
        try:
            procfs.check(self._process)
            self._look_around()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Tell no more."""
        if self._subscription is not None:
            self._subscription.close()

    def _hear(self, event: Event) -> None:
        match event:
            case Fork(tid=tid):
                self._born(tid)
            case Exit(tid=tid):
                self._ended(tid)
            case Exec():  # the thread that executes takes the number of the first one
                self._look_around()
            case Lost(messages=count):
                self._owner.lost(count)
                self._look_around()

    def _look_around(self) -> None:
        try:
            there = procfs.tids(self._process.pid)
        except LimitsError:
            there = []
        for tid in self._known.keys() - set(there):
            self._ended(tid)
        for tid in there:
            self._born(tid)

    def _born(self, tid: int) -> None:
        try:
            now = procfs.stat(self._process.pid, tid)
        except LimitsError:
            return
        thread = Thread(self._process.pid, tid, now.start)
        if self._known.get(tid) == thread or now.state in "ZX":
            return
        self._ended(tid)
        self._known[tid] = thread
        self._owner.born(thread)

    def _ended(self, tid: int) -> None:
        thread = self._known.pop(tid, None)
        if thread is not None:
            self._owner.ended(thread)


# Counting


class Counted:
    """A want at work: a set of numbers, and what ends it."""

    source = "connector"
    guarantee = Guarantee.EXACT
    period: float | None = None

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self._disarmed = False

    def disarm(self) -> None:
        """Stop, and forget the numbers."""
        self._disarmed = True
        self._undo.close()


class _ThreadSet:
    """The threads of one process: a snapshot, and what was heard since. Raises Gone."""

    __slots__ = ("_taken_ns", "_tids")

    def __init__(self, pid: int) -> None:
        self._taken_ns = time.monotonic_ns()
        self._tids = set(procfs.tids(pid))

    def __len__(self) -> int:
        return len(self._tids)

    def hear(self, event: Fork | Exit) -> bool:
        """Take in an event; whether it was news."""
        # Older ones are in the snapshot. The first thread is counted until the process has ended.
        if event.time_ns < self._taken_ns or event.tid == event.pid:
            return False
        (self._tids.add if isinstance(event, Fork) else self._tids.discard)(event.tid)
        return True


class ProcessThreads(Counted):
    """How many threads one process has."""

    def __init__(self, connector: Connector, deaths: Deaths, process: Process, listener: Listener) -> None:
        super().__init__()
        self._process = process
        self._listener = listener
        try:
            self._undo.callback(deaths.watch(process, self._ended).cancel)
            kinds = {Kind.FORK, Kind.EXEC, Kind.EXIT}
            self._undo.callback(connector.subscribe(self._hear, kinds, pid=process.pid).close)
            self._take_snapshot()
        except BaseException:
            self.disarm()
            raise

    def _take_snapshot(self) -> None:
        self._threads = _ThreadSet(self._process.pid)
        procfs.check(self._process)
        self._report()

    def _hear(self, event: Event) -> None:
        match event:
            case Lost(messages=count):
                self._listener.lost(count)
                self._again()
            case Exec():
                self._again()
            case Fork() | Exit():
                if self._threads.hear(event):
                    self._report()

    def _again(self) -> None:
        if not self._disarmed:
            with contextlib.suppress(Gone):
                self._take_snapshot()

    def _report(self) -> None:
        if not self._disarmed:
            self._listener.reading(self._process, float(len(self._threads)))

    def _ended(self) -> None:
        self.disarm()
        self._listener.gone(self._process)


class Census(Counted):
    """How many processes, or threads, the machine has.

    As the kernel counts them, a zombie is one still, for it has a number. When its parent waits for it no
    message comes; so zombies are looked at again with every message, and some times without.

    Args:
        threads: count threads; else processes.
    """

    def __init__(
        self, reactor: Reactor, connector: Connector, threads: bool, target: Target, listener: Listener
    ) -> None:
        super().__init__()
        self._reactor = reactor
        self._threads = threads
        self._target = target
        self._listener = listener
        self._tids: dict[int, set[int]] = {}
        self._count = 0
        # In order of age, the youngest last.
        self._zombies: dict[int, None] = {}
        self._timer: Timer | None = None
        self._delay = 0.0
        self._taken_ns = 0
        kinds = {Kind.FORK, Kind.EXEC, Kind.EXIT} if threads else {Kind.FORK, Kind.EXIT}
        try:
            self._undo.callback(connector.subscribe(self._hear, kinds, threads=threads).close)
            self._take_snapshot()
        except BaseException:
            self.disarm()
            raise

    def disarm(self) -> None:
        """Stop, and forget the numbers."""
        super().disarm()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _take_snapshot(self) -> None:
        self._taken_ns = time.monotonic_ns()
        self._tids = {}
        for pid in procfs.pids():
            with contextlib.suppress(LimitsError):
                self._tids[pid] = set(procfs.tids(pid)) if self._threads else {pid}
        self._count = sum(map(len, self._tids.values()))
        self._zombies = {pid: None for pid in self._tids if _is_zombie(pid)}
        self._report()
        self._look_soon()

    def _hear(self, event: Event) -> None:
        if self._disarmed:
            return
        match event:
            case Lost(messages=count):
                self._listener.lost(count)
                if not self._disarmed:
                    self._take_snapshot()
                return
            case Fork():
                self._bury(_YOUNGEST)
                if event.time_ns >= self._taken_ns:
                    self._add(event.pid, event.tid)
            case Exec(pid=pid):
                self._count -= len(self._tids.get(pid, ()))
                self._tids[pid] = {pid}
                self._count += 1
            case Exit(tid=tid, pid=pid):
                if tid != pid:
                    self._discard(pid, tid)
                else:
                    self._zombies[pid] = None
                    self._bury(_YOUNGEST)
                    self._look_soon()
        self._report()

    def _add(self, pid: int, tid: int) -> None:
        tids = self._tids.setdefault(pid, set())
        if tid not in tids:
            tids.add(tid)
            self._count += 1
        if tid == pid:
            self._zombies.pop(pid, None)

    def _discard(self, pid: int, tid: int) -> None:
        tids = self._tids.get(pid)
        if tids is not None and tid in tids:
            tids.discard(tid)
            self._count -= 1

    def _bury(self, most: int) -> bool:
        """Take out those of the youngest zombies that somebody waited for; whether there were any."""
        gone = [pid for pid in itertools.islice(reversed(self._zombies), most) if not _exists(pid)]
        for pid in gone:
            del self._zombies[pid]
            self._count -= len(self._tids.pop(pid, ()))
        return bool(gone)

    def _report(self) -> None:
        if not self._disarmed:
            self._listener.reading(self._target, float(self._count))

    # Zombies

    def _look_soon(self) -> None:
        self._delay = _FIRST_DELAY
        if self._timer is None or self._timer.when > self._reactor.now() + _FIRST_DELAY:
            self._look_later()

    def _look_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # Nobody waits for some zombies, ever; those are left to the next message.
        if self._zombies and self._delay <= _LAST_DELAY and not self._disarmed:
            self._timer = self._reactor.call_at(self._reactor.now() + self._delay, self._look_at_zombies)

    def _look_at_zombies(self) -> None:
        self._timer = None
        if self._bury(len(self._zombies)):
            self._report()
        self._delay *= 2
        self._look_later()


_FIRST_DELAY = 0.005
_LAST_DELAY = 5.0
"""Seconds until zombies are looked at again; doubled each time."""

_YOUNGEST = 16
"""Zombies that are looked at with every message."""


def _is_zombie(pid: int) -> bool:
    try:
        return procfs.stat(pid).zombie
    except LimitsError:
        return True  # reaped, or about to be: `_bury` finds out


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class EachThreads(Counted):
    """How many threads each process has."""

    def __init__(self, connector: Connector, deaths: Deaths, listener: Listener) -> None:
        super().__init__()
        self._listener = listener
        self._processes: dict[int, tuple[Process, _ThreadSet]] = {}
        members = ProcessMembers(connector, deaths, self)
        try:
            kinds = {Kind.FORK, Kind.EXEC, Kind.EXIT}
            self._undo.callback(connector.subscribe(self._hear, kinds, threads=True).close)
            self._undo.callback(members.close)
            members.start()
        except BaseException:
            self.disarm()
            raise

    def born(self, member: Process) -> None:
        """A process is there."""
        with contextlib.suppress(LimitsError):
            self._processes[member.pid] = member, _ThreadSet(member.pid)
            self._report(member.pid)

    def ended(self, member: Process) -> None:
        """A process is no more."""
        if self._processes.pop(member.pid, None) is not None and not self._disarmed:
            self._listener.gone(member)

    def lost(self, count: int) -> None:
        """Whoever is known already is counted anew; the others are born next."""
        self._listener.lost(count)
        for process, _threads in list(self._processes.values()):
            self.born(process)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Lost) or event.pid not in self._processes:
            return  # `lost` and `born` are called too
        process, threads = self._processes[event.pid]
        if isinstance(event, Exec):
            self.born(process)
        elif isinstance(event, Fork | Exit) and threads.hear(event):
            self._report(event.pid)

    def _report(self, pid: int) -> None:
        if not self._disarmed:
            process, threads = self._processes[pid]
            self._listener.reading(process, float(len(threads)))


class ConnectorSource:
    """Hears `threads` of a process, of every process and of the machine, and `processes`: also every change."""

    name: ClassVar[str] = "connector"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    cost: ClassVar[str] = "a message for each birth and death that somebody wants to hear"

    def __init__(self, reactor: Reactor, connector: Connector, deaths: Deaths) -> None:
        self._reactor = reactor
        self._connector = connector
        self._deaths = deaths

    def missing(self) -> str | None:
        """See `Connector.missing`."""
        return self._connector.missing()

    def hears(self, resource: Resource, target: Target, each: bool) -> bool:
        """`processes` of the machine; `threads` of the machine, of a process and of every process."""
        if resource.name == "processes":
            return isinstance(target, System) and not each
        if resource.name != "threads":
            return False
        return isinstance(target, System | Processes) if each else isinstance(target, System | Process)

    def arm(self, want: Want, listener: Listener) -> Armed:
        """Take a snapshot, and count on from there. Raises Refused, Gone."""
        if want.each:
            return EachThreads(self._connector, self._deaths, listener)
        match want.target:
            case Process() as process:
                return ProcessThreads(self._connector, self._deaths, process, listener)
            case System() as system:
                threads = want.resource.name == "threads"
                return Census(self._reactor, self._connector, threads, system, listener)
        raise Refused("a process, or the machine")


# The record of births


class Birth(NamedTuple):
    """One line of `births`; None for what nobody can tell any more."""

    kind: str
    """fork, exec, exit, or lost."""
    time_ns: int
    """CLOCK_MONOTONIC."""
    pid: int | None
    ppid: int | None
    comm: str | None
    uid: int | None
    """The real one."""
    status: int | None
    """Of an exit, as wait(2) gives it. Of a loss: None."""


class Births:
    """Calls back with a record of every fork, exec and exit of a process.

    Raises:
        Refused: see `Connector.missing`.
    """

    def __init__(self, connector: Connector, callback: Callable[[Birth], None]) -> None:
        self._callback = callback
        self._subscription = connector.subscribe(self._hear, {Kind.FORK, Kind.EXEC, Kind.EXIT})

    def close(self) -> None:
        """Call back no more."""
        self._subscription.close()

    def _hear(self, event: Event) -> None:
        match event:
            case Fork():
                _ppid, comm, uid = _about(event.pid)
                self._callback(Birth("fork", event.time_ns, event.pid, event.ppid, comm, uid, None))
            case Exec():
                ppid, comm, uid = _about(event.pid)
                self._callback(Birth("exec", event.time_ns, event.pid, ppid, comm, uid, None))
            case Exit():
                _ppid, comm, uid = _about(event.pid)
                self._callback(
                    Birth("exit", event.time_ns, event.pid, event.ppid or None, comm, uid, event.status)
                )
            case Lost():
                self._callback(Birth("lost", time.monotonic_ns(), None, None, None, None, None))


def _about(pid: int) -> tuple[int | None, str | None, int | None]:
    """Parent, name and real user, as far as they can still be read."""
    try:
        now = procfs.stat(pid)
        return now.ppid, now.comm, procfs.status(pid).uids[0]
    except (LimitsError, ValueError):
        return None, None, None
