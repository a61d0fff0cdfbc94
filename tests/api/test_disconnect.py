"""Clients that go away take their generations with them."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.serving import PROMPT, Running, serving, until

CLIENTS = 20


@pytest.fixture
def own(tiny_model: Path) -> Iterator[Running]:
    with serving(tiny_model, max_batch=8) as running:
        yield running


def ask(running: Running, **fields: object) -> socket.socket:
    """A connection on which a completion has been asked for."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": 200, "block_length": 1} | fields).encode()
    connection = socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def all_cancelled(running: Running) -> bool:
    """Whether everything that is queued or running has been told to end."""
    return all(
        generation.cancelled for generation in [*running.engine._scheduler.running, *running.engine._scheduler.waiting]
    )


@pytest.mark.parametrize("stream", [True, False])
def test_generations_of_clients_that_are_gone_end(own: Running, stream: bool) -> None:
    with own.gate.closed():
        connections = [ask(own, stream=stream) for _ in range(CLIENTS)]
        # The pass that waits at the gate began with one or a few of them.
        until(lambda: sum(own.gauges()) == CLIENTS)
        for connection in connections:
            connection.close()
        forwards = own.gate.forwards
        until(lambda: all_cancelled(own))
    until(lambda: own.gauges() == (0, 0))
    assert own.gate.forwards <= forwards + 1, "one pass was under way, none may follow"
    assert own.metrics()[("dllm_requests_total", "abort", "topk")] == CLIENTS


def test_in_mid_stream(own: Running) -> None:
    with ask(own, stream=True) as connection:
        while b"data: " not in connection.recv(65536):
            pass
        with own.gate.closed():  # so that it cannot come to its end however slow this client is
            assert own.gauges() == (1, 0)
            connection.close()
            until(lambda: all_cancelled(own))
    until(lambda: own.gauges() == (0, 0))
    assert own.gate.forwards < 200


def test_a_request_dropped_in_the_queue_never_reaches_the_model(tiny_model: Path) -> None:
    with serving(tiny_model, max_batch=1) as running:
        with running.gate.closed():
            first = ask(running, max_tokens=3)
            until(lambda: running.gauges() == (1, 0))
            dropped = ask(running, prompt="#### 8")
            until(lambda: running.gauges() == (1, 1))
            dropped.close()
            until(lambda: running.engine._scheduler.waiting[0].cancelled)
        until(lambda: running.gauges() == (0, 0))
        first.close()
        assert running.gate.seen and running.text.encode("#### 8") not in running.gate.seen


def test_all_choices_of_a_request_end(own: Running) -> None:
    with own.gate.closed():
        connection = ask(own, n=4, prompt=[PROMPT, "a"])
        until(lambda: sum(own.gauges()) == 8)
        connection.close()
        until(lambda: all_cancelled(own))
    until(lambda: own.gauges() == (0, 0))
