"""Event logs and their readers, against a model that is a list of lines."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from limitfs.space import eventlog
from limitfs.space.eventlog import RETAINED, Cursor, EventLog


def notice(count: int) -> bytes:
    return f"lost {count}\n".encode()


def line(number: int) -> bytes:
    return f"line {number}{'.' * (number % 7)}\n".encode()


def filled(count: int) -> EventLog:
    log = EventLog()
    for number in range(count):
        log.append(line(number))
    return log


def read_all(cursor: Cursor, size: int = 64, offset: int = 0) -> bytes:
    text = b""
    while piece := cursor.read(offset + len(text), size):
        text += piece
    return text


@given(st.integers(0, 3 * RETAINED), st.integers(1, 5000))
@settings(max_examples=50, deadline=None)
def test_a_snapshot_is_the_last_lines_whatever_the_size_of_reads(count: int, size: int) -> None:
    expected = b"".join(line(number) for number in range(max(0, count - RETAINED), count))
    assert read_all(Cursor(filled(count), notice), size) == expected


@given(st.integers(0, 40), st.integers(0, 2000))
def test_the_tail_can_be_read_by_the_size(count: int, offset: int) -> None:
    """tail(1) seeks by st_size and reads on from there."""
    whole = b"".join(map(line, range(count)))
    assert read_all(Cursor(filled(count), notice), 100, offset) == whole[offset:]


def test_sizes_grow_though_lines_are_dropped() -> None:
    log, before = EventLog(), 0
    for number in range(2 * RETAINED):
        log.append(line(number))
        assert log.end == before + len(line(number))
        before = log.end
    assert log.end - log.start == len(log.since(0))


@pytest.mark.parametrize("reads_first", [True, False])
def test_an_overtaken_reader_is_told_once(reads_first: bool) -> None:
    log = filled(10)
    cursor = Cursor(log, notice)
    if reads_first:
        read_all(cursor)
    for number in range(10, 10 + RETAINED + 5):
        log.append(line(number))
    assert read_all(cursor, 4096).startswith(b"lost 5\nline 15")
    assert read_all(cursor, 4096).startswith(b"line 15")


def test_who_comes_later_has_missed_nothing() -> None:
    assert b"lost" not in read_all(Cursor(filled(3 * RETAINED), notice), 4096)


def test_waiters_are_called_once_for_a_line_and_for_the_end() -> None:
    log = EventLog()
    called: list[str] = []
    log.waiters["a"] = lambda: called.append("a")
    log.append(b"x\n")
    log.append(b"y\n")
    assert called == ["a"]
    log.waiters["b"] = lambda: called.append("b")
    log.close()
    assert called == ["a", "b"]
    assert log.closed


class Readers(RuleBasedStateMachine):
    """Two readers of one log that keeps four lines."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = eventlog.RETAINED
        eventlog.RETAINED = 4
        self.log = EventLog()
        self.lines: list[bytes] = []
        self.cursors = [Cursor(self.log, notice) for _ in range(2)]
        self.seen = [0, 0]
        self.offsets = [0, 0]

    def teardown(self) -> None:
        eventlog.RETAINED = self.kept

    def owed(self, which: int, start: int) -> bytes:
        """What a load gives that begins with line `start`."""
        oldest = max(0, len(self.lines) - 4)
        missed = max(0, oldest - self.seen[which])
        self.seen[which] = len(self.lines)
        return (notice(missed) if missed else b"") + b"".join(self.lines[max(start, oldest) :])

    @rule()
    def append(self) -> None:
        self.lines.append(line(len(self.lines)))
        self.log.append(self.lines[-1])

    @rule(which=st.sampled_from([0, 1]))
    def snapshot(self, which: int) -> None:
        expected = self.owed(which, 0)
        assert self.cursors[which].read(0, 1 << 20) == expected
        self.offsets[which] = len(expected)

    @rule(which=st.sampled_from([0, 1]))
    def read_on(self, which: int) -> None:
        if self.offsets[which] == 0:
            return self.snapshot(which)
        expected = self.owed(which, self.seen[which])
        assert self.cursors[which].read(self.offsets[which], 1 << 20) == expected
        self.offsets[which] += len(expected)
        return None

    @invariant()
    def ready_means_unseen(self) -> None:
        for which, cursor in enumerate(self.cursors):
            assert cursor.ready == (self.seen[which] < len(self.lines))


TestReaders = Readers.TestCase
