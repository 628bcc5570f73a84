"""Channels and connections: real sockets, queues and FIFOs of processes of our own, with psutil as a witness."""

import ast
import contextlib
import ctypes
import errno
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Set
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Helper
from limitfs.errors import Gone, Unsupported
from limitfs.resources import RESOURCES, procfs, sockdiag, sockets
from limitfs.resources.model import Process, System, Thread
from limitfs.resources.sockets import Channels, Connections, Sockets

MakeHelper = Callable[..., Helper]
MPTCP = 262
KINDS = pytest.mark.parametrize("kind", [Channels, Connections])


def usage(name: str, helper: Helper) -> float:
    return RESOURCES[name].usage(procfs.identify(helper.pid))


def counts(helper: Helper) -> tuple[float, float]:
    return usage("channels", helper), usage("connections", helper)


# Channels


@pytest.mark.parametrize(
    ("code", "channels"),
    [
        ("s = socket.create_server(('127.0.0.1', 0))", 1),
        ("s = socket.create_server(('::1', 0), family=socket.AF_INET6)", 1),
        ("s = socket.create_server(('', 0), family=socket.AF_INET6, dualstack_ipv6=True)", 1),
        ("s = socket.socket(); s.bind(('127.0.0.1', 0))", 0),  # bound only: a caller is refused
        ("s = socket.socket()", 0),
        ("s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", 0),
        ("s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0))", 1),
        ("s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(('::1', 0))", 1),
        # It has a port now.
        ("s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'', ('127.0.0.1', 9))", 1),
        # It hears nobody but its peer.
        ("s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('127.0.0.1', 9))", 0),
        ("s = socket.socket(socket.AF_UNIX); s.bind(f'\\0limitfs{os.getpid()}')", 0),
        ("s = socket.socket(socket.AF_UNIX); s.bind(f'\\0limitfs{os.getpid()}'); s.listen()", 1),
        (
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind(f'\\0limitfs{os.getpid()}');"
            " s.listen()",
            1,
        ),
        ("s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)", 0),
        ("s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind(f'\\0limitfs{os.getpid()}')", 1),
        ("s = socket.socketpair()", 0),
        ("s = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", 0),
        ("s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); s.bind((0, 0))", 0),
        ("s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)", 0),
        ("s = socket.create_server(('127.0.0.1', 0)); t = [s.dup() for _ in range(3)]", 1),
        ("s = [socket.create_server(('127.0.0.1', 0)) for _ in range(50)]", 50),
        ("s = os.pipe()", 0),
        ("s = [open(__import__('tempfile').mkstemp()[1])]; os.unlink(s[0].name)", 0),
    ],
)
def test_what_is_a_channel(helper: MakeHelper, code: str, channels: int) -> None:
    process = helper()
    assert counts(process) == (0, 0)
    process.do(code)
    assert counts(process) == (channels, 0)
    process.do("del s; t = None")
    assert counts(process) == (0, 0)


def test_a_connected_datagram_socket_is_no_channel_and_its_peer_stays_one(helper: MakeHelper) -> None:
    server, client = helper(), helper()
    server.do("s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind(f'\\0limitfs{os.getpid()}')")
    client.do("s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind(f'\\0limitfs{os.getpid()}')")
    assert usage("channels", client) == 1
    client.do(f"s.connect('\\0limitfs{server.pid}')")
    assert usage("channels", client) == 0
    assert usage("channels", server) == 1


@pytest.mark.parametrize(
    ("flags", "channels"),
    [("os.O_RDONLY | os.O_NONBLOCK", 1), ("os.O_RDWR", 1), ("os.O_PATH", 0)],
)
def test_a_fifo_open_for_reading(helper: MakeHelper, tmp_path: Path, flags: str, channels: int) -> None:
    os.mkfifo(tmp_path / "fifo")
    process = helper()
    process.do(
        f"f = os.open({str(tmp_path / 'fifo')!r}, {flags}); g = os.open({str(tmp_path / 'fifo')!r}, {flags})"
    )
    assert counts(process) == (channels, 0)
    os.unlink(tmp_path / "fifo")
    assert counts(process) == (channels, 0)
    process.do("os.close(f)")
    assert counts(process) == (channels, 0)
    process.do("os.close(g)")
    assert counts(process) == (0, 0)


