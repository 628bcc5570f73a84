"""Thresholds on channels, connections and file sizes, through a real mount."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mountkit import crossings, events

from conftest import Helper, Mount

MakeHelper = Callable[..., Helper]
LISTEN = "held.append(socket.create_server(('127.0.0.1', 0)))"
SERVE = "c = socket.create_connection(held[0].getsockname()); held.append(c); held.append(held[0].accept()[0])"
GROW = "held.append(os.memfd_create('x')); os.truncate(held[-1], 1 << 20)"


@pytest.mark.parametrize(
    ("name", "before", "then", "level", "value"),
    [
        ("channels", LISTEN, LISTEN, "2", "2"),
        ("connections", LISTEN, SERVE, "1", "1"),
        ("filesize", "", GROW, "1M", str(1 << 20)),
    ],
)
def test_a_threshold_rings_and_its_twin_stays_silent(
    limits: Mount, helper: MakeHelper, name: str, before: str, then: str, level: str, value: str
) -> None:
    loud, silent = helper(before), helper(before)
    for process in (loud, silent):
        limits.write(f"process/{process.pid}/{name}/threshold", level)
    assert events(limits, f"process/{loud.pid}/{name}") == []
    loud.do(then)
    limits.wait_for(lambda: limits.state(f"process/{loud.pid}/{name}/state")["state"] == "alarm")
    (line,) = events(limits, f"process/{loud.pid}/{name}")
    assert (line["crossing"], line["value"], line["pid"]) == ("alarm", value, str(loud.pid))
    assert (line["source"], line["guarantee"]) == ("sampled", "sampled")
    loud.do("closing = held.pop(); os.close(closing) if isinstance(closing, int) else closing.close()")
    limits.wait_for(lambda: limits.state(f"process/{loud.pid}/{name}/state")["state"] == "clear")
    assert crossings(events(limits, f"process/{loud.pid}/{name}")) == ["alarm", "clear"]
    assert events(limits, f"process/{silent.pid}/{name}") == []


@pytest.mark.parametrize("name", ["channels", "connections"])
def test_each_names_the_member(limits: Mount, helper: MakeHelper, name: str) -> None:
    loud, silent = helper(LISTEN), helper(LISTEN)
    path = f"process/{name}"
    limits.write(f"{path}/threshold", "40")
    loud.do(f"[exec({(LISTEN if name == 'channels' else SERVE)!r}) for _ in range(40)]")
    silent.do(f"[exec({(LISTEN if name == 'channels' else SERVE)!r}) for _ in range(20)]")
    limits.wait_for(lambda: f"member {loud.pid}" in limits.read(f"{path}/state"))
    limits.write(f"{path}/threshold", "off")
    assert {line["pid"] for line in events(limits, path)} == {str(loud.pid)}
    (shown,) = [line for line in limits.read(f"{path}/top").splitlines() if f" {loud.pid} " in line]
    assert int(shown.split()[0]) in (40, 41)


def test_the_limit_of_file_sizes_is_set_and_held_against(
    limits: Mount, helper: MakeHelper, tmp_path: Path
) -> None:
    process = helper(f"f = open({str(tmp_path / 'file')!r}, 'wb')")
    path = f"process/{process.pid}/filesize"
    limits.write(f"{path}/limit", "2M")
    assert limits.read(f"{path}/limit") == f"{2 << 20} max\n"
    limits.write(f"{path}/threshold", "50%")
    process.do("f.truncate(1 << 20)")
    limits.wait_for(lambda: crossings(events(limits, path)) == ["alarm"])
