"""Kernel programs under test: a source that is unloaded afterwards, and a listener that counts alarms."""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from kernelkit import Heard, Turned
from limitfs.hearing.bpf import build, layout
from limitfs.hearing.bpf.source import BpfFds, BpfRss, BpfTasks
from limitfs.hearing.source import Witness
from limitfs.resources.model import Target

AnySource = TypeVar("AnySource", BpfFds, BpfRss, BpfTasks)


@dataclass
class Alarmed(Heard):
    """A listener that keeps the alarms of each member, by readings and by `missed`."""

    level: float = 0
    alarms: dict[Target, int] = field(default_factory=dict)
    unseen: int = 0
    witnesses: list[Witness] = field(default_factory=list)
    _beyond: set[Target] = field(default_factory=set)

    def reading(self, member: Target, value: float) -> None:
        super().reading(member, value)
        if value < self.level:
            self._beyond.discard(member)
        elif member not in self._beyond:
            self._beyond.add(member)
            self.alarms[member] = self.alarms.get(member, 0) + 1

    def gone(self, member: Target, peak: float | None = None) -> None:
        super().gone(member, peak)
        self._beyond.discard(member)

    def missed(self, member: Target, alarms: int) -> None:
        self.alarms[member] = self.alarms.get(member, 0) + alarms
        self.unseen += alarms

    def witnessed(self, member: Target, witness: Witness) -> None:
        del member
        self.witnesses.append(witness)

    @property
    def total(self) -> int:
        return sum(self.alarms.values())


@functools.cache
def objects() -> Path:
    """Where the objects are; built where the package brings none."""
    if all((build.SOURCES / f"{name}.bpf.o").exists() for name in build.NAMES):
        return build.SOURCES
    out = Path(tempfile.mkdtemp(prefix="limitfs-bpf-"))
    assert build.build(out), "tests/run installs what this needs"
    return out


@contextlib.contextmanager
def loaded(kind: type[AnySource], reactor: Turned) -> Iterator[AnySource]:
    """A source that works here, or the test is skipped."""
    source = kind(reactor, objects())
    reason = source.missing()
    if reason is not None:
        pytest.skip(reason)
    try:
        source.engine.wait_detached()
        yield source
    finally:
        source.close()


def links() -> int:
    """How many programs this process has attached: a link ends with its descriptor, proc_pid_fdinfo(5)."""
    count = 0
    for name in os.listdir("/proc/self/fdinfo"):
        with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{name}") as info:
            count += "link_type" in info.read()
    return count


def settle(reactor: Turned) -> None:
    """Take all that the kernel has said."""
    while reactor.quiet(0.05) or reactor.next_time() <= reactor.now():
        pass


def base_fds(pid: int) -> int:
    """Descriptors that are open now."""
    return os.stat(f"/proc/{pid}/fd").st_size or len(os.listdir(f"/proc/{pid}/fd"))


def test_layouts_are_those_of_the_header() -> None:
    """Compared with the C compiler's."""
    clang = shutil.which("clang")
    assert clang, "tests/run installs it"
    names = {
        "watch": layout.Watch,
        "config": layout.Config,
        "member": layout.Member,
        "state": layout.State,
        "record": layout.Record,
        "share": layout.Share,
        "total": layout.Total,
        "membership": layout.Membership,
        "planting": layout.Planting,
        "leaving": layout.Leaving,
        "control": layout.Control,
    }
    lines = ["#include <linux/types.h>", f'#include "{build.SOURCES}/limitfs.h"']
    for name, structure in names.items():
        lines.append(f'_Static_assert(sizeof(struct {name}) == {ctypes.sizeof(structure)}, "{name}");')
        for entry in structure._fields_:
            offset = getattr(structure, entry[0]).offset
            lines.append(
                f'_Static_assert(__builtin_offsetof(struct {name}, {entry[0]}) == {offset}, "{entry[0]}");'
            )
    done = subprocess.run(
        [clang, "-fsyntax-only", "-x", "c", "-"],
        input="\n".join(lines),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
