"""Kernel programs under test: a source that is unloaded afterwards, and a listener that counts alarms."""

import contextlib
import ctypes
import functools
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
from kernelkit import Heard, Turned

from limitfs.hearing.bpf import build
from limitfs.hearing.bpf.source import BpfFds, BpfRss, BpfTasks, Witness
from limitfs.resources.model import Target

AnySource = TypeVar("AnySource", BpfFds, BpfRss, BpfTasks)

_BPF_LINK_GET_NEXT_ID = 31
_SYS_BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), 280)


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
    if not build.build(out):
        pytest.skip("the kernel programs cannot be built here")
    return out


@contextlib.contextmanager
def loaded(kind: type[AnySource], reactor: Turned) -> Iterator[AnySource]:
    """A source that works here, or the test is skipped."""
    source = kind(reactor, objects())
    reason = source.missing()
    if reason is not None:
        pytest.skip(reason)
    try:
        yield source
    finally:
        source.close()


def links() -> int:
    """How many programs are attached through links, on the whole machine."""
    libc = ctypes.CDLL(None, use_errno=True)
    attribute = (ctypes.c_uint32 * 8)()
    count = 0
    while libc.syscall(_SYS_BPF, _BPF_LINK_GET_NEXT_ID, ctypes.byref(attribute), ctypes.sizeof(attribute)) == 0:
        attribute[0] = attribute[1]
        count += 1
    return count


def settle(reactor: Turned) -> None:
    """Take all that the kernel has said."""
    while reactor.quiet(0.05):
        pass


def base_fds(pid: int) -> int:
    """Descriptors that are open now."""
    return os.stat(f"/proc/{pid}/fd").st_size or len(os.listdir(f"/proc/{pid}/fd"))
