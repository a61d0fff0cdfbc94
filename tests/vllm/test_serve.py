"""`unmask serve --engine vllm` over HTTP: what a request may choose, and what the server tells."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.processes import Process, served
from tests.e2e.test_serve import LONG, _in_the_midst
from tests.vllm.processes import alive, descendants

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ON_VLLM = ("--engine", "vllm", "--dtype", "float32", "--device", "cpu")
QUESTION = "Tom has 12 pens. He buys 3 boxes of 4. He loses 5 of them. How many pens does Tom have now?"
SAMPLERS: list[dict[str, Any]] = [
    {"sampler": "topk", "sampler_params": {"k": 1}},
    {"sampler": "topk", "sampler_params": {"k": 4}},
    {"sampler": "threshold", "sampler_params": {"threshold": 0.9}},
    {"sampler": "entropy", "sampler_params": {"k": 2}},
    {"sampler": "random", "seed": 3, "temperature": 0.5, "top_p": 0.9},
    {"sampler": "policy", "sampler_params": {"policy": "chain"}, "block_length": None},
    {"model": "unmask-tiny:policy-general", "block_length": None},
]


@pytest.fixture(scope="module")
def on_vllm() -> Iterator[Process]:
    """The embedded model."""
    with served(*ON_VLLM) as process:
        yield process


@pytest.fixture(scope="module")
def on_torch() -> Iterator[Process]:
    with served("--dtype", "float32", "--device", "cpu") as process:
        yield process


def complete(process: Process, **fields: Any) -> Any:
    answer = process.post(**({"prompt": QUESTION, "max_tokens": 48, "block_length": 16} | fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def told(answer: Any) -> tuple[str, str, int, int]:
    choice, usage = answer["choices"][0], answer["usage"]
    forwards = usage["completion_tokens_details"]["forward_passes"]
    return choice["text"], choice["finish_reason"], usage["completion_tokens"], forwards


def metrics(process: Process) -> dict[tuple[str, ...], float]:
    found = {}
    for family in text_string_to_metric_families(process.http.get("/metrics").text):
        for sample in family.samples:
            labels = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
            found[(sample.name, *labels)] = sample.value
    return found


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("fields", SAMPLERS)
def test_each_request_chooses_its_sampler(on_vllm: Process, on_torch: Process, fields: dict[str, Any]) -> None:
    """And gets from vLLM what it gets from our own code: policies, draws and all."""
    answer = complete(on_vllm, **fields)
    assert told(answer) == told(complete(on_torch, **fields))
    assert told(answer)[2] > 1


def test_a_stream_says_the_same(on_vllm: Process) -> None:
    fields = {"prompt": QUESTION, "max_tokens": 48, "block_length": 8, "sampler": "topk", "stream": True}
    with on_vllm.http.stream("POST", "/v1/completions", json=fields) as answer:
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    parts = [json.loads(event)["choices"][0]["text"] for event in events]
    assert len([part for part in parts if part]) > 3
    assert "".join(parts) == told(complete(on_vllm, block_length=8, sampler="topk"))[0]


def test_metrics_are_ours_alone(on_vllm: Process) -> None:
    before = metrics(on_vllm)
    answer = complete(on_vllm, sampler="topk", sampler_params={"k": 2}, block_length=8)
    after = metrics(on_vllm)
    _, reason, tokens, forwards = told(answer)

    def grown(*name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("dllm_model_forwards_total") == grown("dllm_forward_passes_total", "topk") == forwards
    assert grown("dllm_generation_tokens_total", "topk") == tokens
    # The labels' values in the order of their names: finish_reason, sampler.
    assert grown("dllm_requests_total", reason, "topk") == 1
    assert grown("dllm_step_seconds_count", "model") == forwards
    assert not [name for name, *_ in after if not name.startswith(("dllm_", "process_", "python_"))]


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_a_cache_is_refused(on_vllm: Process, mode: str) -> None:
    answer = on_vllm.post(max_tokens=4, cache=mode)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "cache"


@contextmanager
def with_its_processes(model: Path) -> Iterator[tuple[Process, list[int]]]:
    """A server, and the processes of vLLM's below it."""
    with served(*ON_VLLM, "--model", str(model)) as process:
        below = list(descendants(process.popen.pid))
        assert len(alive(below)) >= 2, "engine core and worker"
        yield process, below


def test_a_client_that_goes_away_and_ctrl_c(tiny_model: Path) -> None:
    """Ctrl-C reaches every process of the terminal's group, and must not take the model from under what runs."""
    with with_its_processes(tiny_model) as (process, below):

        def value(name: str, *labels: str) -> float:
            return metrics(process).get((name, *labels), 0.0)

        with _in_the_midst(process):
            assert value("dllm_requests_running") == 2
        until(lambda: value("dllm_requests_running") == 0)
        assert value("dllm_requests_total", "abort", "threshold") == 2
        forwards = value("dllm_model_forwards_total")
        assert process.post(max_tokens=8, block_length=1).status_code == 200
        assert value("dllm_model_forwards_total") == forwards + 8, "nobody's generation went on"

        with process.http.stream("POST", "/v1/completions", json=LONG) as answer:
            lines = answer.iter_lines()
            next(lines)
            for pid in (process.popen.pid, *below):
                os.kill(pid, signal.SIGINT)
            while process.status("/ready") == 200:
                time.sleep(0.01)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        reasons = [json.loads(event[6:])["choices"][0]["finish_reason"] for event in events[:-1]]
        assert len([reason for reason in reasons if reason in ("length", "stop")]) == 2
        assert process.popen.wait(timeout=60) == 0
        assert process.popen.stdout is not None and process.popen.stdout.read() == ""
    until(lambda: not alive(below))


def test_sigterm_ends_it_all(tiny_model: Path) -> None:
    with with_its_processes(tiny_model) as (process, below):
        assert process.post(max_tokens=4).status_code == 200
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(timeout=60) == 0
    until(lambda: not alive(below))


def test_a_server_that_is_killed_leaves_no_process_behind(tiny_model: Path) -> None:
    with with_its_processes(tiny_model) as (process, below):
        process.popen.kill()
    until(lambda: not alive(below))


def test_a_model_that_ends_ends_the_server(tiny_model: Path) -> None:
    with with_its_processes(tiny_model) as (process, below):
        for pid in below:
            os.kill(pid, signal.SIGKILL)
        assert process.post(max_tokens=4).status_code >= 500
        assert process.popen.wait(timeout=60) == 1
