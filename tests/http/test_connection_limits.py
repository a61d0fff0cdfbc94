"""What connections can cost: long heads, pipelines, silence, slow sending and slow reading, and their number."""

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from server.api.text_threads import SHORT_THREADS
from server.http.connections import (
    RESERVED_DESCRIPTORS,
    SMALL_RESPONSE,
    ConnectionLimits,
    ConnectionWatch,
    TooFewDescriptorsError,
    check_connections,
    connection_limit,
)
from server.http.lifecycle import SEND_BUFFER, listen
from server.http.progress import MAX_HEAD
from server.http.protocol import MAX_HEADERS, MAX_PIPELINED, PARSE_SLICE, Protocol
from tests.api.serving import PROMPT, Running, serving, until
from tests.http.test_connections import BODY, Answers, connected, head, sized

GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
UPGRADE = b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
ENDLESS = {
    "headers": (GET[:-2], b"x-some: %s\r\n" % (b"v" * 990), 431),
    "short headers": (GET[:-2], b"a:\r\n" * 250, 431),
    "a header's value": (GET[:-2] + b"x: ", b"v" * 1000, 431),
    "a header's name": (GET[:-2], b"v" * 1000, 431),
    "the URL": (b"GET /", b"v" * 1000, 414),
    "the query": (b"GET /health?", b"v" * 1000, 414),
    "lines before the request": (b"", b"\r\n" * 500, 431),
    "an upgrade's headers": (UPGRADE, b"x-some: %s\r\n" % (b"v" * 990), 431),
    "trailers": (CHUNKED + b"0\r\n", b"x-some: %s\r\n" % (b"v" * 990), 431),
    "short trailers": (CHUNKED + b"0\r\n", b"a:\r\n" * 250, 431),
    "trailers of a body": (CHUNKED + b"4000\r\n" + b" " * 0x4000 + b"\r\n0\r\n", b"x-some: %s\r\n" % (b"v" * 990), 431),
    "a chunk's extension": (CHUNKED + b"1;", b"v" * 1000, 431),
}


@pytest.fixture(scope="module")
def hasty(tiny_model: Path) -> Iterator[Running]:
    """A server with little patience."""
    with serving(tiny_model, header_timeout=0.5, body_timeout=0.5, write_timeout=0.5) as running:
        yield running


def rejected(running: Running, reason: str) -> float:
    return running.metrics().get(("dllm_rejected_total", reason), 0)


@contextmanager
def reading_little(running: Running) -> Iterator[socket.socket]:
    """A connection of whose answers the client's system keeps little."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionError:
        pass
    return found


@pytest.mark.parametrize(("start", "more", "status"), ENDLESS.values(), ids=ENDLESS)
def test_what_never_ends_is_refused_after_64_kilobytes(server: Running, start: bytes, more: bytes, status: int) -> None:
    before = rejected(server, "headers")
    with connected(server) as connection:
        connection.sendall(start)
        sent = 0
        try:
            while sent < 3 * MAX_HEAD:
                connection.sendall(more)
                sent += len(more)
        except ConnectionError:
            pass
        answer = read_all(connection)
    top, _, body = answer.partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 %d " % status) and b"connection: close" in top
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert rejected(server, "headers") == before + 1


def test_a_head_below_the_limits_is_read(server: Running) -> None:
    with connected(server) as connection:
        answers = Answers(connection)
        connection.sendall(GET[:-2] + b"x: %s\r\n\r\n" % (b"v" * (MAX_HEAD - 200)))
        assert answers.next()[0] == 200
        connection.sendall(GET[:-2] + b"a: b\r\n" * (MAX_HEADERS - 1) + b"\r\n")
        assert answers.next()[0] == 200
        connection.sendall(GET[:-2] + b"a: b\r\n" * MAX_HEADERS + b"\r\n")
        assert answers.next()[0] == 431
        assert answers.ended()


def test_many_small_chunks_are_no_long_frame(server: Running) -> None:
    body = BODY + b" " * 3 * MAX_HEAD  # a byte each, so that their sizes take more than the limit of what frames them
    with connected(server) as connection:
        connection.sendall(head("Transfer-Encoding: chunked") + b"".join(b"1\r\n%c\r\n" % byte for byte in body))
        connection.sendall(b"0\r\n\r\n")
        assert Answers(connection).next()[0] == 200


@pytest.mark.asyncio
async def test_what_frames_a_body_is_in_proportion_to_it() -> None:
    fake = Connection()
    chunk = b"1;" + b"v" * 1000 + b"\r\n \r\n"
    sent = 0
    fake.protocol.data_received(head("Transfer-Encoding: chunked"))
    while not fake.transport.closed and b"HTTP/1.1 431 " not in fake.transport.sent and sent < 4 * MAX_HEAD:
        fake.protocol.data_received(chunk)
        sent += len(chunk)
    assert MAX_HEAD < sent < 1.1 * MAX_HEAD
    assert fake.counted == ["headers"]


def test_thousands_of_requests_at_once_are_answered_in_order(server: Running) -> None:
    paths = ["/health", "/version", "/v1/models/tiny"]
    count = 600
    with connected(server) as connection:
        requests = b"".join(head(line=f"GET {paths[i % 3]} HTTP/1.1") for i in range(count))
        sending = threading.Thread(target=connection.sendall, args=(requests + sized(),))
        sending.start()
        answers = Answers(connection)
        for i in range(count):
            status, body = answers.next()
            assert status == 200 and [*body] == [["status"], ["version"], [*body]][i % 3]
            assert ("max_model_len" in body) == (i % 3 == 2)
        assert answers.next()[0] == 200
        sending.join()


class FakeTransport(asyncio.Transport):
    """A transport that only notes what is done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = self.aborted = self.closed = False
        self.waiting = 0
        self.sent = b""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def write(self, data: Any) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True


