"""The engine: any mixture of generations in one forward, and no failure that spreads."""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from torch import Tensor

from samplers import (
    CacheMode,
    Canvas,
    Layout,
    Sampler,
    SamplerError,
    SamplerParams,
    Selection,
    Step,
    StepContext,
    TokenBonus,
    TokenChoice,
    get_sampler,
    registry,
)
from samplers.forward.query import Query
from samplers.loop import run as loop
from samplers.loop.advancing import advance
from samplers.ranking import surest
from server.backends.contract import BackendDeadError
from server.engine import (
    Backend,
    Engine,
    FinishReason,
    GenerationRequest,
    Limits,
    NotServingError,
    Owner,
    QueueFullError,
    RequestError,
)
from server.engine import engine as engine_module
from server.runtime.metrics import Metrics
from tests.engine.backends import CheapBackend, Gate, Listener, run
from tests.samplers.models import MASK, random_logits

Serve = Callable[..., Engine]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts engines, and stops them at the end."""
    engines: list[Engine] = []

    def started(backend: Backend, **limits: int) -> Engine:
        engine = Engine(backend, Metrics("test"), Limits(**limits))
        engines.append(engine)
        engine.start()
        return engine

    yield started
    for engine in engines:
        before = getattr(engine.backend, "_before", None)
        if isinstance(before, Gate):
            before.open()
        engine.stop()


def request(number: int, sampler: str | None = None, **changes: Any) -> GenerationRequest:
    """The n-th of a row of requests that differ in everything; its prompt begins with `number` + 1."""
    name = sampler or ("topk", "threshold", "random")[number % 3]
    if "params" not in changes:
        params = {"threshold": 0.3} if name == "threshold" else {"k": 1 + number % 2}
        changes["params"] = get_sampler(name).Params(**params)
    fields: dict[str, Any] = {
        "prompt": [number + 1, *[2] * (number % 4)],
        "max_tokens": 6 + number,
        "sampler": get_sampler(name),
        "name": name,
        "block_length": (None, 4, 3)[number % 3],
        "choice": TokenChoice(0.0 if number % 2 else 0.8),
        "seed": number,
    }
    return GenerationRequest(**(fields | changes))


def tokens_alone(number: int, **changes: Any) -> list[int]:
    """What the n-th request gives on an engine of its own."""
    asked = request(number, **changes)
    engine = Engine(CheapBackend(), Metrics("test"))
    engine.start()
    try:
        (listener,) = run(engine, [asked])
    finally:
        engine.stop()
    return listener.tokens(asked.max_tokens)


def value(engine: Engine, name: str, **labels: str) -> float:
    found = engine._metrics.registry.get_sample_value(name, {"model_name": "test", **labels})
    assert found is not None
    return found


def test_a_batch_of_eight_equals_eight_batches_of_one(serve: Serve) -> None:
    backend = CheapBackend()
    listeners = run(serve(backend), [request(i) for i in range(8)])
    assert max(len(batch) for batch in backend.batches) == 8, "one forward for all of them"
    for i, listener in enumerate(listeners):
        assert listener.finish().reason is FinishReason.LENGTH
        assert listener.tokens(6 + i) == tokens_alone(i)


def test_arrivals_in_mid_run_change_nothing(serve: Serve) -> None:
    gate = Gate()
    backend = CheapBackend(before=gate)
    engine = serve(backend)
    listeners = []
    for i in range(5):
        listeners.append(Listener())
        engine.submit(request(i, max_tokens=24), listeners[-1])
        if i:
            gate.release()
        gate.wait()
    gate.open()
    for i, listener in enumerate(listeners):
        listener.finish()
        assert listener.tokens(24) == tokens_alone(i, max_tokens=24)
    assert [len(batch) for batch in backend.batches[:5]] == [1, 2, 3, 4, 5], "admitted at every step"


def test_events_tell_the_whole_story(serve: Serve) -> None:
    asked = request(1, "topk", params=get_sampler("topk").Params(k=3), max_tokens=9, block_length=None)
    (listener,) = run(serve(CheapBackend()), [asked])
    end = listener.finish()
    assert [event.forward for event in listener.commits] == [1, 2, 3] and end.forwards == 3
    assert [len(event.positions) for event in listener.commits] == [3, 3, 3]
    assert all(0 < c <= 1 for event in listener.commits for c in event.confidences)
    assert listener.text() == listener.tokens(9), "without end-of-text the text is the region"
    assert end.completion_tokens == 9 == listener.commits[-1].settled


def test_end_of_text_is_not_part_of_the_text(serve: Serve) -> None:
    def logits(canvas: Canvas) -> Tensor:
        out = random_logits(canvas)
        out[:, 7] = -100.0
        out[5, 7] = 100.0
        return out

    (listener,) = run(serve(CheapBackend(logits)), [request(0, "topk", max_tokens=20, end_ids=frozenset({7}))])
    end = listener.finish()
    assert (end.reason, end.completion_tokens) == (FinishReason.STOP, 5)
    assert len(listener.text()) == 4 and 7 not in listener.text()
    filled = [p for event in listener.commits for p in event.filled]
    assert filled == list(range(5, 20))
    assert end.forwards == 5


def test_more_requests_than_rows_wait_their_turn(serve: Serve) -> None:
    backend = CheapBackend()
    listeners = run(serve(backend, rows=3), [request(i) for i in range(8)])
    assert max(len(batch) for batch in backend.batches) == 3
    for i, listener in enumerate(listeners):
        assert listener.tokens(6 + i) == tokens_alone(i)


def test_a_request_cancelled_in_the_queue_never_reaches_the_model(serve: Serve) -> None:
    gate = Gate()
    backend = CheapBackend(before=gate)
    engine = serve(backend, rows=1)
    first, second, third = Listener(), Listener(), Listener()
    engine.submit(request(0), first)
    gate.wait()
    queued = engine.submit(request(1), second)
    engine.submit(request(2), third)
    engine.cancel(queued)
    gate.release()
    gate.wait()
    assert second.finish().reason is FinishReason.ABORT and second.commits == []
    assert not first.ended
    gate.open()
    first.finish()
    assert third.finish().reason is FinishReason.LENGTH
    assert backend.prompts_seen() == {1, 3}


def test_a_short_request_is_spared_the_wait_for_long_ones_where_forwards_are_slow(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    backend = CheapBackend(before=gate)
    engine = serve(backend, rows=8, tokens=320)
    fields = {"prompt": [], "max_tokens": 40, "params": get_sampler("topk").Params(k=1), "block_length": None}
    hog = [request(0, "topk", owner=Owner("hog"), **fields) for _ in range(8)]
    engine.submit_all(hog, [Listener() for _ in hog])
    gate.wait()
    monkeypatch.setattr(engine_module, "SLOW", 0.0)  # every step has taken longer than that
    late = Listener()
    engine.submit(request(1, "topk", owner=Owner("late"), max_tokens=1), late)
    gate.release()
    gate.step()
    assert late.finish().reason is FinishReason.LENGTH
    gate.wait()
    assert [len(batch) for batch in backend.batches] == [8, 2, 8]


def test_a_cancelled_row_is_free_within_one_step(serve: Serve) -> None:
    gate = Gate()
    backend = CheapBackend(before=gate)
    engine = serve(backend, rows=1)
    first, second = Listener(), Listener()
    running = engine.submit(request(0, max_tokens=40), first)
    engine.submit(request(1), second)
    gate.step(2)
    gate.wait()
    engine.cancel(running)
    gate.release()
    gate.wait()
    assert first.finish().reason is FinishReason.ABORT
    assert [batch[0][0] for batch in backend.batches] == [1, 1, 1, 2]
    assert first.finish().forwards == 3
    gate.open()
    assert second.finish().reason is FinishReason.LENGTH


def test_cancelling_what_has_ended_does_nothing(serve: Serve) -> None:
    engine = serve(CheapBackend())
    listener = Listener()
    generation = engine.submit(request(0), listener)
    listener.finish()
    engine.cancel(generation)
    run(engine, [request(1)])
    assert listener.finish().reason is FinishReason.LENGTH


def test_broken_logits_in_one_row_of_eight(serve: Serve) -> None:
    def logits(canvas: Canvas) -> Tensor:
        out = random_logits(canvas)
        if canvas.tokens[0] == 4:
            out[-1] = torch.nan
        return out

    listeners = run(serve(CheapBackend(logits)), [request(i, block_length=None) for i in range(8)])
    check_one_failed(listeners, 3, "the model's output is not finite")


def check_one_failed(listeners: list[Listener], failed: int, message: str) -> None:
    """Exactly one of a batch failed; the others gave what they give on a clean run."""
    clean_engine = Engine(CheapBackend(), Metrics("test"))
    clean_engine.start()
    clean = run(clean_engine, [request(i, block_length=None) for i in range(len(listeners))])
    clean_engine.stop()
    for i, (listener, expected) in enumerate(zip(listeners, clean, strict=True)):
        end = listener.finish()
        if i == failed:
            assert end.reason is FinishReason.ERROR and message in end.message
        else:
            assert end.reason is FinishReason.LENGTH
            assert listener.tokens(6 + i) == expected.tokens(6 + i)


class Raises(Sampler):
    """Fails for one of its rows."""

    name = "raises"
    Params = SamplerParams

    def select(self, step: Step) -> Selection:
        if bool((step.seed == 3).any()):
            raise ZeroDivisionError("by design")
        return Selection(surest(step.confidence, step.candidate))


def test_a_raising_sampler_in_one_row_of_eight(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registry(), "raises", Raises())
    requests = [request(i, "raises", params=SamplerParams(), block_length=None) for i in range(8)]
    listeners = run(serve(CheapBackend()), requests)
    clean = run(
        serve(CheapBackend()),
        [request(i, "topk", params=get_sampler("topk").Params(), block_length=None) for i in range(8)],
    )
    for i, (listener, expected) in enumerate(zip(listeners, clean, strict=True)):
        end = listener.finish()
        if i == 3:
            assert end.reason is FinishReason.ERROR and "raises failed: ZeroDivisionError" in end.message
        else:
            assert listener.tokens(6 + i) == expected.tokens(6 + i)


class RaisesBefore(Sampler):
    """Fails where it tells what the forward shall compute for it, for one of the seeds."""

    name = "raises_before"

    def __init__(self, method: str) -> None:
        self._method = method

    def select(self, step: Step) -> Selection:
        return Selection(torch.zeros_like(step.candidate))

    def name_tokens(self, context: StepContext) -> Tensor | None:
        return self._fail("name_tokens", context)

    def bonus(self, context: StepContext) -> TokenBonus | None:
        return self._fail("bonus", context)

    def _fail(self, method: str, context: StepContext) -> None:
        if self._method == method and bool((context.seed == 3).any()):
            raise ZeroDivisionError("by design")


@pytest.mark.parametrize("method", ["name_tokens", "bonus"])
def test_a_sampler_that_raises_before_the_forward_fails_alone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(registry._registry(), "raises_before", RaisesBefore(method))
    engine = serve(CheapBackend())
    listeners = run(engine, [request(i, "raises_before", params=SamplerParams()) for i in range(8)])
    clean = run(serve(CheapBackend()), [request(i, "topk", params=get_sampler("topk").Params()) for i in range(8)])
    for i, (listener, expected) in enumerate(zip(listeners, clean, strict=True)):
        end = listener.finish()
        if i == 3:
            assert end.reason is FinishReason.ERROR
            assert end.message == "sampler raises_before failed: ZeroDivisionError: by design"
        else:
            assert listener.tokens(6 + i) == expected.tokens(6 + i)
    (after,) = run(engine, [request(9)])
    assert after.finish().reason is FinishReason.LENGTH


class RaisesAfter(Sampler):
    """Fails where it says how long it may revise."""

    name = "raises_after"
    revises = True

    def select(self, step: Step) -> Selection:
        return Selection(step.candidate, done=torch.ones(len(step.params), dtype=torch.bool))

    def most_forwards(self, params: SamplerParams, layout: Layout) -> int:
        return 1

    def post_steps(self, params: SamplerParams) -> int:
        raise ZeroDivisionError("by design")


def test_a_sampler_that_cannot_say_how_long_it_may_revise_is_refused_alone(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._registry(), "raises_after", RaisesAfter())
    engine = serve(CheapBackend())
    with pytest.raises(SamplerError, match=r"^sampler raises_after failed: ZeroDivisionError: by design$"):
        engine.submit(request(3, "raises_after", params=SamplerParams(), choice=TokenChoice()), Listener())
    (after,) = run(engine, [request(9)])
    assert after.finish().reason is FinishReason.LENGTH


def test_a_fault_of_the_loops_own_costs_the_step_and_not_the_engine(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = iter([ZeroDivisionError("ours")])

    def faulty(*arguments: Any) -> Any:
        for error in faults:
            raise error
        return advance(*arguments)

    monkeypatch.setattr(loop, "advance", faulty)
    engine = serve(CheapBackend())
    for listener in run(engine, [request(i) for i in range(3)]):
        end = listener.finish()
        assert (end.reason, end.message) == (FinishReason.ERROR, "the step failed: ZeroDivisionError")
    (after,) = run(engine, [request(9)])
    assert after.finish().reason is FinishReason.LENGTH


def test_the_log_shows_where_a_sampler_failed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registry(), "raises", Raises())
    said = structlog.testing.LogCapture()
    kind = structlog.make_filtering_bound_logger(0)
    monkeypatch.setattr(engine_module, "log", structlog.wrap_logger(None, processors=[said], wrapper_class=kind))
    run(serve(CheapBackend()), [request(i, "raises", params=SamplerParams()) for i in range(8)])
    (line,) = [line for line in said.entries if line["event"] == "generation failed"]
    assert line["error"] == "sampler raises failed: ZeroDivisionError: by design" and line["sampler"] == "raises"
    frames = traceback.extract_tb(line["exc_info"].__traceback__)
    assert (frames[-1].name, Path(frames[-1].filename)) == ("select", Path(__file__))


def test_a_forward_that_fails_for_one_row(serve: Serve) -> None:
    def before(query: Query) -> None:
        if any(canvas.tokens[0] == 6 for canvas in query.canvases):
            raise RuntimeError("device-side assert")

    engine = serve(CheapBackend(before=before))
    listeners = run(engine, [request(i, block_length=None) for i in range(8)])
    check_one_failed(listeners, 5, "the forward pass failed: RuntimeError")
    (after,) = run(engine, [request(9)])
    assert after.finish().reason is FinishReason.LENGTH


def test_a_batch_too_large_for_memory_is_split(serve: Serve) -> None:
    def before(query: Query) -> None:
        if len(query.canvases) > 3:
            raise torch.OutOfMemoryError("out of memory")

    listeners = run(serve(CheapBackend(before=before)), [request(i) for i in range(8)])
    for i, listener in enumerate(listeners):
        assert listener.finish().reason is FinishReason.LENGTH
        assert listener.tokens(6 + i) == tokens_alone(i)


@pytest.mark.parametrize("filled", ["before", "meanwhile"])
def test_a_full_queue_refuses_and_takes_none_of_several(
    serve: Serve, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    engine = serve(CheapBackend(before=gate), rows=1, queue=2)
    if filled == "meanwhile":  # while the rows were made
        monkeypatch.setattr(engine, "check_room", lambda *_: None)
    running = Listener()
    engine.submit(request(0), running)
    gate.wait()
    queued = Listener()
    engine.submit(request(1), queued)
    with pytest.raises(QueueFullError, match="1 generations are waiting, the limit is 2"):
        engine.submit_all([request(2), request(3)], [Listener(), Listener()])
    assert value(engine, "dllm_requests_waiting") == 1, "all or none"
    last = Listener()
    engine.submit(request(2), last)
    with pytest.raises(QueueFullError):
        engine.submit(request(3), Listener())
    assert value(engine, "dllm_rejected_total", reason="queue_full") == 2
    gate.open()
    assert {listener.finish().reason for listener in (running, queued, last)} == {FinishReason.LENGTH}


def test_a_refusal_costs_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of rows that are made to be refused would hold up the requests of others."""
    gate = Gate()
    engine = serve(CheapBackend(before=gate), rows=1, queue=1)
    listeners = [Listener(), Listener()]
    for i, listener in enumerate(listeners):
        engine.submit(request(i), listener)
        if i == 0:
            gate.wait()
    with monkeypatch.context() as patched:
        patched.setattr(engine, "check", lambda _: pytest.fail("a row was made"))
        with pytest.raises(QueueFullError):
            engine.submit_all([request(2)] * 100, [Listener()] * 100)
    gate.open()
    assert {listener.finish().reason for listener in listeners} == {FinishReason.LENGTH}


