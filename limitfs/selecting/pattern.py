"""Regular expressions that strangers write, searched for at a bounded price.

RE2's time is bounded by program × text: at worst each byte of the text meets each instruction of the compiled
program, at about 8 ns. That product is the unit here: *work*. What was searched for lately is remembered.
"""

import functools
import os
from typing import ClassVar

LARGEST_PROGRAM = 128
"""Instructions. A character, or a set of them in ASCII, is one; `.`, and what is negated, are ten."""
_MEMORY = 1 << 16
"""Bytes that one pattern may take, compiled."""
_REMEMBERED = 512
"""Searches."""


class TooLarge(ValueError):
    """It would take too long to search for."""


class Pattern:
    """A compiled regular expression.

    Attributes:
        size: instructions of the larger of its programs; RE2 has one to search forwards, one backwards.
        spent: the work of all searches so far, for all patterns.
    """

    spent: ClassVar[int] = 0
    __slots__ = ("_compiled", "size")

    def __init__(self, text: str) -> None:
        """Compile.

        Raises:
            TooLarge: it has more instructions than `LARGEST_PROGRAM`.
            ValueError: it is no regular expression of RE2.
        """
        import re2

        options = re2.Options()
        options.max_mem = _MEMORY
        options.never_capture = True
        options.log_errors = False
        try:
            self._compiled = re2.compile(text, options=options)
        except UnicodeEncodeError:
            raise ValueError("not UTF-8") from None
        except re2.error as error:
            raise ValueError(ascii(os.fsdecode(error.args[0]))[1:-1]) from None
        self.size = int(max(self._compiled.programsize, self._compiled.reverseprogramsize))
        if self.size > LARGEST_PROGRAM:
            raise TooLarge(
                f"a regular expression of {self.size} instructions, at most {LARGEST_PROGRAM}: "
                "repetitions count as often as they repeat, `.` about ten times"
            )

    def found_in(self, text: str) -> bool:
        """Whether it is somewhere in `text`."""
        return _found(self, text)

    def _search(self, text: str) -> bool:
        data = os.fsencode(text)
        Pattern.spent += self.size * len(data)
        return self._compiled.search(data) is not None


@functools.lru_cache(maxsize=_REMEMBERED)
def _found(pattern: Pattern, text: str) -> bool:
    """Most processes execute one of few programs."""
    return pattern._search(text)


@functools.lru_cache(maxsize=128)
def compiled(text: str) -> Pattern:
    """The pattern that is written so; raises as `Pattern`."""
    return Pattern(text)
