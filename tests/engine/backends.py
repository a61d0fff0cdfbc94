"""Backends for tests: cheap, watchable, and able to fail on purpose."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from server.engine import Engine, Event, Finished, GenerationRequest, ModelInfo, StepEvent
from tests.samplers.models import MASK, VOCAB, Logits, predictor, random_logits

Tokens = list[int]


def model_info(end_ids: frozenset[int] = frozenset()) -> ModelInfo:
    return ModelInfo(
        architecture="Test",
        max_length=64,
        vocab_size=VOCAB,
        mask_id=MASK,
        end_ids=end_ids,
        block_length=None,
        device="cpu",
        dtype="float32",
        parameters=0,
    )


class CheapBackend:
    """Logits that are a function of the canvas. Keeps what it was asked; `before` may raise or wait."""

    def __init__(self, logits: Logits = random_logits, before: Callable[[Query], None] | None = None) -> None:
        self.info = model_info()
        self.batches: list[list[Tokens]] = []
        self.closed = False
        self._predict = predictor(logits)
        self._before = before

    def predict(self, query: Query) -> Prediction:
        self.batches.append([canvas.tokens.tolist() for canvas in query.canvases])
        if self._before is not None:
            self._before(query)
        return self._predict(query)

    def close(self) -> None:
        self.closed = True

    def prompts_seen(self) -> set[int]:
        """First tokens of all canvases that reached the model."""
        return {tokens[0] for batch in self.batches for tokens in batch}


class Gate:
    """Lets forwards through one by one, as `before` of a CheapBackend."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)

    def __call__(self, query: Query) -> None:
        self._arrived.release()
        assert self._permits.acquire(timeout=30)

    def wait(self) -> None:
        """Until a forward stands at the gate."""
        assert self._arrived.acquire(timeout=30)

    def release(self) -> None:
        """Let one forward through."""
        self._permits.release()

    def step(self, count: int = 1) -> None:
        """Wait for forwards and let them through, one after the other."""
        for _ in range(count):
            self.wait()
            self.release()

    def open(self) -> None:
        """Let all forwards through from now on."""
        self._permits.release(1_000_000)


@dataclass
class Listener:
    """Collects the events of one generation."""

    events: list[Event] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished):
            self._ended.set()

    def finish(self, timeout: float = 30) -> Finished:
        """Wait for the end, which must be the last event and the only one of its kind."""
        assert self._ended.wait(timeout), "the generation did not end"
        *others, last = self.events
        assert isinstance(last, Finished) and all(isinstance(event, StepEvent) for event in others)
        return last

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def commits(self) -> list[StepEvent]:
        return [event for event in self.events if isinstance(event, StepEvent)]

    def tokens(self, length: int) -> Tokens:
        """The region put together from the events; -1 where nothing was committed."""
        region = torch.full((length,), -1)
        for event in self.commits:
            region[event.positions] = torch.tensor(event.tokens)
        found: Tokens = region.tolist()
        return found

    def text(self) -> Tokens:
        """The text put together from the events."""
        return [token for event in self.commits for token in event.text_tokens]


def run(engine: Engine, requests: list[GenerationRequest]) -> list[Listener]:
    """Submit all at once and wait for all."""
    listeners = [Listener() for _ in requests]
    engine.submit_all(requests, list(listeners))
    for listener in listeners:
        listener.finish()
    return listeners
