"""The originals' records on the vLLM engine: all that needs no cache passes."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from samplers import Canvas, get_sampler
from samplers.loop.row import Row
from server.engine import Backend
from tests.conformance.models import open_backend
from tests.conformance.replay import compare_states, replay
from tests.conformance.report import Status
from tests.conformance.runner import NOT_BUILT, run
from tests.conformance.test_conformance import FIXTURES, needs_fixtures

pytestmark = [pytest.mark.vllm, needs_fixtures, pytest.mark.filterwarnings("ignore")]

CACHED = ("prefix", "dual", "cached", "Vicinity")


@pytest.mark.parametrize(("family", "least"), [("llada", 32), ("dinfer", 7), ("dream", 33)])
def test_everything_without_a_cache_passes(family: str, least: int) -> None:
    results = list(run(FIXTURES / family, "vllm"))
    passed = [result for result in results if result.status is Status.PASS]
    others = [result for result in results if result.status is not Status.PASS]
    assert len(passed) >= least
    assert [result.line() for result in others if not result.detail.startswith(NOT_BUILT)] == []
    assert [result.line() for result in others if not any(word in result.case for word in CACHED)] == []


@pytest.fixture(scope="module")
def llada() -> Iterator[Backend]:
    backend = open_backend(FIXTURES / "llada" / "checkpoint", "vllm")
    yield backend
    backend.close()


def plain_cases() -> list[dict[str, Any]]:
    """Single prompts, greedy, without the originals' quirks."""
    cases = json.loads((FIXTURES / "llada" / "cases.json").read_text())["cases"]
    quirks = {"cfg_scale", "logits_eos_inf", "confidence_eos_eot_inf", "remasking", "factor"}
    return [
        case
        for case in cases
        if case["function"] == "generate" and case["manual_seed"] is None and not quirks & case["params"].keys()
    ]


def test_eight_cases_at_once(llada: Backend) -> None:
    """In one batch, of different prompts, lengths, blocks and samplers."""
    cases = plain_cases()
    rows, records = [], []
    for case in cases:
        params = case["params"]
        threshold = params.get("threshold")
        sampler = get_sampler("topk" if threshold is None else "threshold")
        chosen = {"steps": params["steps"]} if threshold is None else {"threshold": threshold}
        for i, prompt in enumerate(case["prompt"]):
            cut = case["attention_mask"][i].index(1) if case["attention_mask"] else 0
            canvas = Canvas.blank(prompt[cut:], params["gen_length"], params["mask_id"], params["block_length"])
            rows.append(Row(canvas, sampler, sampler.Params(**chosen), fill_after_end=False))
            records.append([state[i][cut:] for state in case["trajectory"]])
    assert len(rows) >= 8
    recording = replay(rows, llada.predict)
    for i, (states, record) in enumerate(zip(recording.states, records, strict=True)):
        compare_states(states, record, i)
