"""A third party's sampler fails in every way there is: it fails its own generation, and seven others never know."""

import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import structlog
import torch
from structlog.testing import LogCapture
from torch import Tensor

from samplers import Canvas, Sampler, SamplerError, get_sampler, registry
from server.engine import Engine, FinishReason, GenerationRequest, RequestError
from server.engine import engine as engine_module
from server.runtime.metrics import Metrics
from tests.engine.backends import CheapBackend, Listener, run
from tests.engine.hostile import HARMLESS, NAME, SINGLE, WHOLE, Leftmost
from tests.samplers.models import VOCAB, random_logits

TOKENS = 4
NEIGHBOURS = ("topk", "threshold", "random", "credit", "edit", "hierarchy_remask")
Told = tuple[FinishReason, list[int], int]


def strict_logits(canvas: Canvas) -> Tensor:
    """As a real model's embedding: there is nothing for a token that does not exist."""
    torch.zeros(VOCAB)[canvas.tokens]
    return random_logits(canvas)


def ask_for(sampler: str, seed: int, **params: object) -> GenerationRequest:
    rule = get_sampler(sampler)
    return GenerationRequest([seed + 1], TOKENS, rule, rule.Params(**params), sampler, seed=seed)


@pytest.fixture(scope="module")
def backend() -> CheapBackend:
    return CheapBackend(strict_logits)


@pytest.fixture(scope="module")
def log() -> Iterator[LogCapture]:
    """What the engine logs."""
    said = LogCapture()
    kind = structlog.make_filtering_bound_logger(0)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(engine_module, "log", structlog.wrap_logger(None, processors=[said], wrapper_class=kind))
        yield said


@pytest.fixture(scope="module")
def engine(backend: CheapBackend, log: LogCapture) -> Iterator[Engine]:
    """One for all faults: each is followed by others."""
    engine = Engine(backend, Metrics("test"))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def away() -> Iterator[ThreadPoolExecutor]:
    """Requests are checked on threads of their own, as the server does; the first thread is a user's."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def others(twin: bool) -> list[GenerationRequest]:
    """Seven generations, or six without the hostile sampler's own that is to go well."""
    found = [ask_for(name, i, **({"penalty": 1.0} if name == "edit" else {})) for i, name in enumerate(NEIGHBOURS)]
    return [*found, ask_for(NAME, 6)] if twin else found


def told(listener: Listener) -> Told:
    end = listener.finish()
    return end.reason, listener.tokens(TOKENS), end.forwards


@pytest.fixture(scope="module")
def clean(backend: CheapBackend) -> tuple[list[Told], int]:
    """What the seven say where nothing goes wrong, and the forwards of the batch."""
    with pytest.MonkeyPatch.context() as patching:
        patching.setitem(registry._registry(), NAME, Leftmost())
        engine = Engine(backend, Metrics("test"))
        engine.start()
        backend.batches.clear()
        found = [told(listener) for listener in run(engine, others(twin=True))]
        engine.stop()
        return found, len(backend.batches)


def run_beside(
    engine: Engine, away: ThreadPoolExecutor, backend: CheapBackend, twin: bool
) -> tuple[str | None, list[Told]]:
    """One that is to fail among the seven: its message, or None if it ended well; and what the others say."""
    backend.batches.clear()
    try:
        last, *found = away.submit(run, engine, [ask_for(NAME, 7, fault=True), *others(twin)]).result(30)
    except (SamplerError, RequestError) as error:
        return str(error), [told(listener) for listener in away.submit(run, engine, others(twin)).result(30)]
    end = last.finish()
    return end.message if end.reason is FinishReason.ERROR else None, [told(listener) for listener in found]


def check(
    sampler: type[Sampler],
    twin: bool,
    engine: Engine,
    away: ThreadPoolExecutor,
    backend: CheapBackend,
    clean: tuple[list[Told], int],
) -> str | None:
    """Run one among seven, and see that these are as they were; returns its message."""
    expected, _ = clean
    with pytest.MonkeyPatch.context() as patching:
        patching.setitem(registry._registry(), NAME, sampler())
        message, found = run_beside(engine, away, backend, twin)
    assert engine.alive, engine.failure
    assert torch.get_default_dtype() is torch.float32
    assert found == expected[: len(found)]
    return message


@pytest.mark.parametrize("fault", SINGLE)
def test_a_row_that_fails_harms_neither_others_nor_its_like(
    fault: str,
    engine: Engine,
    away: ThreadPoolExecutor,
    backend: CheapBackend,
    clean: tuple[list[Told], int],
    log: LogCapture,
) -> None:
    log.entries.clear()
    message = check(SINGLE[fault], True, engine, away, backend, clean)
    assert message is not None and message.startswith(f"sampler {NAME} failed: ")
    assert len(message) <= 500 and message.isprintable()
    assert len(backend.batches) == clean[1], "nobody's forward is done twice"
    (line,) = log.entries
    assert line["error"] == message and line["sampler"] == NAME
    if (cause := line["exc_info"]) is not None:
        assert len("".join(traceback.format_exception(cause))) < 20_000


@pytest.mark.parametrize("fault", WHOLE)
def test_a_sampler_that_is_wrong_as_such_harms_no_other(
    fault: str, engine: Engine, away: ThreadPoolExecutor, backend: CheapBackend, clean: tuple[list[Told], int]
) -> None:
    message = check(WHOLE[fault], False, engine, away, backend, clean)
    assert message and len(message) <= 700 and message.isprintable()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", "must return a Selection"),
        ("bonus of two", "a bonus must be a TokenBonus or None"),
        ("bonus nan", "is not finite"),
        ("chooses in words", "must be TokenChoices or None"),
        ("window in words", "must be a Window or None"),
        ("resample numbers", "must return a Resampling or None"),
        ("state of another name", "it keeps a state that it has not declared"),
        ("incompatibility number", "must say why in words"),
        ("waits at no barrier", "barrier is neither step nor block"),
    ],
)
def test_what_is_wrong_is_said(
    fault: str,
    words: str,
    engine: Engine,
    away: ThreadPoolExecutor,
    backend: CheapBackend,
    clean: tuple[list[Told], int],
) -> None:
    message = check((SINGLE | WHOLE)[fault], False, engine, away, backend, clean)
    assert message is not None and words in message and "output" not in message


@pytest.mark.parametrize("fault", HARMLESS)
def test_what_a_sampler_may_try_changes_nothing_for_others(
    fault: str, engine: Engine, away: ThreadPoolExecutor, backend: CheapBackend, clean: tuple[list[Told], int]
) -> None:
    message = check(HARMLESS[fault], HARMLESS[fault].revises is False, engine, away, backend, clean)
    assert message is None or message.startswith(f"sampler {NAME} failed: ")


def test_a_sampler_cannot_change_the_parameters_that_others_share(
    engine: Engine, backend: CheapBackend, clean: tuple[list[Told], int]
) -> None:
    with pytest.MonkeyPatch.context() as patching:
        patching.setitem(registry._registry(), NAME, HARMLESS["spoils its step"]())
        request = ask_for(NAME, 7, fault=True)
        run(engine, [request])
    assert request.params.model_dump() == {"fault": True}
