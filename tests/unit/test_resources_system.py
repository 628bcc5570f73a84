"""The resources of the machine, and the table."""

import math
import os

import psutil
import pytest

from limitfs.errors import Unsupported
from limitfs.resources import ABSENT, RESOURCES, at, kinds, procfs
from limitfs.resources.model import Level, System
from limitfs.resources.pressure import CpuPressure, Pressure
from limitfs.resources.sockets import Channels, Connections

MACHINE = System()
TABLE = [
    "cpu", "cputime", "memory", "available", "swap", "shared", "virtual", "data", "locked", "stack", "fds",
    "threads", "processes", "channels", "connections", "signals", "filesize",
    "cpu_pressure", "memory_pressure", "io_pressure",
]  # fmt: skip


def test_the_table_is_in_the_manual_s_order() -> None:
    assert [each.name for each in kinds()] == TABLE
    missing = {name for name in TABLE if name.endswith("_pressure") and not os.path.exists("/proc/pressure")}
    missing |= {each.name for each in (Channels(), Connections()) if each.missing()}
    assert list(RESOURCES) == [name for name in TABLE if name not in missing]
    assert set(ABSENT) == missing
    assert all(each.name == name and each.help and each.levels for name, each in RESOURCES.items())


def test_at() -> None:
    assert [each.name for each in at(Level.THREAD)] == ["cpu", "cputime", "stack"]
    assert {"memory", "fds", "threads", "processes"} <= {each.name for each in at(Level.PARTITION)}


@pytest.mark.parametrize("name", [each.name for each in at(Level.SYSTEM)])
def test_every_resource_of_the_machine_answers(name: str) -> None:
    resource = RESOURCES[name]
    assert resource.usage(MACHINE) >= 0
    assert resource.limit(MACHINE).soft >= resource.usage(MACHINE)
    assert resource.peak(MACHINE) is None


def test_agrees_with_psutil() -> None:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    assert RESOURCES["memory"].limit(MACHINE).soft == memory.total
    assert RESOURCES["available"].usage(MACHINE) == pytest.approx(memory.available, abs=128 << 20)
    assert RESOURCES["swap"].limit(MACHINE).soft == swap.total
    assert RESOURCES["shared"].usage(MACHINE) == pytest.approx(memory.shared, abs=64 << 20)
    assert RESOURCES["processes"].usage(MACHINE) == pytest.approx(len(psutil.pids()), abs=10)
    times = psutil.cpu_times()
    busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    assert RESOURCES["cputime"].usage(MACHINE) == pytest.approx(busy, abs=1)


def test_used_and_available_make_up_the_total() -> None:
    used, available = RESOURCES["memory"].usage(MACHINE), RESOURCES["available"].usage(MACHINE)
    assert used + available == pytest.approx(RESOURCES["memory"].limit(MACHINE).soft, abs=128 << 20)


def test_one_open_file_more_is_one_handle_more() -> None:
    before = RESOURCES["fds"].usage(MACHINE)
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
    after = RESOURCES["fds"].usage(MACHINE)
    for fd in files:
        os.close(fd)
    assert after - before == pytest.approx(100, abs=60)


@pytest.mark.parametrize("name", [name for name in RESOURCES if name.endswith("_pressure")])
def test_pressure_is_a_rate_of_a_counter(name: str) -> None:
    resource = RESOURCES[name]
    assert isinstance(resource, Pressure)
    assert (resource.rate, resource.window, resource.summable) == (True, 10.0, False)
    assert 0 <= resource.counter(MACHINE) <= procfs.uptime()
    assert resource.path == f"/proc/pressure/{name.removesuffix('_pressure')}"


def test_without_pressure_files_there_is_no_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuPressure, "path", "/proc/no-such-file")
    assert CpuPressure.missing() == "no /proc/no-such-file: boot with psi=1, on a kernel with CONFIG_PSI"


def test_what_is_no_rate_has_no_counter() -> None:
    with pytest.raises(Unsupported, match="not a rate"):
        RESOURCES["memory"].counter(MACHINE)


def test_the_most_that_a_machine_computes() -> None:
    assert RESOURCES["cpu"].limit(MACHINE).soft == 100 * (os.cpu_count() or 1)
    assert RESOURCES["cpu"].whole(MACHINE) == 100
    assert RESOURCES["cputime"].limit(MACHINE).soft == math.inf
