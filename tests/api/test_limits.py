"""Bodies that are too long, queues that are full, servers that stop."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from server.api.middleware.body_limit import BodyLimit
from server.engine import Owner
from tests.api.serving import PROMPT, Running, error_of, serving, until

LIMIT = 2000
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> Iterator[Running]:
    with serving(tiny_model, max_body_bytes=LIMIT) as running:
        yield running


def body_of(size: int) -> bytes:
    body = {"prompt": "a", "max_tokens": 1, "user": ""}
    body["user"] = "u" * (size - len(json.dumps(body)))
    return json.dumps(body).encode()


def chunked(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 500):
        yield body[start : start + 500]


def test_a_body_at_the_limit_is_read(small: Running) -> None:
    assert small.http.post("/v1/completions", content=body_of(LIMIT), headers=JSON).status_code == 200
    assert small.http.post("/v1/completions", content=chunked(body_of(LIMIT)), headers=JSON).status_code == 200


@pytest.mark.parametrize("size", [LIMIT + 1, 20_000_000])
def test_a_longer_one_is_refused_at_once(small: Running, size: int) -> None:
    error = error_of(small.http.post("/v1/completions", content=body_of(size), headers=JSON), 413)
    assert error["code"] == "request_too_large"
    assert str(LIMIT) in error["message"]


def test_a_longer_one_in_chunks_is_refused_while_it_comes(small: Running) -> None:
    error_of(small.http.post("/v1/completions", content=chunked(body_of(LIMIT + 1)), headers=JSON), 413)


async def _ask(length: bytes) -> int:
    """The status that a request with this content-length gets from the middleware, whatever server is before it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing of the body may be read")

    scope = {"type": "http", "headers": [(b"content-length", length)]}
    await BodyLimit(app, LIMIT, lambda _: Owner())(scope, receive, send)
    status: int = sent[0]["status"]
    return status


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("length", "status"),
    [(b"0", 200), (b"2000", 200), (b"2001", 413), (b"9" * 5000, 413)]
    + [(wrong, 400) for wrong in (b"", b"-1", b"+5", b"5 5", b"5,5", b"0x5", b"1e3", "\u0665".encode(), b"five")],
)
async def test_content_lengths(length: bytes, status: int) -> None:
    assert await _ask(length) == status


@pytest.mark.asyncio
async def test_long_bodies_are_read_by_turns() -> None:
    """One part of one of them in a round of the event loop, and a client that is slow to send keeps nobody waiting."""
    rounds, parts, whole = 0, [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        whole.append(scope["name"])

    def sender(name: str) -> Any:
        sent = 0

        async def receive() -> Message:
            nonlocal sent
            if name == "slow" and sent:
                await asyncio.Event().wait()
            sent += 1
            if sent > 1:
                parts.append(rounds)
            return {"type": "http.request", "body": b"x" * 100_000, "more_body": sent < 5}

        return receive

    async def count() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    limit = BodyLimit(app, 1_000_000, lambda _: Owner())
    names = ["slow", *"abcdefgh"]
    scopes = [{"type": "http", "headers": [], "name": name} for name in names]
    counting = asyncio.create_task(count())
    asked = [asyncio.create_task(limit(scope, sender(str(scope["name"])), print)) for scope in scopes]  # type: ignore[arg-type]
    await asyncio.wait(asked[1:], timeout=10)
    for task in (counting, asked[0]):
        task.cancel()
    assert sorted(whole) == names[1:]
    assert len(parts) == 8 * 4 and max(parts.count(each) for each in parts) <= 2


def test_a_full_queue_is_a_429_and_nothing_hangs(tiny_model: Path) -> None:
    with serving(tiny_model, max_queue=8, max_batch=2) as running, ThreadPoolExecutor(100) as pool:
        with running.gate.closed():
            body = {"prompt": PROMPT, "max_tokens": 2}
            answers = [pool.submit(running.post, "/v1/completions", body) for _ in range(100)]
            until(lambda: sum(answer.done() for answer in answers) >= 100 - 8 - 2)
            began = time.monotonic()
            assert running.get("/health").status_code == 200
            assert time.monotonic() - began < 5  # 100 ms on a machine that has nothing else to do
        results = [answer.result(timeout=60) for answer in answers]
        refused = [answer for answer in results if answer.status_code != 200]
        assert len(results) - len(refused) in (8, 9, 10)
        for answer in refused:
            assert error_of(answer, 429)["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) >= 1
        until(lambda: running.gauges() == (0, 0))


def test_more_than_the_queue_ever_takes_is_a_400(tiny_model: Path) -> None:
    with serving(tiny_model, max_queue=4) as running:
        error = error_of(running.post("/v1/completions", {"prompt": ["a"] * 3, "n": 2}), 400)
        assert error["param"] == "prompt" and "6 generations" in error["message"]
        assert error_of(running.post("/v1/completions", {"prompt": "a", "n": 5}), 400)["param"] == "n"
        assert len(running.complete(prompt=["a", "b"], n=2)["choices"]) == 4


def test_all_choices_are_queued_or_none(tiny_model: Path) -> None:
    with serving(tiny_model, max_queue=4, max_batch=1) as running, ThreadPoolExecutor(2) as pool:
        with running.gate.closed():
            first = pool.submit(running.complete, n=3)
            until(lambda: running.gauges() == (1, 2))
            error_of(running.post("/v1/completions", {"prompt": PROMPT, "n": 3}), 429)
            assert running.gauges() == (1, 2)
        first.result()


def test_a_draining_server_finishes_what_runs_and_takes_nothing_new(tiny_model: Path) -> None:
    with serving(tiny_model) as running, ThreadPoolExecutor(1) as pool:
        with running.gate.closed():
            inside = pool.submit(running.complete)
            until(lambda: running.gauges() == (1, 0))
            running.engine.drain()
            assert running.get("/health").status_code == 200
            for answer in (running.get("/ready"), running.post("/v1/completions", {"prompt": PROMPT})):
                assert error_of(answer, 503)["code"] == "not_serving"
                assert answer.headers["retry-after"]
        assert len(inside.result()["choices"]) == 1


def test_connections_that_do_not_get_on_hold_up_nobody(server: Running) -> None:
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with ExitStack() as stack:
        for i in range(200):
            connection = stack.enter_context(socket.create_connection(address))
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + b"content-length: 9\r\n\r\n{" * (i % 2)
            )
        assert server.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


@pytest.mark.asyncio
async def test_a_reader_that_does_not_read_slows_nobody(server: Running) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 16, "stream": True, "block_length": 1}).encode()
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []
    reads = asyncio.Event()

    async def receive() -> Message:
        if not incoming:
            await asyncio.Future()
        return incoming.pop()

    async def send(message: Message) -> None:
        sent.append(message)
        await reads.wait()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    asking = asyncio.create_task(server.app(scope, receive, send))
    while not (server.engine.idle and sent):
        await asyncio.sleep(0.01)
    assert len(sent) == 1, "all of it was generated although nothing but the head was taken"
    reads.set()
    await asking
    assert b"[DONE]" in sent[-2]["body"]


def test_a_long_text_does_not_hold_up_others(server: Running) -> None:
    with ThreadPoolExecutor(1) as pool:
        text = "apples and pears " * 20_000
        long = pool.submit(server.post, "/tokenize", {"prompt": text})
        count = 0
        while not long.done():
            assert server.get("/health").status_code == 200
            count += 1
        assert long.result().json()["count"] > 50_000
        assert count >= 2
