"""The engine: a bounded queue, its own thread, and one forward a turn for whatever is running."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from operator import itemgetter

import structlog

from samplers import CacheMode, Canvas, ParameterError, Prediction, SamplerError
from samplers.forward.query import Query
from samplers.loop.batch import Batch
from samplers.loop.event import ForwardError, StepEvent
from samplers.loop.guard import own_params
from samplers.loop.row import Row
from samplers.loop.run import Turn, run
from samplers.loop.work import work
from server.backends.contract import Backend, BackendDeadError, ModelInfo
from server.engine.generation import Deliver, Generation
from server.engine.quota import Buckets
from server.engine.request import (
    Budget,
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


def _field_of(error: ParameterError) -> str:
    """The request's field that parameters are in."""
    if error.field in ("sampler", "temperature", "modifiers") or error.field.startswith("modifiers."):
        return error.field
    return f"sampler_params.{error.field}"


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
    """

    def __init__(
        self,
        backend: Backend,
        metrics: Metrics,
        limits: Limits | None = None,
    ) -> None:
        self.backend = backend
        limits = limits or Limits()
        self.info = backend.info
        if limits.tokens < self.info.max_length:
            self.info = replace(self.info, max_length=limits.tokens, length_limit="--max-batch-tokens")
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
        self._batch = Batch(self.info.loop_device)
        self._taking: dict[int, Generation] = {}
        self._began = self._model_seconds = 0.0
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
        canvas = self._canvas(request)
        try:
            params = own_params(request.sampler, request.params)
            modifiers = [(modifier, own_params(modifier, own)) for modifier, own in request.modifiers]
            row = Row(
                canvas,
                request.sampler,
                params,
                request.choice,
                request.seed,
                request.end_ids,
                request.fill_after_end,
                request.cache,
                self.info.vocab_size,
                modifiers,
            )
            self._check_size(row)
            return row, work(row)
        except ParameterError as error:
            raise RequestError(_field_of(error), str(error), error.code) from None
        except SamplerError as error:
            self._metrics.rejected("sampler_failed")
            self._log_failure(request, error)
            raise

    def _canvas(self, request: GenerationRequest) -> Canvas:
        """The request's canvas. Raises RequestError if it does not fit the model."""
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
            return Canvas.blank(
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

    def _check_size(self, row: Row) -> None:
        """Refuse what no forward takes: too many canvases of a generation at a time, or too long ones."""
        longest = max(layout.length for layout in row.layouts)
        if longest > self.info.max_length:
            raise RequestError("modifiers", f"a view of {longest} tokens is longer than {self.info.max_length}")
        if row.passes == 1:
            return
        tokens = len(row.lanes) * sum(layout.length for layout in row.layouts)
        if row.passes > self.limits.rows or tokens > self.limits.tokens:
            raise RequestError(
                "modifiers" if len(row.lanes) == 1 else "sampler_params",
                f"a forward of this generation has {row.passes} canvases of {tokens} tokens in all, and takes at most "
                f"{self.limits.rows} (--max-batch) of {self.limits.tokens} (--max-batch-tokens)",
            )

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
        self._check_rows(generations)
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

    def _check_rows(self, generations: list[Generation]) -> None:
        """Refuse a generation of more canvases at a time than its owner may ever have."""
        most = self._scheduler.rows_of(generations[0].request.owner)
        if (rows := max(generation.rows for generation in generations)) > most:
            self._metrics.rejected("key_rows")
            message = f"this generation has {rows} canvases at a time: the limit is rows={most} (--key-limit)"
            raise KeyLimitError("rows", message, math.inf)

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
            while not (self._stopping or self._stuck):
                self._steps()
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

    def _steps(self) -> None:
        """Run steps until it is time to stop, or until one fails: a fault of ours, which is to cost no more than that
        step's generations."""
        try:
            for turn in run(self._next_rows, self._predict, batch=self._batch):
                self._watch.end()
                self._told(turn)
        except BackendDeadError:
            raise  # ends the engine, whose health then says so
        except Exception as error:
            log.exception("step failed")
            for generation in self._taking.values():
                if not generation.ended:
                    self._remove(generation, FinishReason.ERROR, f"the step failed: {type(error).__name__}")
        finally:
            self._watch.end()

    def _next_rows(self) -> list[Row]:
        """The rows of the next step; none when it is time to stop."""
        batch = self._next_batch() or []
        self._taking = {id(generation.row): generation for generation in batch}
        self._began = time.monotonic()
        self._model_seconds = 0.0
        self._watch.begin()
        return [generation.row for generation in batch]

    def _predict(self, query: Query) -> Prediction:
        """One forward for all, between what samplers are asked before and after it."""
        self._watch.end()
        began = time.monotonic()
        try:
            return self._forward(query)
        finally:
            self._model_seconds += time.monotonic() - began
            self._watch.begin()

    def _forward(self, query: Query) -> Prediction:
        """If a forward fails, halves of it are tried on their own, so that one row cannot fail the others."""
        try:
            found = self.backend.predict(query)
        except BackendDeadError:
            raise
        except Exception as error:
            count = query.generations
            if count == 1:
                return replace(Prediction.missing(query.wanted, query.answers, query.row.device), failed={0: error})
            middle = count // 2
            first, second = self._forward(query.part(0, middle)), self._forward(query.part(middle, count))
            failed = {**first.failed, **{middle + i: each for i, each in second.failed.items()}}
            return replace(Prediction.join([first, second]), failed=failed)
        self._metrics.model_forward()
        return found

    def _told(self, turn: Turn) -> None:
        """Deliver what a step did to each generation."""
        spent = time.monotonic() - self._began - self._model_seconds
        for row, told in groupby(turn, key=itemgetter(0)):
            generation = self._taking[id(row)]
            *before, last = (event for _, event in told)
            try:
                for event in before:
                    self._deliver(generation, event, last=False)
                self._deliver(generation, last, last=True)
            except Exception as error:  # whatever became of this one, the others go on
                log.exception("generation failed", sampler=generation.request.name)
                self._remove(generation, FinishReason.ERROR, f"its tokens could not be told: {type(error).__name__}")
        with self._change:
            self._gauge()
            self._change.notify_all()
        total = time.monotonic() - self._began
        self._seconds = max(total, FADING * self._seconds)
        self._metrics.step(len(self._taking), self._model_seconds, spent, total - self._model_seconds - spent)

    def _deliver(self, generation: Generation, event: StepEvent, last: bool) -> None:
        """Tell what a step did to one generation, and retire it if that was its last.

        Args:
            last: whether this is all that the step did to it.
        """
        if event.error is not None:
            self._fail(generation, event.error)
            return
        row, sampler = generation.row, generation.request.name
        before, generation.counted = generation.counted, event.settled
        stop = generation.request.stop
        stopped = None if stop is None else stop.add(event.text_tokens, last=row.finished and last)
        if stopped is not None:
            generation.counted, event.text_tokens = stopped, event.text_tokens[: stopped - before]
        event.settled = generation.counted
        if generation.counted and generation.first_token is None:
            generation.first_token = time.monotonic()
            self._metrics.first_token(generation.first_token - generation.submitted)
        # Of several canvases it is told at the end what the one that won has committed.
        later = row.particles is not None and not event.positions
        committed = None if later else len(event.positions) - len(event.replaced)
        forwards = max(0, event.forward - generation.forwards)
        generation.forwards += forwards
        self._metrics.committed(sampler, committed, generation.counted - before, forwards)
        generation.deliver(event)
        if not last:
            return
        if stopped is not None or row.ended:
            self._remove(generation, FinishReason.STOP)
        elif row.finished:
            self._remove(generation, FinishReason.LENGTH)

    def _fail(self, generation: Generation, error: SamplerError) -> None:
        """Retire a generation that cannot go on."""
        if isinstance(error, ForwardError):
            log.error("forward pass failed", error=repr(error.__cause__), exc_info=error.__cause__)
        else:
            self._log_failure(generation.request, error)
        self._remove(generation, FinishReason.ERROR, str(error))

    def _log_failure(self, request: GenerationRequest, error: SamplerError) -> None:
        """Say why a generation fails; where the sampler itself raised, with its traceback."""
        log.error("generation failed", error=str(error), sampler=request.name, exc_info=error.__cause__)

    def _remove(self, generation: Generation, reason: FinishReason, message: str = "") -> None:
        with self._change:
            self._scheduler.remove(generation)
            self._finish(generation, reason, message)

    def _finish(self, generation: Generation, reason: FinishReason, message: str = "") -> None:
        generation.ended = True
        tokens, forwards = generation.counted, generation.row.forwards
        self._metrics.finished(
            generation.request.name,
            reason,
            tokens=tokens,
            forwards=forwards,
            seconds=time.monotonic() - generation.submitted,
            decode_seconds=time.monotonic() - (generation.first_token or time.monotonic()),
        )
        generation.row.release()
        try:
            generation.deliver(Finished(reason, tokens, forwards, message))
        except Exception:  # whoever listens may be gone, which is nothing to the others
            log.exception("the end of a generation could not be told")