class Connection:
    """A connection without a network, whose app notes the requests and answers when it is told to.

    Attributes:
        counted: reasons of refusals.
        asked: paths, in order.
    """

    def __init__(self, limits: ConnectionLimits | None = None) -> None:
        self.counted: list[str] = []
        self.asked: list[str] = []
        self.answer = asyncio.Event()
        self.watch = ConnectionWatch(limits or ConnectionLimits(), self.counted.append)
        config = uvicorn.Config(self._app, lifespan="off", log_config=None)
        config.load()
        config.loaded_app = self._app
        self.protocol = Protocol(config, ServerState(), {}, asyncio.get_running_loop(), watch=self.watch)
        self.transport = FakeTransport()
        self.protocol.connection_made(self.transport)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        await receive()
        await self.answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


async def soon() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.asyncio
@pytest.mark.parametrize("request_", [GET, b"GET / HTTP/1.1\r\n\r\n", sized(body=b"{}")], ids=["get", "short", "body"])
async def test_a_pipeline_is_read_ahead_of_by_a_few_requests_only(request_: bytes) -> None:
    fake = Connection()
    fake.protocol.data_received(request_ * 5000)
    await soon()
    most = MAX_PIPELINED + PARSE_SLICE // len(request_) + 1
    assert len(fake.asked) == 1 and len(fake.protocol.pipeline) <= most
    assert fake.transport.paused, "nothing more is read, although the app asked for the rest of its body"
    fake.answer.set()
    for _ in range(5000):
        if len(fake.asked) == 5000:
            break
        await soon()
        assert len(fake.protocol.pipeline) <= most
    await soon()
    assert fake.transport.sent.count(b"HTTP/1.1 200") == 5000
    assert not fake.transport.paused


@pytest.mark.asyncio
async def test_bodies_that_wait_are_bounded() -> None:
    fake = Connection()
    fake.protocol.data_received(GET + head("Content-Length: 3000000", line="POST /big HTTP/1.1"))
    for _ in range(30):
        if not fake.transport.paused:
            fake.protocol.data_received(b" " * 100_000)
        await soon()
    assert len(fake.protocol.pipeline[0][0].body) < 300_000
    assert len(fake.protocol._buffer) < 300_000


