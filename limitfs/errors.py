"""What can go wrong, as the user sees it.

Every refusal is a `LimitsError` that carries the errno of the contract, what is wrong, and a hint at what
would be right; both reach the user through `last_error`.

    LimitsError
    ├── Invalid       EINVAL      syntax
    ├── Impossible    ERANGE      understood, but cannot be
    ├── Unsupported   EOPNOTSUPP  no such resource, level or mode on this kernel
    ├── Gone          ESRCH       the target ended
    ├── Absent        ENOENT      no such name
    ├── Busy          EBUSY       a second condition on one open file
    ├── Exists        EEXIST      the name is taken
    ├── Quota         ENOSPC      the user's quota of watchers
    ├── TooManyFiles  EMFILE      the user's quota of open files
    ├── TooBig        E2BIG       over 4,096 bytes
    ├── Denied        EACCES      not yours
    └── Forbidden     EPERM       an operation the fixed tree has not
"""

import errno


class LimitsError(Exception):
    """A request that cannot be granted.

    Args:
        message: what is wrong, in a few words.
        hint: what would be right, if that can be said.
        picture: what was written, in lines that show where it is wrong; told in place of it.
        at: how many characters of what was written come before what is wrong.
    """

    errno: int = errno.EINVAL

    def __init__(self, message: str, hint: str = "", picture: str = "", at: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.picture = picture
        self.at = at


class Invalid(LimitsError):
    """The text does not parse."""

    errno = errno.EINVAL


class Impossible(LimitsError):
    """The text parses, but asks for what cannot be."""

    errno = errno.ERANGE


class Unsupported(LimitsError):
    """This kernel, level or mode does not have it."""

    errno = errno.EOPNOTSUPP


class Gone(LimitsError):
    """The process or thread has ended."""

    errno = errno.ESRCH


class Absent(LimitsError):
    """There is no such name."""

    errno = errno.ENOENT


class Busy(LimitsError):
    """It is in use."""

    errno = errno.EBUSY


class Exists(LimitsError):
    """The name is taken."""

    errno = errno.EEXIST


class Quota(LimitsError):
    """The user has as many watchers as allowed."""

    errno = errno.ENOSPC


class TooManyFiles(LimitsError):
    """The user has as many open files as allowed."""

    errno = errno.EMFILE


class TooBig(LimitsError):
    """One write holds at most 4,096 bytes."""

    errno = errno.E2BIG


class Denied(LimitsError):
    """It belongs to somebody else."""

    errno = errno.EACCES


class Forbidden(LimitsError):
    """The tree is fixed here."""

    errno = errno.EPERM
