"""The line that `births` has for a fork, an exec or an exit."""

from limitfs.hearing.connector import Birth
from limitfs.watching.crossing import iso, number, quoted
from limitfs.watching.watcher import Surroundings


def birth_line(around: Surroundings, birth: Birth, user: int) -> bytes | None:
    """The line, or None where the process is not the reader's to see (root sees all)."""
    if user != 0 and birth.uid != user and birth.kind != "lost":
        return None
    # The kernel's clock is monotonic; the line tells the time of day at which it happened.
    happened = around.wall() - (around.now() - birth.time_ns / 1e9)
    pairs = (
        ("seq", str(around.next_seq())),
        ("time", iso(happened)),
        ("birth", birth.kind),
        ("pid", number(birth.pid)),
        ("ppid", number(birth.ppid)),
        ("comm", quoted(birth.comm)),
        ("uid", number(birth.uid)),
        ("status", number(birth.status)),
    )
    return (" ".join(f"{key}={value}" for key, value in pairs) + "\n").encode()