@pytest.mark.asyncio
async def test_a_client_that_takes_nothing_is_cut_off_and_one_that_takes_little_is_not() -> None:
    fake = Connection(ConnectionLimits(write_timeout=30))
    fake.protocol.data_received(GET)
    fake.answer.set()
    await soon()
    written = len(fake.transport.sent)
    now = asyncio.get_running_loop().time()
    for left in (written, written - 1, written - 2):
        fake.transport.waiting = left
        now += 29
        fake.protocol.check(now)
    assert not fake.transport.aborted and fake.counted == []
    fake.protocol.check(now + 29)
    assert not fake.transport.aborted
    fake.protocol.check(now + 31)
    assert fake.transport.aborted and fake.counted == ["slow_reader"]
    assert fake.watch.truncated == 1


def test_answers_that_nobody_reads_end_the_connection(hasty: Running) -> None:
    with reading_little(hasty) as connection:
        before = rejected(hasty, "slow_reader")
        threading.Thread(target=_send, args=(connection, head(line="GET /openapi.json HTTP/1.1") * 500)).start()
        until(lambda: rejected(hasty, "slow_reader") == before + 1)
        assert hasty.get("/health").status_code == 200


def test_a_stream_that_nobody_reads_ends_its_generations(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.lifecycle.SEND_BUFFER", 4096)
    body = {"prompt": PROMPT, "max_tokens": 200, "n": 16, "stream": True, "return_trajectory": True, "logprobs": 0}
    body |= {"sampler_params": {"k": 1}, "ignore_eos": True}
    with serving(tiny_model, write_timeout=0.3) as running, reading_little(running) as connection:
        connection.sendall(sized(body=json.dumps(body).encode()))
        until(lambda: rejected(running, "slow_reader") == 1)
        until(lambda: running.gauges() == (0, 0))
        assert running.metrics()[("dllm_requests_total", "abort", "topk")] > 0


def _send(connection: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        connection.sendall(data)


@pytest.mark.parametrize(
    ("start", "more", "status"),
    [
        (b"", b"", None),
        (b"GET /hea", b"", 408),
        (b"GET /hea", b"l", 408),
        (GET[:-2] + b"x: ", b"v", 408),
        (GET[:-2], b"", 408),
        (POST + b"content-length: 900\r\n\r\n", b"", 408),
        (POST + b"content-length: 900\r\n\r\n{", b" ", 408),
        (CHUNKED + b"1\r\n{\r\n", b"", 408),
        (CHUNKED + b"1\r\n{\r\n1;", b"v", 408),
        (CHUNKED, b"1\r\n \r\n", 408),
        (CHUNKED + b"1\r\n{\r\n0\r\nx: ", b"v", 408),
        (GET * 2 + b"GET /", b"", 408),
    ],
)
def test_who_takes_too_long_is_not_waited_for(hasty: Running, start: bytes, more: bytes, status: int | None) -> None:
    before = rejected(hasty, "slow_request")
    with connected(hasty) as connection:
        connection.sendall(start)
        stop = threading.Event()

        def trickle() -> None:
            while not stop.wait(0.1):
                _send(connection, more)

        connection.settimeout(10)
        trickling = threading.Thread(target=trickle)
        trickling.start()
        try:
            answer = read_all(connection)
        finally:
            stop.set()
            trickling.join()
    answers = answer.count(b"HTTP/1.1 ")
    assert answers == start.count(GET) + (status is not None)
    if status is not None:
        assert b"HTTP/1.1 408 " in answer and b'"code":"request_timeout"' in answer
    assert rejected(hasty, "slow_request") == before + 1


def test_who_waits_for_an_answer_is_not_slow(hasty: Running) -> None:
    with connected(hasty) as connection:
        with hasty.gate.closed():
            connection.sendall(sized())
            until(lambda: hasty.gauges() == (1, 0))
            time.sleep(1.2)
        assert Answers(connection).next()[0] == 200


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("size", "until_then", "then", "is_cut"),
    [
        (5000, 200, 5000, False),  # slow, but steady
        (100_000, 10, 1, True),  # fast at first
        (1_000, 200, 1000, True),
        (1, 28, 1, False),  # its time is not up
    ],
)
async def test_a_body_may_take_long_if_it_comes_steadily(
    monkeypatch: pytest.MonkeyPatch, size: int, until_then: int, then: int, is_cut: bool
) -> None:
    fake = Connection(ConnectionLimits(body_timeout=30))
    fake.protocol.data_received(head("Content-Length: 3000000"))
    now = asyncio.get_running_loop().time()
    monkeypatch.setattr(fake.protocol, "loop", Clock())
    later = until_then + (32 if is_cut else 1)
    for second in range(1, later):
        fake.protocol.loop.now = now + second  # type: ignore[attr-defined]
        fake.protocol.data_received(b" " * (size if second < until_then else then))
        fake.protocol.flow.resume_reading()
        fake.protocol.check(now + second)
    assert fake.counted == ["slow_request"] * is_cut
    assert (b"HTTP/1.1 408 " in fake.transport.sent) == is_cut


class Clock:
    """An event loop of which only the time is asked for."""

    now = 0.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def narrow(tiny_model: Path) -> Iterator[Running]:
    """A server with room for four connections, one of which is that of its `http`."""
    with serving(tiny_model, max_connections=4) as running:
        yield running


@pytest.mark.parametrize("sent", [b"", b"GET /hea", GET, POST + b"content-length: 9\r\n\r\n{"])
def test_a_newcomer_takes_the_place_of_who_has_owed_a_request_longest(narrow: Running, sent: bytes) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(connected(narrow)) for _ in range(8)]
        for connection in idle:
            _send(connection, sent)
        assert narrow.get("/health").status_code == 200
        newest = stack.enter_context(connected(narrow))
        newest.sendall(GET)
        assert Answers(newest).next()[0] == 200
        read_all(idle[0])
        assert rejected(narrow, "connections") >= 5