def test_a_fifo_open_for_writing_is_no_channel(helper: MakeHelper, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    process = helper()
    process.do(f"f = os.open({str(tmp_path / 'fifo')!r}, os.O_WRONLY)")
    assert counts(process) == (0, 0)
    os.close(reader)


@pytest.fixture
def queue() -> Iterator[str]:
    """The name of a POSIX message queue."""
    libc = ctypes.CDLL(None, use_errno=True)
    name = f"/limitfs-test-{os.getpid()}"
    queue = libc.mq_open(name.encode(), os.O_CREAT | os.O_RDWR, 0o600, None)
    if queue < 0:
        pytest.skip(f"no message queues: {os.strerror(ctypes.get_errno())}")
    os.close(queue)
    yield name
    libc.mq_unlink(name.encode())


@pytest.mark.parametrize(("flags", "channels"), [("os.O_RDONLY", 1), ("os.O_RDWR", 1), ("os.O_WRONLY", 0)])
def test_a_message_queue_open_for_reading(helper: MakeHelper, queue: str, flags: str, channels: int) -> None:
    process = helper("import ctypes")
    process.do(f"q = ctypes.CDLL(None).mq_open({queue.encode()!r}, {flags}); assert q >= 0")
    assert counts(process) == (channels, 0)
    assert usage("filesize", process) == 0
    ctypes.CDLL(None).mq_unlink(queue.encode())
    assert counts(process) == (channels, 0)
    process.do("os.close(q)")
    assert counts(process) == (0, 0)


def test_a_file_that_looks_like_a_queue_is_none(helper: MakeHelper) -> None:
    process = helper()
    process.do("f = os.memfd_create('x'); os.truncate(f, 80)")
    assert counts(process) == (0, 0)


# Connections

CREATE = "socket.create_server(('127.0.0.1', 0))"
TCP = "l = socket.create_server(('127.0.0.1', 0)); address = l.getsockname()"
ANY = "l = socket.create_server(('', 0)); address = ('127.0.0.1', l.getsockname()[1])"
SIX = "l = socket.create_server(('::1', 0), family=socket.AF_INET6); address = l.getsockname()"
DUAL = (
    "l = socket.create_server(('', 0), family=socket.AF_INET6, dualstack_ipv6=True);"
    " address = ('127.0.0.1', l.getsockname()[1])"
)
UNIX = (
    "l = socket.socket(socket.AF_UNIX); l.bind(f'\\0limitfs{os.getpid()}'); l.listen(); address = l.getsockname()"
)
SEQPACKET = UNIX.replace("AF_UNIX", "AF_UNIX, socket.SOCK_SEQPACKET")


def told(process: Helper, expression: str) -> Any:
    """What an expression is, there."""
    with tempfile.NamedTemporaryFile("r") as answer:
        process.do(f"print({expression}, file=open({answer.name!r}, 'w'), flush=True)")
        return ast.literal_eval(answer.read())


def connected(server: Helper, clients: Helper, listen: str, many: int = 1) -> None:
    """Have `clients` connect to what the server listens on."""
    server.do(listen)
    family, kind, protocol, address = told(server, "(int(l.family), int(l.type), l.proto, address)")
    if address[0] == "127.0.0.1":
        family = int(socket.AF_INET)
    for _ in range(many):
        clients.do(f"held.append(socket.socket({family}, {kind}, {protocol})); held[-1].connect({address!r})")


@pytest.mark.parametrize("listen", [TCP, ANY, SIX, DUAL, UNIX, SEQPACKET])
def test_connections_are_those_that_were_accepted(helper: MakeHelper, listen: str) -> None:
    server, clients = helper(), helper()
    connected(server, clients, listen, 3)
    assert counts(server) == (1, 0)  # they wait in the queue
    assert counts(clients) == (0, 0)
    server.do("a = [l.accept()[0] for _ in range(3)]")
    assert counts(server) == (1, 3)
    assert counts(clients) == (0, 0)
    server.do("b = [s.dup() for s in a]; a.pop().close()")
    assert counts(server) == (1, 3)
    server.do("b.pop().close()")
    assert counts(server) == (1, 2)
    clients.do("[s.close() for s in held]")
    assert counts(server) == (1, 2)  # until it closes them
    server.do("[s.close() for s in a + b]")
    assert counts(server) == (1, 0)


@pytest.mark.parametrize("listen", [TCP, UNIX])
@pytest.mark.parametrize("whose", ["server", "client"])
def test_a_connection_that_one_side_has_shut_down(helper: MakeHelper, listen: str, whose: str) -> None:
    server, client = helper(), helper()
    connected(server, client, listen)
    server.do("a = l.accept()[0]")
    (server if whose == "server" else client).do(
        f"{'a' if whose == 'server' else 'held[0]'}.shutdown(socket.SHUT_WR)"
    )
    (client if whose == "server" else server).do(f"{'held[0]' if whose == 'server' else 'a'}.recv(1)")
    assert counts(server) == (1, 1)
    assert counts(client) == (0, 0)


def test_without_its_listener_a_connection_does_not_show_as_accepted(helper: MakeHelper) -> None:
    server, client = helper(), helper()
    connected(server, client, TCP)
    server.do("a = l.accept()[0]; l.close()")
    assert counts(server) == (0, 0)


def test_multipath_tcp(helper: MakeHelper) -> None:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP).close()
    except OSError as error:
        pytest.skip(str(error))
    server, client, plain = helper(), helper(), helper()
    connected(
        server,
        client,
        f"l = socket.socket(socket.AF_INET, socket.SOCK_STREAM, {MPTCP}); l.bind(('127.0.0.1', 0)); l.listen();"
        " address = l.getsockname()",
    )
    plain.do(f"held.append(socket.create_connection({told(server, 'address')!r}))")
    server.do("a = [l.accept()[0] for _ in range(2)]")
    assert counts(server) == (1, 2)
    assert counts(client) == counts(plain) == (0, 0)


