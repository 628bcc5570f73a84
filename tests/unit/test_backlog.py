"""Judging by patterns in portions: counted by an own clock, with groups that note who was held against them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from limitfs.hearing.reactor import Reactor
from limitfs.resources.model import Process
from limitfs.selecting.backlog import BURST, EACH, QUANTUM, RATE, Backlog
from limitfs.selecting.columns import Row
from limitfs.selecting.pattern import Pattern

COST = QUANTUM // 2
"""Of one search here."""


@dataclass(eq=False)
class Noting:
    """A group."""

    owner: int
    searches: bool = True
    held: list[int] = field(default_factory=list)
    newborn: set[int] = field(default_factory=set)

    def hold(self, row: Row, newborn: bool = False) -> bool:
        self.held.append(row.process.pid)
        if newborn:
            self.newborn.add(row.process.pid)
        if self.searches:
            Pattern.spent += COST - EACH
        return True


class Clock:
    now = 1000.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reactor(clock: Clock) -> Iterator[Reactor]:
    made = Reactor(lambda: clock.now)
    yield made
    made.close()


def row(pid: int) -> Row:
    return Row(Process(pid, 1))


def test_so_much_at_once_and_then_so_much_a_second(clock: Clock, reactor: Reactor) -> None:
    judging, greedy, twin, plain = Backlog(reactor), Noting(1000), Noting(1001), Noting(1000, searches=False)
    count = 10 * BURST // COST
    for pid in range(count):
        judging.hold(greedy, row(pid), False)
        judging.hold(plain, row(pid), False)
    at_once = len(greedy.held)
    assert at_once == BURST // COST
    assert judging.has(greedy)
    assert len(plain.held) == count
    assert judging.hold(twin, row(1), False), "another user does not wait"
    assert not judging.has(twin)
    reactor.pump()
    assert len(greedy.held) == at_once, "nothing is earned yet"
    turns = 0
    while judging.has(greedy):
        before = len(greedy.held)
        clock.now = reactor.next_time()
        reactor.pump()
        assert 0 < len(greedy.held) - before <= QUANTUM // COST + 1
        turns += 1
        assert turns <= count
    assert greedy.held == list(range(count))
    assert clock.now - 1000 >= (count - at_once - 2) * COST / RATE
    assert reactor.next_time() == float("inf")


def test_who_waits_is_held_once_and_who_ended_never(clock: Clock, reactor: Reactor) -> None:
    judging, group, other = Backlog(reactor), Noting(1000), Noting(1000)
    for pid in range(BURST // COST):
        judging.hold(group, row(pid), False)
    group.held.clear()
    for newborn in (True, False, False):
        judging.hold(group, row(500), newborn)
    judging.hold(group, row(501), False)
    judging.hold(other, row(500), False)
    judging.ended(Process(501, 1))
    judging.forget(other)
    assert not judging.has(other)
    clock.now += BURST / RATE
    reactor.pump()
    assert group.held == [500]
    assert group.newborn == {500}
    assert other.held == []
    assert not judging.has(group)


def test_what_was_not_spent_is_no_more_than_a_burst(clock: Clock, reactor: Reactor) -> None:
    judging, group = Backlog(reactor), Noting(1000)
    clock.now += 3600
    for pid in range(10 * BURST // COST):
        judging.hold(group, row(pid), False)
    assert len(group.held) == BURST // COST
    judging.forget(group)
