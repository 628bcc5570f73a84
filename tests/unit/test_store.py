"""What outlives a daemon: keys and values in a file."""

import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limitfs import store
from limitfs.store import Store


class Later:
    """Calls that wait for their time."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, seconds: float, callback: Callable[[], None]) -> None:
        self.calls.append((seconds, callback))

    def pass_(self) -> None:
        calls, self.calls = self.calls, []
        for _seconds, call in calls:
            call()


def opened(
    directory: Path, later: Later | None = None, mountpoint: str = "/limits"
) -> tuple[Store, dict[str, Any]]:
    made = Store(str(directory), mountpoint, later or Later())
    return made, made.open()


def file_of(directory: Path) -> Path:
    return directory / "%2Flimits.db"


def test_what_was_kept_comes_back_in_order(tmp_path: Path) -> None:
    first, found = opened(tmp_path / "state")
    assert found == {}
    first.put("b", {"x": [1, None, "ü"]})
    first.put("a", 1)
    first.put("c", 2)
    first.drop("c")
    first.put("a", 3)
    assert len(first) == 2
    first.close(forget=False)
    second, found = opened(tmp_path / "state")
    assert list(found.items()) == [("a", 3), ("b", {"x": [1, None, "ü"]})]
    second.close(forget=True)
    assert list((tmp_path / "state").iterdir()) == []
    third, found = opened(tmp_path / "state")
    assert found == {}
    third.close(forget=True)


def test_it_is_private(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    made, _found = opened(directory)
    made.put("a", 1)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert file_of(directory).stat().st_mode & 0o077 == 0
    made.close(forget=True)


def test_the_mode_of_a_directory_that_is_there_stays(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(0o755)
    made, _found = opened(directory)
    made.put("a", 1)
    assert made.trouble is None
    assert directory.stat().st_mode & 0o777 == 0o755
    assert file_of(directory).stat().st_mode & 0o077 == 0
    made.close(forget=True)


@pytest.mark.parametrize("mode", [0o1777, 0o770])
def test_a_directory_where_others_write_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(mode)
    made, _found = opened(directory)
    assert made.trouble is not None
    assert f"others may write in {directory}" in made.trouble
    assert directory.stat().st_mode & 0o7777 == mode
    assert list(directory.iterdir()) == []
    made.close(forget=True)


def test_a_directory_of_somebody_else_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "state").symlink_to("other")
    later = Later()
    made, found = opened(tmp_path / "state", later)
    assert found == {}
    assert "no directory of ours" in (made.trouble or "")
    made.put("a", 1)
    assert list((tmp_path / "other").iterdir()) == []
    assert "cannot be written" in caplog.text
    # It is tried again, less and less often; in time it works.
    later.pass_()
    assert [seconds for seconds, _call in later.calls] == [2 * store.RETRY]
    (tmp_path / "state").unlink()
    later.pass_()
    assert made.trouble is None
    made.close(forget=False)
    again, found = opened(tmp_path / "state")
    assert found == {"a": 1}
    again.close(forget=True)


def test_mount_points_do_not_mix(tmp_path: Path) -> None:
    places = ["/a/b", "/a-b", "/" + "x" * 300, "/" + "x" * 301, "/caf\udce9"]
    stores = [opened(tmp_path, mountpoint=place)[0] for place in places]
    for number, made in enumerate(stores):
        made.put("number", number)
        made.close(forget=False)
    for number, place in enumerate(places):
        again, found = opened(tmp_path, mountpoint=place)
        assert found == {"number": number}
        again.close(forget=True)


def test_another_boot_brings_nothing_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _found = opened(tmp_path)
    made.put("a", 1)
    made.close(forget=False)
    monkeypatch.setattr(store, "_boot", lambda: "another")
    made, found = opened(tmp_path)
    assert found == {}
    assert len(made) == 0
    made.close(forget=True)


def killed_while(work: Callable[[], None]) -> None:
    """Run `work` in a child that kills itself in it."""
    child = os.fork()
    if child == 0:
        work()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_was_put_outlives_a_sigkill(tmp_path: Path) -> None:
    def work() -> None:
        made, _found = opened(tmp_path)
        for number in range(1000):
            made.put(f"key {number % 7}", number)

    killed_while(work)
    made, found = opened(tmp_path)
    assert sorted(found.values()) == list(range(993, 1000))
    made.close(forget=True)


def test_together_is_all_or_nothing(tmp_path: Path) -> None:
    def work() -> None:
        made, _found = opened(tmp_path)
        made.put("a", 1)
        with made.together():
            made.put("a", 2)
            made.put("b", 2)
            os.kill(os.getpid(), signal.SIGKILL)

    killed_while(work)
    made, found = opened(tmp_path)
    assert found == {"a": 1}
    with made.together():
        made.put("a", 2)
        made.put("b", 2)
    made.close(forget=False)
    made, found = opened(tmp_path)
    assert found == {"a": 2, "b": 2}
    made.close(forget=True)


def test_who_comes_while_the_file_is_held_does_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _found = opened(tmp_path)
    first.put("a", 1)
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    later = Later()
    second, found = opened(tmp_path, later)
    assert found == {}
    assert second.trouble == "database is locked"
    second.put("b", 2)
    first.close(forget=False)
    later.pass_()
    # It has begun without what lay there.
    assert (second.trouble, len(second)) == (None, 1)
    second.close(forget=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _data: b"",
        lambda _data: b"garbage" * 1000,
        lambda data: data[: len(data) // 2],
        lambda data: data[:100] + b"\xff" * (len(data) - 100),
        lambda data: data[:4096] + os.urandom(len(data) - 4096),
        lambda data: data[:44] + b"\xff" * 4 + data[48:],
    ],
    ids=["empty", "garbage", "half", "header-only", "first-page-only", "format"],
)
def test_a_damaged_file_is_said_and_set_aside(
    spoil: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, _found = opened(tmp_path)
    for number in range(200):
        made.put(f"key {number}", "x" * 100)
    made.close(forget=False)
    spoilt = spoil(file_of(tmp_path).read_bytes())
    file_of(tmp_path).write_bytes(spoilt)
    made, found = opened(tmp_path)
    assert found == {}
    assert bool(spoilt) == ("is damaged" in caplog.text)
    made.put("a", 1)
    made.close(forget=False)
    made, found = opened(tmp_path)
    assert found == {"a": 1}
    made.close(forget=True)


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_torn_file_never_stops_anybody(tmp_path: Path, data: st.DataObject) -> None:
    made, _found = opened(tmp_path)
    for number in range(60):
        made.put(f"key {number}", "x" * 100)
    made.close(forget=False)
    whole = bytearray(file_of(tmp_path).read_bytes())
    at = int(len(whole) * data.draw(st.floats(0, 1, exclude_max=True)))
    if data.draw(st.booleans()):
        del whole[at:]
    else:
        whole[at : at + 64] = data.draw(st.binary(min_size=64, max_size=64))
    file_of(tmp_path).write_bytes(bytes(whole))
    made, _found = opened(tmp_path)
    made.put("after", 1)
    assert made.trouble is None
    made.close(forget=True)


def test_a_value_that_is_no_json_is_dropped_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, _found = opened(tmp_path)
    made.put("a", 1)
    made.put("b", 2)
    made.close(forget=False)
    with sqlite3.connect(file_of(tmp_path)) as db:
        db.execute("update kept set value = '{' where key = 'a'")
    db.close()
    made, found = opened(tmp_path)
    assert found == {"b": 2}
    assert "what was kept of 'a' is damaged" in caplog.text
    made.close(forget=True)


def test_a_name_that_is_no_utf8_is_kept_as_it_is(tmp_path: Path) -> None:
    made, _found = opened(tmp_path)
    for name in ("a\udcff", "a\udcff/b", "aü"):
        made.put(name, {"path": name})
    made.put("dropped\udcff", 1)
    made.drop("dropped\udcff")
    made.close(forget=False)
    made, found = opened(tmp_path)
    assert list(found.items()) == [(name, {"path": name}) for name in ("aü", "a\udcff", "a\udcff/b")]
    made.close(forget=True)


def test_what_cannot_be_kept_keeps_nothing_else_from_it(tmp_path: Path) -> None:
    made, _found = opened(tmp_path)
    with pytest.raises(UnicodeEncodeError):
        made.put("\ud800", 1)
    made.put("a", 1)
    # Whatever fails in a transaction ends it.
    made._pending[b"odd"] = "\ud800"
    with pytest.raises(UnicodeEncodeError):
        made.put("b", 1)
    del made._pending[b"odd"]
    made.put("c", 1)
    made.close(forget=False)
    made, found = opened(tmp_path)
    assert found == {"a": 1, "b": 1, "c": 1}
    made.close(forget=True)


def test_nothing_is_kept_where_nothing_is_to_be(tmp_path: Path) -> None:
    made = Store(None, "/limits", Later())
    assert made.open() == {}
    made.put("a", 1)
    made.drop("a")
    assert (len(made), made.trouble) == (0, None)
    made.close(forget=True)
    assert list(tmp_path.iterdir()) == []
