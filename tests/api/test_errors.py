"""Errors of every status, in one shape."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.api.serving import PROMPT, Running, error_of, serving, until

BODY = {"prompt": PROMPT, "max_tokens": 4}


@pytest.fixture
def own(tiny_model: Path) -> Iterator[Running]:
    """A server that a test may break."""
    with serving(tiny_model) as running:
        yield running


def test_no_such_route(server: Running) -> None:
    error = error_of(server.get("/v1/nothing"), 404)
    assert "/v1/nothing" in error["message"]
    assert error_of(server.get("/v1"), 404)["code"] == "not_found"


def test_wrong_method(server: Running) -> None:
    answer = server.get("/v1/completions")
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/policies", "GET, HEAD, POST"),
        ("PATCH", "/v1/policies/x", "DELETE, GET, HEAD"),
        ("POST", "/v1/policies/x/", "DELETE, GET, HEAD"),
        ("OPTIONS", "/v1/chat/completions", "POST"),
        ("HEAD", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/a/b", "GET, HEAD"),
        ("POST", "/docs", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_all_right_ones(server: Running, method: str, path: str, allowed: str) -> None:
    answer = server.http.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/v1/models/", "//v1/models", "/v1//models", "///v1///models///"])
def test_slashes_too_many_are_overlooked(server: Running, path: str) -> None:
    # httpx would read //v1 as a host
    url = httpx.URL(f"{server.url}/").copy_with(raw_path=path.encode())
    assert server.http.get(url).json() == server.get("/v1/models").json()


def test_slashes_too_many_after_what_has_parameters(server: Running) -> None:
    assert server.get("/v1/models/tiny:topk/").json()["id"] == "tiny:topk"
    assert server.get("/v1/samplers//topk").json()["id"] == "topk"
    assert server.post("/v1/completions/", BODY).status_code == 200
    assert server.get("/health/").json() == {"status": "ok"}
    assert error_of(server.get("/"), 404)


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/samplers/topk", "/metrics", "/docs", "/v1/x"])
def test_head_is_get_without_the_body(server: Running, path: str) -> None:
    whole, head = server.get(path), server.http.head(path)
    assert head.content == b""
    assert head.status_code == whole.status_code
    names = ["content-type"] if path == "/metrics" else ["content-type", "content-length"]
    assert [head.headers[name] for name in names] == [whole.headers[name] for name in names]
    assert server.http.head(path).status_code == whole.status_code, "the connection goes on"


def test_a_failed_forward_pass_is_a_500_and_the_next_request_is_fine(own: Running) -> None:
    own.gate.failure = MemoryError("secret details")
    error = error_of(own.post("/v1/completions", BODY), 500)
    assert error["code"] == "generation_failed" and error["type"] == "server_error"
    assert "secret" not in error["message"]
    own.gate.failure = None
    assert own.complete()["choices"][0]["text"]


def test_a_failure_in_mid_stream_is_an_event(own: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 32, "block_length": 1, "stream": True}
    with own.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines)[6:])["choices"]
        own.gate.failure = RuntimeError("broken")
        events = [line for line in lines if line]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "generation_failed"


def test_the_client_raises_on_an_error_in_mid_stream(own: Running) -> None:
    own.gate.failure = RuntimeError("broken")
    with own.client() as client:
        stream = client.completions.create(model="tiny", prompt=PROMPT, stream=True)
        with pytest.raises(Exception, match="forward pass failed"):
            list(stream)


def test_time_that_is_up_is_a_504(tiny_model: Path) -> None:
    with serving(tiny_model, request_timeout=0.2) as running, ThreadPoolExecutor(1) as pool:
        with running.gate.closed():
            answer = pool.submit(running.post, "/v1/completions", BODY)
            until(lambda: running.gauges()[0])
            time.sleep(0.3)  # the pass that is under way then outlasts the request's time
        assert error_of(answer.result(), 504)["code"] == "timeout"


def test_a_dead_engine_is_a_503(own: Running) -> None:
    own.gate.failure = KeyboardInterrupt()  # nothing that the engine handles
    error_of(own.post("/v1/completions", BODY), 500)
    until(lambda: not own.engine.alive)
    for path in ("/health", "/ready"):
        answer = own.get(path)
        assert error_of(answer, 503)["code"] == "not_serving"
        assert answer.headers["retry-after"]
    error_of(own.post("/v1/completions", BODY), 503)


def test_a_bug_is_a_500_that_tells_nothing(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret details")

    monkeypatch.setattr("server.api.routes.tokens._encode", broken)
    answer = own.post("/tokenize", {"prompt": "a"}, headers={"x-request-id": "mine"})
    assert "secret" not in error_of(answer, 500)["message"]
    assert answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3", True), ("a b", False), ("x" * 129, False), ("ä", False)])
def test_a_sane_request_id_comes_back(server: Running, given: str, kept: bool) -> None:
    answer = server.get("/v1/nothing", headers={"x-request-id": given.encode()})
    assert (answer.headers["x-request-id"] == given) == kept
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "junk",
    [
        b"GARBAGE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\nx: \x00\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_our_shape_too(server: Running, junk: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(junk)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
