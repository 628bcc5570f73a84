"""Wires the rooms together and runs them for one mount."""

import contextlib
import errno
import logging
import os
import resource as rlimits
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import pyfuse3
import trio

from limitfs import __version__, mounting, service
from limitfs.errors import LimitsError
from limitfs.hearing.arrivals import Arrivals
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.sources import Hearing
from limitfs.options import NONE, Options
from limitfs.resources import members, who
from limitfs.rules import plain
from limitfs.selecting.groups import Groups
from limitfs.space import eager
from limitfs.space.births import BirthLog
from limitfs.space.delivery import Delivery
from limitfs.space.fuse import Operations
from limitfs.space.house import House
from limitfs.space.poke import Notifier
from limitfs.space.recall import Recall
from limitfs.space.ruling import Ruling
from limitfs.space.shell import Shell
from limitfs.space.tree import Node, Tree
from limitfs.store import Store
from limitfs.watching.registry import Registry
from limitfs.watching.watcher import Surroundings

log = logging.getLogger(__name__)

OBEYED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end a daemon, or have it read the rules."""
NICE = -10
"""See setpriority(2)."""
PATIENCE = 0.3
"""Seconds to look, at the end, for who still uses the mount."""
CLOSING = 0.1
"""Seconds after `umount -l` in which the kernel may tell of files that were closed before."""


def serve(mountpoint: str, options: Options, ready: Callable[[], None]) -> int:
    """Mount at `mountpoint`, call `ready` when requests can be answered, and serve until it is unmounted.

    Returns:
        The exit code: 0 after an unmount or a termination signal.

    Raises:
        MountError, OSError, RuntimeError: it cannot be mounted.
    """
    Hearing.prepare()
    _raise_file_limit()
    _go_first()
    logging.getLogger("pyfuse3").addFilter(_tells_something)
    daemon = Daemon(mountpoint, options)
    eager.install()
    with mounting.alone(mountpoint):
        # From now on whoever ends it means the mount, too: obeyed as soon as it can be.
        signal.pthread_sigmask(signal.SIG_BLOCK, OBEYED)
        pyfuse3.init(daemon.operations, mountpoint, _fuse_options(options))
    try:
        trio.run(daemon.run, ready)
    finally:
        daemon.let_go()
        # Of one that was detached, somebody else's mount may have taken the place by now.
        pyfuse3.close(unmount=not daemon.detached)
    return 0


def _fuse_options(options: Options) -> set[str]:
    chosen = set(pyfuse3.default_options) | {"fsname=limitfs", "subtype=limitfs"} | options.flags
    chosen.discard("default_permissions")
    # The handlers check rights themselves, so that last_error can explain a refusal.
    return chosen | {"allow_other"} if options.allow_other else chosen


def _raise_file_limit() -> None:
    """Every followed process costs a descriptor; take all that we may have."""
    soft, hard = rlimits.getrlimit(rlimits.RLIMIT_NOFILE)
    if soft != hard:
        rlimits.setrlimit(rlimits.RLIMIT_NOFILE, (hard, hard))


def _go_first() -> None:
    """An alarm must be heard above all on a machine that is too busy: run before what keeps it busy."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


def _tells_something(record: logging.LogRecord) -> bool:
    """A client that was killed while it waited takes no answer: ENOENT, and no fault of anybody's."""
    return not ("fuse_reply_*" in record.msg and record.args == (os.strerror(errno.ENOENT),))


