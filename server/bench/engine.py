"""Benchmarks of the engine: against bare matrix products, against the plain loop, by parts, with many samplers."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from samplers import Canvas, get_sampler
from samplers.forward.query import Query
from samplers.loop.row import Row
from samplers.loop.run import next_query
from server.backends.torch.backend import TorchBackend
from server.bench.products import bare_products
from server.bench.reference import generate
from server.bench.results import Result, alternate, ratio_of, spread, timed
from server.bench.subjects import BenchModel
from server.engine import Engine, Finished, GenerationRequest, Limits
from server.engine.request import Event
from server.runtime.metrics import Metrics
from server.runtime.threads import run_in_own_thread

MIXED: list[tuple[str, dict[str, Any]]] = [
    ("topk", {}),
    ("random", {}),
    ("sequential", {}),
    ("margin", {}),
    ("entropy", {}),
    ("threshold", {"threshold": 1.0}),
    ("dream", {"alg": "topk_margin"}),
    ("dream", {"alg": "entropy"}),
]
"""Eight rules; all with a number of steps use the same."""


class TimedEngine:
    """An engine around a model under measurement, with the time of its parts."""

    def __init__(self, subject: BenchModel) -> None:
        self._metrics = Metrics(subject.name)
        self._name = subject.name
        self._subject = subject
        self.engine = Engine(subject.backend, self._metrics, Limits(rows=64, queue=1024, tokens=1 << 20))
        self.engine.start()

    def requests(self, prompts: list[list[int]], sampler: str, params: dict[str, Any], ends: bool) -> list[Any]:
        chosen = get_sampler(sampler)
        end_ids = self._subject.backend.info.end_ids if ends else frozenset[int]()
        return [
            GenerationRequest(
                prompt,
                self._subject.gen_length,
                chosen,
                chosen.Params(**params),
                sampler,
                block_length=self._subject.block_length,
                end_ids=end_ids,
            )
            for prompt in prompts
        ]

    def run(self, requests: list[GenerationRequest]) -> tuple[float, int, int]:
        """Run requests. Returns seconds until all are done, and their total tokens and forwards."""
        done = threading.Semaphore(0)
        finished: list[Finished] = []

        def deliver(event: Event) -> None:
            if isinstance(event, Finished):
                finished.append(event)
                done.release()

        began = time.perf_counter()
        self.engine.submit_all(requests, [deliver] * len(requests))
        for _ in requests:
            done.acquire()
        seconds = time.perf_counter() - began
        return seconds, sum(each.completion_tokens for each in finished), sum(each.forwards for each in finished)

    def parts(self) -> dict[str, float]:
        """Seconds so far by part of a step."""
        sample = self._metrics.registry.get_sample_value
        return {
            part: sample("dllm_step_seconds_sum", {"model_name": self._name, "part": part}) or 0.0
            for part in ("model", "sampler", "rest")
        }


def measure_engine(subject: BenchModel, rounds: int, concurrent: tuple[int, ...] = (1, 4, 16)) -> Iterator[Result]:
    """All measurements of one model."""
    running = TimedEngine(subject)
    detail = {
        "model": subject.name,
        "gen_length": subject.gen_length,
        "block_length": subject.block_length,
        "steps": subject.steps,
        "prompt_length": len(subject.prompts[0]),
    }
    yield _matmul(subject, rounds, detail)
    for count in concurrent:
        yield _against_reference(running, subject, subject.prompts[:count], rounds, False, detail)
        if subject.ends:
            yield _against_reference(running, subject, subject.ends[:count], rounds, True, detail)
    yield _parts(running, subject, rounds, detail)
    yield _mixed(running, subject, rounds, detail)
    yield _invariant(subject, rounds, detail)
    running.engine.drain()
    running.engine.wait_idle()


def _against_reference(
    running: TimedEngine, subject: BenchModel, prompts: list[list[int]], rounds: int, ends: bool, detail: dict[str, Any]
) -> Result:
    """Tokens per second relative to the plain loop; if answers end early, both count only tokens before the end."""
    requests = running.requests(prompts, "topk", {"steps": subject.steps}, ends)
    tokens = running.run(requests)[1]

    def plain() -> float:
        began = time.perf_counter()
        generate(
            subject.plain,
            torch.tensor(prompts),
            subject.gen_length,
            subject.block_length,
            subject.steps,
            subject.plain.config.mask_token_id,
        )
        return tokens / (time.perf_counter() - began)

    def ours() -> float:
        seconds, _, _ = running.run(requests)
        return tokens / seconds

    fast, slow = alternate(ours, plain, rounds)
    name = f"engine_vs_reference_{len(prompts)}" + ("_ends_early" if ends else "")
    return ratio_of(name, "throughput ratio", fast, slow, **detail, tokens=tokens, reference_tokens_per_second=slow[0])


def _parts(running: TimedEngine, subject: BenchModel, rounds: int, detail: dict[str, Any]) -> Result:
    """Share of the sampler and other work in a step of 16 requests with eight samplers."""
    shares, model = [], []
    for _ in range(rounds):
        before = running.parts()
        running.run(_many(running, subject, MIXED))
        spent = {part: seconds - before[part] for part, seconds in running.parts().items()}
        shares.append((spent["sampler"] + spent["rest"]) / sum(spent.values()))
        model.append(spent["model"] / sum(spent.values()))
    return spread("sampler_and_rest_share", "share of step time", shares, **detail, rows=16, model_share=model[0])


def _many(
    running: TimedEngine, subject: BenchModel, rules: list[tuple[str, dict[str, Any]]]
) -> list[GenerationRequest]:
    """Sixteen requests, at least two per rule."""
    found: list[GenerationRequest] = []
    for i in range(16):
        name, params = rules[i % len(rules)]
        if name != "hierarchy":
            params = params | {"steps": 8}
        found += running.requests([subject.prompts[i]], name, params, False)
    return found


def _mixed(running: TimedEngine, subject: BenchModel, rounds: int, detail: dict[str, Any]) -> Result:
    """Seconds per row and forward: eight samplers in the batch relative to one."""

    def cost(rules: list[tuple[str, dict[str, Any]]]) -> Callable[[], float]:
        def measured() -> float:
            seconds, _, forwards = running.run(_many(running, subject, rules))
            return seconds / forwards

        return measured

    mixed, one = alternate(cost(MIXED), cost(MIXED[:1]), rounds)
    return ratio_of("mixed_samplers_cost", "seconds a row and forward, ratio", mixed, one, **detail, rows=16)


def _first_step(subject: BenchModel, count: int) -> Query:
    topk = get_sampler("topk")
    canvases = [
        Canvas.blank(prompt, subject.gen_length, subject.backend.info.mask_id, subject.block_length)
        for prompt in subject.prompts[:count]
    ]
    return next_query([Row(canvas, topk, topk.Params()) for canvas in canvases])


def _invariant(subject: BenchModel, rounds: int, detail: dict[str, Any]) -> Result:
    """Cost of bitwise reproducibility: a forward of 16 rows, each computed on its own, relative to the normal one."""
    query = run_in_own_thread(lambda: _first_step(subject, 16))
    alone = TorchBackend(subject.backend.network, subject.backend.info, batch_invariant=True)

    invariant, usual = alternate(
        timed(lambda: alone.predict(query)), timed(lambda: subject.backend.predict(query)), rounds
    )
    return ratio_of("batch_invariant_cost", "seconds of a forward, ratio", invariant, usual, **detail, rows=16)


def _matmul(subject: BenchModel, rounds: int, detail: dict[str, Any]) -> Result:
    """Time of a forward's bare matrix products relative to the forward: the share of attainable speed."""
    backend, query = subject.backend, run_in_own_thread(lambda: _first_step(subject, 16))
    tokens = sum(canvas.layout.length for canvas in query.canvases)
    bare, operations = run_in_own_thread(lambda: bare_products(subject.plain.config, tokens, len(query.row)))
    alone, whole = alternate(timed(bare), timed(lambda: backend.predict(query)), rounds)
    return ratio_of(
        "model_vs_matmul",
        "share of the model's time",
        alone,
        whole,
        **detail,
        rows=16,
        gflops=operations / alone[0] / 1e9,
    )
