"""Pressure stall information, see Documentation/accounting/psi.rst."""

from typing import ClassVar

from limitfs.errors import Unsupported
from limitfs.resources import cgroups, limits, procfs
from limitfs.resources.cgroups import Knob
from limitfs.resources.model import Level, Limit, Measured, Partition, Resource, System, Unit


class Pressure(Resource):
    """Share of time in which some task waited for a resource (the line "some"). Sums make no sense.

    Attributes:
        path: the machine's file that is read, and that takes triggers.
        knob: that of a partition.
    """

    unit = Unit.PERCENT
    levels = frozenset({Level.PARTITION, Level.SYSTEM})
    rate = True
    window = 10.0
    summable = False
    path: ClassVar[str]
    knob: ClassVar[Knob]

    @classmethod
    def missing(cls) -> str | None:
        """Why this kernel does not keep it, if so; where PSI is only switched off the file exists, unreadable."""
        try:
            procfs.psi(cls.path)
        except Unsupported:
            return f"no {cls.path}: boot with psi=1, on a kernel with CONFIG_PSI"
        return None

    def usage(self, target: Measured) -> float:
        """Percent of time stalled over the last 10 s, by the kernel's own average."""
        return self._read(target).avg10

    def limit(self, target: Measured) -> Limit:
        limits.check(self, target)
        return Limit(100.0, 100.0)

    def kept(self, target: Partition) -> bool:
        return cgroups.has(target, self.knob)

    def counter(self, target: Measured) -> float:
        """Seconds stalled since boot, to the microsecond."""
        return self._read(target).total

    def file(self, target: Measured) -> str:
        """The file that is read, and that takes triggers.

        Raises:
            Gone: the partition was removed.
            Unsupported: it keeps none (cgroup.pressure is 0), or the target is of another level.
        """
        match target:
            case Partition():
                return cgroups.file(target, self.knob)
            case System():
                return self.path
        raise self.elsewhere(target)

    def _read(self, target: Measured) -> procfs.Psi:
        path = self.file(target)
        try:
            return procfs.psi(path)
        except Unsupported:
            limits.check(self, target)  # it may have been removed meanwhile
            raise


class CpuPressure(Pressure):
    """Some task was ready to run and had no CPU."""

    name = "cpu_pressure"
    help = "share of time in which some task waited for a CPU"
    path = "/proc/pressure/cpu"
    knob = Knob("pressure", "cpu.pressure", None)


class MemoryPressure(Pressure):
    """Some task waited for memory: reclaim, refaults, swapping in."""

    name = "memory_pressure"
    help = "share of time in which some task waited for memory"
    path = "/proc/pressure/memory"
    knob = Knob("pressure", "memory.pressure", None)


class IoPressure(Pressure):
    """Some task waited for input or output."""

    name = "io_pressure"
    help = "share of time in which some task waited for I/O"
    path = "/proc/pressure/io"
    knob = Knob("pressure", "io.pressure", None)
