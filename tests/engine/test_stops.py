"""Stops that are looked for on the engine's thread, and listeners that fail."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from samplers import get_sampler
from server.engine import Engine, Event, FinishReason, GenerationRequest, Limits
from server.runtime.metrics import Metrics
from tests.engine.backends import CheapBackend, Listener
from tests.samplers.models import scripted

TOPK = get_sampler("topk")
LETTERS = [4, 7, 5, 9, 6, 8, 3, 10]
BACKEND_SCRIPT = {i + 1: (token, 0.9 - i / 100) for i, token in enumerate(LETTERS)}


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(CheapBackend(scripted(BACKEND_SCRIPT)), Metrics("test"), Limits())
    engine.start()
    yield engine
    engine.stop()


@dataclass
class After:
    """Stops with this token."""

    token: int
    seen: list[int] = field(default_factory=list)
    ended: bool = False

    def add(self, tokens: Sequence[int], last: bool = False) -> int | None:
        assert not self.ended, "nothing is asked after the end"
        self.ended = last
        self.seen += tokens
        return self.seen.index(self.token) + 1 if self.token in self.seen else None


def request(stop: object, k: int = 1) -> GenerationRequest:
    return GenerationRequest([1], len(LETTERS), TOPK, TOPK.Params(k=k), stop=stop)  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "forwards"), [(1, 4), (3, 2), (8, 1)])
def test_no_forward_follows_the_one_that_completes_a_stop(engine: Engine, k: int, forwards: int) -> None:
    """However many tokens a forward settles, those up to the stop count."""
    listener = Listener()
    engine.submit(request(After(9), k), listener)
    end = listener.finish()
    assert (end.reason, end.completion_tokens, end.forwards) == (FinishReason.STOP, 4, forwards)
    assert listener.text() == LETTERS[:4]
    assert len(engine.backend.batches) == forwards  # type: ignore[attr-defined]


def test_a_stop_that_never_comes(engine: Engine) -> None:
    listener, stop = Listener(), After(11)
    engine.submit(request(stop), listener)
    assert (listener.finish().reason, listener.finish().completion_tokens) == (FinishReason.LENGTH, len(LETTERS))
    assert stop.ended and stop.seen == LETTERS


class Broken:
    def add(self, tokens: Sequence[int], last: bool = False) -> int | None:
        raise RuntimeError("no such text")


def test_a_stop_that_fails_ends_its_generation_alone(engine: Engine) -> None:
    broken, other = Listener(), Listener()
    engine.submit_all([request(Broken()), request(None)], [broken, other])
    assert broken.finish().reason is FinishReason.ERROR and "RuntimeError" in broken.finish().message
    assert other.finish().reason is FinishReason.LENGTH and other.text() == LETTERS
    assert engine.alive


def test_a_listener_that_fails_harms_no_other(engine: Engine) -> None:
    def deaf(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    other = Listener()
    engine.submit_all([request(None), request(None)], [deaf, other])
    assert other.finish().reason is FinishReason.LENGTH
    assert engine.wait_idle(timeout=30) and engine.alive
