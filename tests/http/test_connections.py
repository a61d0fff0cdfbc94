"""What happens on a connection: upgrades, bodies, half-closed clients, over a raw socket."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.settings import load_settings
from tests.api.serving import PROMPT, Running, serving, until

BODY = json.dumps({"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}).encode()
UPGRADES = [
    ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"],
    ["connection: upgrade", "upgrade: h2c"],
    ["CONNECTION: UPGRADE", "UPGRADE: H2C"],
    [
        "Connection: keep-alive",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ],
    ["Upgrade: websocket", "Connection: keep-alive, Upgrade"],
    ["Upgrade: TLS/1.2, h2c", "Connection: Upgrade"],
]


@contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def head(*headers: str, line: str = "POST /v1/completions HTTP/1.1") -> bytes:
    return "\r\n".join([line, "Host: x", "Content-Type: application/json", *headers, "", ""]).encode()


def sized(*headers: str, body: bytes = BODY, line: str = "POST /v1/completions HTTP/1.1") -> bytes:
    return head(*headers, f"Content-Length: {len(body)}", line=line) + body


class Answers:
    """The answers on a connection, one after another."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")

    def next(self) -> tuple[int, Any]:
        """Status and JSON of the next one."""
        status = int(self._file.readline().split()[1])
        headers = http.client.parse_headers(self._file)
        return status, json.loads(self._file.read(int(headers["content-length"])))

    def ended(self) -> bool:
        """Whether nothing more comes."""
        return not self._file.read(1)


def text_of(body: Any) -> str:
    text: str = body["choices"][0]["text"]
    return text


@pytest.fixture(scope="module")
def expected(server: Running) -> str:
    return text_of(server.complete(max_tokens=4, ignore_eos=True))


@pytest.mark.parametrize("upgrade", UPGRADES, ids=str)
@pytest.mark.parametrize("delivery", ["whole", "later", "bytes", "chunked"])
def test_an_offered_upgrade_is_ignored(server: Running, expected: str, upgrade: list[str], delivery: str) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        if delivery == "chunked":
            chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:]))
            connection.sendall(head(*upgrade, "Transfer-Encoding: chunked") + chunks + b"0\r\n\r\n")
        elif delivery == "whole":
            connection.sendall(sized(*upgrade))
        else:
            request = sized(*upgrade)
            parts = [request[: -len(BODY)], BODY] if delivery == "later" else [bytes([byte]) for byte in request]
            for part in parts:
                connection.sendall(part)
                time.sleep(0.05 if delivery == "later" else 0)
        status, body = answers.next()
        assert (status, text_of(body)) == (200, expected)
        connection.sendall(head(line="GET /health HTTP/1.1"))
        assert answers.next() == (200, {"status": "ok"}), "the connection goes on in HTTP/1.1"


@pytest.mark.parametrize("upgrade", UPGRADES, ids=str)
def test_a_body_after_an_offered_upgrade_is_no_request(server: Running, upgrade: list[str]) -> None:
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    for delay in (0, 0.1):
        with connected(server) as connection:
            answers = Answers(connection)
            connection.sendall(head(*upgrade, f"Content-Length: {len(smuggled)}"))
            time.sleep(delay)
            connection.sendall(smuggled + head("Connection: close", line="GET /health HTTP/1.1"))
            status, body = answers.next()
            assert status == 400 and body["error"]["code"] == "invalid_json"
            assert answers.next() == (200, {"status": "ok"})
            assert answers.ended()


def test_a_request_behind_one_that_offers_an_upgrade(server: Running, expected: str) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        get = head(*UPGRADES[0], line="GET /health HTTP/1.1")
        connection.sendall(sized(*UPGRADES[0]) + sized(*UPGRADES[1]) + get + sized("Connection: close"))
        for _ in range(2):
            status, body = answers.next()
            assert (status, text_of(body)) == (200, expected)
        assert answers.next() == (200, {"status": "ok"})
        assert text_of(answers.next()[1]) == expected
        assert answers.ended()


def test_an_upgrade_in_http_1_0(server: Running, expected: str) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        connection.sendall(sized(*UPGRADES[0], line="POST /v1/completions HTTP/1.0"))
        status, body = answers.next()
        assert (status, text_of(body)) == (200, expected)
        assert answers.ended()