def test_draining_finishes_what_there_is_and_takes_no_more(serve: Serve) -> None:
    gate = Gate()
    engine = serve(CheapBackend(before=gate), rows=1)
    listeners = [Listener(), Listener()]
    for i, listener in enumerate(listeners):
        engine.submit(request(i), listener)
    gate.wait()
    engine.drain()
    assert engine.alive and not engine.accepting
    with pytest.raises(NotServingError, match="shutting down"):
        engine.submit(request(2), Listener())
    assert not engine.wait_idle(timeout=0.01)
    gate.open()
    assert engine.wait_idle(timeout=30)
    assert [listener.finish().reason for listener in listeners] == [FinishReason.LENGTH] * 2


def test_stopping_ends_what_runs_and_waits_and_closes_the_backend() -> None:
    gate = Gate()
    backend = CheapBackend(before=gate)
    engine = Engine(backend, Metrics("test"), Limits(rows=1))
    engine.start()
    listeners = [Listener(), Listener()]
    for i, listener in enumerate(listeners):
        engine.submit(request(i), listener)
    gate.wait()
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    while not engine._stopping:
        time.sleep(0.001)
    gate.release()
    stopping.join(timeout=30)
    assert not stopping.is_alive() and backend.closed and not engine.alive
    assert [listener.finish().reason for listener in listeners] == [FinishReason.ABORT] * 2
    with pytest.raises(NotServingError):
        engine.submit(request(2), Listener())


