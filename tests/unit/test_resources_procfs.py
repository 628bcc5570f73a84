"""The parsers of /proc, on a made-up tree: what the kernel prints, also when a task goes away meanwhile."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from limitfs.errors import Gone, Unsupported
from limitfs.resources import procfs
from limitfs.resources.model import Process, System, Thread

FakeProc = Callable[[str, bytes], None]

STATUS = b"""Name:\ta\\nVmHWM:\t1 kB
State:\tS (sleeping)
Tgid:\t7
Uid:\t1000\t1001\t0\t0
VmPeak:\t    3060 kB
VmHWM:\t 1608 kB
VmSwap:\t       0 kB
SigQ:\t3/96365
"""


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProc:
    monkeypatch.setattr(procfs, "ROOT", str(tmp_path))

    def write(path: str, text: bytes) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text)

    return write


def stat_line(
    comm: bytes = b"cat", state: str = "S", start: int = 4711, threads: int = 2, signal: int = 17
) -> bytes:
    fields = [b"0"] * 52
    fields[0], fields[1], fields[2], fields[3] = b"7", b"(" + comm + b")", state.encode(), b"1"
    fields[13], fields[14], fields[19], fields[21] = b"11", b"22", b"%d" % threads, b"%d" % start
    fields[23], fields[37] = b"18446744073709551615", b"%d" % signal
    return b" ".join(fields) + b"\n"


@pytest.mark.parametrize(
    "comm",
    [b"cat", b"a) b (c\n", b") R 1 2 3", b"", b"((((", b"))))", b"kworker/0:1-events_power_efficient", b"\t \n"],
)
def test_a_name_may_hold_anything(proc: FakeProc, comm: bytes) -> None:
    proc("7/stat", stat_line(comm))
    assert procfs.stat(7) == procfs.Stat(7, comm.decode(), "S", 1, 11, 22, 2, 4711, leader=True)


def test_a_name_that_is_not_utf8_is_kept(proc: FakeProc) -> None:
    proc("7/stat", stat_line(b"\xff\xfe"))
    assert procfs.stat(7).comm.encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_huge_numbers(proc: FakeProc) -> None:
    proc("7/stat", stat_line(start=2**64 - 1))
    assert procfs.stat(7).start == 2**64 - 1


@pytest.mark.parametrize("text", [b"", b"7", b"7 (cat", b"7 (cat)", b"7 (cat) S 1 7", b"7 (cat) S x" + b" 0" * 50])
def test_a_stat_cut_short_means_gone(proc: FakeProc, text: bytes) -> None:
    proc("7/stat", text)
    with pytest.raises(Gone):
        procfs.stat(7)


@pytest.mark.parametrize(
    "read", [procfs.stat, procfs.status, procfs.statm, procfs.limits, procfs.tids, procfs.owner, procfs.fds]
)
@pytest.mark.usefixtures("proc")
def test_no_file_means_gone(read: Callable[[int], object]) -> None:
    with pytest.raises(Gone, match="process 7 "):
        read(7)


@pytest.mark.parametrize("read", [procfs.stat, procfs.status, procfs.statm, procfs.limits])
def test_an_empty_file_means_gone(proc: FakeProc, read: Callable[[int], object]) -> None:
    for name in ("stat", "status", "statm", "limits"):
        proc(f"7/{name}", b"")
    with pytest.raises(Gone):
        read(7)


def test_status(proc: FakeProc) -> None:
    proc("7/status", STATUS)
    status = procfs.status(7)
    assert status.size(b"VmHWM") == 1608 * 1024
    assert status.size(b"VmPeak") == 3060 * 1024
    assert status.size(b"VmSwap") == 0
    assert status.uids == (1000, 1001)
    assert status.queued == (3, 96365)
    assert status.tgid == 7


def test_status_of_what_has_no_memory(proc: FakeProc) -> None:
    proc("7/status", b"Name:\tkthreadd\nSigQ:\t0/18446744073709551615\n")
    assert procfs.status(7).size(b"VmHWM") == 0
    assert procfs.status(7).field(b"VmHWM") is None
    assert procfs.status(7).queued == (0, math.inf)


def test_status_longer_than_one_read(proc: FakeProc) -> None:
    proc("7/status", b"Name:\tx\nGroups:\t" + b"1000000 " * 60_000 + b"\nVmHWM:\t 4 kB\n")
    assert procfs.status(7).size(b"VmHWM") == 4096


def test_statm(proc: FakeProc) -> None:
    proc("7/statm", b"765 402 374 5 0 90 0\n")
    assert procfs.statm(7) == (765 * procfs.PAGE, 402 * procfs.PAGE, 374 * procfs.PAGE)


def test_limits(proc: FakeProc) -> None:
    proc(
        "7/limits",
        b"Limit                     Soft Limit           Hard Limit           Units     \n"
        b"Max cpu time              unlimited            unlimited            seconds   \n"
        b"Max file size             18446744073709551614 unlimited            bytes     \n"
        b"Max nice priority         0                    10                   \n",
    )
    assert procfs.limits(7) == [(math.inf, math.inf), (18446744073709551614, math.inf), (0, 10)]


@pytest.mark.parametrize(
    ("text", "pointer"),
    [
        (b"running\n", None),
        (b"230 0x0 0x0 0x7ffe35004f90 0x7ffe35004fd0 0x0 0x0 0x7ffe35004f78 0x7f4664580503\n", 0x7FFE35004F78),
        (b"-1 0x7ffe35004f78 0x7f4664580503\n", 0x7FFE35004F78),
    ],
)
def test_stack_pointer(proc: FakeProc, text: bytes, pointer: int | None) -> None:
    proc("7/task/8/syscall", text)
    assert procfs.stack_pointer(7, 8) == pointer


def test_mapping(proc: FakeProc) -> None:
    proc("7/maps", b"1000-2000 r--p 0 fe:00 2 /bin/a b\n3000-5000 rw-p 0 00:00 0 [stack]\n")
    assert procfs.mapping(7, 0x1000) == (0x1000, 0x2000)
    assert procfs.mapping(7, 0x4FFF) == (0x3000, 0x5000)
    assert procfs.mapping(7, 0x2000) is None
    assert procfs.mapping(7, 0x5000) is None


def test_runtime(proc: FakeProc) -> None:
    proc("7/task/8/schedstat", b"34958868 11296501 39\n")
    assert procfs.runtime(7, 8) == 34_958_868


@pytest.mark.parametrize("name", [b"cat", b"a\nb\n", b""])
def test_comm(proc: FakeProc, name: bytes) -> None:
    proc("7/comm", name + b"\n")
    proc("7/task/8/comm", b"worker\n")
    assert procfs.comm(7) == name.decode()
    assert procfs.comm(7, 8) == "worker"


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        (b"0::/system.slice/a:b.service\n", {"": "/system.slice/a:b.service"}),
        (b"9:name=systemd:/x\n0::/\n", {"name=systemd": "/x", "": "/"}),
        (b"8:cpu,cpuacct:/a b\\c\xff\n", {"cpu,cpuacct": "/a b\\c\udcff"}),
        (b"", {}),
    ],
)
def test_cgroups(proc: FakeProc, text: bytes, paths: dict[str, str]) -> None:
    proc("7/cgroup", text)
    assert {",".join(sorted(names)): path for names, path in procfs.cgroups(7).items()} == paths


def test_thread_group(proc: FakeProc) -> None:
    proc("8/status", STATUS)
    assert procfs.thread_group(8) == 7
    with pytest.raises(Gone):
        procfs.thread_group(9)


def test_processes_are_names_of_digits(proc: FakeProc) -> None:
    for name in ("1", "22", "self", "thread-self", "sys", "7x"):
        proc(f"{name}/stat", b"")
    assert sorted(procfs.pids()) == [1, 22]


def test_identify(proc: FakeProc) -> None:
    proc("7/stat", stat_line(start=99))
    proc("7/task/8/stat", stat_line(start=100, signal=-1))
    assert procfs.identify(7) == Process(7, 99)
    assert procfs.identify_thread(7, 8) == Thread(7, 8, 100)


def test_a_thread_number_is_no_process(proc: FakeProc) -> None:
    proc("8/stat", stat_line(signal=-1))
    with pytest.raises(Gone):
        procfs.identify(8)


def test_a_zombie_exists_and_a_dead_one_does_not(proc: FakeProc) -> None:
    proc("7/stat", stat_line(state="Z", threads=1))
    assert procfs.verify(procfs.identify(7)).zombie
    proc("7/stat", stat_line(state="X", threads=1))
    with pytest.raises(Gone):
        procfs.identify(7)
    with pytest.raises(Gone):
        procfs.verify(Process(7, 4711))


def test_a_number_used_again_is_another_target(proc: FakeProc) -> None:
    proc("7/stat", stat_line(start=99))
    procfs.check(Process(7, 99))
    procfs.check(System())
    with pytest.raises(Gone, match="used again"):
        procfs.check(Process(7, 98))


def test_the_first_thread_ended_before_the_others(proc: FakeProc) -> None:
    proc("7/stat", stat_line(state="Z", threads=3))
    proc("7/task/7/stat", stat_line(state="Z"))
    proc("7/task/9/stat", stat_line(state="S", signal=-1))
    proc("7/task/10/other", b"")  # ended while we looked
    proc("7/statm", b"0 0 0 0 0 0 0\n")
    proc("9/statm", b"5 4 3 0 0 0 0\n")
    assert procfs.reading(Process(7, 4711), procfs.statm).resident == 4 * procfs.PAGE


def test_meminfo(proc: FakeProc) -> None:
    proc(
        "meminfo",
        b"MemTotal:       8 kB\nMemFree: 1 kB\nMemAvailable:   6 kB\nSwapCached: 9 kB\n"
        b"SwapTotal:  18014398509481983 kB\n"
        b"SwapFree: 2 kB\nShmem:  3 kB\nShmemHugePages: 1 kB\n",
    )
    assert procfs.meminfo() == (8192, 6144, 3072, 18014398509481983 * 1024, 2048)


def test_a_line_that_the_kernel_has_not_is_unsupported(proc: FakeProc) -> None:
    proc("meminfo", b"MemTotal: 8 kB\nMemFree: 1 kB\n")
    with pytest.raises(Unsupported, match="meminfo"):
        procfs.meminfo()
    with pytest.raises(Unsupported, match="kernel/pid_max"):
        procfs.sysctl("kernel/pid_max")


def test_cpu_time(proc: FakeProc) -> None:
    proc("stat", b"cpu  100 20 3 5000 600 7 8 9 50 0\ncpu0 1 1 1 1\n")
    assert procfs.cpu_time() == pytest.approx((100 + 20 + 3 + 7 + 8 + 9) / procfs.TICKS)
    proc("stat", b"")
    with pytest.raises(Unsupported):
        procfs.cpu_time()


def test_loadavg(proc: FakeProc) -> None:
    proc("loadavg", b"0.23 0.13 0.19 1/88 4761\n")
    assert procfs.loadavg() == (0.23, 0.13, 0.19, 1, 88)


def test_psi(proc: FakeProc, tmp_path: Path) -> None:
    proc(
        "pressure/io",
        b"some avg10=0.14 avg60=0.72 avg300=0.26 total=17062939\nfull avg10=1.00 avg60=0.00 avg300=0.00 total=0\n",
    )
    assert procfs.psi(f"{tmp_path}/pressure/io") == (0.14, 0.72, 0.26, 17.062939)
    assert procfs.psi(f"{tmp_path}/pressure/io", b"full").avg10 == 1
    proc("pressure/io", b"")
    with pytest.raises(Unsupported):
        procfs.psi(f"{tmp_path}/pressure/io")


def test_file_nr(proc: FakeProc) -> None:
    proc("sys/fs/file-nr", b"485\t5\t2466186\n")
    assert procfs.file_nr() == (480, 2466186)
    proc("sys/fs/file-nr", b"485\t0\t9223372036854775807\n")
    assert procfs.file_nr().maximum == math.inf