def test_one_too_many_is_told_so_where_all_others_are_busy(narrow: Running) -> None:
    narrow.http.close()
    until(lambda: not narrow.server._watch.open)
    with ExitStack() as stack:
        with narrow.gate.closed():
            busy = [stack.enter_context(connected(narrow)) for _ in range(4)]
            for connection in busy:
                connection.sendall(sized())
            scheduler = narrow.engine._scheduler
            until(lambda: len(scheduler.running) + len(scheduler.waiting) == 4)
            refused = stack.enter_context(connected(narrow))
            answer = read_all(refused)
        assert [Answers(connection).next()[0] for connection in busy] == [200] * 4
    top, _, body = answer.partition(b"\r\n\r\n")
    assert top.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in top and b"connection: close" in top
    assert json.loads(body)["error"]["code"] == "too_many_connections"


def test_connections_leave_descriptors_for_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(files: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))

    monkeypatch.setattr("server.http.connections._open_files", lambda: 10)
    limit(256)
    assert connection_limit(None) == 256 - 10 - RESERVED_DESCRIPTORS
    assert connection_limit(100) == 100
    check_connections(None)
    check_connections(100)
    with pytest.raises(TooFewDescriptorsError, match="256 open files"):
        check_connections(1000)
    limit(40)
    with pytest.raises(TooFewDescriptorsError):
        check_connections(None)
    for plenty in (100_000, resource.RLIM_INFINITY):
        limit(plenty)
        assert connection_limit(None) == 1024
        check_connections(5000)
        assert connection_limit(5000) == 5000


def drain(running: Running) -> None:
    """What a signal does."""
    loop = running.server._watching.get_loop()
    loop.call_soon_threadsafe(partial(running.server.handle_exit, 15, None))