def test_a_deadline_ends_running_and_waiting_requests(serve: Serve) -> None:
    gate = Gate()
    engine = serve(CheapBackend(before=gate), rows=1)
    running, waiting, patient = Listener(), Listener(), Listener()
    late = [engine.submit(request(0, timeout=60), running), engine.submit(request(1, timeout=60), waiting)]
    engine.submit(request(2, timeout=60), patient)
    gate.step()
    gate.wait()
    for generation in late:
        generation.submitted -= 61
    gate.release()
    gate.wait()
    for listener in (running, waiting):
        end = listener.finish()
        when = "after 2 forward passes" if listener is running else "before its first forward pass"
        message = f"the request's time is up {when}: the limit is 60 seconds (--request-timeout)"
        assert (end.reason, end.message) == (FinishReason.TIMEOUT, message)
    assert running.finish().forwards == 2, "at most one step late"
    assert waiting.commits == []
    gate.open()
    assert patient.finish().reason is FinishReason.LENGTH


class Fatal(BaseException):
    """What no handler of ordinary errors catches."""


@pytest.mark.parametrize("failure", [Fatal, BackendDeadError])
def test_a_dead_engine_says_so_to_everyone(serve: Serve, failure: type[BaseException]) -> None:
    def before(query: Query) -> None:
        gate(query)
        raise failure

    gate = Gate()
    engine = serve(CheapBackend(before=before), rows=1)
    listeners = [Listener(), Listener()]
    for i, listener in enumerate(listeners):
        engine.submit(request(i), listener)
    assert engine.alive
    gate.open()
    for listener in listeners:
        end = listener.finish()
        assert (end.reason, end.message) == (FinishReason.ERROR, "the engine has stopped")
    assert engine.wait_idle(timeout=30)
    assert not engine.alive and not engine.accepting
    with pytest.raises(NotServingError, match="not running"):
        engine.submit(request(2), Listener())
    assert value(engine, "dllm_requests_running") == value(engine, "dllm_requests_waiting") == 0


