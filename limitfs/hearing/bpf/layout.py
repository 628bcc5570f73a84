"""What the kernel programs and we say to each other: limitfs.h once more, for ctypes. Change both."""

import ctypes
import enum

WATCHES = 16
STATES = 65536
GROUPS = 8
DEPTH = 16
MARKS = 65536
EVERY = 1
GROUP = 1 << 62
PROCESS = 1 << 63
EVERY_CGROUP = PROCESS | GROUP
SHARE = 1_000_000_000
KINDS = 8
HIGHEST = 2**63 - 1

_u32, _u64, _s64 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64


class Kind(enum.IntEnum):
    """What a value counts: enum limitfs_kind."""

    FDS = 0
    MEMORY = 1
    SHARED = 2
    SWAP = 3
    THREADS = 4
    PROCESSES = 5


class Flag(enum.IntFlag):
    """enum limitfs_flag."""

    DOWN = 1
    STRICT = 2
    CHANGE = 4
    SUM = 8
    ENTER_SHARE = 16
    LEAVE_SHARE = 32


class Wide(enum.IntFlag):
    """enum limitfs_wide."""

    EVERY = 1
    CGROUPS = 2
    GROUPS = 4
    SUMS = 8
    TOTALS = 16


class What(enum.IntEnum):
    """enum limitfs_what."""

    CROSSED = 0
    GONE = 1
    FORK = 2
    EXEC = 3
    EXIT = 4
    FULL = 5
    MOVE = 6
    WAKE = 7


class Ending(enum.IntEnum):
    """enum limitfs_ending."""

    ENDS = 1
    UNTOLD = 2


class Watch(ctypes.Structure):
    """One condition."""

    _fields_ = (
        ("id", _u32),
        ("flags", _u32),
        ("kind", _u32),
        ("rlimit", _u32),
        ("enter", _s64),
        ("leave", _s64),
    )


class Config(ctypes.Structure):
    """What is watched in one scope."""

    _fields_ = (("start", _u64), ("count", _u32), ("unused", _u32), ("watches", Watch * WATCHES))


class Member(ctypes.Structure):
    """The key of a state; without a watch, of a membership."""

    _fields_ = (("watch", _u32), ("tgid", _u32), ("start", _u64))


class Share(ctypes.Structure):
    """The key of what one process adds to totals."""

    _fields_ = (("ledger", _u32), ("tgid", _u32), ("start", _u64), ("group", _u64))


class Total(ctypes.Structure):
    """The key of a total."""

    _fields_ = (("ledger", _u32), ("unused", _u32), ("scope", _u64))


class Membership(ctypes.Structure):
    """The groups of a process."""

    _fields_ = (("groups", _u32 * GROUPS), ("seen", _u32))


class State(ctypes.Structure):
    """The state of one member."""

    _fields_ = (
        ("flips", _u64),
        ("value", _s64),
        ("peak", _s64),
        ("told", _u32),
        ("gone", _u32),
    )


class Record(ctypes.Structure):
    """What came through the ring."""

    _fields_ = (
        ("time", _u64),
        ("value", _s64),
        ("flips", _u64),
        ("start", _u64),
        ("watch", _u32),
        ("what", _u32),
        ("tgid", _u32),
        ("tid", _u32),
        ("uid", _u32),
        ("parent", _u32),
        ("comm", ctypes.c_char * 16),
    )


class Planting(ctypes.Structure):
    """The argument of the program `plant`."""

    _fields_ = (("config", _u64), ("scope", _u64), ("watch", _u32), ("unused", _u32))


class Leaving(ctypes.Structure):
    """The argument of the program `leave`."""

    _fields_ = (("tgid", _u32), ("group", _u32), ("start", _u64))


class Processors(ctypes.Structure):
    """The argument of the program `find_processors`."""

    _fields_ = (("count", _u32), ("found", _u32))


class Control(ctypes.Structure):
    """The variables that kernel and user space share."""

    _fields_ = (
        ("wide", _u32),
        ("lives", _u32),
        ("margin", _u32),
        ("processors", _u32),
        ("pid", _u32),
        ("plant", _u32),
        ("start", _u64),
        ("seen", _u32),
        ("wanted", _u32),
        ("ledgers", _u32 * KINDS),
        ("unused", _u32),
        ("zero", _u32),
        ("dropped", _u64),
        ("full", _u64),
        ("heard", _u64),
        ("marks", _u32 * (MARKS // 32)),
    )


def alarms(flips: int) -> int:
    """How many entries into alarm `flips` stands for."""
    return (flips + 1) // 2
