"""How others reach a process: the endpoints that it can be called on, and the connections that it serves.

Which sockets a process has, its descriptors tell by inode number; what these sockets are, the kernel's list of its
network namespace tells (`sockdiag`). A process may also have sockets of the namespace that limitfs runs in, from a
service manager for instance; those of any third one are not seen.
"""

import os
import socket
import stat
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Set
from typing import Self

from limitfs.errors import Gone, Unsupported
from limitfs.resources import files, limits, procfs
from limitfs.resources.model import Level, Limit, Measured, Process, Resource, System, Unit
from limitfs.resources.sockdiag import CLOSED, ESTABLISHED, LISTENING, SockDiag, states

_ANYWHERE = bytes(16)
_NO_PORT = bytes(2)
_STREAMS = frozenset({socket.SOCK_STREAM, socket.SOCK_SEQPACKET})
_CONNECTED = states(ESTABLISHED, 4, 5, 8, 9, 11)
"""Of TCP: also where one side will send no more, or both; FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING."""


def endpoints(diag: SockDiag) -> frozenset[int]:
    """The inode numbers of sockets that can be called: of TCP and UNIX, if they listen; of UDP and UNIX datagram
    sockets, if they are bound, and not connected to one peer.
    """
    tcp = diag.inet(socket.IPPROTO_TCP, states(LISTENING))
    udp = diag.inet(socket.IPPROTO_UDP, states(CLOSED))
    # That a datagram socket is connected does not show in its state: before 6.10, its peer had that state too.
    unix = diag.unix(states(ESTABLISHED, CLOSED, LISTENING))
    found = {each.inode for each in tcp}
    found |= {each.inode for each in udp if each.port != _NO_PORT}
    found |= {
        each.inode
        for each in unix
        if each.state == LISTENING or (each.type == socket.SOCK_DGRAM and each.name and not each.connected)
    }
    return frozenset(found)


def accepted(diag: SockDiag) -> frozenset[int]:
    """The inode numbers of connections that were accepted: an accepted socket has the address of a listening one.

    The other half of a connection within the machine has an address of its own, and what waits in a listener's
    queue has no inode.
    """
    tcp = list(diag.inet(socket.IPPROTO_TCP, states(LISTENING) | _CONNECTED))
    listening = {(each.family, each.port, each.address) for each in tcp if each.state == LISTENING}
    ports = {port for _family, port, _address in listening}
    found = {
        each.inode
        for each in tcp
        if each.port in ports
        and each.state != LISTENING
        and (
            (each.family, each.port, each.address) in listening or (each.family, each.port, _ANYWHERE) in listening
        )
    }
    unix = [each for each in diag.unix(states(ESTABLISHED, LISTENING)) if each.name and each.type in _STREAMS]
    names = {each.name for each in unix if each.state == LISTENING}
    found |= {each.inode for each in unix if each.state != LISTENING and each.name in names}
    return frozenset(found - {0})


class Listed:
    """Which sockets count, by network namespace: each namespace is listed once. Good for one look only."""

    def __init__(self, choose: Callable[[SockDiag], frozenset[int]]) -> None:
        self._choose = choose
        self._ours = procfs.network(os.getpid())
        self._known: dict[str, frozenset[int]] = {}

    def among(self, pid: int, links: Mapping[int, str]) -> Set[int]:
        """Those of the sockets `links` (see `procfs.links`) of a process that count, by inode number.

        Raises:
            Gone: it ended.
            Unsupported: we may not look into its network namespace.
        """
        sockets = {int(link[8:-1]) for link in links.values() if link.startswith("socket:[")}
        if not sockets:
            return sockets
        namespace = procfs.network(pid)
        found = sockets & self._in(namespace, pid)
        if namespace != self._ours and found != sockets:
            found |= sockets & self._in(self._ours, None)
        return found

    def _in(self, namespace: str, pid: int | None) -> frozenset[int]:
        known = self._known.get(namespace)
        if known is None:
            known = self._list(None if namespace == self._ours else pid)
            self._known[namespace] = known
        return known

    def _list(self, pid: int | None) -> frozenset[int]:
        namespace = None if pid is None else procfs.open_network(pid)
        try:
            with SockDiag(namespace) as diag:
                return self._choose(diag)
        except OSError as error:
            where = "here" if pid is None else f"in the network namespace of process {pid}"
            raise Unsupported(f"sockets {where} are not told: {os.strerror(error.errno or 0)}") from error
        finally:
            if namespace is not None:
                os.close(namespace)


