"""Limits of processes and partitions: reading, the text form, and setting them.

See getrlimit(2), prlimit(2), proc_pid_limits(5), and Documentation/admin-guide/cgroup-v2.rst.
"""

import errno
import math
import os
import re
import resource as rlimits
from fractions import Fraction

from limitfs.errors import Busy, Denied, Gone, Impossible, Invalid
from limitfs.resources import cgroups, procfs
from limitfs.resources.cgroups import Knob
from limitfs.resources.model import Limit, Measured, Partition, Process, Resource, Unit

_SUFFIXES: dict[Unit, dict[str, Fraction]] = {
    Unit.BYTES: {suffix: Fraction(1024**power) for power, suffix in enumerate(["", "K", "M", "G", "T"])},
    Unit.SECONDS: {
        "": Fraction(1),
        "us": Fraction(1, 1_000_000),
        "ms": Fraction(1, 1000),
        "s": Fraction(1),
        "m": Fraction(60),
        "h": Fraction(3600),
    },
    Unit.COUNT: {"": Fraction(1)},
    Unit.PERCENT: {"": Fraction(1)},
}
_AMOUNT = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)([a-zA-Z]*)")
_LARGEST = 2**63 - 1


def check(resource: Resource, target: Measured) -> None:
    """Make sure that `resource` is measured on `target`, and that `target` still exists.

    Raises:
        Unsupported: not at this level.
        Gone: the process or thread ended, the partition was removed.
    """
    if target.level not in resource.levels:
        raise resource.elsewhere(target)
    if isinstance(target, Partition):
        cgroups.check(target)
    else:
        procfs.check(target)


def enforced(resource: Resource, target: Measured) -> Limit:
    """What the RLIMIT_* of `resource` lets `target` have: only a process has such limits, all else has none.

    Raises:
        Unsupported: not at this level.
        Gone: the process or thread ended.
    """
    if isinstance(target, Process) and target.level in resource.levels and resource.rlimit is not None:
        return read_limit(target, resource.rlimit)
    check(resource, target)
    return Limit()


def read_limit(target: Process, rlimit: int) -> Limit:
    """Soft and hard limit of a process.

    Raises:
        Gone: the process ended.
    """
    found = _present(target.pid, rlimit)
    procfs.check(target)
    return Limit(*found)


def _present(pid: int, rlimit: int) -> tuple[float, float]:
    try:
        soft, hard = rlimits.prlimit(pid, rlimit)
    except ProcessLookupError as error:
        raise Gone(f"process {pid} has ended") from error
    except PermissionError:
        # Without CAP_SYS_RESOURCE prlimit(2) tells only of processes of our own user; the file tells of all.
        return procfs.limits(pid)[rlimit]
    return _from_kernel(soft), _from_kernel(hard)


def _from_kernel(number: int) -> float:
    return math.inf if number == rlimits.RLIM_INFINITY else number


def _to_kernel(number: float) -> int:
    return rlimits.RLIM_INFINITY if math.isinf(number) else int(number)


def parse_limit(text: str, unit: Unit) -> tuple[float, float | None]:
    """Soft and hard limit from "soft hard", or the soft limit alone from "soft" (hard is then None).

    Either may be "max". "max" alone stands for both, as it does when a limit is read.

    Raises:
        Invalid: not of this form.
        Impossible: more than the kernel can hold, not a whole number, or soft above hard.
    """
    words = list(re.finditer(r"\S+", text))
    if [word[0] for word in words] == ["max"]:
        return math.inf, math.inf
    if len(words) == 1:
        return _amount(words[0], unit), None
    if len(words) != 2:
        raise Invalid(f"a limit is one or two numbers, not {len(words)}", 'write "soft", "soft hard" or "max"')
    soft, hard = (_amount(word, unit) for word in words)
    _ordered(soft, hard)
    return soft, hard


def _amount(written: re.Match[str], unit: Unit) -> float:
    word, at = written[0], written.start()
    if word == "max":
        return math.inf
    match = _AMOUNT.fullmatch(word)
    suffixes = _SUFFIXES[unit]
    if match is None or match[2] not in suffixes:
        known = " ".join(filter(None, suffixes))
        raise Invalid(
            f"{word!r} is not a number of {unit}", f"units: {known}" if known else "write a plain number", at=at
        )
    number = Fraction(match[1]) * suffixes[match[2]]
    # A share of the CPU is kept in microseconds of each period; all else is counted in its unit.
    if number.denominator != 1 and unit is not Unit.PERCENT:
        raise Impossible(f"{word!r} is not a whole number", "the kernel keeps limits as whole numbers", at=at)
    if number >= _LARGEST:
        raise Impossible(f"{word!r} is more than the kernel can hold", 'write "max" for no limit', at=at)
    return int(number) if number.denominator == 1 else float(number)


