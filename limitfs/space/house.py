"""What the files of the tree are about: the one object that readers and writers are given."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from limitfs.hearing.sources import Hearing
from limitfs.options import Options
from limitfs.resources.model import Target
from limitfs.selecting.groups import Groups
from limitfs.space.births import BirthLog
from limitfs.space.delivery import Delivery
from limitfs.space.users import LastErrors
from limitfs.watching.registry import Registry

if TYPE_CHECKING:
    from limitfs.space.recall import Recall
    from limitfs.space.ruling import Ruling


@dataclass(slots=True)
class House:
    """Everything behind the mount.

    Attributes:
        facts: lines of the root `state` that only the daemon knows (pid, start, requests, wake-ups).
        births: the record of processes.
        rules, recall: those of limitfs.d, and what comes back after a crash; there once the tree is.
        groups: those below `group/`.
        hearing: for what an open file hears by itself: PSI triggers.
        highest: own high-water marks by target and resource name: (value, Unix time since when).
    """

    registry: Registry
    delivery: Delivery
    options: Options
    facts: Callable[[], dict[str, object]]
    births: BirthLog
    hearing: Hearing
    groups: Groups
    rules: "Ruling" = field(init=False)
    recall: "Recall" = field(init=False)
    last_errors: LastErrors = field(default_factory=LastErrors)
    highest: dict[tuple[Target, str], tuple[float, float]] = field(default_factory=dict)
