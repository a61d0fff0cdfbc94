"""IncomingBodies that are not complete: how much memory they take together, who waits, and who goes."""

import asyncio
import math
from contextlib import ExitStack
from pathlib import Path

import pytest

from server.http.connections import ConnectionLimits
from server.http.incoming import MIN_PACE, READ_SIZE, SMALL_BODY, IncomingBodies
from server.http.progress import PACE_PERIOD
from tests.api.serving import serving, until
from tests.http.test_connection_limits import GET, POST, Connection, rejected, soon
from tests.http.test_connections import BODY, Answers, connected, head, sized

BIG = 10 * SMALL_BODY


class Fake:
    """A connection that only notes what is done to it."""

    def __init__(self, bodies: IncomingBodies, pace: float = math.inf) -> None:
        self.bodies, self.pace = bodies, pace
        self.is_read = True
        self.ended: str | None = None

    def hold_body(self) -> None:
        self.is_read = False

    def read_body(self) -> None:
        self.is_read = True

    def end_slow_body(self) -> None:
        self.ended = "slow"
        self.bodies.set_held(self, 0)

    def end_waiting_body(self) -> None:
        self.ended = "waited"
        self.bodies.set_held(self, 0)


def several(most: int, *paces: float) -> tuple[IncomingBodies, list[Fake]]:
    """Connections that hold a big body each."""
    bodies = IncomingBodies(most)
    fakes = [Fake(bodies, pace) for pace in paces]
    for fake in fakes:
        bodies.set_held(fake, BIG)
    return bodies, fakes


def test_beyond_the_budget_one_is_read_at_a_time() -> None:
    bodies, fakes = several(2 * BIG, *[math.inf] * 5)
    assert [fake.is_read for fake in fakes] == [True, True, False, False, False]
    bodies.check(0, 30)
    for fake in fakes[:2]:
        bodies.set_held(fake, BIG + 1)
    assert [fake.is_read for fake in fakes] == [False, False, True, False, False]
    bodies.set_held(fakes[2], 2 * BIG)
    assert fakes[2].is_read, "the first reads on"
    bodies.set_held(fakes[2], 0)
    assert [fake.is_read for fake in fakes] == [False, False, True, True, False], "the next is read"
    for fake in (fakes[3], fakes[4], *fakes[:2]):
        assert fake.is_read
        bodies.set_held(fake, 0)
    assert all(fake.is_read and fake.ended is None for fake in fakes)
    assert bodies.total == 0 and bodies.freed == 6 * BIG + 2


def test_where_there_is_room_no_more_are_read_than_fit() -> None:
    bodies, fakes = several(BIG, *[math.inf] * 9)
    bodies.set_held(fakes[0], 0)
    for fake in fakes[1:]:
        bodies.set_held(fake, 1)
    bodies.check(0, 30)
    assert sum(fake.is_read for fake in fakes[1:]) == (BIG - 8) // READ_SIZE + 2


def test_small_bodies_are_read_in_any_case() -> None:
    bodies, _ = several(BIG, math.inf, math.inf)
    small = Fake(bodies)
    bodies.set_held(small, SMALL_BODY)
    assert small.is_read
    bodies.set_held(small, SMALL_BODY + 1)
    assert not small.is_read


def test_the_slowest_go_first_and_only_as_many_as_must() -> None:
    bodies, fakes = several(2 * BIG, MIN_PACE, MIN_PACE - 1, 1, 2, math.inf)
    bodies.check(0, 30)
    assert [fake.ended for fake in fakes] == [None, "slow", "slow", "slow", None]
    bodies, fakes = several(4 * BIG, MIN_PACE, MIN_PACE - 1, 1, 2, math.inf)
    bodies.check(0, 30)
    assert [fake.ended for fake in fakes] == [None, None, "slow", None, None]


def test_nobody_waits_for_ever() -> None:
    bodies, fakes = several(BIG, *[math.inf] * 4)
    for now in (0, 29, 31):
        bodies.check(now, 30)
    assert [fake.ended for fake in fakes] == [None, None, "waited", "waited"]


@pytest.mark.asyncio
async def test_what_the_app_has_of_a_body_is_counted_until_it_is_complete_or_refused() -> None:
    for end in (
        lambda fake: fake.protocol.data_received(b" " * (BIG - 501)),
        lambda fake: fake.protocol.connection_lost(None),
        lambda fake: fake.protocol.make_room(),
    ):
        fake = Connection()
        fake.protocol.data_received(head(f"Content-Length: {BIG}") + b" " * 500)
        await soon()
        fake.protocol.data_received(b" ")
        assert fake.watch.bodies.total == 500
        end(fake)
        assert fake.watch.bodies.total == 0


@pytest.mark.asyncio
async def test_a_body_that_the_app_does_not_want_yet_is_not_counted() -> None:
    fake = Connection()
    fake.protocol.data_received(GET + head(f"Content-Length: {BIG}") + b" " * 2 * SMALL_BODY)
    await soon()
    assert fake.watch.bodies.total == 0


@pytest.mark.asyncio
async def test_a_pace_is_that_of_the_time_in_which_a_body_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Connection()
    now = asyncio.get_running_loop().time()
    fake.protocol.data_received(head(f"Content-Length: {BIG}") + b" " * 500)
    fake.protocol.check(now + PACE_PERIOD / 2)
    assert fake.protocol.pace == math.inf
    fake.protocol.hold_body()
    fake.protocol.check(now + 10 * PACE_PERIOD)
    fake.protocol.flow.resume_reading()
    assert fake.transport.paused, "whoever reads the body cannot make it read on"
    fake.protocol.read_body()
    fake.protocol.check(now + 10.5 * PACE_PERIOD)
    assert fake.protocol.pace == math.inf
    fake.protocol.data_received(b" " * 1000)
    fake.protocol.check(now + 12 * PACE_PERIOD)
    assert fake.protocol.pace == pytest.approx(1000 / (2 * PACE_PERIOD), rel=0.1)


@pytest.mark.asyncio
async def test_a_body_whose_client_does_not_read_is_looked_at_too() -> None:
    fake = Connection(ConnectionLimits(body_timeout=5))
    fake.transport.waiting = 10
    fake.protocol.data_received(head(f"Content-Length: {BIG}") + b" ")
    fake.protocol.check(asyncio.get_running_loop().time() + 6)
    assert fake.counted == ["slow_request"]


def test_others_are_served_while_bodies_are_held(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[None] = []
    monkeypatch.setattr("server.http.lifecycle.TRIM_AFTER", BIG)
    monkeypatch.setattr("server.http.lifecycle.QUIET_TICKS", 2)
    monkeypatch.setattr("server.http.lifecycle.give_back_heap", lambda: trimmed.append(None))
    monkeypatch.setattr("server.http.progress.PACE_PERIOD", 0.2)
    with serving(tiny_model) as running, ExitStack() as stack:
        bodies = running.server._watch.bodies
        bodies.max_total = 2 * BIG
        holding = [stack.enter_context(connected(running)) for _ in range(6)]
        for connection in holding:
            connection.sendall(POST + b"content-length: %d\r\n\r\n" % (2 * BIG) + b" " * BIG)
        quick = stack.enter_context(connected(running))
        quick.sendall(sized(body=BODY + b" " * 3 * BIG))
        assert Answers(quick).next()[0] == 200
        until(lambda: bodies.total <= bodies.max_total)
        assert rejected(running, "slow_request") >= 3
        until(lambda: trimmed)