def _ordered(soft: float, hard: float) -> None:
    if soft > hard:
        raise Impossible(
            f"the soft limit {_shown(soft)} is above the hard limit {_shown(hard)}", 'raise both: "soft hard"'
        )


def _shown(number: float) -> str:
    if math.isinf(number):
        return "max"
    return str(int(number)) if number == int(number) else f"{number:g}"


def set_limit(
    target: Process, rlimit: int, soft: float, hard: float | None = None, *, raise_hard: bool = False
) -> None:
    """Set the limits of a process, as its owner could with setrlimit(2).

    Args:
        target: the process.
        rlimit: number of the RLIMIT_*.
        soft: the new soft limit.
        hard: the new hard limit; None leaves it.
        raise_hard: whether the asking user may raise a hard limit. The daemon may be able to where the user is
            not, so the kernel's own refusal is not enough.

    Raises:
        Gone: the process ended.
        Impossible: soft above hard.
        Denied: the hard limit would rise and may not, or the kernel refuses.
    """
    present = read_limit(target, rlimit).hard
    hard = present if hard is None else hard
    _ordered(soft, hard)
    if hard > present and not raise_hard:
        raise _refusal(hard, present)
    try:
        rlimits.prlimit(target.pid, rlimit, (_to_kernel(soft), _to_kernel(hard)))
    except ProcessLookupError as error:
        raise Gone(f"process {target.pid} has ended") from error
    except PermissionError as error:
        raise _beyond_nr_open(rlimit, hard) or _refusal(hard, present) from error


def _refusal(hard: float, present: float) -> Denied:
    if hard > present:
        return Denied(
            f"the hard limit is {_shown(present)} and may only be lowered",
            "raising a hard limit takes CAP_SYS_RESOURCE",
        )
    return Denied(
        "the kernel does not let the daemon set limits of this process",
        "setting limits of another user's process takes CAP_SYS_RESOURCE",
    )


def _beyond_nr_open(rlimit: int, hard: float) -> Impossible | None:
    """The reason where nobody may have so many descriptors, which the kernel calls EPERM too (getrlimit(2))."""
    if rlimit != rlimits.RLIMIT_NOFILE:
        return None
    most = procfs.sysctl("fs/nr_open")
    if hard <= most:
        return None
    return Impossible(f"no process may have more than {most} descriptors", "see /proc/sys/fs/nr_open")


# Partitions


def of_partition(target: Partition, knob: Knob) -> Limit:
    """What a knob of a controller lets `target` have; no limit where it has no such file.

    Raises:
        Gone: the partition was removed.
    """
    if not cgroups.has(target, knob):
        cgroups.check(target)
        return Limit()
    most = cgroups.number(target, knob)
    return Limit(most, most)


def store(target: Partition, knob: Knob, limit: float, user: int) -> None:
    """Set a knob to a number, or to none, for a user; raises as `put`."""
    none = "-1" if knob.v1 is not None and cgroups.file(target, knob).endswith("_in_bytes") else "max"
    put(target, knob, none if math.isinf(limit) else str(int(limit)), user)


def put(target: Partition, knob: Knob, text: str, user: int) -> None:
    """Write to a knob, for a user, what the kernel wants to read there.

    Raises:
        Gone: the partition was removed.
        Unsupported: it has no such file.
        Busy: more is in use than the limit, and the kernel could not make it less.
        Impossible: the kernel does not take such a limit.
        Denied: it lets this user, or anybody, not set this one.
    """
    if not _may_store(target, knob, user):
        raise Denied("this limit belongs to who delegated the partition")
    try:
        cgroups.write(target, knob, text)
    except OSError as error:
        said = f"the kernel does not take {text} there: {os.strerror(error.errno or 0)}"
        if error.errno == errno.EBUSY:
            raise Busy(said, "more is in use; stop something, or choose a higher limit") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Denied(said) from error
        raise Impossible(said) from error


def _may_store(target: Partition, knob: Knob, user: int) -> bool:
    """Whether the kernel's own permissions let a user write to a knob; see "Delegation" in cgroup-v2.rst."""
    if user == 0:
        return True
    about = os.stat(cgroups.file(target, knob))
    return about.st_uid == user and bool(about.st_mode & 0o200)