def test_a_socket_that_a_fork_shares_counts_for_each_and_once_for_the_machine(
    helper: MakeHelper, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = helper(), helper()
    connected(server, client, TCP)
    server.do("a = l.accept()[0]")
    server.do("child = os.fork() or time.sleep(3600)")
    child = psutil.Process(server.pid).children()[0]
    try:
        assert usages(procfs.identify(child.pid)) == Counter(channels=1, connections=1)
        assert counts(server) == (1, 1)
        # Others come and go on this machine; here it has these processes, and one that ended.
        monkeypatch.setattr(procfs, "pids", lambda: [client.pid, server.pid, child.pid, 2**22])
        assert [RESOURCES[name].usage(System()) for name in ("channels", "connections")] == [1, 1]
    finally:
        child.kill()


def test_sockets_of_threads_are_the_process_s(helper: MakeHelper) -> None:
    server, client = helper(), helper()
    connected(server, client, TCP, 4)
    server.do("t = [threading.Thread(target=lambda: held.append(l.accept()[0])) for _ in range(4)]")
    server.do("[each.start() for each in t]; [each.join() for each in t]")
    assert counts(server) == (1, 4)


# Other network namespaces


@pytest.fixture
def elsewhere() -> Iterator[Helper]:
    """A process in a network namespace of its own."""
    process = Helper("import ctypes; libc = ctypes.CDLL(None, use_errno=True); moved = libc.unshare(0x40000000)")
    try:
        process.do("assert moved == 0, ctypes.get_errno()")
    except AssertionError:
        process.end()
        pytest.skip("no network namespace can be made")
    yield process
    process.end()


UP = (
    "import fcntl, struct; s = socket.socket();"
    " fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 0x1)); s.close()"
)


def test_a_process_in_another_network_namespace(elsewhere: Helper, helper: MakeHelper) -> None:
    here = helper()
    here.do("l = socket.create_server(('127.0.0.1', 0))")
    elsewhere.do(UP)
    elsewhere.do("l = socket.create_server(('127.0.0.1', 4711)); c = socket.create_connection(l.getsockname())")
    elsewhere.do("u = socket.socket(socket.AF_UNIX); u.bind('\\0limitfs-elsewhere'); u.listen()")
    assert counts(elsewhere) == (2, 0)
    elsewhere.do("a = l.accept()[0]")
    assert counts(elsewhere) == (2, 1)
    assert counts(here) == (1, 0)
    assert procfs.network(elsewhere.pid) != procfs.network(os.getpid())


def test_the_same_address_in_another_namespace_is_another(elsewhere: Helper, helper: MakeHelper) -> None:
    """A listener there says nothing of connections here."""
    server, client = helper(), helper()
    connected(server, client, TCP)
    server.do("a = l.accept()[0]; l.close()")
    port = told(server, "address[1]")
    elsewhere.do(UP)
    elsewhere.do(f"l = socket.create_server(('127.0.0.1', {port}))")
    assert counts(elsewhere) == (1, 0)
    for kind in (Connections(), Connections().look()):
        assert kind.usage(procfs.identify(elsewhere.pid)) == 0
        assert kind.usage(procfs.identify(server.pid)) == 0


@pytest.mark.usefixtures("elsewhere")
def test_a_socket_from_our_namespace_in_a_process_of_another(helper: MakeHelper) -> None:
    """As a service manager hands it over."""
    process = helper("l = socket.create_server(('127.0.0.1', 0))")
    process.do("import ctypes; assert ctypes.CDLL(None).unshare(0x40000000) == 0")
    process.do("m = socket.create_server(('127.0.0.1', 0))")
    assert counts(process) == (2, 0)


def test_no_leave_to_look_into_a_namespace_is_said(elsewhere: Helper, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere.do("l = socket.create_server(('127.0.0.1', 0))")

    def refuse(_namespace: int) -> socket.socket:
        raise PermissionError(errno.EPERM, "setns")

    monkeypatch.setattr(sockdiag, "_open_in", refuse)
    with pytest.raises(Unsupported, match=f"network namespace of process {elsewhere.pid}"):
        usage("channels", elsewhere)


def test_looking_elsewhere_leaves_us_here(elsewhere: Helper) -> None:
    elsewhere.do("l = socket.create_server(('127.0.0.1', 0))")
    before, open_before = procfs.network(os.getpid()), set(os.listdir("/proc/self/fd"))
    assert usage("channels", elsewhere) == 1
    assert procfs.network(os.getpid()) == before
    assert os.readlink("/proc/thread-self/ns/net") == before
    assert set(os.listdir("/proc/self/fd")) == open_before


# Read now, in one look, and witnesses


def test_what_has_returned_shows_at_once() -> None:
    me = procfs.identify(os.getpid())
    before = RESOURCES["channels"].usage(me)
    for _ in range(200):
        with socket.create_server(("127.0.0.1", 0)):
            assert RESOURCES["channels"].usage(me) == before + 1
        assert RESOURCES["channels"].usage(me) == before


@KINDS
def test_one_look_lists_a_namespace_once(
    helper: MakeHelper, elsewhere: Helper, monkeypatch: pytest.MonkeyPatch, kind: type[Sockets]
) -> None:
    processes = [helper(f"held.append({CREATE})") for _ in range(3)]
    elsewhere.do("l = socket.create_server(('127.0.0.1', 0))")
    targets = [procfs.identify(process.pid) for process in [*processes, elsewhere]]
    expected = [kind().usage(target) for target in targets]
    lists = 0

    def counted(namespace: int | None = None) -> sockdiag.SockDiag:
        nonlocal lists
        lists += 1
        return sockdiag.SockDiag(namespace)

    monkeypatch.setattr(sockets, "SockDiag", counted)
    look = kind().look()
    assert look.look() is look
    assert [look.usage(target) for target in targets] == expected
    # Ours and the other one; there all sockets are known, or ours is not asked a second time.
    assert lists == 2


@given(st.lists(st.sampled_from(["tcp", "udp", "unix", "dgram", "client", "close"]), max_size=12))
@settings(max_examples=25, deadline=None)
def test_agrees_with_psutil_after_every_step(steps: list[str]) -> None:
    me = procfs.identify(os.getpid())
    start, base = usages(me), witness([])
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        held: list[socket.socket] = []
        stack.callback(lambda: [each.close() for each in held])
        for number, step in enumerate(steps):
            take(step, number, held, server)
            assert usages(me) - start == witness(held) - base


def usages(process: Process) -> Counter[str]:
    return Counter({name: int(RESOURCES[name].usage(process)) for name in ("channels", "connections")})


def take(step: str, number: int, held: list[socket.socket], server: socket.socket) -> None:
    name = f"\0limitfs-{os.getpid()}-{number}"
    match step:
        case "tcp":
            held.append(socket.create_server(("127.0.0.1", 0)))
        case "udp":
            held.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            held[-1].bind(("127.0.0.1", 0))
        case "unix":
            held.append(socket.socket(socket.AF_UNIX))
            held[-1].bind(name)
            held[-1].listen()
            held.append(socket.socket(socket.AF_UNIX))
            held[-1].connect(name)
            held.append(held[-2].accept()[0])
        case "dgram":
            held.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            held[-1].bind(name)
        case "client":
            held.append(socket.create_connection(server.getsockname()))
            held.append(server.accept()[0])
        case "close":
            if held:
                held.pop(number % len(held)).close()


def witness(held: list[socket.socket]) -> Counter[str]:
    """What psutil sees of TCP and UDP here, and what the UNIX sockets say of themselves."""
    seen = psutil.Process().net_connections("inet")
    listening = [each.laddr for each in seen if each.status == psutil.CONN_LISTEN]
    udp = [each for each in seen if each.type == socket.SOCK_DGRAM]
    served = [each for each in seen if each.status != psutil.CONN_LISTEN and each.laddr in listening]
    unix = [each for each in held if each.family == socket.AF_UNIX and each.getsockname()]
    called = [each for each in unix if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
    bound = [each for each in unix if each.type == socket.SOCK_DGRAM]
    names = {each.getsockname() for each in called}
    accepted = [each for each in unix if each not in called + bound and each.getsockname() in names]
    return Counter(
        channels=len(listening) + len(udp) + len(called) + len(bound), connections=len(served) + len(accepted)
    )


def test_a_name_cannot_forge_a_socket(helper: MakeHelper) -> None:
    """It would, in /proc/net/unix."""
    process = helper()
    process.do("s = socket.socket()")
    inode = os.readlink(next(p for p in fds(process) if os.readlink(p).startswith("socket:")))[8:-1]
    forged = f"\0\n0: 00000002 00000000 00010000 0001 01 {inode} x".encode()[:100]
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(forged)
        stranger.listen()
        assert counts(process) == (0, 0)


def fds(process: Helper) -> list[str]:
    return [f"/proc/{process.pid}/fd/{fd}" for fd in os.listdir(f"/proc/{process.pid}/fd")]


# Who is not there


def test_a_process_that_we_may_not_look_into(helper: MakeHelper, monkeypatch: pytest.MonkeyPatch) -> None:
    process, look = helper(), Channels().look()

    def refuse(path: str) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "readlink", refuse)
    with pytest.raises(Unsupported, match=f"does not show /proc/{process.pid}/fd/"):
        look.usage(procfs.identify(process.pid))


def test_gone_between_the_list_and_its_links(helper: MakeHelper, monkeypatch: pytest.MonkeyPatch) -> None:
    process, look = helper(), Channels().look()
    target = procfs.identify(process.pid)
    real = os.readlink

    def late(path: str) -> str:
        process.end()
        return real(path)

    monkeypatch.setattr(os, "readlink", late)
    with pytest.raises(Gone):
        look.usage(target)


@KINDS
def test_gone(helper: MakeHelper, kind: type[Sockets]) -> None:
    process = helper()
    target = procfs.identify(process.pid)
    process.end()
    for resource in (kind(), kind().look()):
        for ask in (resource.usage, resource.limit):
            with pytest.raises(Gone):
                ask(target)
    with pytest.raises(Gone):
        kind().usage(Process(os.getpid(), 1))


@KINDS
def test_threads_have_none_of_their_own(kind: type[Sockets]) -> None:
    me = procfs.identify_thread(os.getpid(), os.getpid())
    assert isinstance(me, Thread)
    with pytest.raises(Unsupported, match="not measured for a thread"):
        kind().usage(me)


@KINDS
def test_a_kernel_that_does_not_list_sockets(monkeypatch: pytest.MonkeyPatch, kind: type[Sockets]) -> None:
    assert kind.missing() is None

    def refuse() -> socket.socket:
        raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))

    monkeypatch.setattr(sockdiag, "_open", refuse)
    assert str(kind.missing()).startswith("sock_diag: Protocol not supported; needs the modules")
    with socket.socket(), pytest.raises(Unsupported, match="Protocol not supported"):
        kind().usage(procfs.identify(os.getpid()))


