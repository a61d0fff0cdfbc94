"""Models behind the servers under test, on the engine that `UNMASK_TEST_ENGINE` names (`torch` if nothing does)."""

import os
import warnings
from dataclasses import replace
from functools import cache

import pytest

from samplers import Prediction
from samplers.forward.query import Query
from server.backends.loading import LoadedModel, load_model
from server.engine import Backend

ENGINE = os.environ.get("UNMASK_TEST_ENGINE", "torch")

needs_torch_engine = pytest.mark.skipif(ENGINE != "torch", reason="about what only the torch engine does")


class Shared:
    """A backend that many servers use one after the other, or together: their ends are not its own."""

    def __init__(self, backend: Backend) -> None:
        self.info = backend.info
        self._backend = backend

    def predict(self, query: Query) -> Prediction:
        return self._backend.predict(query)

    def close(self) -> None:
        """Nothing: `close_models` does it."""


_opened: list[LoadedModel] = []


@cache
def _started(model: str, max_model_len: int | None) -> LoadedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of libraries that vLLM imports are not ours to mend
        loaded = load_model(model, ENGINE, device="cpu", dtype="float32", max_model_len=max_model_len)
    _opened.append(loaded)
    return replace(loaded, backend=Shared(loaded.backend))


def open_model(model: str, max_model_len: int | None) -> LoadedModel:
    """A model for one server. vLLM takes a quarter of a minute to start, so that its backends are shared."""
    if ENGINE != "torch":
        return _started(model, max_model_len)
    return load_model(model, device="cpu", dtype="float32", max_model_len=max_model_len)


def close_models() -> None:
    """Close what was shared."""
    for loaded in _opened:
        loaded.backend.close()
