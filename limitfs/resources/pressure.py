"""Pressure stall information, see Documentation/accounting/psi.rst."""

from typing import ClassVar

from limitfs.errors import Unsupported
from limitfs.resources import procfs
from limitfs.resources.model import Level, Limit, Measured, Resource, System, Unit


class Pressure(Resource):
    """Share of time in which some task waited for a resource (the line "some"). Sums make no sense.

    Attributes:
        path: the file that is read, and that takes triggers.
    """

    unit = Unit.PERCENT
    levels = frozenset({Level.SYSTEM})
    rate = True
    window = 10.0
    summable = False
    path: ClassVar[str]

    @classmethod
    def present(cls) -> bool:
        """Whether this kernel keeps it; where PSI is built in but switched off the file exists, unreadable."""
        try:
            procfs.psi(cls.path)
        except Unsupported:
            return False
        return True

    def usage(self, target: Measured) -> float:
        """Percent of time stalled over the last 10 s, by the kernel's own average."""
        return self._read(target).avg10

    def limit(self, target: Measured) -> Limit:
        if not isinstance(target, System):
            raise self.elsewhere(target)
        return Limit(100.0, 100.0)

    def counter(self, target: Measured) -> float:
        """Seconds stalled since boot, to the microsecond."""
        return self._read(target).total

    def _read(self, target: Measured) -> procfs.Psi:
        if not isinstance(target, System):
            raise self.elsewhere(target)
        return procfs.psi(self.path)


class CpuPressure(Pressure):
    """Some task was ready to run and had no CPU."""

    name = "cpu_pressure"
    help = "share of time in which some task waited for a CPU"
    path = "/proc/pressure/cpu"


class MemoryPressure(Pressure):
    """Some task waited for memory: reclaim, refaults, swapping in."""

    name = "memory_pressure"
    help = "share of time in which some task waited for memory"
    path = "/proc/pressure/memory"


class IoPressure(Pressure):
    """Some task waited for input or output."""

    name = "io_pressure"
    help = "share of time in which some task waited for I/O"
    path = "/proc/pressure/io"