def test_the_rest_of_an_offered_upgrade_still_counts(server: Running) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        connection.sendall(head(*UPGRADES[0], f"Content-Length: {len(BODY)}", "Expect: 100-continue"))
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert answers.next()[0] == 200
        connection.sendall(head("Upgrade: h2c", "Connection: Upgrade, close", line="GET /health HTTP/1.1"))
        assert answers.next()[0] == 200
        assert answers.ended()


@pytest.mark.parametrize("target", ["example.com:443", "/v1/completions", "127.0.0.1:80"])
def test_connect_is_refused_and_what_follows_is_not_read(server: Running, target: str) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        connection.sendall(head(line=f"CONNECT {target} HTTP/1.1") + head(line="GET /health HTTP/1.1"))
        status, body = answers.next()
        assert status == 400 and "CONNECT" in body["error"]["message"]
        assert answers.ended()


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: {n}", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: {n}"],
        ["Content-Length: {n}", "Content-Length: {n}"],
        ["Content-Length: {n}", "Content-Length: 0"],
        ["Content-Length: {n}, {n}"],
        ["Content-Length: +{n}"],
        ["Content-Length : {n}"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
    ],
    ids=str,
)
@pytest.mark.parametrize("upgrade", [[], UPGRADES[0]], ids=["plain", "upgrade"])
def test_two_readings_of_a_bodys_length_are_refused(server: Running, headers: list[str], upgrade: list[str]) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        smuggled = b"0\r\n\r\n" + head(line="GET /health HTTP/1.1")
        connection.sendall(head(*upgrade, *[header.format(n=len(smuggled)) for header in headers]) + smuggled)
        status, body = answers.next()
        assert status == 400 and body["error"]["type"] == "invalid_request_error"
        assert answers.ended()


