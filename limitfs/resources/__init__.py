"""What can be measured. Adding a resource is adding a class to one module here, and its name to `kinds`."""

from limitfs.resources.cpu import Cpu, Cputime
from limitfs.resources.fds import Fds
from limitfs.resources.filesize import Filesize
from limitfs.resources.memory import Available, Data, Locked, Memory, Shared, Swap, Virtual
from limitfs.resources.model import Level, Resource
from limitfs.resources.pressure import CpuPressure, IoPressure, MemoryPressure, Pressure
from limitfs.resources.signals import Signals
from limitfs.resources.sockets import Channels, Connections, Sockets
from limitfs.resources.stack import Stack
from limitfs.resources.tasks import Processes, Threads

__all__ = ["ABSENT", "RESOURCES", "at", "kinds"]


def kinds() -> list[Resource]:
    """One of each, whatever this kernel has, in the order of the manual's table."""
    return [
        Cpu(), Cputime(),
        Memory(), Available(), Swap(), Shared(), Virtual(), Data(), Locked(), Stack(),
        Fds(), Threads(), Processes(), Channels(), Connections(), Signals(), Filesize(),
        CpuPressure(), MemoryPressure(), IoPressure(),
    ]  # fmt: skip


ABSENT: dict[str, str] = {
    each.name: why for each in kinds() if isinstance(each, Pressure | Sockets) and (why := each.missing())
}
"""What this kernel does not tell, by its name, and why."""

RESOURCES: dict[str, Resource] = {each.name: each for each in kinds() if each.name not in ABSENT}
"""Every resource of this kernel by its name."""


def at(level: Level) -> list[Resource]:
    """The resources that are measured at `level`."""
    return [each for each in RESOURCES.values() if level in each.levels]
