"""A server on a real socket in this process, and a backend that can be made to wait or fail."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from policies.serving.store import PolicyStore, ServedModel
from samplers import Prediction
from samplers.forward.query import Query
from server.app import create_app, limits_of
from server.engine import Backend, Engine
from server.http.lifecycle import DrainingServer, listen
from server.models.text.codec import TextCodec
from server.runtime.metrics import Metrics
from server.settings import load_settings
from tests.api.models import open_model

NAME = "tiny"
PROMPT = "Tom has 3 apples. He buys 5 more."


class Gate:
    """A backend that forwards to another one while it is open, and holds each forward pass while it is closed.

    Attributes:
        forwards: passes that were let through.
        seen: prompts' first tokens of every pass, to tell what reached the model.
        failure: raised instead of a prediction.
    """

    def __init__(self, backend: Backend) -> None:
        self.info = backend.info
        self.forwards = 0
        self.seen: list[list[int]] = []
        self.failure: BaseException | None = None
        self._backend = backend
        self._open = threading.Event()
        self._open.set()

    def predict(self, query: Query) -> Prediction:
        self._open.wait()
        if self.failure is not None:
            raise self.failure
        self.forwards += 1
        self.seen.extend(canvas.tokens[: canvas.layout.prompt_length].tolist() for canvas in query.canvases)
        return self._backend.predict(query)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """No pass gets through inside."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def let_through(self) -> None:
        """Open for good."""
        self._open.set()

    def close(self) -> None:
        self._backend.close()


@dataclass(frozen=True)
class Running:
    """A server, and what is behind it."""

    url: str
    engine: Engine
    gate: Gate
    text: TextCodec
    app: FastAPI
    policies: PolicyStore
    http: httpx.Client
    server: DrainingServer

    def client(self, key: str = "any") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=json, **options)

    def complete(self, **fields: Any) -> Any:
        """The JSON of a completion that must succeed."""
        answer = self.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 16} | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Every sample by (name, label values but the model's)."""
        found = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                labels = [value for name, value in sorted(sample.labels.items()) if name != "model_name"]
                found[(sample.name, *labels)] = sample.value
        return found

    def gauges(self) -> tuple[float, float]:
        """Generations that run and wait."""
        found = self.metrics()
        return found[("dllm_requests_running",)], found[("dllm_requests_waiting",)]


@contextmanager
def serving(model: Path, **settings: Any) -> Iterator[Running]:
    """A server with these settings on a free port, until the end of the block."""
    chosen = load_settings({"sampler": "topk", **settings})
    loaded = open_model(str(model), chosen.max_model_len)
    gate = Gate(loaded.backend)
    metrics = Metrics(chosen.served_name or NAME)
    engine = Engine(gate, metrics, limits_of(chosen))
    bound = listen("127.0.0.1", 0)
    policies = PolicyStore(ServedModel(engine.info.architecture, engine.info.vocab_size))
    app = create_app(engine, loaded.text, metrics, chosen, policies)
    server = DrainingServer(app, engine, chosen)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="server")
    engine.start()
    thread.start()
    until(lambda: server.started)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            yield Running(url, engine, gate, loaded.text, app, policies, http, server)
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        engine.stop()
        bound.close()


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not happen in time"
        time.sleep(0.01)


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error in an answer that must have this status and OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert "Traceback" not in answer.text
    return error