def test_a_transfer_that_is_compressed_is_refused(server: Running) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        connection.sendall(head("Transfer-Encoding: gzip, chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))
        status, body = answers.next()
        assert status == 415 and "transfer-encoding is 'gzip'" in body["error"]["message"]


def test_trailers_are_no_headers(tiny_model: Path) -> None:
    with serving(tiny_model, api_key=["secret"]) as running, connected(running) as connection:
        answers = Answers(connection)
        body = b"%x\r\n%s\r\n0\r\nAuthorization: Bearer secret\r\n\r\n" % (len(BODY), BODY)
        connection.sendall(head("Transfer-Encoding: chunked", "Trailer: Authorization") + body)
        assert answers.next()[0] == 401


def test_what_is_no_http_comes_after_the_answer_to_what_is(server: Running, expected: str) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        with server.gate.closed():
            connection.sendall(sized() + b"GARBAGE\r\n\r\n")
            until(lambda: server.gauges() == (1, 0))
        assert text_of(answers.next()[1]) == expected
        assert answers.ended()


def test_a_broken_body_is_refused_at_once(server: Running) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        connection.sendall(head("Transfer-Encoding: chunked") + b"zz\r\n")
        assert answers.next()[0] == 400
        assert answers.ended()


@pytest.mark.parametrize("delay", [0, 0.3], ids=["at once", "after a while"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_half_closed_client_gets_its_answer(server: Running, expected: str, version: str, delay: float) -> None:
    with connected(server) as connection:
        with server.gate.closed():
            connection.sendall(sized(line=f"POST /v1/completions HTTP/{version}"))
            connection.shutdown(socket.SHUT_WR)
            until(lambda: server.gauges() == (1, 0))
            time.sleep(delay)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.count(b"HTTP/1.1") == 1
    top, _, body = answer.partition(b"\r\n\r\n")
    assert text_of(json.loads(body)) == expected
    assert b"content-length: %d" % len(body) in top and b"connection: close" in top


@pytest.mark.parametrize("path", ["/health", "/v1/nothing", "/v1/completions"])
def test_a_half_closed_client_gets_any_answer(server: Running, path: str) -> None:
    with connected(server) as connection:
        connection.sendall(head(line=f"GET {path} HTTP/1.1"))
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    status = {"/health": 200, "/v1/nothing": 404, "/v1/completions": 405}[path]
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.endswith(b"}")


def test_a_half_closed_client_gets_the_whole_stream(server: Running) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 12, "block_length": 1, "stream": True}).encode()
    with connected(server) as connection:
        file = connection.makefile("rb")
        with server.gate.closed():
            connection.sendall(sized(body=body))
            assert file.readline() == b"HTTP/1.1 200 OK\r\n"
            connection.shutdown(socket.SHUT_WR)
            time.sleep(0.3)
        while file.readline() != b"\r\n":
            pass
        stream = b""
        while size := int(file.readline(), 16):
            stream += file.read(size)
            assert file.readline() == b"\r\n"
        assert file.read() == b"\r\n"
    events = [json.loads(line[6:]) for line in stream.split(b"\n\n")[:-2]]
    assert stream.endswith(b"data: [DONE]\n\n")
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == text_of(server.complete(max_tokens=12, block_length=1))


def test_a_half_closed_client_gets_all_answers(server: Running, expected: str) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        connection.sendall(sized() + sized() + head(line="GET /health HTTP/1.1"))
        connection.shutdown(socket.SHUT_WR)
        assert [text_of(answers.next()[1]) for _ in range(2)] == [expected] * 2
        assert answers.next() == (200, {"status": "ok"})
        assert answers.ended()


@pytest.mark.parametrize(
    "rest", [b"POST /v1/comp", head("Content-Length: 9") + b"{", head("Transfer-Encoding: chunked") + b"zz\r\n"]
)
def test_a_request_that_never_ends_does_not_take_the_answer_before_it(
    server: Running, expected: str, rest: bytes
) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        with server.gate.closed():
            connection.sendall(sized())
            until(lambda: server.gauges() == (1, 0))
            connection.sendall(rest)
            connection.shutdown(socket.SHUT_WR)
            time.sleep(0.1)
        assert text_of(answers.next()[1]) == expected
        assert answers.ended()


def test_an_end_in_the_midst_of_a_request_ends_the_connection(server: Running) -> None:
    for part in (b"", b"POST /v1/comp", head("Content-Length: 9"), head("Content-Length: 9") + b"{"):
        with connected(server) as connection:
            connection.sendall(part)
            connection.shutdown(socket.SHUT_WR)
            began = time.monotonic()
            connection.recv(65536)
            assert time.monotonic() - began < 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half_first", [False, True])
def test_a_client_that_goes_is_told_from_one_that_is_half_closed(
    tiny_model: Path, stream: bool, half_first: bool
) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 200, "stream": stream}).encode()
    with serving(tiny_model) as running, running.gate.closed():
        with connected(running) as connection:
            connection.sendall(sized(body=body))
            until(lambda: running.gauges() == (1, 0))
            if stream:
                assert b"text/event-stream" in connection.recv(65536)
            if half_first:
                connection.shutdown(socket.SHUT_WR)
                time.sleep(0.2)
                assert not any(generation.cancelled for generation in running.engine._scheduler.running)
        # One that went long after it had ended its side is found out by one of the last probes.
        until(lambda: all(generation.cancelled for generation in running.engine._scheduler.running), 60)


def test_an_idle_connection_is_kept(tiny_model: Path) -> None:
    with serving(tiny_model, keep_alive=1.0) as running, connected(running) as connection:
        answers = Answers(connection)
        for _ in range(3):
            connection.sendall(head(line="GET /health HTTP/1.1"))
            assert answers.next()[0] == 200
            time.sleep(0.4)
        assert answers.ended()


def test_an_answer_may_take_longer_than_a_connection_may_idle(tiny_model: Path) -> None:
    with serving(tiny_model, keep_alive=0.2, header_timeout=0.2) as running, connected(running) as connection:
        with running.gate.closed():
            connection.sendall(sized())
            time.sleep(0.8)
        assert Answers(connection).next()[0] == 200


def test_connections_are_kept_for_longer_than_pools_keep_them() -> None:
    """Common clients and proxies drop an idle connection by themselves after a minute at most."""
    assert load_settings({}).keep_alive == 75