def test_a_cache_that_the_backend_does_not_have_is_refused(serve: Serve) -> None:
    backend = CheapBackend()
    backend.info = replace(backend.info, caches=frozenset({CacheMode.NONE}))
    with pytest.raises(RequestError, match="no dual cache; choose from none") as refused:
        serve(backend).check(request(0, cache=CacheMode.DUAL))
    assert refused.value.field == "cache"


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 64}, "max_tokens", "context length is 64 tokens.*65 tokens .1 in the prompt, 64"),
        ({"prompt": [1] * 64}, "prompt", "64 in the prompt"),
        ({"prompt": [1] * 40, "suffix": [1] * 24}, "prompt", "shorten the prompt"),
        ({"max_tokens": 8, "block_length": 2}, "sampler_params.steps", "4 blocks"),
    ],
)
def test_requests_that_do_not_fit_are_refused(serve: Serve, changes: dict[str, Any], field: str, message: str) -> None:
    engine = serve(CheapBackend())
    params = get_sampler("topk").Params(steps=2)
    with pytest.raises(RequestError, match=message) as caught:
        engine.submit(request(0, "topk", params=params, **changes), Listener())
    assert caught.value.field == field
    assert value(engine, "dllm_prompt_tokens_total") == 0


def test_a_canvas_as_long_as_the_context_fits(serve: Serve) -> None:
    (listener,) = run(serve(CheapBackend()), [request(0, max_tokens=63, params=get_sampler("topk").Params(k=8))])
    assert listener.finish().completion_tokens == 63


