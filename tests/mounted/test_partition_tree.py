"""Partitions on a real mount: real cgroups, of every hierarchy that this machine has."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from cgroupkit import Cgroup, cgroup, hierarchy_of
from mountkit import crossings, events, other, private_mount, refused

from conftest import EXCURSIONS, Helper, Mount, poll_for
from limitfs.resources import cgroups
from limitfs.watching.crossing import bare

Make = Callable[..., Helper]


@pytest.fixture
def group() -> Iterator[Cgroup]:
    with cgroup() as made:
        yield made


# The tree


def test_what_the_kernel_nests_is_nested(limits: Mount, group: Cgroup) -> None:
    assert group.path[1:] in os.listdir(limits / "partition")
    below = group.below("sub").below("deeper")
    assert "deeper" in os.listdir(limits / group.tree / "sub")
    assert (limits / below.tree / "fds" / "usage").read_text() == "0\n"
    below.remove()
    assert not (limits / below.tree).exists()
    assert "deeper" not in os.listdir(limits / group.tree / "sub")


@pytest.mark.parametrize(
    "name", ["a b", 'quo"te', "back\\slash", "ümlaut", "a=b", "x,y", "-", "...x", "r\udcff", "\x1b"]
)
def test_odd_names(limits: Mount, group: Cgroup, helper: Make, name: str) -> None:
    below = group.below(name)
    child = helper()
    below.take(child.pid)
    assert name in os.listdir(limits / group.tree)
    path = f"{group.tree}/{name}/fds"
    limits.write(f"{path}/threshold", str(child.fds() + 3))
    child.open_files(3)
    limits.wait_for(lambda: events(limits, path))
    (line,) = events(limits, path)
    assert line["path"] == path
    assert line["partition"] == below.path
    assert os.path.realpath(limits / f"process/{child.pid}/partition") == str(limits / group.tree / name)
    for file in ("state", "rules", "last_error", f"{group.tree}/fds/state", "partition/fds/top", f"{path}/limit"):
        limits.read(file)
    (said,) = [line for line in limits.read("state").splitlines() if line.startswith("watcher ")]
    assert said == f"watcher {bare(path)} alarm >= {child.fds()}"
    assert refused(lambda: limits.write(f"{path}/threshold", "?")) == "EINVAL"
    told = f"{path}/threshold"
    assert limits.last_error().startswith(told if told.isprintable() and " " not in told else ascii(told))
    assert refused(lambda: os.mkdir(limits / path / "below")) == ""
    assert os.readlink(limits / f"process/{child.pid}/partition").endswith(f"/{name}")


def test_names_that_collide_with_resources_are_escaped(limits: Mount, group: Cgroup, helper: Make) -> None:
    for name in ("fds", "_fds", "_other"):
        group.below(name)
    names = os.listdir(limits / group.tree)
    assert {"fds", "_fds", "__fds", "_other"} <= set(names)
    child = helper()
    Cgroup(group.hierarchy, f"{group.path}/fds").take(child.pid)
    assert limits.read(f"{group.tree}/_fds/processes/usage") == "1\n"
    assert limits.read(f"{group.tree}/__fds/processes/usage") == "0\n"
    assert os.readlink(limits / f"process/{child.pid}/partition") == f"../../{group.tree}/_fds"
    assert not (limits / group.tree / "__other").exists()


def test_a_partition_of_one_hierarchy_only(limits: Mount, helper: Make) -> None:
    if hierarchy_of("pids") is None:
        pytest.skip("no hierarchy of version 1 has pids")
    child = helper()
    with cgroup("pids") as made:
        made.take(child.pid)
        assert limits.read(f"{made.tree}/threads/usage") == "1\n"
        assert limits.read(f"{made.tree}/processes/usage") == "1\n"
        assert limits.read(f"{made.tree}/fds/usage") == f"{child.fds()}\n"
        # In several hierarchies it may be in several places; the link leads to one of them.
        path = cgroups.of(child.pid)
        assert path is not None
        assert child.pid in cgroups.pids(cgroups.identify(path))


def test_a_path_of_two_hierarchies_leads_to_whom_it_counts(limits: Mount, group: Cgroup, helper: Make) -> None:
    memory = hierarchy_of("memory")
    if memory is None:
        pytest.skip("no hierarchy of version 1 has memory")
    child, there = helper(), helper()
    group.take(there.pid)
    same = Cgroup(memory, group.path)
    same.directory.mkdir()
    try:
        same.take(child.pid)
        assert limits.read(f"{group.tree}/processes/usage") == "1\n"
        assert os.readlink(limits / f"process/{there.pid}/partition") == f"../../{group.tree}"
        link = os.readlink(limits / f"process/{child.pid}/partition")
        assert link != f"../../{group.tree}"
        path = cgroups.of(child.pid)
        assert path is not None
        assert child.pid in cgroups.pids(cgroups.identify(path))
    finally:
        same.remove()


def test_a_threaded_cgroup_has_whose_first_thread_is_in_it(limits: Mount, group: Cgroup, helper: Make) -> None:
    child = helper("threading.Thread(target=time.sleep, args=(900,), daemon=True).start()")
    group.take(child.pid)
    first, other = group.below("first"), group.below("other")
    try:
        for each in (first, other):
            each.write("cgroup.type", "threaded")
        first.take(child.pid)
        (second,) = set(os.listdir(f"/proc/{child.pid}/task")) - {str(child.pid)}
        other.write("cgroup.threads", second)
        assert os.readlink(limits / f"process/{child.pid}/partition") == f"../../{first.tree}"
        for of, processes, fds in ((first, 1, child.fds()), (other, 0, 0), (group, 1, child.fds())):
            assert limits.read(f"{of.tree}/processes/usage") == f"{processes}\n"
            assert limits.read(f"{of.tree}/fds/usage") == f"{fds}\n"
            assert limits.read(f"{of.tree}/fds/top").count("\n") == processes
    finally:
        child.end()
        for each in (first, other):
            limits.wait_for(lambda each=each: not refused(each.directory.rmdir))


def test_cgroups_that_nest_deeper_than_python_calls(limits: Mount, group: Cgroup, helper: Make) -> None:
    child = helper()
    there = [os.open(group.directory, os.O_RDONLY)]
    # Fewer in an emulated machine, where each takes long.
    names = ["d"] * min(sys.getrecursionlimit() + 100, EXCURSIONS // 4) + ["n" * 250] * 12
    limits.write("partition/channels/threshold", ">= 900000")
    try:
        for name in names:
            os.mkdir(name, dir_fd=there[-1])
            there.append(os.open(name, os.O_RDONLY, dir_fd=there[-1]))
        fd = os.open("cgroup.procs", os.O_WRONLY, dir_fd=there[-1])
        os.write(fd, str(child.pid).encode())
        os.close(fd)
        assert limits.read(f"{group.tree}/processes/usage") == "1\n"
        assert limits.read(f"{group.tree}/d/fds/usage") == f"{child.fds()}\n"
        for resource in ("processes", "channels", "filesize"):
            limits.read(f"partition/{resource}/top" if resource != "filesize" else "process/filesize/top")
        limits.write("partition/fds/threshold", ">= 900000")
        assert limits.state("partition/fds/state")["state"] == "clear"
        limits.write("partition/fds/threshold", "off")
        # Each of those that are told one by one, and nothing was lost.
        assert [partition.path for partition in cgroups.partitions(group.path)] == [
            group.path + "/d" * levels for levels in range(1, cgroups.DEEPEST)
        ]
        assert limits.state("partition/channels/state")["lost"] == "0"
        assert events(limits, "partition/channels") == []
    finally:
        child.end()
        limits.write("partition/channels/threshold", "off")
        for name in reversed(names[: len(there) - 1]):
            os.close(there.pop())
            limits.wait_for(lambda name=name: not refused(lambda: os.rmdir(name, dir_fd=there[-1])))
        os.close(there.pop())


# Values


def test_usage_adds_up_what_the_kernel_does_not_keep(limits: Mount, group: Cgroup, helper: Make) -> None:
    one, two, outside = helper(), helper(), helper()
    below = group.below("sub")
    group.take(one.pid)
    below.take(two.pid)
    assert limits.read(f"{group.tree}/fds/usage") == f"{one.fds() + two.fds()}\n"
    assert limits.read(f"{below.tree}/fds/usage") == f"{two.fds()}\n"
    assert limits.read(f"{group.tree}/processes/usage") == "2\n"
    assert str(outside.pid) not in limits.read(f"{group.tree}/fds/top")
    top = limits.read(f"{group.tree}/fds/top").splitlines()
    assert sorted(int(row.split()[1]) for row in top) == sorted([one.pid, two.pid])
    rows = dict(reversed(row.split(" ", 1)) for row in limits.read("partition/fds/top").splitlines())
    if group.path in rows:  # among the largest
        assert rows[group.path] == str(one.fds() + two.fds())


def test_memory_is_the_kernel_s_own_charge(limits: Mount, helper: Make) -> None:
    child = helper()
    with cgroup("memory") as made:
        made.take(child.pid)
        before = int(limits.read(f"{made.tree}/memory/usage"))
        child.do("held.append(bytearray(b'x' * (32 << 20)))")
        assert int(limits.read(f"{made.tree}/memory/usage")) - before >= 30 << 20
        assert int(limits.read(f"{made.tree}/memory/peak").split()[0]) - before >= 30 << 20


def test_cpu_time_of_what_has_left_stays(limits: Mount, group: Cgroup, helper: Make) -> None:
    child = helper()
    group.take(child.pid)
    child.do(
        "begin = time.process_time()\nwhile time.process_time() - begin < 0.3: pass".replace("\n", ";exec('")
        + "')"
    )
    child.end()
    assert float(limits.read(f"{group.tree}/cputime/usage")) >= 0.3


# Limits


@pytest.mark.parametrize(
    ("controller", "resource", "text", "shown"),
    [
        ("memory", "memory", "64M", str(64 << 20)),
        ("pids", "threads", "7", "7"),
        ("cpu", "cpu", "50", "50"),
        ("cpu", "cpu", "12.5", "12.5"),
    ],
)
def test_a_limit_is_written_to_the_kernel(
    limits: Mount, controller: str, resource: str, text: str, shown: str
) -> None:
    with cgroup(controller) as made:
        path = f"{made.tree}/{resource}/limit"
        limits.write(path, text)
        assert limits.read(path) == f"{shown}\n"
        limits.write(path, limits.read(path))
        assert limits.read(path) == f"{shown}\n"
        limits.write(path, "max")
        assert limits.read(path) == "max\n"


def test_the_limit_on_threads_is_enforced(limits: Mount, helper: Make) -> None:
    child = helper()
    with cgroup("pids") as made:
        made.take(child.pid)
        limits.write(f"{made.tree}/threads/limit", "1")
        child.do(
            "try: os.fork()\nexcept OSError as e: held.append(e.errno)".replace("\n", "\\n").join(("exec('", "')"))
        )
        child.do("assert held == [11], held")


def test_what_has_no_limit_says_so(limits: Mount, group: Cgroup) -> None:
    assert limits.read(f"{group.tree}/fds/limit") == "max\n"
    assert refused(lambda: limits.write(f"{group.tree}/fds/limit", "5")) == "EOPNOTSUPP"
    assert "no limit on fds of a partition" in limits.last_error()
    assert refused(lambda: limits.write(f"{group.tree}/fds/threshold", "50%")) == "ERANGE"


def test_two_different_limits_are_refused(limits: Mount) -> None:
    with cgroup("pids") as made:
        assert refused(lambda: limits.write(f"{made.tree}/threads/limit", "5 7")) == "EINVAL"
        assert limits.read(f"{made.tree}/threads/limit") == "max\n"


# Thresholds


def test_the_sum_rings_and_one_below_is_silent(limits: Mount, group: Cgroup, helper: Make) -> None:
    one, two = helper(), helper()
    group.take(one.pid, two.pid)
    path = f"{group.tree}/fds"
    assert limits.read(f"{path}/mode") == "each [sum]\n"
    limits.write(f"{path}/threshold", str(one.fds() + two.fds() + 10))
    one.open_files(5)
    two.open_files(4)
    time.sleep(1)
    assert events(limits, path) == []
    with (limits / path / "event").open("rb") as event:
        assert event.read() == b""
        two.open_files(1)
        assert poll_for(event.fileno())
    (line,) = events(limits, path)
    assert line["partition"] == group.path
    assert "pid" not in line


def test_each_names_the_process_in_it_or_below(limits: Mount, group: Cgroup, helper: Make) -> None:
    one, two, outside = helper(), helper(), helper()
    group.take(one.pid)
    group.below("sub").take(two.pid)
    path = f"{group.tree}/fds"
    limits.write(f"{path}/mode", "each")
    limits.write(f"{path}/threshold", str(max(one.fds(), two.fds()) + 10))
    outside.open_files(50)
    two.open_files(20)
    limits.wait_for(lambda: events(limits, path))
    assert [line["pid"] for line in events(limits, path)] == [str(two.pid)]


def test_a_removed_partition_is_gone(limits: Mount, group: Cgroup) -> None:
    below = group.below("sub")
    path = f"{below.tree}/fds"
    limits.write(f"{path}/threshold", "1000")
    with (limits / path / "event").open("rb") as event:
        below.remove()
        limits.wait_for(lambda: poll_for(event.fileno(), 0.1))
        event.seek(0)
        assert b"crossing=gone" in event.read()
    limits.wait_for(lambda: not (limits / below.tree).exists())


def test_a_path_used_again_is_another_partition(limits: Mount, group: Cgroup) -> None:
    below = group.below("sub")
    old = os.open(limits / below.tree / "fds" / "threshold", os.O_WRONLY)
    try:
        below.remove()
        group.below("sub")
        assert refused(lambda: os.write(old, b"5")) == "ESRCH"
    finally:
        os.close(old)
    assert limits.read(f"{below.tree}/fds/threshold") == "off\n"


def test_all_partitions_add_up_to_the_root(limits: Mount, group: Cgroup, helper: Make) -> None:
    child = helper()
    group.below("sub").take(child.pid)
    everybody = int(limits.read("process/fds/usage"))
    assert abs(int(limits.read("partition/fds/usage")) - everybody) < 200
    assert crossings(events(limits, "partition/fds")) == []


# Rights


def test_a_delegated_partition_belongs_to_its_owner(
    tmp_path_factory: pytest.TempPathFactory, group: Cgroup
) -> None:
    with private_mount(tmp_path_factory.mktemp("mount")) as limits, other() as nobody:
        below, mine = group.below("theirs"), group.below("mine")
        os.chown(mine.directory, 65534, 65534)
        write = "write('{}/{}/fds/threshold', '100')"
        assert nobody.refused(write.format(limits.root, below.tree)) == "EACCES"
        assert nobody.refused(write.format(limits.root, mine.tree)) == ""
        assert (limits / mine.tree).stat().st_uid == 65534
        knob = f"write('{limits.root}/{mine.tree}/memory/limit', '64M')"
        assert nobody.refused(knob) in ("EACCES", "EOPNOTSUPP")
    assert cgroups.owner(cgroups.identify(mine.path)) == 65534


def test_shells(limits: Mount, group: Cgroup) -> None:
    found = subprocess.run(
        ["find", limits / group.tree, "-name", "usage", "-exec", "cat", "{}", "+"], capture_output=True, check=True
    )
    assert found.stdout.strip()
