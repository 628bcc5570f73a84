"""Wires the rooms together and runs them for one mount."""

import contextlib
import errno
import logging
import math
import os
import resource as rlimits
import signal
import time
from collections.abc import Callable

import pyfuse3
import trio

from limitfs import __version__
from limitfs.errors import LimitsError
from limitfs.hearing.reactor import Reactor
from limitfs.hearing.sources import Hearing
from limitfs.options import Options
from limitfs.resources import who
from limitfs.resources.model import Processes, Resource, System, Target, Threads
from limitfs.space import eager
from limitfs.space.births import BirthLog
from limitfs.space.delivery import Delivery
from limitfs.space.fuse import Operations
from limitfs.space.house import House
from limitfs.space.poke import Notifier
from limitfs.space.tree import Tree
from limitfs.watching.registry import Registry
from limitfs.watching.watcher import Surroundings

log = logging.getLogger(__name__)

NICE = -10
"""See setpriority(2)."""


def serve(mountpoint: str, options: Options, ready: Callable[[], None]) -> int:
    """Mount at `mountpoint`, call `ready` when requests can be answered, and serve until it is unmounted.

    Returns:
        The exit code: 0 after an unmount or a termination signal.

    Raises:
        OSError, RuntimeError: it cannot be mounted.
    """
    Hearing.prepare()
    _raise_file_limit()
    _go_first()
    logging.getLogger("pyfuse3").addFilter(_tells_something)
    daemon = Daemon(mountpoint, options)
    eager.install()
    pyfuse3.init(daemon.operations, mountpoint, _fuse_options(options))
    try:
        trio.run(daemon.run, ready)
    finally:
        daemon.close()
        pyfuse3.close(unmount=True)
    return 0


def _fuse_options(options: Options) -> set[str]:
    chosen = set(pyfuse3.default_options) | {"fsname=limitfs", "subtype=limitfs"}
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
    """Everything behind one mount."""

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
        births = BirthLog(self.hearing.connector, registry.surroundings, self.notifier.announce)
        self.house = House(registry, delivery, options, self.facts, births, self.hearing)
        self.tree = Tree(self.house, time.time_ns())
        self.operations = Operations(self.tree, self.house)

    def _surroundings(self) -> Surroundings:
        def call_at(when: float, callback: Callable[[], None]) -> Callable[[], None]:
            return self.reactor.call_at(when, callback).cancel

        return Surroundings(self.reactor.now, time.time, who.describe, _whole, call_at)

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve requests, sources and inotify until the mount ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.reactor.run)
            nursery.start_soon(self.notifier.run)
            nursery.start_soon(_terminate_on_signal)
            ready()
            # One task is enough, and quickest: no handler ever waits.
            await pyfuse3.main(min_tasks=1, max_tasks=1)
            nursery.cancel_scope.cancel()

    def facts(self) -> dict[str, object]:
        """What the root's `state` tells of the daemon."""
        return {
            "version": __version__,
            "pid": os.getpid(),
            "uptime": f"{time.time() - self._started:.0f}",
            "requests": self.operations.requests,
            "wakeups": self.reactor.wakeups,
            "nodes": len(self.tree),
        }

    def close(self) -> None:
        """Disarm everything: no hook outlives the daemon."""
        for watcher in list(self.house.registry):
            try:
                watcher.end()
            except (OSError, LimitsError):
                log.exception("disarming %s", watcher.path)
        self.hearing.close()
        self.reactor.close()


def _whole(resource: Resource, target: Target) -> float:
    """What 100 % is; of a collection, what it is for the thing whose parts it collects."""
    if isinstance(target, Processes):
        target = System()
    if isinstance(target, Threads):
        target = target.process
    return resource.whole(target) if target.level in resource.levels else math.inf


async def _terminate_on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async for _number in signals:
            pyfuse3.terminate()
