"""Prometheus metrics, recorded where the event happens. All metric names are defined here."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

log = structlog.get_logger(__name__)

disable_created_metrics()  # type: ignore[no-untyped-call]

# vLLM's buckets for shared metrics, with smaller ones added: a small model answers in milliseconds.
E2E = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2),
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
)
FIRST_TOKEN = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
PER_TOKEN = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
COUNTS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 128.0, 256.0)
PER_FORWARD = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 128.0)
STEP = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


P = ParamSpec("P")


def recording(record: Callable[Concatenate["Metrics", P], None]) -> Callable[Concatenate["Metrics", P], None]:
    """Decorate a recording method so that it never raises: what it measures must go on. The first failure is logged."""

    @functools.wraps(record)
    def guarded(self: "Metrics", /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            record(self, *args, **kwargs)
        except Exception:
            if record.__name__ not in self.failed:
                self.failed.add(record.__name__)
                log.exception("a metric cannot be recorded; this is told once", metric=record.__name__)

    return guarded


class Metrics:
    """All metrics of one served model, in their own registry.

    Attributes:
        failed: names of recording methods that have failed, which indicates a bug here or in a caller.
    """

    def __init__(self, model_name: str) -> None:
        self.failed: set[str] = set()
        self.registry = CollectorRegistry()
        self.model_name = self._model = model_name
        self._of_sampler: dict[str, tuple[Any, ...]] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dllm_{name}", text, ["model_name", *labels], registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"dllm_{name}", text, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"dllm_{name}", text, ["model_name", *labels], registry=self.registry, buckets=buckets)

        self._running = gauge("requests_running", "Generations that have a row.")
        self._waiting = gauge(
            "requests_waiting", "Generations that wait for a row, before their first forward or between two."
        )
        self._memory = gauge("memory_bytes", "What serving takes at most, found out at start-up, by part.", "part")
        self._tasks = gauge("event_loop_tasks", "Tasks of the event loop, which grow with requests under way alone.")
        self._requests = counter("requests", "Generations that ended.", "sampler", "finish_reason")
        self._rejected = counter("rejected", "Requests and connections that were refused or cut off.", "reason")
        self._policies = gauge("policies_loaded", "Policies that requests can use.")
        self._policy_failures = counter("policy_load_failures", "Policies that could not be loaded.")
        self._policy_folder = gauge(
            "policy_folder_last_seen_timestamp_seconds", "Unix time of the last look at the folder of policies."
        )
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self._tokens = counter(
            "generation_tokens", "Tokens generated up to and including the first end-of-text.", "sampler"
        )
        self._forwards = counter(
            "forward_passes", "Forward passes, counted for every generation that took part.", "sampler"
        )
        self._model_forwards = counter("model_forwards", "Batched forward passes of the model.")
        self._per_forward = histogram(
            "tokens_per_forward", "Generated tokens per forward pass of a finished generation.", PER_FORWARD, "sampler"
        )
        self._per_step = histogram(
            "committed_tokens_per_step", "Positions that one generation committed in one forward.", COUNTS, "sampler"
        )
        self._rows = histogram("batch_rows", "Generations that shared a step.", COUNTS)
        self._step = histogram("step_seconds", "Time of a step by part.", STEP, "part")
        self._e2e = histogram("e2e_request_latency_seconds", "From submission to the end of a generation.", E2E)
        self._first = histogram(
            "time_to_first_token_seconds", "From submission to the first settled token.", FIRST_TOKEN
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", "Time per settled token after the first.", PER_TOKEN
        )
        self._queue = histogram("request_queue_time_seconds", "From submission to the first forward.", E2E)
        # process_resident_memory_bytes, process_open_fds, python_gc_collections_total etc.
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        for metric in (
            *(self._running, self._waiting, self._prompt_tokens, self._model_forwards),
            *(self._policies, self._policy_failures),
        ):
            metric.labels(model_name)

    @recording
    def queue(self, running: int, waiting: int) -> None:
        """Set the numbers of running and waiting generations."""
        self._running.labels(self._model).set(running)
        self._waiting.labels(self._model).set(waiting)

    @recording
    def tasks(self, count: int) -> None:
        """Set the number of tasks of the event loop."""
        self._tasks.labels(self._model).set(count)

    @recording
    def memory(self, parts: Mapping[str, int]) -> None:
        """Set the memory that serving takes at most, in bytes by part."""
        for part, count in parts.items():
            self._memory.labels(self._model, part).set(count)

    @recording
    def rejected(self, reason: str) -> None:
        """Count a request or connection refused or cut off. `reason` is one of a fixed set of labels."""
        self._rejected.labels(self._model, reason).inc()

    @recording
    def policies(self, count: int) -> None:
        """Set the number of loaded policies."""
        self._policies.labels(self._model).set(count)

    @recording
    def policy_load_failed(self) -> None:
        """Count a policy that could not be loaded; the previous version, if any, stays in service."""
        self._policy_failures.labels(self._model).inc()

    @recording
    def policy_folder_seen(self, at: float) -> None:
        """Set the Unix time of the last complete scan of the policy folder."""
        self._policy_folder.labels(self._model).set(at)

    @recording
    def prompt_tokens(self, count: int) -> None:
        """Count the prompt tokens of an accepted request."""
        self._prompt_tokens.labels(self._model).inc(count)

    @recording
    def queue_time(self, seconds: float) -> None:
        """Record the queue time of an admitted generation."""
        self._queue.labels(self._model).observe(seconds)

    @recording
    def model_forward(self) -> None:
        """Count a forward pass of the model, whatever its number of rows."""
        self._model_forwards.labels(self._model).inc()

    @recording
    def committed(self, sampler: str, positions: int | None, tokens: int, forwards: int = 1) -> None:
        """A generation took part in a step, and `tokens` more are settled text.

        Args:
            positions: how many it committed; None where that is told at its end.
            forwards: forward passes of its canvases in this step.
        """
        series = self._of_sampler.get(sampler)
        if series is None:  # looked up once: a step asks for them as often as there are generations
            each = (self._forwards, self._per_step, self._tokens)
            series = self._of_sampler[sampler] = tuple(metric.labels(self._model, sampler) for metric in each)
        passes, per_step, text = series
        passes.inc(forwards)
        if positions is not None:
            per_step.observe(positions)
        text.inc(tokens)

    @recording
    def first_token(self, seconds: float) -> None:
        """Record the time to a generation's first settled token."""
        self._first.labels(self._model).observe(seconds)

    @recording
    def step(self, rows: int, model: float, sampler: float, rest: float) -> None:
        """Record a step of `rows` generations, with its seconds by part."""
        self._rows.labels(self._model).observe(rows)
        for part, seconds in (("model", model), ("sampler", sampler), ("rest", rest)):
            self._step.labels(self._model, part).observe(seconds)

    @recording
    def finished(
        self, sampler: str, reason: str, tokens: int, forwards: int, seconds: float, decode_seconds: float
    ) -> None:
        """Record the end of a generation."""
        self._requests.labels(self._model, sampler, reason).inc()
        self._e2e.labels(self._model).observe(seconds)
        if reason in ("stop", "length"):
            self._per_forward.labels(self._model, sampler).observe(tokens / max(1, forwards))
            if tokens > 1:
                self._per_token.labels(self._model).observe(decode_seconds / (tokens - 1))
