"""The same model on both engines: the same predictions, the same tokens in as many forwards."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from prometheus_client import REGISTRY, Counter

from samplers import CacheMode, Canvas, TokenChoice, get_modifier, get_sampler, list_samplers
from samplers.forward.query import Query
from samplers.forward.statistics import LogitBonus, StatisticsRequest
from samplers.loop.row import Row
from samplers.loop.run import finish, next_query
from server.backends.vllm.backend import VllmBackend
from server.engine import Backend, Engine, GenerationRequest, RequestError
from server.runtime.metrics import Metrics

pytestmark = pytest.mark.vllm

NAMES = [sampler.name for sampler in list_samplers() if not sampler.requires and not sampler.drafts]
CLOSE = 2e-5
"""How far apart both engines' probabilities may be; greedy runs part ways only where two choices are closer."""


def row(name: str, i: int = 0, temperature: float = 0.0) -> Row:
    sampler = get_sampler(name)
    canvas = Canvas.blank(list(range(5, 9 + i)), 16 + i, 0, (None, 8)[i % 2], [7] * (i % 3))
    choice = TokenChoice(0.0 if sampler.chooses_tokens else temperature, 0.9, 40)
    return Row(canvas, sampler, sampler.Params(), choice, seed=i)


def tokens_and_forwards(rows: list[Row], backend: Backend) -> list[tuple[list[int], int]]:
    finish(rows, backend.predict)
    return [(each.canvas.tokens.tolist(), each.forwards) for each in rows]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_the_same(vllm_tiny: Backend, torch_tiny: Backend, name: str, temperature: float) -> None:
    expected = tokens_and_forwards([row(name, temperature=temperature)], torch_tiny)
    assert tokens_and_forwards([row(name, temperature=temperature)], vllm_tiny) == expected


def guided(i: int, temperature: float = 0.0) -> Row:
    """One that the model sees twice, the second time without its prompt or with another."""
    base, guidance = row(NAMES[i], i, temperature), get_modifier("guidance")
    params = guidance.Params(scale=0.5 + i, negative_prompt=[9, 8, 7] if i else None)
    return replace(base, canvas=row(NAMES[i], i).canvas, modifiers=[(guidance, params)])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_guidance_is_the_same(vllm_tiny: Backend, torch_tiny: Backend, temperature: float) -> None:
    """Alone, with others that are guided, and among some that are not; each view is a forward."""

    def some() -> list[Row]:
        return [row("topk", 7), *(guided(i, temperature) for i in range(3)), row("threshold", 6)]

    expected = tokens_and_forwards(some(), torch_tiny)
    assert tokens_and_forwards(some(), vllm_tiny) == expected
    assert tokens_and_forwards(some()[2:3], vllm_tiny) == expected[2:3]
    assert expected[1][1] == 2 * tokens_and_forwards([row(NAMES[0], 0, temperature)], torch_tiny)[0][1]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_eight_at_once_are_the_same_as_alone(vllm_tiny: Backend, torch_tiny: Backend, temperature: float) -> None:
    def eight() -> list[Row]:
        return [row(name, i, temperature) for i, name in enumerate(NAMES[:8])]

    expected = [tokens_and_forwards([each], torch_tiny)[0] for each in eight()]
    assert tokens_and_forwards(eight(), vllm_tiny) == expected
    assert tokens_and_forwards(eight()[3:4], vllm_tiny) == expected[3:4]


def test_all_statistics_of_a_mixed_query(vllm_tiny: Backend, torch_tiny: Backend) -> None:
    query = next_query([row(name, i, 0.7) for i, name in enumerate(NAMES)])
    found, expected = vllm_tiny.predict(query), torch_tiny.predict(query)
    assert found.token.equal(expected.token)
    assert (found.confidence - expected.confidence).abs().max() < CLOSE
    assert found.extra.keys() == expected.extra.keys()
    for name, values in expected.extra.items():
        rows = query.wanted.only.get(name, torch.ones(len(values), dtype=torch.bool))
        assert (found.extra[name][rows] - values[rows]).abs().max() < 10 * CLOSE, name


