"""The engine: a bounded queue, a thread of its own, and one forward per turn for all running generations."""

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
"""Seconds per step from which short requests no longer wait for long ones beside them."""
FADING = 0.9
"""Factor per step by which the recorded duration of the longest recent step decays."""


def too_long(info: ModelInfo, prompt: int, max_tokens: int, at_least: bool = False) -> str:
    """OpenAI's message for a full context, which clients recognise; they also check the error code.

    Args:
        at_least: True if `prompt` is a lower bound, derived from the length of the text.
    """
    or_more = "at least " if at_least else ""
    limit = f" here, because of {info.length_limit}" if info.length_limit else ""
    return (
        f"This model's maximum context length is {info.max_length} tokens{limit}. However, you requested "
        f"{or_more}{prompt + max_tokens} tokens ({or_more}{prompt} in the prompt, {max_tokens} in the completion). "
        f"Please shorten the prompt or lower max_tokens. ({CONTEXT_LENGTH_EXCEEDED})"
    )


def _time_is_up(generation: Generation) -> str:
    """Message for a request that reached its timeout."""
    forwards = generation.row.forwards
    how_far = f"after {forwards} forward passes" if forwards else "before its first forward pass"
    return (
        f"the request's time is up {how_far}: the limit is {generation.request.timeout:g} seconds (--request-timeout)"
    )


def _field_of(error: ParameterError) -> str:
    """Request field that holds the parameters."""
    if error.field in ("sampler", "temperature", "modifiers") or error.field.startswith("modifiers."):
        return error.field
    return f"sampler_params.{error.field}"


def _charged(request: GenerationRequest) -> int:
    """Tokens charged to a per-minute limit: prompt and maximum text, known before generation."""
    prompt = len(request.prompt) + len(request.suffix)
    return request.max_tokens + (prompt if request.counts_prompt else 0)


