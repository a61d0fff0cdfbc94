"""The benchmarks measure what they say, at a size that takes no time; no time is asserted."""

import json
import platform
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samplers import Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import finish
from server.backends.loading import load_model, load_network
from server.backends.torch.backend import TorchBackend
from server.bench.curves import measure_growth
from server.bench.engine import measure_engine
from server.bench.machine import in_words, instructions, machine
from server.bench.reference import generate
from server.bench.results import alternate, ratio_of, spread, write_results
from server.bench.subjects import BenchModel, embedded
from server.models.families.llada import LLaDA


def tiny(folder: Path) -> BenchModel:
    backend = load_model(str(folder), device="cpu", dtype="float32").backend
    assert isinstance(backend, TorchBackend)
    _, _, plain = load_network(folder, torch.device("cpu"), torch.float32)
    assert isinstance(plain, LLaDA)
    prompts = torch.randint(2, 60, (16, 5), generator=torch.Generator().manual_seed(0)).tolist()
    return BenchModel("tiny", backend, plain, prompts, prompts, 16, 8, 8)


def test_the_plain_loop_gives_the_engines_tokens(tiny_model: Path) -> None:
    subject = tiny(tiny_model)
    info = subject.backend.info
    canvases, forwards = generate(subject.plain, torch.tensor(subject.prompts), 16, 8, 8, info.mask_id)
    topk = get_sampler("topk")
    rows = [Row(Canvas.blank(prompt, 16, info.mask_id, 8), topk, topk.Params(steps=8)) for prompt in subject.prompts]
    finish(rows, subject.backend.predict)
    assert canvases.tolist() == [row.canvas.tokens.tolist() for row in rows]
    assert forwards == 8 == rows[0].forwards


def test_every_measurement_is_there(tiny_model: Path, tmp_path: Path) -> None:
    results = list(measure_engine(tiny(tiny_model), rounds=2, concurrent=(1, 4)))
    assert [result.name for result in results] == [
        "model_vs_matmul",
        "engine_vs_reference_1",
        "engine_vs_reference_1_ends_early",
        "engine_vs_reference_4",
        "engine_vs_reference_4_ends_early",
        "sampler_and_rest_share",
        "mixed_samplers_cost",
        "batch_invariant_cost",
    ]
    for result in results:
        assert 0 < result.low <= result.ratio <= result.high and result.detail["model"] == "tiny"
    write_results(tmp_path / "out.json", machine(), results)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["machine"]["cores"] >= 1 and len(content["results"]) == len(results)
    assert set(content["results"][0]) == {"name", "ratio", "low", "high", "unit", "detail"}


def test_growth_has_a_point_for_each_size() -> None:
    results = list(measure_growth(2, lengths=(64, 128), batches=(1, 4), vocabularies=(100, 200, 300)))
    assert [(result.name, list(result.detail["seconds"])) for result in results] == [
        ("growth_canvas_length", ["64", "128"]),
        ("growth_batch", ["1", "4"]),
        ("growth_vocabulary", ["100", "200", "300"]),
    ]
    assert all(seconds > 0 for result in results for seconds in result.detail["seconds"].values())


def test_ratios_are_taken_round_by_round() -> None:
    first, second = iter([9.0, 2.0, 4.0, 6.0]), iter([9.0, 1.0, 1.0, 1.0])
    over, under = alternate(lambda: next(first), lambda: next(second), 3)
    result = ratio_of("a", "b", over, under, model="c")
    assert (over, under) == ([2.0, 4.0, 6.0], [1.0, 1.0, 1.0])
    assert result.ratio == 4.0 and result.low <= 4.0 <= result.high and result.detail["rounds"] == 3


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=9))
def test_quartiles_lie_between_the_measured_ratios(ratios: list[float]) -> None:
    result = spread("a", "b", ratios)
    assert round(min(ratios), 4) <= result.low <= result.ratio <= result.high <= round(max(ratios), 4)
    assert result.ratio == round(statistics.median(ratios), 4)


def test_quartiles_of_few_ratios() -> None:
    assert spread("a", "b", [3.0]).low == spread("a", "b", [3.0]).high == 3.0
    two, four = spread("a", "b", [1.0, 9.0]), spread("a", "b", [1.0, 2.0, 3.0, 4.0])
    assert (two.low, two.ratio, two.high) == (3.0, 5.0, 7.0)
    assert (four.low, four.ratio, four.high) == (1.75, 2.5, 3.25)


def test_the_machine_is_told_with_its_instructions_threads_and_load() -> None:
    found = machine()
    assert found["processor"] in Path("/proc/cpuinfo").read_text()
    assert set(found["instructions"]) == {"torch", "onednn", "mkl"} and all(found["instructions"].values())
    assert found["threads"] == torch.get_num_threads() and len(found["load"]) == 3
    for told in (found["processor"], found["instructions"]["onednn"], f"load {found['load'][0]}"):
        assert told in in_words(found)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 instruction sets")
def test_instructions_are_those_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert instructions()["onednn"] == "Intel SSE4.1"


def test_prompts_are_of_one_length() -> None:
    subject = embedded(4)
    for prompts in (subject.prompts, subject.ends):
        assert len(prompts) == 4 and len({len(prompt) for prompt in prompts}) == 1
