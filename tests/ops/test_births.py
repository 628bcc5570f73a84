"""`births` with a made-up record: who is told what, and when anything is recorded at all."""

from collections.abc import Callable

import pytest
from opskit import Kernel, Waker, house, refused

from conftest import NOBODY, lines_of
from limitfs.hearing.births import Birth
from limitfs.space import births


class Record:
    """Stands for `hearing.connector.Births`."""

    begun: "list[Record]"

    def __init__(self, _connector: object, callback: Callable[[Birth], None]) -> None:
        self.tell = callback
        self.closed = False
        Record.begun.append(self)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    Record.begun = []
    monkeypatch.setattr(births, "Births", Record)
    with house(monkeypatch) as made:
        monkeypatch.setattr(made.daemon.hearing.connector, "missing", lambda: None)
        yield made


FORK = Birth("fork", 1, 100, 1, "sh", NOBODY, None)
EXIT = Birth("exit", 2, 100, 1, "sh", NOBODY, 3 << 8)
KILLED = Birth("exit", 3, 101, 1, 'a" pid=1\n', 0, 9)
LOST = Birth("lost", 4, None, None, None, None, None)


async def test_recorded_only_while_somebody_reads(kernel: Kernel) -> None:
    first, second = await kernel.open("births"), await kernel.open("births", uid=NOBODY)
    (record,) = Record.begun
    await kernel.ops.release(first)
    assert not record.closed
    await kernel.ops.release(second)
    assert record.closed
    await kernel.ops.release(await kernel.open("births"))
    assert len(Record.begun) == 2


async def test_each_is_told_of_his_own_and_of_losses(kernel: Kernel) -> None:
    root, his = await kernel.open("births"), await kernel.open("births", uid=NOBODY)
    for birth in (FORK, EXIT, KILLED, LOST):
        Record.begun[0].tell(birth)
    told = lines_of((await kernel.ops.read(root, 0, 1 << 16)).decode())
    assert [line["birth"] for line in told] == ["fork", "exit", "exit", "lost"]
    assert (told[1]["status"], told[2]["signal"]) == ("3", "9")
    assert told[2]["comm"] == 'a" pid=1\n'
    told = lines_of((await kernel.ops.read(his, 0, 1 << 16)).decode())
    assert [line["birth"] for line in told] == ["fork", "exit", "lost"]
    for handle in (root, his):
        await kernel.ops.release(handle)


async def test_a_record_wakes(kernel: Kernel) -> None:
    handle = await kernel.open("births")
    waker, ino = Waker(), (await kernel.walk("births")).st_ino
    assert await kernel.ops.poll(ino, handle, waker, None) == 0
    Record.begun[0].tell(FORK)
    assert waker.woken == 1
    await kernel.ops.release(handle)


async def test_without_a_connector(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.daemon.hearing.connector, "missing", lambda: "no such socket")
    assert await refused(kernel.open("births")) == "EOPNOTSUPP"
    assert b"no record of processes: no such socket" in await kernel.read("last_error")
