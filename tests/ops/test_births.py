"""`births` with a made-up record: who is told what, and when anything is recorded at all."""

from collections.abc import Callable

import pytest
from opskit import Kernel, Waker, house, refused

from conftest import NOBODY, lines_of
from limitfs.hearing import sources
from limitfs.hearing.births import Birth
from limitfs.hearing.source import Refused


class Recorder:
    """Stands for `Hearing.births`."""

    def __init__(self) -> None:
        self.begun: list[Callable[[Birth], None]] = []
        self.ended = 0
        self.missing: str | None = None

    def __call__(self, callback: Callable[[Birth], None]) -> Callable[[], None]:
        if self.missing is not None:
            raise Refused(self.missing)
        self.begun.append(callback)
        return self.end

    def end(self) -> None:
        self.ended += 1

    def tell(self, birth: Birth) -> None:
        self.begun[-1](birth)


@pytest.fixture
def record() -> Recorder:
    return Recorder()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, record: Recorder):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sources.Hearing, "births", lambda _self, callback: record(callback))
    with house(monkeypatch) as made:
        yield made


FORK = Birth("fork", 1, 100, 1, "sh", NOBODY)
EXIT = Birth("exit", 2, 100, 1, "sh", NOBODY, 3 << 8, 4096)
KILLED = Birth("exit", 3, 101, 1, 'a" pid=1\n', 0, 9)
LOST = Birth("lost", 4, None, None, None, None)


async def test_recorded_only_while_somebody_reads(kernel: Kernel, record: Recorder) -> None:
    first, second = await kernel.open("births"), await kernel.open("births", uid=NOBODY)
    await kernel.ops.release(first)
    assert (len(record.begun), record.ended) == (1, 0)
    await kernel.ops.release(second)
    assert record.ended == 1
    await kernel.ops.release(await kernel.open("births"))
    assert (len(record.begun), record.ended) == (2, 2)


async def test_each_is_told_of_his_own_and_of_losses(kernel: Kernel, record: Recorder) -> None:
    root, his = await kernel.open("births"), await kernel.open("births", uid=NOBODY)
    for birth in (FORK, EXIT, KILLED, LOST):
        record.tell(birth)
    told = lines_of((await kernel.ops.read(root, 0, 1 << 16)).decode())
    assert [line["birth"] for line in told] == ["fork", "exit", "exit", "lost"]
    assert (told[1]["status"], told[2]["signal"]) == ("3", "9")
    assert [line.get("peak") for line in told] == [None, "4096", None, None]
    assert told[2]["comm"] == 'a" pid=1\n'
    told = lines_of((await kernel.ops.read(his, 0, 1 << 16)).decode())
    assert [line["birth"] for line in told] == ["fork", "exit", "lost"]
    for handle in (root, his):
        await kernel.ops.release(handle)


async def test_a_record_wakes(kernel: Kernel, record: Recorder) -> None:
    handle = await kernel.open("births")
    waker, ino = Waker(), (await kernel.walk("births")).st_ino
    assert await kernel.ops.poll(ino, handle, waker, None) == 0
    record.tell(FORK)
    assert waker.woken == 1
    await kernel.ops.release(handle)


async def test_where_nothing_tells(kernel: Kernel, record: Recorder) -> None:
    record.missing = "no such socket"
    assert await refused(kernel.open("births")) == "EOPNOTSUPP"
    assert b"no record of processes: no such socket" in await kernel.read("last_error")
