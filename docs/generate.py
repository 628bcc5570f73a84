#!/usr/bin/env python3
"""Write the generated parts of the manual from the code that they describe.

    docs/generate.py            write them
    docs/generate.py --check    write nothing; name what differs, and exit 1 if anything does

A part stands between two marks, `generated: NAME` and `end of generated`, in a comment of its file's language.
"""

import argparse
import re
import stat
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from limitfs.hearing.reactor import Reactor  # noqa: E402
from limitfs.hearing.sources import Hearing  # noqa: E402
from limitfs.resources import kinds, members  # noqa: E402
from limitfs.resources.model import (  # noqa: E402
    Level,
    Partition,
    Partitions,
    Process,
    Processes,
    Resource,
    Several,
    System,
    Target,
    Thread,
    Threads,
)
from limitfs.space import content  # noqa: E402
from limitfs.space.table import RESOURCE, WATCHER, Dir, Entry, Link, walk  # noqa: E402

FILES = ("pathname-space.md", "each-or-sum.md", "hearing.md", "man/limitfs.5")

_PART = re.compile(
    r"^(?P<begin>(?:<!-- |\.\\\" )generated: (?P<name>[a-z-]+)(?: -->)?\n)"
    r".*?"
    r"^(?P<end>(?:<!-- |\.\\\" )end of generated(?: -->)?\n)",
    re.MULTILINE | re.DOTALL,
)


def filled(text: str) -> str:
    """`text` with every generated part made anew."""
    return _PART.sub(lambda part: part["begin"] + PARTS[part["name"]]() + part["end"], text)


# What there is, whatever this kernel has


def places() -> list[tuple[str, Entry]]:
    """Every path above the resource directories, and these once."""
    return [(path, entry) for path, entry in walk() if "RESOURCE/" not in path]


def directory(below: Dir) -> list[tuple[str, Entry]]:
    """The entries of a directory, not of those in it."""
    return [(path, entry) for path, entry in walk(below) if "/" not in path]


# Tables in Markdown


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _table(*rows: tuple[str, ...]) -> str:
    head, *body = rows
    return "\n" + _row(*head) + _row(*("---" for _ in head)) + "".join(_row(*row) for row in body) + "\n"


def _shown(path: str, entry: Entry) -> str:
    return f"`{path}{'/' if isinstance(entry, Dir) else ''}`"


def _mode(entry: Entry) -> str:
    kind = stat.S_IFDIR if isinstance(entry, Dir) else stat.S_IFLNK if isinstance(entry, Link) else stat.S_IFREG
    return f"`{stat.filemode(kind | entry.mode)}`"


def _help(entry: Entry) -> str:
    condition = "; only where there is something below" if entry.present is content.has_members else ""
    return entry.help + condition


def _entries(entries: list[tuple[str, Entry]]) -> str:
    rows = [(_shown(path, entry), _mode(entry), _help(entry)) for path, entry in entries]
    return _table(("name", "mode", "what it is"), *rows)


def resource_table() -> str:
    """Which resource is measured where."""
    levels = tuple(Level)
    rows = [
        (
            f"`{each.name}`",
            each.unit,
            *(_yes(level in each.levels) for level in levels),
            _yes(each.summable),
            each.help,
        )
        for each in kinds()
    ]
    return _table(("resource", "unit", *levels, "sum", "what it is"), *rows)


def _yes(so: bool) -> str:
    return "yes" if so else ""


# Who hears what

_SOMEBODY = Process(0, 0)
_SOMEWHERE = Partition("/", 0, 0)
_TARGETS: tuple[tuple[str, Target, bool], ...] = (
    ("`system/`", System(), False),
    ("`partition/` each", Partitions(), True),
    ("`CGROUP/` sum", _SOMEWHERE, False),
    ("`CGROUP/` each", Processes(_SOMEWHERE), True),
    ("`process/` each", Processes(), True),
    ("`process/` sum", Processes(), False),
    ("`process/PID/`", _SOMEBODY, False),
    ("`thread/` each", Threads(_SOMEBODY), True),
    ("`thread/` sum", Threads(_SOMEBODY), False),
    ("`thread/TID/`", Thread(0, 0, 0), False),
)


