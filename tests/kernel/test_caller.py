"""The thread that calls into our own mount has none of our descriptors."""

import os
import threading
from pathlib import Path

import trio

from limitfs.caller import Caller


def _descriptors(tid: int) -> list[str]:
    """What a thread of this process has open."""
    table = f"/proc/self/task/{tid}/fd"
    links = [f"{table}/{fd}" for fd in os.listdir(table)]
    # Not the one that the table was read by.
    return [os.readlink(link) for link in links if os.path.lexists(link)]


def test_it_has_one_descriptor_and_takes_none_from_us(tmp_path: Path) -> None:
    async def run() -> None:
        with (tmp_path / "held").open("w") as held, Caller() as caller:
            number: list[int] = []
            await caller.call(lambda: number.append(threading.get_native_id()))
            assert number[0] != threading.get_native_id()
            assert _descriptors(number[0]) == ["anon_inode:[eventfd]"]
            assert held.name in _descriptors(threading.get_native_id())
            # What is opened later is not its either.
            with (tmp_path / "later").open("w"):
                assert _descriptors(number[0]) == ["anon_inode:[eventfd]"]

    trio.run(run)


def test_calls_are_made_in_turn_and_their_ends_are_told() -> None:
    made: list[int] = []

    async def run() -> None:
        with Caller() as caller:
            for number in range(100):
                await caller.call(lambda number=number: made.append(number))  # type: ignore[misc]
                assert made[-1] == number

    trio.run(run)
    assert made == list(range(100))


def test_one_that_does_not_return_holds_up_nobody() -> None:
    answer = threading.Event()
    before = len(_descriptors(threading.get_native_id()))

    async def run() -> None:
        with Caller() as caller, trio.move_on_after(0.1) as scope:
            await caller.call(lambda: answer.wait() and None)
        assert scope.cancelled_caught

    trio.run(run)
    assert len(_descriptors(threading.get_native_id())) == before
    answer.set()
