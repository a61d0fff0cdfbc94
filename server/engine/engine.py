"""The engine: a bounded queue, its own thread, and one forward a turn for whatever is running."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import structlog
from samplers.loop.denoising import Outcome, advance, ask

from policies.serving.store import PolicyStore, ServedModel, UnknownPolicyError
from samplers import CacheMode, Canvas, ParameterError, Prediction, SamplerError, UnknownSamplerError
from samplers.forward.query import Query
from samplers.loop.guard import incompatibility, own_params
from samplers.loop.row import Row
from samplers.loop.traits import Traits
from samplers.loop.work import work
from server.backends.contract import Backend, BackendDeadError, ModelInfo
from server.engine.generation import Deliver, Generation
from server.engine.quota import Buckets
from server.engine.request import (
    Budget,
    Committed,
    EngineError,
    Finished,
    FinishReason,
    GenerationRequest,
    KeyLimitError,
    NotServingError,
    Owner,
    QueueFullError,
    RequestError,
)
from server.engine.scheduler import Limits, Scheduler
from server.engine.watch import LOOKS, PATIENCE, Watch
from server.runtime.metrics import Metrics
from server.runtime.waiting import sleep_where_crowded

log = structlog.get_logger(__name__)

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
SLOW = 0.25
"""Seconds of a step from which on short requests are spared the wait for long ones beside them."""
FADING = 0.9
"""What is left, after a step, of how long the longest before it is thought to have taken."""


def too_long(info: ModelInfo, prompt: int, max_tokens: int, at_least: bool = False) -> str:
    """The words by which clients of OpenAI's API know that a context is full; they also look for the code in it.

    Args:
        at_least: the prompt has more tokens than these, as its length alone tells.
    """
    or_more = "at least " if at_least else ""
    limit = f" here, because of {info.length_limit}" if info.length_limit else ""
    return (
        f"This model's maximum context length is {info.max_length} tokens{limit}. However, you requested "
        f"{or_more}{prompt + max_tokens} tokens ({or_more}{prompt} in the prompt, {max_tokens} in the completion). "
        f"Please shorten the prompt or lower max_tokens. ({CONTEXT_LENGTH_EXCEEDED})"
    )


def _time_is_up(generation: Generation) -> str:
    """Why a request has ended before its text."""
    forwards = generation.row.forwards
    how_far = f"after {forwards} forward passes" if forwards else "before its first forward pass"
    return (
        f"the request's time is up {how_far}: the limit is {generation.request.timeout:g} seconds (--request-timeout)"
    )


def _charged(request: GenerationRequest) -> int:
    """Tokens that count against a limit a minute: what was asked for, known before it is written."""
    prompt = len(request.prompt) + len(request.suffix)
    return request.max_tokens + (prompt if request.counts_prompt else 0)


class Engine:
    """Runs generations through a backend.

    Every turn: retire what was cancelled or is out of time, pick whose turn it is, as many as a forward takes, run that
    forward, let each sampler commit, deliver events, retire what is finished.

    Args:
        backend: where the model runs; closed by `stop`.
        metrics: where counts go.
        limits: rows, tokens and queue; no canvas may be longer than a forward.
        policies: where the sampler `policy` finds its networks; without it, none is loaded.
    """

    def __init__(
        self,
        backend: Backend,
        metrics: Metrics,
        limits: Limits | None = None,
        policies: PolicyStore | None = None,
    ) -> None:
        self.backend = backend
        limits = limits or Limits()
        self.info = backend.info
        if limits.tokens < self.info.max_length:
            self.info = replace(self.info, max_length=limits.tokens, length_limit="--max-batch-tokens")
        self.policies = policies or PolicyStore(ServedModel(self.info.architecture, self.info.vocab_size))
        self.limits = limits
        self._metrics = metrics
        self._scheduler = Scheduler(limits)
        self._buckets = None if limits.quota.tokens is None else Buckets(limits.quota.tokens)
        self._change = threading.Condition()
        self._draining = False
        self._stopping = False
        self._seconds = 0.0  # of the longest of the last steps
        self._failure: BaseException | None = None
        self._stuck = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watch = Watch(self._thread)

    @property
    def metrics(self) -> Metrics:
        """Where counts go."""
        return self._metrics

    def start(self) -> None:
        """Start the engine's thread."""
        sleep_where_crowded()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is doing its work."""
        return self._thread.is_alive() and self._failure is None

    @property
    def failure(self) -> BaseException | None:
        """What the engine's thread died of, if it did."""
        return self._failure

    def look_after(self) -> None:
        """Give the engine up for dead if a sampler does not come back; to be called every second or more often."""
        if self.alive and self._watch.look():
            name, lines = self._watch.where()
            self._stuck = True
            self._failure = EngineError(f"sampler {name} has not come back for {PATIENCE:.0f} s")
            log.error("a sampler does not come back", sampler=name, seconds=PATIENCE, stack=lines)

    @property
    def accepting(self) -> bool:
        """Whether new generations are taken."""
        return self.alive and not self._draining

    def check_accepting(self) -> None:
        """Raise NotServingError unless new generations are taken."""
        if not self.accepting:
            raise NotServingError("the server is shutting down" if self.alive else "the engine is not running")

    def check(self, request: GenerationRequest) -> tuple[Row, int]:
        """The request as a row of the loop, and its work.

        Raises RequestError if it does not fit model or sampler, SamplerError if the sampler fails when it is asked.
        """
        given = len(request.prompt) + len(request.suffix)
        if request.max_tokens < 1:
            raise RequestError("max_tokens", f"max_tokens must be at least 1, got {request.max_tokens}")
        if given + request.max_tokens > self.info.max_length:
            raise RequestError(
                "prompt" if given >= self.info.max_length else "max_tokens",
                too_long(self.info, given, request.max_tokens),
                CONTEXT_LENGTH_EXCEEDED,
            )
        if request.cache not in self.info.caches:
            modes = ", ".join(mode for mode in CacheMode if mode in self.info.caches)
            raise RequestError("cache", f"this server's engine has no {request.cache} cache; choose from {modes}")
        if request.suffix and self.info.pattern.causal:
            raise RequestError("suffix", "this model cannot see what comes after the text that it writes")
        try:
            canvas = Canvas.blank(
                request.prompt,
                request.max_tokens,
                self.info.mask_id,
                request.block_length,
                request.suffix,
                self.info.pattern,
                self.info.max_length,
            )
        except ValueError as error:
            raise RequestError("block_length", str(error)) from None
        try:
            sampler = self.policies.sampler(request.sampler, request.params)
            if reason := incompatibility(sampler, self.info.pattern):
                raise RequestError("sampler", reason)
            if Traits.of(sampler).greedy and request.choice.temperature > 0:
                raise RequestError("temperature", f"sampler {request.sampler} chooses tokens itself; use temperature 0")
            params = own_params(sampler, request.params)
            row = Row(
                canvas,
                sampler,
                params,
                request.choice,
                request.seed,
                request.end_ids,
                request.fill_after_end,
                request.cache,
                self.info.vocab_size,
            )
            return row, work(sampler, params, canvas.layout)
        except ParameterError as error:
            raise RequestError(f"sampler_params.{error.field}", str(error)) from None
        except UnknownPolicyError as error:
            raise RequestError("sampler_params.policy", str(error), "unknown_policy") from None
        except UnknownSamplerError as error:
            raise RequestError("sampler", str(error), "unknown_sampler") from None
        except SamplerError as error:
            self._metrics.rejected("sampler_failed")
            self._log_failure(request, error)
            raise

    def submit(self, request: GenerationRequest, deliver: Deliver) -> Generation:
        """Queue a generation. `deliver` gets its events on the engine's thread and must not block.

        Raises RequestError, SamplerError, QueueFullError, KeyLimitError or NotServingError; then nothing was queued.
        """
        return self.submit_all([request], [deliver])[0]

    def submit_all(self, requests: list[GenerationRequest], delivers: list[Deliver]) -> list[Generation]:
        """Queue several generations of one owner, all or none (see `submit`)."""
        self.check_room(requests[0].owner, len(requests))
        generations = [
            Generation(request, deliver, *self.check(request))
            for request, deliver in zip(requests, delivers, strict=True)
        ]
        self._check_work(generations)
        with self._counting_refusals(), self._change:
            self._queue(generations)
        for request in requests:
            if request.counts_prompt:
                self._metrics.prompt_tokens(len(request.prompt) + len(request.suffix))
        return generations

    def check_room(self, owner: Owner, count: int) -> None:
        """Raise QueueFullError, KeyLimitError or NotServingError if so many generations of an owner cannot wait now.

        To be asked before anything is made of a request: a refusal must cost nothing, or refusals hold others up.
        """
        with self._counting_refusals(), self._change:
            self.check_accepting()
            self._scheduler.check(owner, count)

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except QueueFullError:
            self._metrics.rejected("queue_full")
            raise
        except KeyLimitError as error:
            self._metrics.rejected(f"key_{error.limit}")
            raise

    def _check_work(self, generations: list[Generation]) -> None:
        """Refuse what would take more than any request may."""
        most = sum(generation.work for generation in generations)
        if self.limits.work is not None and most > self.limits.work:
            raise RequestError(
                "max_tokens",
                f"forwards may have to compute {most} tokens for this, and a request's limit is {self.limits.work} "
                "(--max-work): ask for fewer or shorter texts, or for more tokens a forward",
            )

    def _queue(self, generations: list[Generation]) -> None:
        """Queue what may wait, at the expense of its owner."""
        self.check_accepting()
        owner = generations[0].request.owner
        self._scheduler.check(owner, len(generations))
        if self._buckets is not None and not owner.ahead:
            self._buckets.take(owner.group, sum(_charged(each.request) for each in generations), time.monotonic())
        self._scheduler.add(generations)
        self._gauge()
        self._change.notify_all()

    def budget(self, owner: Owner) -> Budget | None:
        """What is left of the tokens that an owner's group has a minute; None where that is not limited."""
        if self._buckets is None or owner.ahead:
            return None
        with self._change:
            return self._buckets.budget(owner.group, time.monotonic())

    def cancel(self, generation: Generation) -> None:
        """End a generation within one step; its `Finished` event says so. Has no effect on one that has ended."""
        with self._change:
            generation.cancelled = True
            self._change.notify_all()

    def drain(self) -> None:
        """Take no new generations; those queued and running go on."""
        with self._change:
            self._draining = True
            self._change.notify_all()

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until nothing is queued or running; whether that happened in time."""
        with self._change:
            return self._change.wait_for(lambda: self.idle or not self.alive, timeout)

    def end_all(self) -> None:
        """End everything that is queued or running, after the step that is under way; does not wait for that."""
        with self._change:
            self._draining = self._stopping = True
            self._change.notify_all()

    def stop(self) -> None:
        """End everything that is queued or running, stop the thread, close the backend."""
        self.end_all()
        while self._thread.is_alive() and not self._stuck:
            self._thread.join(LOOKS)
            self.look_after()
        self.backend.close()

    def _gauge(self) -> None:
        self._metrics.queue(running=len(self._scheduler.running), waiting=self._scheduler.waits)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or running."""
        return self._scheduler.empty

    def _run(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                self._turn(batch)
        except BaseException as error:
            self._failure = error
            log.exception("engine died")
        finally:
            with self._change:
                left = self._scheduler.clear()
                reason = FinishReason.ERROR if self._failure else FinishReason.ABORT
                for generation in left:
                    self._finish(generation, reason, "the engine has stopped")
                self._gauge()
                self._change.notify_all()

    def _next_batch(self) -> list[Generation] | None:
        """Retire, pick, and wait until there is something to run. None when it is time to stop."""
        with self._change:
            while True:
                if self._stopping or self._stuck:
                    return None
                self._retire_ended()
                batch = self._scheduler.pick(slow=self._seconds > SLOW)
                for generation in batch:
                    if generation.started is None:
                        generation.started = time.monotonic()
                        self._metrics.queue_time(generation.started - generation.submitted)
                self._gauge()
                if batch:
                    return batch
                self._change.notify_all()
                self._change.wait()

    def _retire_ended(self) -> None:
        """Take out what was cancelled or is past its deadline, queued or running."""
        now = time.monotonic()
        for generation in self._scheduler.all():
            if generation.cancelled:
                self._scheduler.remove(generation)
                self._finish(generation, FinishReason.ABORT)
            elif now > generation.deadline:
                self._scheduler.remove(generation)
                self._finish(generation, FinishReason.TIMEOUT, _time_is_up(generation))

    def _turn(self, running: list[Generation]) -> None:
        """One step of these, which fit into a forward."""
        began = time.monotonic()
        model_seconds = sampler_seconds = 0.0
        for generations, result, seconds in self._predict(running):
            model_seconds += seconds
            if isinstance(result, Exception):
                log.error("forward pass failed", error=repr(result), exc_info=result)
                for generation in generations:
                    self._remove(generation, FinishReason.ERROR, f"the forward pass failed: {type(result).__name__}")
                continue
            mark = time.monotonic()
            try:
                with self._watch:
                    outcomes = advance([generation.row for generation in generations], *result)
            except Exception as error:  # a fault of ours, which is to cost no more than these
                log.exception("step failed")
                for generation in generations:
                    self._remove(generation, FinishReason.ERROR, f"the step failed: {type(error).__name__}")
                continue
            sampler_seconds += time.monotonic() - mark
            for generation, outcome in zip(generations, outcomes, strict=True):
                try:
                    self._deliver(generation, outcome)
                except Exception as error:  # whatever became of this one, the others go on
                    log.exception("generation failed", sampler=generation.request.sampler)
                    self._remove(
                        generation, FinishReason.ERROR, f"its tokens could not be told: {type(error).__name__}"
                    )
        with self._change:
            self._gauge()
            self._change.notify_all()
        total = time.monotonic() - began
        self._seconds = max(total, FADING * self._seconds)
        self._metrics.step(len(running), model_seconds, sampler_seconds, total - model_seconds - sampler_seconds)

    def _predict(
        self, generations: list[Generation]
    ) -> list[tuple[list[Generation], tuple[Query, Prediction] | Exception, float]]:
        """One forward for all. If it fails, halves are tried on their own, so that one row cannot fail the others."""
        began = time.monotonic()
        try:
            with self._watch:
                query = ask([generation.row for generation in generations])
            began = time.monotonic()
            prediction = self.backend.predict(query)
        except BackendDeadError:
            raise  # ends the engine, whose health then says so
        except Exception as error:
            seconds = time.monotonic() - began
            if len(generations) == 1:
                return [(generations, error, seconds)]
            middle = len(generations) // 2
            return self._predict(generations[:middle]) + self._predict(generations[middle:])
        self._metrics.model_forward()
        return [(generations, (query, prediction), time.monotonic() - began)]

    def _deliver(self, generation: Generation, outcome: Outcome) -> None:
        """Tell what a step did to one generation, and retire it if that was its last."""
        if outcome.error is not None:
            self._fail(generation, outcome.error)
            return
        row, sampler = generation.row, generation.request.sampler
        before = generation.counted
        generation.counted = row.completion_tokens
        text = row.text_tokens()[before:]
        stop = generation.request.stop
        stopped = None if stop is None else stop.add(text, last=row.finished)
        if stopped is not None:
            generation.counted, text = stopped, text[: stopped - before]
        if generation.counted and generation.first_token is None:
            generation.first_token = time.monotonic()
            self._metrics.first_token(generation.first_token - generation.submitted)
        self._metrics.committed(sampler, len(outcome.positions) - len(outcome.replaced), generation.counted - before)
        generation.deliver(
            Committed(
                row.forwards,
                outcome.positions,
                outcome.tokens,
                outcome.confidences,
                outcome.filled,
                generation.counted,
                text,
                outcome.replaced,
                outcome.remasked,
                outcome.draft,
            )
        )
        if stopped is not None or row.ended:
            self._remove(generation, FinishReason.STOP)
        elif row.finished:
            self._remove(generation, FinishReason.LENGTH)

    def _fail(self, generation: Generation, error: SamplerError) -> None:
        """Retire a generation that cannot go on."""
        self._log_failure(generation.request, error)
        self._remove(generation, FinishReason.ERROR, str(error))

    def _log_failure(self, request: GenerationRequest, error: SamplerError) -> None:
        """Say why a generation fails; where the sampler itself raised, with its traceback."""
        log.error("generation failed", error=str(error), sampler=request.sampler, exc_info=error.__cause__)

    def _remove(self, generation: Generation, reason: FinishReason, message: str = "") -> None:
        with self._change:
            self._scheduler.remove(generation)
            self._finish(generation, reason, message)

    def _finish(self, generation: Generation, reason: FinishReason, message: str = "") -> None:
        tokens, forwards = generation.counted, generation.row.forwards
        self._metrics.finished(
            generation.request.sampler,
            reason,
            tokens=tokens,
            forwards=forwards,
            seconds=time.monotonic() - generation.submitted,
            decode_seconds=time.monotonic() - (generation.first_token or time.monotonic()),
        )
        try:
            generation.deliver(Finished(reason, tokens, forwards, message))
        except Exception:  # whoever listens may be gone, which is nothing to the others
            log.exception("the end of a generation could not be told")
