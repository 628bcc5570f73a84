"""Births, deaths and changes of processes and threads: the kernel's proc connector.

The kernel sends a message for every fork, exec, exit, change of user, group and name, after the fact: whoever
was born is in /proc, whoever exited is a zombie or gone. See Documentation/driver-api/connector.rst and
linux/cn_proc.h. Needs the initial namespaces, and before Linux 6.6 CAP_NET_ADMIN.

A socket filter drops in the kernel what nobody wants, above all the threads of other processes. Messages that
do not fit into the socket's buffer are lost; that is told as `Lost`, after all that came before it.
"""

import contextlib
import ctypes
import enum
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from limitfs.hearing.reactor import Reactor
from limitfs.hearing.source import Refused

log = logging.getLogger(__name__)

Callback = Callable[[], None]


class Kind(enum.IntEnum):
    """What happened; the numbers of `enum proc_cn_event`."""

    FORK = 0x1
    EXEC = 0x2
    UID = 0x4
    GID = 0x40
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


class Gid(NamedTuple):
    """A thread has another group now."""

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


Event = Fork | Exec | Uid | Gid | Comm | Exit | Lost
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
_IDS = struct.Struct("=IIII")
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
        return Uid(time_ns, *_IDS.unpack_from(message, _DATA))
    if what == Kind.GID:
        return Gid(time_ns, *_IDS.unpack_from(message, _DATA))
    return None


_KIND_OF: dict[type[Event], Kind] = {
    Fork: Kind.FORK,
    Exec: Kind.EXEC,
    Uid: Kind.UID,
    Gid: Kind.GID,
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

    def _tell(self, event: Event) -> None:
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
