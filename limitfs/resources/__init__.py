"""What can be measured. Adding a resource is adding a class to one module here, and its name to `_all`."""

from limitfs.resources.cpu import Cpu, Cputime
from limitfs.resources.fds import Fds
from limitfs.resources.memory import Available, Data, Locked, Memory, Shared, Swap, Virtual
from limitfs.resources.model import Level, Resource
from limitfs.resources.pressure import CpuPressure, IoPressure, MemoryPressure, Pressure
from limitfs.resources.signals import Signals
from limitfs.resources.stack import Stack
from limitfs.resources.tasks import Processes, Threads

__all__ = ["RESOURCES", "at"]


def _all() -> list[Resource]:
    """One of each that this kernel has, in the order of the manual's table."""
    everywhere: list[Resource] = [
        Cpu(), Cputime(),
        Memory(), Available(), Swap(), Shared(), Virtual(), Data(), Locked(), Stack(),
        Fds(), Threads(), Processes(), Signals(),
    ]  # fmt: skip
    pressures: list[type[Pressure]] = [CpuPressure, MemoryPressure, IoPressure]
    return everywhere + [kind() for kind in pressures if kind.present()]


RESOURCES: dict[str, Resource] = {each.name: each for each in _all()}
"""Every resource of this kernel by its name."""


def at(level: Level) -> list[Resource]:
    """The resources that are measured at `level`."""
    return [each for each in RESOURCES.values() if level in each.levels]
