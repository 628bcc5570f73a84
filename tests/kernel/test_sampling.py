"""Looking again and again, whatever a look meets with."""

import pytest

from kernelkit import Heard, Turned, want
from limitfs.errors import Unsupported
from limitfs.hearing.sampling import SamplingSource
from limitfs.resources.model import Level, Limit, Measured, Resource, System, Unit


class Fake(Resource):
    """Has a value, or raises what it is told to."""

    name = "fake"
    unit = Unit.COUNT
    levels = frozenset({Level.SYSTEM})
    help = "made up"

    def __init__(self) -> None:
        self.value: float | Exception = 1.0

    def usage(self, target: Measured) -> float:
        del target
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def limit(self, target: Measured) -> Limit:
        del target
        return Limit()


@pytest.fixture
def fake() -> Fake:
    return Fake()


def test_a_look_that_fails_is_said_once_and_is_not_the_last(
    reactor: Turned, heard: Heard, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    armed = SamplingSource(reactor).arm(want(fake, System(), ">= 5"), heard)
    fake.value = RecursionError("too deep")
    reactor.until(lambda: heard.losses)
    armed.look_now()
    assert heard.losses == 1
    assert caplog.text.count("looking at fake") == 1
    fake.value = 7.0
    reactor.until(lambda: 7.0 in heard.values())
    fake.value = OSError("again")
    reactor.until(lambda: heard.losses == 2)
    armed.disarm()
    assert heard.ended == []


def test_what_cannot_be_told_just_now_is_no_failure(
    reactor: Turned, heard: Heard, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    armed = SamplingSource(reactor).arm(want(fake, System(), ">= 5"), heard)
    fake.value = Unsupported("just now")
    armed.look_now()
    fake.value = 7.0
    reactor.until(lambda: 7.0 in heard.values())
    armed.disarm()
    assert heard.losses == 0
    assert caplog.text == ""


def test_who_arms_is_told_of_a_first_look_that_fails(reactor: Turned, heard: Heard, fake: Fake) -> None:
    fake.value = RecursionError("too deep")
    with pytest.raises(RecursionError):
        SamplingSource(reactor).arm(want(fake, System(), ">= 5"), heard)
    assert (heard.losses, heard.readings) == (0, [])