def test_draining_does_not_wait_for_the_threads_that_make_texts_tokens(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, free = threading.Semaphore(0), threading.Event()

    def slow(*_: Any) -> list[int]:
        begun.release()
        assert free.wait(30)
        return [1]

    monkeypatch.setattr("server.api.routes.tokens.encode_chat", slow)
    body = json.dumps({"messages": [{"role": "user", "content": "a"}]}).encode()
    with serving(tiny_model) as running, ExitStack() as stack:
        clients = [stack.enter_context(connected(running)) for _ in range(60)]
        for client in clients:
            client.sendall(sized(body=body, line="POST /tokenize HTTP/1.1"))
        for _ in range(SHORT_THREADS):
            assert begun.acquire(timeout=30)
        drain(running)
        until(lambda: running.get("/ready").status_code == 503)
        assert running.get("/health").status_code == 200
        time.sleep(0.4)  # some looks at what is left
        assert not running.server.should_exit, "what is being made tokens may finish"
        free.set()
        statuses = [Answers(client).next()[0] for client in clients]
        assert {200, 503} >= set(statuses) and statuses.count(200) >= SHORT_THREADS
        until(lambda: not running.server._watch.open)
        until(lambda: running.server.should_exit)
        assert running.server.drained
    assert not any(record.exc_info for record in caplog.records)


def test_a_drain_in_which_an_answer_is_cut_says_so(tiny_model: Path) -> None:
    with serving(tiny_model, write_timeout=0.3) as running, reading_little(running) as connection:
        threading.Thread(target=_send, args=(connection, head(line="GET /openapi.json HTTP/1.1") * 500)).start()
        until(lambda: any(each.flow.write_paused for each in running.server.server_state.connections))
        drain(running)
        until(lambda: not running.server._watch.open)
        until(lambda: not running.server.drained)


def test_prompts_that_wait_for_a_thread_are_not_made_tokens_once_the_server_stops(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr("server.api.routes.completions.encode_prompts", lambda *given: made.append(given))
    with serving(tiny_model) as running:
        # Found out by the thread: what was asked before the server stopped may have waited for one.
        monkeypatch.setattr(running.engine, "check_room", lambda *_: None)
        monkeypatch.setattr("server.api.generation.run._requests", lambda *_: pytest.fail("the prompt was read"))
        running.engine.drain()
        assert running.post("/v1/completions", {"prompt": PROMPT}).status_code == 503
    assert not made


def test_texts_are_not_made_tokens_once_the_server_stops(tiny_model: Path) -> None:
    with serving(tiny_model) as running:
        running.engine.drain()
        assert running.post("/tokenize", {"prompt": PROMPT}).status_code == 503
        assert running.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]}).status_code == 503


def test_a_body_that_is_not_complete_does_not_hold_up_the_end(tiny_model: Path) -> None:
    with serving(tiny_model) as running, connected(running) as connection:
        connection.sendall(POST + b"content-length: 900\r\n\r\n{")
        until(lambda: running.server.server_state.tasks)
        loop = running.server._watching.get_loop()
        loop.call_soon_threadsafe(setattr, running.server, "should_exit", True)
        status, body = Answers(connection).next()
        assert status == 503 and body["error"]["code"] == "not_serving"


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "host.invalid", "999.1.1.1"])
def test_what_is_no_address_cannot_be_listened_on(host: str) -> None:
    with pytest.raises(OSError) as caught:
        listen(host, 0)
    assert caught.value.strerror


def test_the_system_keeps_little_of_an_answer() -> None:
    with listen("127.0.0.1", 0) as bound:
        assert bound.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) in (SEND_BUFFER, 2 * SEND_BUFFER)


@pytest.mark.asyncio
async def test_a_connection_that_cannot_be_looked_at_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.connections.CHECK_PERIOD", 0)
    fake = Connection(ConnectionLimits(header_timeout=0.01))

    class Broken(FakeTransport):
        def get_write_buffer_size(self) -> int:
            raise RuntimeError("broken")

    good, fake.transport = fake.transport, Broken()
    other = Protocol(fake.protocol.config, ServerState(), {}, asyncio.get_running_loop(), watch=fake.watch)
    other.connection_made(fake.transport)
    watching = asyncio.create_task(fake.watch.run())
    while not (good.closed or watching.done()):
        await asyncio.sleep(0.01)
    assert not watching.done()
    watching.cancel()


@pytest.mark.asyncio
@pytest.mark.parametrize("rest", [b"GET /", POST + b"content-length: 9\r\n\r\n"])
async def test_a_client_that_is_not_read_is_not_slow(rest: bytes) -> None:
    fake = Connection()
    fake.protocol.data_received(GET * MAX_PIPELINED + rest)
    fake.protocol.check(asyncio.get_running_loop().time() + 1000)
    assert fake.transport.paused and fake.counted == []


