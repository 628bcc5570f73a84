"""What the files of the tree are about: the one object that readers and writers are given."""

from collections.abc import Callable
from dataclasses import dataclass, field

from limitfs.hearing.sources import Hearing
from limitfs.options import Options
from limitfs.resources.model import Target
from limitfs.space.births import BirthLog
from limitfs.space.delivery import Delivery
from limitfs.space.users import LastErrors
from limitfs.watching.registry import Registry


@dataclass(slots=True)
class House:
    """Everything behind the mount.

    Attributes:
        facts: lines of the root `state` that only the daemon knows (pid, start, requests, wake-ups).
        births: the record of processes.
        hearing: for what an open file hears by itself: PSI triggers.
        highest: own high-water marks by target and resource name: (value, Unix time since when).
    """

    registry: Registry
    delivery: Delivery
    options: Options
    facts: Callable[[], dict[str, object]]
    births: BirthLog
    hearing: Hearing
    last_errors: LastErrors = field(default_factory=LastErrors)
    highest: dict[tuple[Target, str], tuple[float, float]] = field(default_factory=dict)
