"""What is kept for each user."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limitfs.errors import Invalid, TooManyFiles
from limitfs.space.users import KEPT_ERRORS, KEPT_USERS, LastErrors, OpenFiles


@given(st.text(), st.text())
def test_a_refusal_is_one_line_whatever_was_written(path: str, written: str) -> None:
    errors = LastErrors()
    errors.refused(1, path, written, Invalid("it is wrong", "this would be right"))
    shown = errors.show(1)
    assert shown.count("\n") == 1
    assert shown.encode().endswith(b" it is wrong; this would be right\n")


def test_a_picture_stands_for_what_was_written() -> None:
    errors = LastErrors()
    errors.refused(1, "group/web/select", "comm < 5", Invalid("it is text", picture="    comm < 5\n         ^"))
    assert errors.show(1) == "group/web/select: it is text\n    comm < 5\n         ^\n"


def test_newest_last_and_so_many() -> None:
    errors = LastErrors()
    for number in range(KEPT_ERRORS + 5):
        errors.refused(1, "a", str(number), Invalid("no"))
    lines = errors.show(1).splitlines()
    assert len(lines) == KEPT_ERRORS
    assert str(KEPT_ERRORS + 4) in lines[-1]


def test_ok_stands_once_and_only_after_a_refusal() -> None:
    errors = LastErrors()
    errors.accepted(1)
    assert errors.show(1) == "ok\n"
    errors.refused(1, "a", None, Invalid("no"))
    errors.accepted(1)
    errors.accepted(1)
    assert errors.show(1).splitlines() == ["a: no", "ok"]
    assert errors.show(2) == "ok\n"


def test_users_are_bounded() -> None:
    errors = LastErrors()
    for user in range(KEPT_USERS + 10):
        errors.refused(user, "a", None, Invalid("no"))
    assert errors.show(0) == "ok\n"
    assert errors.show(KEPT_USERS + 9) == "a: no\n"


def test_open_files_are_counted_by_user() -> None:
    files = OpenFiles(2)
    for _ in range(2):
        files.opened(7)
        files.opened(8)
    with pytest.raises(TooManyFiles):
        files.opened(7)
    files.closed(7)
    files.opened(7)
    for _ in range(10):
        files.opened(0)