@pytest.mark.asyncio
async def test_a_closing_connection_is_not_refused_again() -> None:
    fake = Connection()
    fake.protocol.data_received(b"GET /")
    fake.transport.close()
    fake.protocol.make_room()
    assert fake.transport.sent == b""


@pytest.mark.asyncio
async def test_short_headers_are_counted_while_they_come() -> None:
    fake = Connection()
    fake.protocol.data_received(GET[:-2] + b"a:\r\n" * 2 * MAX_HEADERS)
    assert b"HTTP/1.1 431 " in fake.transport.sent


@pytest.mark.asyncio
async def test_a_long_answer_must_be_taken_at_some_rate_and_the_end_of_it_as_slowly_as_one_likes() -> None:
    fake = Connection(ConnectionLimits(write_timeout=30))
    fake.protocol.data_received(GET)
    fake.answer.set()
    await soon()
    now = asyncio.get_running_loop().time()
    fake.protocol._output.written = 10 * SMALL_RESPONSE
    for left, step in (
        (10 * SMALL_RESPONSE, 0),
        (5 * SMALL_RESPONSE, 25),
        (SMALL_RESPONSE + 1, 25),
        (SMALL_RESPONSE, 29),
        (SMALL_RESPONSE - 1, 29),
    ):
        now += step
        fake.transport.waiting = left
        fake.protocol.check(now)
    assert not fake.transport.aborted
    fake.protocol._output.written += 10 * SMALL_RESPONSE
    fake.transport.waiting = 10 * SMALL_RESPONSE
    for second in range(32):
        assert not fake.transport.aborted
        fake.transport.waiting -= 10
        fake.protocol.check(now + second)
    assert fake.transport.aborted and fake.counted == ["slow_reader"]


def test_answers_that_nobody_takes_have_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:
        ended = False

        def __init__(self, unread: int, taken_at: float) -> None:
            self.unread, self.taken_at = unread, taken_at

        def end(self) -> None:
            self.ended = True

    monkeypatch.setattr("server.http.connections.MAX_UNREAD", 4 * SMALL_RESPONSE)
    watch = ConnectionWatch(ConnectionLimits(), (counted := []).append)  # type: ignore[var-annotated]
    given = (
        (2 * SMALL_RESPONSE, 3),
        (2 * SMALL_RESPONSE, 1),
        (SMALL_RESPONSE, 0),
        (2 * SMALL_RESPONSE, 9.5),
        (2 * SMALL_RESPONSE, 2),
    )
    readers = [Reader(*each) for each in given]
    watch.open = set(readers)  # type: ignore[arg-type]
    watch._end_unread(10)
    assert [reader.ended for reader in readers] == [True, True, False, False, True]
    assert counted == ["slow_reader"] * 3
    readers = [Reader(9 * SMALL_RESPONSE, 9), Reader(SMALL_RESPONSE, 0)]
    watch.open = set(readers)  # type: ignore[arg-type]
    watch._end_unread(10)
    assert not any(reader.ended for reader in readers), "who takes it fast is not cut off"


def test_silent_connections_do_not_cost_another_its_body(narrow: Running) -> None:
    with ExitStack() as stack:
        sender = stack.enter_context(connected(narrow))
        sender.sendall(head(f"Content-Length: {len(BODY)}") + BODY[:-1])
        until(lambda: any(each.body_rate for each in narrow.server._watch.open))
        for _ in range(12):
            stack.enter_context(connected(narrow))
        assert narrow.get("/health").status_code == 200
        sender.sendall(BODY[-1:])
        assert Answers(sender).next()[0] == 200


@pytest.mark.asyncio
async def test_what_is_known_to_be_body_is_parsed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    feed = Protocol._feed
    monkeypatch.setattr(Protocol, "_feed", lambda self, data: (parsed.append(len(data)), feed(self, data)))
    fake = Connection()
    fake.protocol.data_received(head("Content-Length: 200000"))
    del parsed[:]
    fake.protocol.data_received(b" " * 150_000)
    fake.protocol.data_received(b" " * 50_000 + GET * 200)
    assert parsed[:3] == [150_000, 50_000, len(GET)]
    assert len(fake.protocol.pipeline) < 2 * PARSE_SLICE / len(GET)
