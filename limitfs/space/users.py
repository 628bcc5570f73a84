"""What is kept for each user: why the latest writes were refused, and how many files are open."""

from collections import Counter, OrderedDict, deque

from limitfs.errors import LimitsError, TooManyFiles

KEPT_ERRORS = 16
"""Refusals shown in `last_error`."""
KEPT_USERS = 1024
"""Users whose refusals are kept; the one longest silent goes first."""
SHOWN = 200
"""Characters of a refused write that are repeated."""


class LastErrors:
    """The content of `last_error`, for each user."""

    def __init__(self) -> None:
        self._lines: OrderedDict[int, deque[str]] = OrderedDict()

    def refused(self, user: int, path: str, written: str | None, error: LimitsError) -> None:
        """Note a refusal: where, what was written, what is wrong with it and what would be right."""
        said = f" {_shown(written)}" if written is not None and not error.picture else ""
        hint = f"; {error.hint}" if error.hint else ""
        picture = f"\n{error.picture}" if error.picture else ""
        self._of(user).append(f"{_one_word(path)}:{said} {error.message}{hint}{picture}\n")

    def accepted(self, user: int) -> None:
        """Note that the latest write was good."""
        lines = self._lines.get(user)
        if lines and lines[-1] != "ok\n":
            lines.append("ok\n")

    def show(self, user: int) -> str:
        """All that is kept for `user`, newest last."""
        return "".join(self._lines.get(user, ())) or "ok\n"

    def _of(self, user: int) -> deque[str]:
        lines = self._lines.setdefault(user, deque(maxlen=KEPT_ERRORS))
        self._lines.move_to_end(user)
        if len(self._lines) > KEPT_USERS:
            self._lines.popitem(last=False)
        return lines


class OpenFiles:
    """Counts open files by user and refuses too many of one who is not root."""

    def __init__(self, quota: int) -> None:
        self.quota = quota
        self._open: Counter[int] = Counter()

    def opened(self, user: int) -> None:
        """One more. Raises TooManyFiles."""
        if user != 0 and self._open[user] >= self.quota:
            raise TooManyFiles(f"user {user} has {self.quota} files open here", "mount with max_open=N for more")
        self._open[user] += 1

    def closed(self, user: int) -> None:
        """One less."""
        self._open[user] -= 1
        if not self._open[user]:
            del self._open[user]


def _one_word(path: str) -> str:
    """A path as it is, or quoted where it could be taken for more than one field or line."""
    return path if path.isprintable() and " " not in path else ascii(path)


def _shown(written: str) -> str:
    text = written if len(written) <= SHOWN else written[:SHOWN] + "…"
    return ascii(text)