def test_largest_named_and_bonus(vllm_tiny: Backend, torch_tiny: Backend) -> None:
    one = row("topk")
    plain = next_query([one])
    count = len(plain.row)
    bonus = LogitBonus(torch.tensor([0, 1]), torch.tensor([9, 9]), torch.tensor([30.0, 30.0]))
    named = torch.tensor([[9, -1]]).expand(count, 2)
    query = Query(
        plain.canvases, plain.spans, plain.row, plain.position, StatisticsRequest(top=5, named=named, bonus=bonus)
    )
    found, expected = vllm_tiny.predict(query), torch_tiny.predict(query)
    assert found.token[:2].tolist() == [9, 9] and found.token.equal(expected.token)
    assert found.top is not None and found.named is not None
    assert expected.top is not None and expected.named is not None
    assert found.top.shape == (count, 5) and (found.top - expected.top).abs().max() < CLOSE
    assert found.named.shape == (count, 2) and (found.named - expected.named).abs().max() < CLOSE
    assert found.named[0, 0] > 0.99 and bool((found.named[:, 1] == 0).all())


def test_queries_of_several_threads_do_not_mix(vllm_tiny: Backend, torch_tiny: Backend) -> None:
    """Their canvases may well share a forward."""
    expected = [tokens_and_forwards([row(name, i)], torch_tiny) for i, name in enumerate(NAMES)]
    with ThreadPoolExecutor(len(NAMES)) as pool:
        jobs = [pool.submit(tokens_and_forwards, [row(name, i)], vllm_tiny) for i, name in enumerate(NAMES)]
        assert [job.result() for job in jobs] == expected


def test_more_canvases_than_rows(vllm_tiny: Backend, torch_tiny: Backend) -> None:
    """What does not fit into one of vLLM's forwards goes into the next."""
    query = next_query([row("topk", i % 5) for i in range(40)])
    found, expected = vllm_tiny.predict(query), torch_tiny.predict(query)
    assert found.token.equal(expected.token)


def test_a_canvas_as_long_as_the_model_allows(vllm_tiny: Backend, torch_tiny: Backend) -> None:
    length = vllm_tiny.info.max_length
    sampler = get_sampler("topk")
    query = next_query([Row(Canvas.blank([5] * (length - 8), 8, 0), sampler, sampler.Params())])
    assert vllm_tiny.predict(query).token.equal(torch_tiny.predict(query).token)


def test_it_says_what_it_cannot_do(vllm_tiny: VllmBackend) -> None:
    assert vllm_tiny.info.caches == {CacheMode.NONE}
    engine, topk = Engine(vllm_tiny, Metrics("m")), get_sampler("topk")
    for mode in (CacheMode.PREFIX, CacheMode.DUAL):
        with pytest.raises(RequestError, match="choose from none") as refused:
            engine.check(GenerationRequest([5], 4, topk, topk.Params(), cache=mode))
        assert refused.value.field == "cache"


def test_a_failed_step_leaves_the_next_one_alone(vllm_tiny: VllmBackend, torch_tiny: Backend) -> None:
    good = row("topk")
    too_long = Canvas.blank([5] * vllm_tiny.info.max_length, 8, 0)
    sampler = get_sampler("topk")
    with pytest.raises(Exception, match="maximum model length"):
        vllm_tiny.predict(next_query([good, Row(too_long, sampler, sampler.Params())]))
    assert tokens_and_forwards([row("topk")], vllm_tiny) == tokens_and_forwards([row("topk")], torch_tiny)


def test_its_metrics_and_those_of_others_stay_apart(vllm_tiny: VllmBackend) -> None:
    """vLLM keeps its own in the global registry, and clears that of everything of its name when it counts."""
    bystander = Counter("vllm:bystander", "Of somebody else in this process.")
    bystander.inc()
    vllm_tiny.predict(next_query([row("topk")]))
    assert REGISTRY.get_sample_value("vllm:bystander_total") == 1
    names = {metric.name for metric in REGISTRY.collect() if metric.name.startswith("vllm:")}
    assert names == {"vllm:bystander"}, "vLLM counts steps as requests"
    assert not any(metric.name.startswith("vllm") for metric in Metrics("m").registry.collect())
    REGISTRY.unregister(bystander)
