"""LLaDA's recorded `cfg_scale` as the modifier `guidance` of requests to the engine, as the API makes them."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from samplers import get_modifier, get_sampler
from samplers.loop.event import StepEvent
from server.engine import Engine, Event, Finished, FinishReason, GenerationRequest
from server.runtime.metrics import Metrics
from tests.conformance.models import open_backend
from tests.conformance.replay import Tokens, compare_states
from tests.conformance.report import Difference
from tests.conformance.requests import unpadded
from tests.conformance.test_conformance import FIXTURES, needs_fixtures, recorded

pytestmark = needs_fixtures

CASES = ("cfg", "batch_left_padded_cfg")


class Story:
    """The events of one generation, and its generation region after each forward."""

    def __init__(self, mask_id: int, length: int) -> None:
        self.states: list[Tokens] = []
        self.end: Finished | None = None
        self.ended = threading.Event()
        self._region = [mask_id] * length

    def deliver(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            for position, token in zip(event.positions, event.tokens, strict=True):
                self._region[position] = token
            self.states.append(list(self._region))
        else:
            self.end = event
            self.ended.set()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    backend = open_backend(FIXTURES / "llada" / "checkpoint", "torch")
    started = Engine(backend, Metrics("test"))
    started.start()
    yield started
    started.stop()


def replayed(engine: Engine, case: dict[str, Any], scale: float) -> list[Story]:
    """The case's prompts as generations of one batch."""
    params = case["params"]
    sampler, guidance = get_sampler("topk"), get_modifier("guidance")
    prompts, _ = unpadded(case)
    stories = [Story(params["mask_id"], params["gen_length"]) for _ in prompts]
    requests = [
        GenerationRequest(
            prompt=prompt,
            max_tokens=params["gen_length"],
            sampler=sampler,
            params=sampler.Params(steps=params["steps"]),
            name="topk",
            modifiers=[(guidance, guidance.Params(scale=scale))],
            block_length=params["block_length"],
            fill_after_end=False,
        )
        for prompt in prompts
    ]
    engine.submit_all(requests, [story.deliver for story in stories])
    for story in stories:
        assert story.ended.wait(30)
    return stories


def compare(case: dict[str, Any], stories: list[Story]) -> None:
    """Raise Difference where a canvas is not the recorded one."""
    for i, story in enumerate(stories):
        first = len(case["prompt"][i])
        compare_states(story.states, [canvas[i][first:] for canvas in case["trajectory"]], i)


@pytest.mark.parametrize("name", CASES)
def test_guidance_is_the_originals(engine: Engine, name: str) -> None:
    """The same canvas after every forward, of which there are two a step."""
    case = recorded(name)
    stories = replayed(engine, case, case["params"]["cfg_scale"])
    compare(case, stories)
    for story in stories:
        assert story.end is not None and story.end.reason is FinishReason.LENGTH
        assert story.end.forwards == 2 * case["params"]["steps"]


@pytest.mark.parametrize("name", CASES)
def test_another_scale_is_noticed(engine: Engine, name: str) -> None:
    case = recorded(name)
    with pytest.raises(Difference):
        compare(case, replayed(engine, case, case["params"]["cfg_scale"] + 1))