class Sockets(Resource):
    """What is counted by socket, however many descriptors it has.

    What several processes share counts for each of them, and so in their sum, as it does for `fds`; for the
    machine, once. What no process has does not count: sockets of the kernel itself, for instance.
    """

    unit = Unit.COUNT
    levels = frozenset({Level.PROCESS, Level.PARTITION, Level.SYSTEM})

    def __init__(self, listed: Listed | None = None) -> None:
        self._listed = listed

    @classmethod
    def missing(cls) -> str | None:
        """Why this kernel does not list its sockets, if so."""
        try:
            with SockDiag() as diag:
                cls.choose(diag)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            return f"sock_diag: {why}; needs the modules unix_diag, tcp_diag and udp_diag"
        return None

    @staticmethod
    @abstractmethod
    def choose(diag: SockDiag) -> frozenset[int]:
        """The inode numbers of the sockets that count."""

    def look(self) -> Self:
        """This resource, for one look at many members: the kernel lists the sockets of a namespace once for all.

        To be forgotten after that look, as it answers from the same lists ever after.
        """
        return self if self._listed else type(self)(Listed(self.choose))

    def usage(self, target: Measured) -> float:
        match target:
            case Process():
                return len(self._had_by(target, self._listed or Listed(self.choose)))
            case System():
                return len(self._had_by_any())
        raise self.elsewhere(target)

    def limit(self, target: Measured) -> Limit:
        return limits.enforced(self, target)

    def _had_by_any(self) -> Set[Hashable]:
        listed = self._listed or Listed(self.choose)
        found: set[Hashable] = set()
        for pid in procfs.pids():
            try:
                found |= self._had_by(procfs.identify(pid), listed)
            except (Gone, Unsupported):
                continue
        return found

    def _had_by(self, process: Process, listed: Listed) -> Set[Hashable]:
        return procfs.reading(process, lambda pid: self._counted(pid, procfs.links(pid), listed))

    def _counted(self, pid: int, links: Mapping[int, str], listed: Listed) -> Set[Hashable]:
        return listed.among(pid, links)


class Channels(Sockets):
    """Endpoints that a process can be called on.

    TCP and UNIX sockets that listen; UDP and UNIX datagram sockets that are bound (to a port that the kernel chose
    for the first message, too) and not connected to one peer; POSIX message queues and FIFOs that it has open
    for reading. Not raw, packet and netlink sockets, which overhear what is meant for others or talk to the
    kernel; not System V message queues, which belong to no process.
    """

    name = "channels"
    help = "endpoints it can be called on: listening and bound sockets, message queues and FIFOs open for reading"

    choose = staticmethod(endpoints)

    def _counted(self, pid: int, links: Mapping[int, str], listed: Listed) -> Set[Hashable]:
        named = files.opened(pid, links, files.READABLE)
        others = {file.identity for file in named if stat.S_ISFIFO(file.mode) or files.is_message_queue(file)}
        return super()._counted(pid, links, listed) | others


class Connections(Sockets):
    """Accepted connections that a process serves: TCP, and UNIX of types stream and seqpacket.

    A connection counts as long as its socket is open, also when the peer has closed it. Accepted is what has the
    address of a socket that listens in the same network namespace; after its listener was closed, that no longer
    shows.
    """

    name = "connections"
    help = "accepted connections it serves"

    choose = staticmethod(accepted)