def hearing_table() -> str:
    """The sources of each resource on each kind of target, best first."""
    reactor = Reactor()
    try:
        sources = Hearing(reactor).sources
    finally:
        reactor.close()

    def heard(resource: Resource, target: Target, each: bool) -> str:
        if target.level not in resource.levels or not (each or _can_total(resource, target)):
            return ""
        # Whether the kernel keeps a partition's number depends on the machine: else its processes are heard.
        kinds = (target, Processes(target)) if isinstance(target, Partition) else (target,)
        return ", ".join(
            source.name for source in sources if any(source.hears(resource, kind, each) for kind in kinds)
        )

    rows = [
        (f"`{resource.name}`", *(heard(resource, target, each) for _name, target, each in _TARGETS))
        for resource in kinds()
    ]
    return _table(("resource", *(name for name, _target, _each in _TARGETS)), *rows)


def _can_total(resource: Resource, target: Target) -> bool:
    return resource.summable or not isinstance(target, Several)


# What each and sum can be

_EVERYWHERE: tuple[tuple[str, Target], ...] = (
    ("`thread/TID/`", Thread(0, 0, 0)),
    ("`thread/`", Threads(_SOMEBODY)),
    ("`process/PID/`", _SOMEBODY),
    ("`process/`", Processes()),
    ("`group/NAME/`", Processes(content.SomeGroup())),
    ("`partition/CGROUP/`", _SOMEWHERE),
    ("`partition/`", Partitions()),
    ("`system/`", System()),
)


def modes_table() -> str:
    """What `mode` can be for each resource on each path; the one that it starts with is bold."""

    def modes(resource: Resource, target: Target) -> str:
        if not (isinstance(target, Partition) or members.measured(resource, target)):
            return ""
        if target.level not in resource.levels and not resource.headcount:
            return ""
        each = members.has_members(resource, target)
        total = resource.summable or not isinstance(target, Several)
        first = "each" if members.starts_as_each(resource, target) else "sum"
        found = [mode for mode, there in (("each", each), ("sum", total)) if there]
        return " ".join(f"**{mode}**" if mode == first else mode for mode in found)

    rows = [(f"`{each.name}`", *(modes(each, target) for _name, target in _EVERYWHERE)) for each in kinds()]
    return _table(("resource", *(name for name, _target in _EVERYWHERE)), *rows)


# Lists in mdoc


def _items(entries: list[tuple[str, Entry]]) -> Iterator[str]:
    yield ".Bl -tag -width Ds\n"
    for path, entry in entries:
        slash = "/" if isinstance(entry, Dir) else ""
        yield f".It Pa {path}{slash} Pq Li {stat.filemode(entry.mode)[1:]}\n{_sentence(_help(entry))}\n"
    yield ".El\n"


def _sentence(text: str) -> str:
    capital = text if text.startswith(("auto", "fork")) else text[0].upper() + text[1:]
    # mandoc wants lines of at most 80 characters.
    return textwrap.fill(capital.replace("\\", "\\e").replace("`", ""), 78, break_on_hyphens=False) + "."


def manual_list(entries: list[tuple[str, Entry]]) -> str:
    """Files with their modes and help."""
    return "".join(_items(entries))


def manual_resources() -> str:
    """Resources with their units, levels and limits."""
    lines = [".Bl -tag -width Ds\n"]
    for each in kinds():
        levels = ", ".join(level for level in Level if level in each.levels)
        lines.append(f".It Cm {each.name}\n{_sentence(each.help)}\nUnit: {each.unit}.\nMeasured for: {levels}.\n")
    return "".join([*lines, ".El\n"])


PARTS: dict[str, Callable[[], str]] = {
    "places": lambda: _entries(places()),
    "resource-files": lambda: _entries(directory(RESOURCE)),
    "watcher-files": lambda: _entries(directory(WATCHER)),
    "resources": resource_table,
    "hearing": hearing_table,
    "modes": modes_table,
    "manual-places": lambda: manual_list(places()),
    "manual-resource-files": lambda: manual_list(directory(RESOURCE)),
    "manual-watcher-files": lambda: manual_list(directory(WATCHER)),
    "manual-resources": manual_resources,
}


def main() -> int:
    """Write, or with --check compare; give the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated parts of the manual.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything differs")
    check = parser.parse_args().check
    differ = [path for path in (HERE / name for name in FILES) if _differs(path, check)]
    for path in differ:
        print(f"{path.relative_to(HERE.parent)} {'differs: run docs/generate.py' if check else 'written'}")
    return 1 if check and differ else 0


def _differs(path: Path, check: bool) -> bool:
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if after == before:
        return False
    if not check:
        path.write_text(after, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
