"""What comes back, in a daemon that nobody serves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opskit import house

from conftest import Helper
from limitfs.daemon import Daemon
from limitfs.resources import procfs
from limitfs.resources.model import Partition, Process, Processes, System, Thread, Threads
from limitfs.space.recall import Setup, identity
from limitfs.space.shell import Shell
from limitfs.store import Store

Make = Callable[..., Helper]


@contextmanager
def daemon(monkeypatch: pytest.MonkeyPatch, state: Path, *options: str) -> Iterator[Daemon]:
    """One that has begun, and ends as if it was killed: its state stays."""
    with house(monkeypatch, "rules=none", f"state={state}", "hearing=sampled", *options) as kernel:
        kernel.daemon.begin()
        yield kernel.daemon


def left(state: Path, **kept: Any) -> None:
    """What a daemon before left."""
    store = Store(str(state), "/nowhere", lambda _seconds, _callback: None)
    store.open()
    for key, value in kept.items():
        store.put(key, value)
    store.close(forget=False)


def kept(state: Path) -> dict[str, Any]:
    store = Store(str(state), "/nowhere", lambda _seconds, _callback: None)
    found = store.open()
    store.close(forget=False)
    return found


def test_identity() -> None:
    assert identity(System()) == ["System"]
    assert identity(Process(1, 2)) == ["Process", 1, 2]
    assert identity(Threads(Process(1, 2))) == ["Threads", ["Process", 1, 2]]
    assert identity(Thread(1, 2, 3)) == ["Thread", 1, 2, 3]
    assert identity(Partition("/a", 1, 2)) == ["Partition", "/a", 1, 2]
    assert identity(Processes()) != identity(Processes(Partition("/a", 1, 2)))


def test_only_what_differs_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with daemon(monkeypatch, tmp_path) as first:
        shell = Shell(first.tree)
        assert len(first.store) == 0
        shell.write("system/fds/threshold", "500000")
        shell.write("system/fds/threshold", "600000")
        shell.write("system/fds/hearing", "auto")
        shell.write("process/fds/mode", "sum")
        shell.mkdir("system/threads/far")
        assert len(first.store) == 3
        shell.write("process/fds/mode", "each")
        shell.write("system/fds/threshold", "off")
        assert len(first.store) == 2
        shell.write("system/fds/hearing", "sampled")
        shell.rmdir("system/threads/far")
        assert len(first.store) == 0


def test_names_that_need_care(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["a b", 'quote"', "ü", "name=1", "x" * 255, "%"]
    with daemon(monkeypatch, tmp_path) as first:
        for name in names:
            Shell(first.tree).mkdir(f"system/fds/{name}")
            Shell(first.tree).write(f"system/fds/{name}/threshold", "500000")
    with daemon(monkeypatch, tmp_path) as second:
        assert {w.name for w in second.house.registry if w.condition} == set(names)


def test_a_quota_that_shrank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, helper: Make, caplog: pytest.LogCaptureFixture
) -> None:
    child = helper()
    with daemon(monkeypatch, tmp_path) as first:
        for name in "abc":
            Shell(first.tree, 1000).mkdir(f"process/{child.pid}/fds/{name}")
            Shell(first.tree, 1000).write(f"process/{child.pid}/fds/{name}/threshold", "500")
    with daemon(monkeypatch, tmp_path, "max_watchers=2") as second:
        assert [w.name for w in second.house.registry if w.condition] == ["a", "b"]
        assert "2 places set up again, 1 lost" in caplog.text
        assert "has 2 watchers already" in Shell(second.tree, 1000).read("last_error")
    assert len(kept(tmp_path)) == 2


def test_what_fails_half_way_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, helper: Make, caplog: pytest.LogCaptureFixture
) -> None:
    process = procfs.identify(helper().pid)
    path = f"process/{process.pid}/fds"
    good = {"target": identity(process), "owner": 0}
    left(
        tmp_path,
        a=None,
        **{
            "setup 1": {**good, "path": f"{path}/made", "made": True, "files": {"threshold": "many"}},
            "setup 2": {**good, "path": path, "made": False, "files": {"hearing": "sampled", "threshold": "-1"}},
            "setup 3": {**good, "path": f"{path}/good", "made": True, "files": {"threshold": "500"}},
        },
    )
    with daemon(monkeypatch, tmp_path) as second:
        assert [w.name for w in second.house.registry] == ["good"]
        assert "1 places set up again, 2 lost" in caplog.text


plain = st.none() | st.integers() | st.text(max_size=5)
anything = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=5), plain, max_size=3)
shapes = st.fixed_dictionaries(
    {
        "path": st.sampled_from(["system/fds", "system/fds/x", "process", "", "a/../b", "\0"]) | anything,
        "target": anything | st.just(["System"]),
        "owner": st.integers(0, 2) | anything,
        "made": st.booleans() | anything,
        "files": st.dictionaries(st.sampled_from(["threshold", "mode", "x"]), st.text()) | anything,
    }
)


keys = st.sampled_from(["setup 1", "setup 2", "rule a/b", "rule c", "x"])


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Daemon]:
    with daemon(monkeypatch, tmp_path) as made:
        yield made


@given(st.dictionaries(keys, anything | shapes), anything)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_in_the_file_the_daemon_begins(begun: Daemon, found: dict[str, Any], made: Any) -> None:
    begun.house.recall.restore(found)
    begun.house.rules.restore({**found, "directories made by rules": made}, begun.house.recall.lost)
    begun.house.rules.reload()
    assert begun.store.trouble is None


def test_setups_are_in_the_order_in_which_they_can_be_made() -> None:
    group = Setup("group/web", None, 0, True, {})
    inside = Setup("group/web/fds", ["Processes", "web"], 0, False, {})
    deeper = Setup("group/web/fds/mine", ["Processes", "web"], 0, True, {})
    other = Setup("group/web-2", None, 0, True, {})
    keys = sorted([setup.key for setup in (deeper, other, inside, group)])
    assert keys.index(group.key) < keys.index(inside.key) < keys.index(deeper.key)
