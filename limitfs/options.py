"""Mount options: `-o name[=value],…`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from limitfs.errors import Invalid
from limitfs.rules import DIRECTORIES

KERNEL_FLAGS = {"nosuid", "nodev", "noexec", "noatime", "nodiratime"}
"""Generic options of mount(8) that the kernel is given."""

_FOR_OTHERS = {
    # What holds without being asked for, or changes nothing here.
    *("rw", "suid", "dev", "exec", "atime", "diratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
    *("async", "defaults"),
    # For mount(8), systemd, and whoever starts the machine.
    *("auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup"),
    *("nofail", "_netdev"),
}
_OF_OTHERS = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")

NONE = "none"
"""For `rules` and `state`: do without."""


def _rules() -> str:
    """Rules are the administrator's: a mount of somebody else's has none unless asked for."""
    return ":".join(DIRECTORIES) if os.geteuid() == 0 else NONE


def _state() -> str:
    """A place of this user's that does not outlive a restart of the machine."""
    if os.geteuid() == 0:
        return "/run/limitfs"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "limitfs") if runtime else NONE


@dataclass(frozen=True, slots=True)
class Options:
    """What `-o` chose.

    Attributes:
        allow_other: users other than the mounting one may enter (on by default for root).
        hearing: "auto", or "sampled" to decline kernel hooks.
        hidepid: as proc(5) has it: 0 all see all, 1 others' process directories are closed, 2 invisible.
        max_watchers: armed and named watchers a user other than root may have.
        max_groups: groups a user other than root may have.
        max_open: files a user other than root may have open here.
        log: a file for the log where there is no journal.
        rules: directories of rules with colons between, or "none".
        state: the directory where what comes back after a crash is kept, or "none".
        flags: those of `KERNEL_FLAGS` that were asked for.
    """

    allow_other: bool = field(default_factory=lambda: os.geteuid() == 0)
    hearing: str = "auto"
    hidepid: int = 0
    max_watchers: int = 8192
    max_groups: int = 64
    max_open: int = 4096
    log: str | None = None
    rules: str = field(default_factory=_rules)
    state: str = field(default_factory=_state)
    flags: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, words: Iterable[str], start: "Options | None" = None, *, sloppy: bool = False) -> "Options":
        """Read options as mount(8) gives them, one word each.

        Args:
            words: `name` or `name=value`.
            start: what holds for names that are not given; the defaults, if left out.
            sloppy: pass over unknown names.

        Raises:
            Invalid: an unknown name or a bad value; the message names it.
        """
        options = start or cls()
        for word in words:
            name, equals, value = word.partition("=")
            if word in _FOR_OTHERS or word.startswith(_OF_OTHERS):
                continue
            if word in KERNEL_FLAGS:
                options = replace(options, flags=options.flags | {word})
            elif _field(name) in names():
                options = replace(options, **{_field(name): _value(name, value, bool(equals))})
            elif word == "ro":
                raise Invalid(
                    "limitfs cannot be mounted read-only", "to arm is to write; see hidepid and max_watchers"
                )
            elif not sloppy:
                raise Invalid(f"unknown mount option {name!r}", f"one of: {', '.join(names())}")
        return options

    def __str__(self) -> str:
        """In the form that `parse` reads."""
        chosen = [f"{name}={value}" for name in names()[1:] if (value := getattr(self, name)) is not None]
        return ",".join(["allow_other" if self.allow_other else "noallow_other", *chosen, *sorted(self.flags)])


def names() -> list[str]:
    """What limitfs itself understands; `noallow_other` besides."""
    return [f.name for f in fields(Options) if f.name != "flags"]


def _field(name: str) -> str:
    return "allow_other" if name == "noallow_other" else name


def _value(name: str, value: str, given: bool) -> Any:
    if name in ("allow_other", "noallow_other"):
        if given:
            raise Invalid(f"mount option {name} takes no value")
        return name == "allow_other"
    if not value:
        raise Invalid(f"mount option {name} needs a value")
    if name == "hearing" and value not in ("auto", "sampled"):
        raise Invalid(f"hearing={value}: no such way of hearing", "hearing=auto or hearing=sampled")
    if name in ("log", "hearing"):
        return value
    if name in ("rules", "state"):
        # The daemon leaves the working directory.
        paths = [path for path in (value.split(":") if name == "rules" else [value]) if path]
        if not paths:
            raise Invalid(f"mount option {name}={value} names no directory")
        return value if value == NONE else ":".join(map(os.path.abspath, paths))
    named = {"off": 0, "noaccess": 1, "invisible": 2}
    number = named.get(value, int(value) if value.isascii() and value.isdigit() else -1)
    if number < 0 or (name == "hidepid" and number > 2):
        raise Invalid(f"mount option {name}={value}: not a number that fits")
    return number