def test_metrics_add_up_with_what_was_delivered(serve: Serve) -> None:
    backend = CheapBackend()
    engine = serve(backend)
    requests = [request(i) for i in range(9)]
    listeners = run(engine, requests)
    engine.stop()
    ends = [listener.finish() for listener in listeners]
    assert value(engine, "dllm_prompt_tokens_total") == sum(len(r.prompt) for r in requests)
    assert value(engine, "dllm_model_forwards_total") == len(backend.batches)
    for name in ("topk", "threshold", "random"):
        mine = [(r, end) for r, end in zip(requests, ends, strict=True) if r.name == name]
        assert value(engine, "dllm_requests_total", sampler=name, finish_reason="length") == len(mine)
        tokens, forwards = (
            sum(values) for values in zip(*((e.completion_tokens, e.forwards) for _, e in mine), strict=True)
        )
        assert value(engine, "dllm_generation_tokens_total", sampler=name) == tokens
        assert value(engine, "dllm_forward_passes_total", sampler=name) == forwards
        assert value(engine, "dllm_tokens_per_forward_count", sampler=name) == len(mine)
    assert value(engine, "dllm_batch_rows_sum") == sum(len(batch) for batch in backend.batches)
    assert value(engine, "dllm_requests_running") == value(engine, "dllm_requests_waiting") == 0


def test_only_one_of_several_choices_counts_the_prompt(serve: Serve) -> None:
    engine = serve(CheapBackend())
    run(engine, [request(3, counts_prompt=i == 0, seed=i) for i in range(3)])
    assert value(engine, "dllm_prompt_tokens_total") == len(request(3).prompt)


def test_the_mask_token_never_comes_out(serve: Serve) -> None:
    def logits(canvas: Canvas) -> Tensor:
        out = random_logits(canvas)
        out[:, MASK] += 20
        return out

    for listener in run(serve(CheapBackend(logits)), [request(i) for i in range(6)]):
        assert MASK not in [token for event in listener.commits for token in event.tokens]