class Daemon:
    """Everything behind one mount.

    Attributes:
        detached: the mount was taken out of the tree of files while it was in use.
    """

    def __init__(self, mountpoint: str, options: Options) -> None:
        self._started = time.time()
        self.reactor = Reactor()
        self.hearing = Hearing(self.reactor)
        self.notifier = Notifier(mountpoint)
        delivery = Delivery(self.notifier.announce)
        registry = Registry(
            self.hearing.sources,
            self._surroundings(),
            delivery.emit,
            self.hearing.watch_death,
            options.max_watchers,
            options.hearing,
        )
        registry.ended = delivery.ended
        births = BirthLog(self.hearing.births, registry.surroundings, self.notifier.announce)
        groups = Groups(
            self.reactor,
            self.hearing.connector,
            self.hearing.deaths,
            options.max_groups,
            moves=self.hearing.moves,
        )
        self.house = House(registry, delivery, options, self.facts, births, self.hearing, groups)
        self.tree = Tree(self.house, time.time_ns())
        self.operations = Operations(self.tree, self.house)
        self.store = Store(None if options.state == NONE else options.state, mountpoint, self._call_later)
        self.house.recall = Recall(self._shell, self.house, self.store)
        registry.changed = self.house.recall.watcher_changed
        self.house.rules = Ruling(
            self._shell(0), _directories(options), self.store, Arrivals(self.hearing.directories)
        )
        self.detached = False
        # Also what the kernel holds up is left then, which pyfuse3.terminate() would wait for.
        self._serving = trio.CancelScope()
        self._terminated = False
        self._unmounted = False

    def _surroundings(self) -> Surroundings:
        def call_at(when: float, callback: Callable[[], None]) -> Callable[[], None]:
            return self.reactor.call_at(when, callback).cancel

        return Surroundings(self.reactor.now, time.time, who.describe, members.whole, call_at)

    def _call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.reactor.call_at(self.reactor.now() + seconds, callback)

    def _shell(self, user: int) -> Shell:
        return Shell(self.tree, user, _drop_name)

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve requests, sources and inotify until the mount ends."""
        self.begin()
        if told := _told_to_end():
            # Before anybody was served; what was not set up again yet is kept for the next.
            self._unmounted = signal.SIGTERM not in told
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.reactor.run)
            nursery.start_soon(self.notifier.run)
            nursery.start_soon(self._obey_signals)
            nursery.start_soon(service.attend, self.notifier.mountpoint, self.status)
            ready()
            # One task, one in reserve, and one for each write that waits, whose number fuse.py bounds.
            with self._serving:
                await pyfuse3.main(min_tasks=1, max_tasks=2**31 - 1)
            self._unmounted = not self._terminated
            nursery.cancel_scope.cancel()

    def begin(self) -> None:
        """Set up what the daemon before had, and what the rules say, before anybody is served.

        It stops half-way when this process was told to end.
        """
        self._follow_table()
        found = self.store.open()
        self.house.recall.restore(found, _told_to_end)
        self.house.rules.restore(found, self.house.recall.lost)
        if not _told_to_end():
            self.house.rules.reload(_told_to_end)

    def facts(self) -> dict[str, object]:
        """What the root's `state` tells of the daemon."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime": f"{time.time() - self._started:.0f}",
            "requests": self.operations.requests,
            "wakeups": self.reactor.wakeups,
            "hooks_full": self.hearing.full,
            "nodes": len(self.tree),
            "options": self.house.options,
            "rules": len(self.house.rules),
            "kept": self.store.trouble or len(self.store),
        }

    def status(self) -> str:
        """The daemon in one line, for people."""
        armed = sum(1 for watcher in self.house.registry if watcher.armed)
        return f"{self.notifier.mountpoint} answers, {armed} armed"

    # The end

    async def _obey_signals(self) -> None:
        with trio.open_signal_receiver(*OBEYED) as signals, _let_through():
            async for number in signals:
                if number == signal.SIGHUP:
                    self.house.rules.reload()
                    continue
                # Who types Ctrl-C means the mount, as with umount(8); a service manager may start us again.
                self._terminated = number == signal.SIGTERM
                self._say_who_holds()
                self._serving.cancel()

    def _say_who_holds(self) -> None:
        """The mount goes all the same: who still has a file open gets ENOTCONN."""
        holders = mounting.holders(self.notifier.mountpoint, patience=PATIENCE)
        held = ", ".join(f"{holder.pid} ({plain(holder.comm)}) holds {plain(holder.path)}" for holder in holders)
        if held:
            log.warning("ended while in use: %s", held)

    def _follow_table(self) -> None:
        """Hear of `umount -l`: the kernel tells only of the end of the last open file."""
        mount = mounting.top_mount(self.notifier.mountpoint)
        if mount is None:
            return
        table = self._table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)

        def look() -> None:
            if all(other.device != mount.device for other in mounting.table()):
                self.hearing.edges.remove(table)
                self._detach()

        self.hearing.edges.add(table, look, select.EPOLLPRI)

    def _detach(self) -> None:
        """Nobody can open anything any more; who has, must not keep the kernel's hooks in force."""
        self.detached = True
        # Of what was closed just before, the kernel tells just after.
        self._call_later(CLOSING if self.operations.open_files else 0, self._end_detached)

    def _end_detached(self) -> None:
        if self.operations.open_files:
            log.warning("unmounted while %d files were open: their users get ENOTCONN", self.operations.open_files)
        self._serving.cancel()

    def let_go(self) -> None:
        """What must be done before the process ends.

        Hooks, timers and triggers are descriptors, or the process' own: the kernel takes ten thousand of them back
        in a moment, where to disarm each would take seconds.
        """
        self.store.close(forget=self._unmounted)

    def close(self) -> None:
        """Disarm everything, where the process goes on."""
        self.let_go()
        self.house.rules.close()
        for watcher in list(self.house.registry):
            try:
                watcher.end()
            except (OSError, LimitsError):
                log.exception("disarming %s", watcher.path)
        self.hearing.close()
        self.reactor.close()


@contextlib.contextmanager
def _let_through() -> Iterator[None]:
    """Have the signals that are obeyed delivered; what comes later must not end this with the mount in place."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OBEYED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, OBEYED)


def _told_to_end() -> set[signal.Signals]:
    """The signals to end that have come, while they are not let through."""
    pending: set[signal.Signals] = signal.sigpending()
    return pending & {signal.SIGTERM, signal.SIGINT}


def _directories(options: Options) -> Sequence[str]:
    return () if options.rules == NONE else options.rules.split(":")


def _drop_name(node: Node) -> None:
    """Have the kernel forget a name that it did not see go."""
    if node.parent is not None and node.lookups:
        pyfuse3.invalidate_entry_async(node.parent.ino, os.fsencode(node.name), ignore_enoent=True)
