"""Mount options: `-o name[=value],…`."""

import os
from dataclasses import dataclass, field, fields, replace
from typing import Any

from limitfs.errors import Invalid

KERNEL_FLAGS = {"rw", "ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime"}
"""Generic options of mount(8) that change nothing here."""


@dataclass(frozen=True, slots=True)
class Options:
    """What `-o` chose.

    Attributes:
        allow_other: users other than the mounting one may enter (on by default for root).
        hearing: "auto", or "sampled" to decline kernel hooks.
        hidepid: as proc(5) has it: 0 all see all, 1 others' process directories are closed, 2 invisible.
        max_watchers: armed and named watchers a user other than root may have.
        max_open: files a user other than root may have open here.
        log: a file for the log where there is no journal.
    """

    allow_other: bool = field(default_factory=lambda: os.geteuid() == 0)
    hearing: str = "auto"
    hidepid: int = 0
    max_watchers: int = 8192
    max_open: int = 4096
    log: str | None = None

    @classmethod
    def parse(cls, words: list[str]) -> "Options":
        """Read options as mount(8) gives them, one word each.

        Raises:
            Invalid: an unknown name or a bad value; the message names it.
        """
        options = cls()
        for word in words:
            name, equals, value = word.partition("=")
            if name in KERNEL_FLAGS and not equals:
                continue
            options = replace(options, **{_known(name): _value(name, value, bool(equals))})
        return options


def _known(name: str) -> str:
    known = name.removeprefix("no") if name == "noallow_other" else name
    if known not in (f.name for f in fields(Options)):
        raise Invalid(f"unknown mount option {name!r}", f"one of: {', '.join(f.name for f in fields(Options))}")
    return known


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
    named = {"off": 0, "noaccess": 1, "invisible": 2}
    number = named.get(value, int(value) if value.isascii() and value.isdigit() else -1)
    if number < 0 or (name == "hidepid" and number > 2):
        raise Invalid(f"mount option {name}={value}: not a number that fits")
    return number
