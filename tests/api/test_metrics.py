"""Metrics cannot harm what they measure, and tell milliseconds apart."""

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from server.runtime.metrics import Metrics
from tests.api.serving import PROMPT, Running, error_of, serving

RECORDING = {
    "queue": (1, 2),
    "memory": ({"weights": 5},),
    "rejected": ("body_too_large",),
    "policies": (3,),
    "policy_load_failed": (),
    "policy_folder_seen": (1.0,),
    "tasks": (3,),
    "prompt_tokens": (3,),
    "queue_time": (0.1,),
    "model_forward": (),
    "committed": ("topk", 1, 1),
    "first_token": (0.1,),
    "step": (1, 0.1, 0.1, 0.1),
    "finished": ("topk", "stop", 5, 2, 1.0, 0.5),
}


def broken(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("counters can only be incremented by non-negative amounts")


def test_every_method_that_records_is_known_here() -> None:
    public = {name for name, _ in inspect.getmembers(Metrics, inspect.isfunction) if not name.startswith("_")}
    assert public == set(RECORDING)


@pytest.mark.parametrize("name", RECORDING)
def test_a_metric_that_raises_is_told_once_and_harms_nobody(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics("m")
    monkeypatch.setattr(MetricWrapperBase, "labels", broken)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            getattr(metrics, name)(*RECORDING[name])
    (record,) = caplog.records
    assert name in record.getMessage() and "non-negative amounts" in record.getMessage()
    assert metrics.failed == {name}


def test_a_count_that_falls_harms_nobody() -> None:
    metrics = Metrics("m")
    metrics.committed("topk", 1, -1)
    metrics.prompt_tokens(-1)
    assert metrics.failed == {"committed", "prompt_tokens"}


def test_the_engine_outlives_all_its_metrics(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_model) as running:
        monkeypatch.setattr(MetricWrapperBase, "labels", broken)
        for stream in (False, True):
            answer = running.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4, "stream": stream})
            assert answer.status_code == 200
        assert running.engine.alive
        assert running.get("/health").status_code == 200
        monkeypatch.undo()
        assert running.metrics()[("dllm_model_forwards_total",)] == 0


def test_labels_are_few_whatever_clients_send(server: Running) -> None:
    def ask(word: str) -> set[tuple[str, ...]]:
        """All series, once a client has said a word wherever it can."""
        headers = {"x-request-id": word, "user-agent": word}
        server.complete(max_tokens=3, user=word, prompt=word, ignore_eos=True)
        server.get(f"/{word}", headers=headers)
        server.http.request(word.upper(), f"/v1/models/{word}", headers=headers)
        for field in ("model", "sampler", word):
            server.post("/v1/completions", {"prompt": "a", "max_tokens": 3, field: word}, headers=headers)
        return set(server.metrics())

    before = ask("first")
    assert all(ask(word) == before for word in ("second", "third"))


def test_metrics_tell_of_the_process_and_its_event_loop(server: Running) -> None:
    found = server.metrics()
    assert found[("process_resident_memory_bytes",)] > 10_000_000 and found[("process_open_fds",)] > 5
    assert found[("python_gc_collections_total", "2")] >= 0
    assert found[("dllm_event_loop_tasks",)] >= 1


def test_metrics_that_cannot_be_written_are_a_500_and_harm_nobody(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tiny_model) as running:
        monkeypatch.setattr(CollectorRegistry, "collect", broken)
        assert error_of(running.get("/metrics"), 500)["code"] == "internal_error"
        assert running.complete()["choices"]
        assert running.get("/health").status_code == 200


def median(metrics: Metrics, name: str) -> float:
    """What a dashboard's histogram_quantile(0.5, ...) says."""
    (family,) = [family for family in metrics.registry.collect() if family.name == name]
    counts = sorted((float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket"))
    half = counts[-1][1] / 2
    below, seen = 0.0, 0.0
    for edge, count in counts:
        if count >= half:
            return below + (edge - below) * (half - seen) / (count - seen)
        below, seen = edge, count
    raise AssertionError


@pytest.mark.parametrize("seconds", [0.001, 0.002, 0.004, 0.01, 0.03, 0.15, 1.2, 7.0])
@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("dllm_request_queue_time_seconds", lambda m, s: m.queue_time(s)),
        ("dllm_time_to_first_token_seconds", lambda m, s: m.first_token(s)),
        ("dllm_e2e_request_latency_seconds", lambda m, s: m.finished("topk", "stop", 2, 2, s, 1.0)),
        ("dllm_time_per_output_token_seconds", lambda m, s: m.finished("topk", "stop", 2, 2, 1.0, s)),
        ("dllm_step_seconds", lambda m, s: m.step(1, s, s, s)),
    ],
)
def test_a_dashboards_median_is_right_from_a_millisecond_up(name: str, record: Any, seconds: float) -> None:
    metrics = Metrics("m")
    for _ in range(100):
        record(metrics, seconds)
    assert seconds / 3 <= median(metrics, name) <= seconds * 2


def test_the_buckets_of_vllm_are_among_ours() -> None:
    from server.runtime.metrics import E2E, FIRST_TOKEN, PER_TOKEN

    assert {0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 60.0, 120.0, 960.0} <= set(E2E)
    assert {0.001, 0.005, 0.01, 0.25, 2.5, 640.0, 2560.0} <= set(FIRST_TOKEN)
    assert {0.01, 0.025, 0.05, 0.075, 0.1, 80.0} <= set(PER_TOKEN)
    for buckets in (E2E, FIRST_TOKEN, PER_TOKEN):
        assert list(buckets) == sorted(set(buckets)) and buckets[0] <= 0.001