class Engine:
    """Runs generations through a backend.

    Each turn retires cancelled and timed-out generations, picks those of the next forward, runs the forward, lets each
    sampler commit, delivers events, and retires finished generations.

    Args:
        backend: the model; closed by `stop`.
        metrics: destination of counts.
        limits: limits of rows, tokens and queue. A canvas cannot be longer than a forward.
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
        self._seconds = 0.0  # of the longest recent step
        self._failure: BaseException | None = None
        self._stuck = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._batch = Batch(self.info.loop_device)
        self._taking: dict[int, Generation] = {}
        self._began = self._model_seconds = 0.0
        self._watch = Watch(self._thread)

    @property
    def metrics(self) -> Metrics:
        """Destination of counts."""
        return self._metrics

    def start(self) -> None:
        """Start the engine's thread."""
        sleep_where_crowded()
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True if the engine's thread is running and responsive."""
        return self._thread.is_alive() and self._failure is None

    @property
    def failure(self) -> BaseException | None:
        """Error that ended the engine's thread; None if there is none."""
        return self._failure

    def look_after(self) -> None:
        """Declare the engine dead if a sampler does not return. Call this at least every second."""
        if self.alive and self._watch.look():
            name, lines = self._watch.where()
            self._stuck = True
            self._failure = EngineError(f"sampler {name} has not come back for {PATIENCE:.0f} s")
            log.error("a sampler does not come back", sampler=name, seconds=PATIENCE, stack=lines)

    @property
    def accepting(self) -> bool:
        """True if new generations are accepted."""
        return self.alive and not self._draining

    def check_accepting(self) -> None:
        """Raise NotServingError unless new generations are accepted."""
        if not self.accepting:
            raise NotServingError("the server is shutting down" if self.alive else "the engine is not running")

    def check(self, request: GenerationRequest) -> tuple[Row, int]:
        """The request as a row of the loop, and its maximum work in tokens.

        Raises RequestError if it does not fit the model or sampler, SamplerError if the sampler's own code fails.
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
        """Raise RequestError if a forward cannot hold the generation: too many canvases, or too long ones."""
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

        Raises RequestError, SamplerError, QueueFullError, KeyLimitError or NotServingError, with nothing queued.
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
        """Raise QueueFullError, KeyLimitError or NotServingError if the owner cannot queue `count` generations now.

        Call this before any work on a request, so that refusals are cheap and do not delay other requests.
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
        """Raise RequestError if the generations exceed the work allowed per request."""
        most = sum(generation.work for generation in generations)
        if self.limits.work is not None and most > self.limits.work:
            raise RequestError(
                "max_tokens",
                f"forwards may have to compute {most} tokens for this, and a request's limit is {self.limits.work} "
                "(--max-work): ask for fewer or shorter texts, or for more tokens a forward",
            )

    def _queue(self, generations: list[Generation]) -> None:
        """Queue generations within the limits of their owner, and charge it."""
        self.check_accepting()
        owner = generations[0].request.owner
        self._scheduler.check(owner, len(generations))
        if self._buckets is not None and not owner.ahead:
            self._buckets.take(owner.group, sum(_charged(each.request) for each in generations), time.monotonic())
        self._scheduler.add(generations)
        self._gauge()
        self._change.notify_all()

    def budget(self, owner: Owner) -> Budget | None:
        """Remaining tokens per minute of an owner's group; None if unlimited."""
        if self._buckets is None or owner.ahead:
            return None
        with self._change:
            return self._buckets.budget(owner.group, time.monotonic())

    def cancel(self, generation: Generation) -> None:
        """End a generation within one step, reported by its `Finished` event. No effect on one that has ended."""
        with self._change:
            generation.cancelled = True
            self._change.notify_all()

    def drain(self) -> None:
        """Refuse new generations; queued and running ones continue."""
        with self._change:
            self._draining = True
            self._change.notify_all()

    def wait_idle(self, timeout: float | None = None) -> bool:
        """Wait until nothing is queued or running. False if the timeout expires first."""
        with self._change:
            return self._change.wait_for(lambda: self.idle or not self.alive, timeout)

    def end_all(self) -> None:
        """End everything queued or running after the current step. Does not wait."""
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
        """True if nothing is queued or running."""
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
        """Retire, pick, and wait until there is something to run. None if the engine is stopping."""
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
        """Remove cancelled and timed-out generations, queued or running."""
        now = time.monotonic()
        for generation in self._scheduler.all():
            if generation.cancelled:
                self._scheduler.remove(generation)
                self._finish(generation, FinishReason.ABORT)
            elif now > generation.deadline:
                self._scheduler.remove(generation)
                self._finish(generation, FinishReason.TIMEOUT, _time_is_up(generation))

    def _steps(self) -> None:
        """Run steps until the engine stops or a step fails.

        A failed step is a bug of ours and ends only that step's generations.
        """
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
        """Rows of the next step; empty if the engine is stopping."""
        batch = self._next_batch() or []
        self._taking = {id(generation.row): generation for generation in batch}
        self._began = time.monotonic()
        self._model_seconds = 0.0
        self._watch.begin()
        return [generation.row for generation in batch]

    def _predict(self, query: Query) -> Prediction:
        """Run one forward for all rows, and pause the watch on samplers meanwhile."""
        self._watch.end()
        began = time.monotonic()
        try:
            return self._forward(query)
        finally:
            self._model_seconds += time.monotonic() - began
            self._watch.begin()

    def _forward(self, query: Query) -> Prediction:
        """Run a forward; if it fails, retry its halves separately, so that one row cannot fail the others."""
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
        """Deliver the events of a step to each generation."""
        spent = time.monotonic() - self._began - self._model_seconds
        for row, told in groupby(turn, key=itemgetter(0)):
            generation = self._taking[id(row)]
            *before, last = (event for _, event in told)
            try:
                for event in before:
                    self._deliver(generation, event, last=False)
                self._deliver(generation, last, last=True)
            except Exception as error:  # one failed delivery must not stop the others
                log.exception("generation failed", sampler=generation.request.name)
                self._remove(generation, FinishReason.ERROR, f"its tokens could not be told: {type(error).__name__}")
        with self._change:
            self._gauge()
            self._change.notify_all()
        total = time.monotonic() - self._began
        self._seconds = max(total, FADING * self._seconds)
        self._metrics.step(len(self._taking), self._model_seconds, spent, total - self._model_seconds - spent)

    def _deliver(self, generation: Generation, event: StepEvent, last: bool) -> None:
        """Deliver an event to its generation, and retire the generation if it is finished.

        Args:
            last: True if this is the generation's last event of the step.
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
        # With several canvases, the winner's commits are reported at the end.
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
        """Log why a generation fails, with a traceback if the sampler itself raised."""
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
        except Exception:  # the listener may be gone; the other generations go on
            log.exception("the end of a generation could not be told")