def test_a_protocol_that_the_kernel_does_not_list() -> None:
    with sockdiag.SockDiag() as diag, pytest.raises(OSError, match="sock_diag") as refused:
        list(diag.inet(253, 0xFFFF))
    assert refused.value.errno == errno.ENOENT


def test_a_kernel_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sockdiag.SockDiag._dump

    def dump(self: sockdiag.SockDiag, request: bytes) -> Any:
        if request[0] == socket.AF_INET6:
            raise OSError(errno.ENOENT, "sock_diag")
        return real(self, request)

    monkeypatch.setattr(sockdiag.SockDiag, "_dump", dump)
    with socket.create_server(("127.0.0.1", 0)), sockdiag.SockDiag() as diag:
        assert any(
            each.family == socket.AF_INET for each in diag.inet(socket.IPPROTO_TCP, 1 << sockdiag.LISTENING)
        )


def test_of_the_machine_is_what_any_process_has(helper: MakeHelper, tmp_path: Path) -> None:
    seen = set().union(*(endpoints_of(pid) for pid in procfs.pids()))
    os.mkfifo(tmp_path / "fifo")
    processes = [helper(f"s, f = {CREATE}, os.open({str(tmp_path / 'fifo')!r}, os.O_RDWR)") for _ in range(3)]
    added = set().union(*(endpoints_of(process.pid) for process in processes)) - seen
    assert len(added) == 4
    assert added <= Channels()._had_by_any()


def endpoints_of(pid: int) -> Set[Hashable]:
    resource = Channels()
    try:
        return resource._had_by(procfs.identify(pid), sockets.Listed(resource.choose))
    except (Gone, Unsupported):
        return set()
