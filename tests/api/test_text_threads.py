"""Long bodies and texts: off the event loop, a bounded number at once, and refused by their length."""

import gc
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from server.api import text_threads
from server.api.generation import answer
from server.api.routes import tokens
from server.api.routes.completions import CompletionAnswer
from server.api.schemas import bodies
from server.commands import serve as commands
from server.engine import Engine
from server.http import lifecycle
from server.models.text import codec as text
from server.runtime.threads import SWITCH_INTERVAL, share_the_interpreter
from server.settings import load_settings
from tests.api.serving import Running, error_of, serving, until

LONG = "apples " * 12_000
CHAT = "/v1/chat/completions"


class Heard:
    """Lets calls through, and remembers them and on which threads they were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
        self.threads: list[str] = []
        self.calls: list[tuple[Any, ...]] = []
        inner: Callable[..., Any] = getattr(place, name)

        def heard(*arguments: Any, **named: Any) -> Any:
            self.threads.append(threading.current_thread().name.rpartition("_")[0])
            self.calls.append(arguments)
            return inner(*arguments, **named)

        monkeypatch.setattr(place, name, heard)


class Held:
    """Holds calls with a certain text until it is told to let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        self.inside = 0
        self.let_go = threading.Event()
        inner = text.one_encoding

        def held(tokenizer: Any, asked: str, *arguments: Any, **named: Any) -> Any:
            if asked.startswith(what):
                self.inside += 1
                self.let_go.wait(60)
            return inner(tokenizer, asked, *arguments, **named)

        monkeypatch.setattr(text, "one_encoding", held)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def test_long_bodies_are_parsed_off_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    parsing = Heard(monkeypatch, bodies, "parse_body")
    for path, body in (
        ("/v1/completions", {"prompt": "a", "max_tokens": 1, "user": LONG}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "user": LONG}),
        ("/tokenize", {"prompt": LONG}),
        ("/detokenize", {"tokens": [5] * 40_000}),
    ):
        assert server.post(path, body).status_code == 200
    assert parsing.threads == ["text-long"] * 4


def test_texts_become_tokens_off_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    chats, encoded = Heard(monkeypatch, server.text, "encode_chat"), Heard(monkeypatch, server.text, "encode")
    decoded, named = Heard(monkeypatch, server.text, "decode"), Heard(monkeypatch, server.text, "token_name")
    written = Heard(monkeypatch, tokens, "json_response")
    server.post(CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
    server.post("/tokenize", {"prompt": "a", "return_token_strs": True})
    server.post("/tokenize", {"prompt": LONG})
    server.post("/detokenize", {"tokens": [5]})
    server.post("/v1/completions", {"prompt": "a", "suffix": "b", "max_tokens": 1})
    assert chats.threads == ["chat-short"] and named.threads == ["text-short"]
    assert encoded.threads == ["text-short", "text-long", "text-short", "text-short"]
    assert written.threads == ["text-short", "text-long", "text-short"]
    assert "text-short" in decoded.threads, "the others are pieces of answers"


def test_long_answers_are_put_together_off_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "LONG_ANSWER", 10)
    whole = Heard(monkeypatch, CompletionAnswer, "whole")
    server.complete(max_tokens=16, ignore_eos=True)
    server.complete(max_tokens=2)
    assert whole.threads == ["text-answers", ""]


def test_more_than_can_wait_are_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    monkeypatch.setattr(text_threads, "MAX_LONG", 3)
    monkeypatch.setattr(text_threads, "LONG_THREADS", 1)
    held = Held(monkeypatch, "apples")
    with serving(tiny_model) as running:
        asked = [pool.submit(running.post, "/tokenize", {"prompt": LONG}) for _ in range(7)]
        until(lambda: sum(each.done() for each in asked) == 4 and held.inside == 1)
        assert running.post("/tokenize", {"prompt": "short"}).status_code == 200, "it does not wait behind long ones"
        assert running.complete(max_tokens=1)["usage"]
        held.let_go.set()
        answers = [each.result() for each in asked]
        assert sorted(each.status_code for each in answers) == [200] * 3 + [429] * 4
        refused = error_of(next(each for each in answers if each.status_code == 429), 429)
        assert refused["code"] == "queue_full"
        assert running.metrics()[("dllm_rejected_total", "texts")] == 4
        assert running.post("/tokenize", {"prompt": LONG}).status_code == 200, "there is room again"


def test_chats_that_take_long_hold_up_no_texts(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    """A template is a program, which each chat may keep busy up to its limit."""
    monkeypatch.setattr(text_threads, "SHORT_THREADS", 1)
    let_go = threading.Event()
    inner = text.TextCodec.encode_chat

    def held(*arguments: Any, **named: Any) -> Any:
        let_go.wait(60)
        return inner(*arguments, **named)

    monkeypatch.setattr(text.TextCodec, "encode_chat", held)
    messages = {"messages": [{"role": "user", "content": "a"}]}
    with serving(tiny_model) as running:
        asked = [pool.submit(running.post, path, messages) for path in (CHAT, "/tokenize") for _ in range(2)]
        assert running.complete(max_tokens=1)["usage"]
        assert running.post("/tokenize", {"prompt": "short"}).status_code == 200
        assert not any(each.done() for each in asked)
        let_go.set()
        assert all(each.result() for each in asked)


def test_who_sends_many_long_texts_does_not_shut_others_out(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    monkeypatch.setattr(text_threads, "MAX_LONG", 3)
    monkeypatch.setattr(text_threads, "LONG_THREADS", 1)
    held = Held(monkeypatch, "apples")
    with serving(tiny_model, api_key=["heavy", "light"]) as running:

        def ask(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return running.post("/tokenize", {"prompt": LONG}, headers=headers).status_code

        heavy = [pool.submit(ask, "heavy") for _ in range(5)]
        until(lambda: sum(each.done() for each in heavy) == 2 and held.inside == 1)
        light = pool.submit(ask, "light")
        until(lambda: sum(each.done() for each in heavy) == 3)
        held.let_go.set()
        assert light.result() == 200
        assert sorted(each.result() for each in heavy) == [200, 200, 429, 429, 429]


def test_what_waits_does_not_hold_up_the_end(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    monkeypatch.setattr(text_threads, "LONG_THREADS", 1)
    held, entered = Held(monkeypatch, "apples"), Heard(monkeypatch, text_threads.TextThreads, "run")
    with serving(tiny_model) as running:
        asked = [pool.submit(running.post, "/tokenize", {"prompt": LONG}) for _ in range(4)]
        until(lambda: held.inside == 1 and entered.calls[0][0]._lanes[text_threads.Work.TEXT, True].line.inside == 4)
        running.engine.drain()
        assert running.get("/ready").status_code == 503
        monkeypatch.setattr(running.engine, "check_accepting", lambda: None)  # which some of the work asks as well
        held.let_go.set()
        assert sorted(each.result().status_code for each in asked) == [200, 503, 503, 503]
        assert held.inside == 1


FULL = {
    "prompt": ("/v1/completions", {"prompt": "{}"}),
    "prompt, one of two": ("/v1/completions", {"prompt": ["a", "{}"]}),
    "suffix": ("/v1/completions", {"prompt": "a", "suffix": "{}"}),
    "messages": (CHAT, {"messages": [{"role": "user", "content": "{}"}]}),
}


@pytest.mark.parametrize(("path", "body"), FULL.values(), ids=FULL)
def test_what_cannot_fit_is_refused_by_its_length(
    server: Running, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], request: Any
) -> None:
    made: list[str] = []
    inner = text.one_encoding

    def remembered(tokenizer: Any, asked: str, *arguments: Any, **named: Any) -> Any:
        made.append(asked)
        return inner(tokenizer, asked, *arguments, **named)

    monkeypatch.setattr(text, "one_encoding", remembered)
    monkeypatch.setattr(server.text._control, "_read", lambda *_: pytest.fail("it was made tokens"))
    filled = json.loads(json.dumps(body).replace("{}", LONG))
    error = error_of(server.post(path, filled | {"max_tokens": 3}), 400)
    assert error["param"] == request.node.callspec.id.partition(",")[0]
    assert error["code"] == "context_length_exceeded" and "context_length_exceeded" in error["message"]
    assert "at least" in error["message"] and "3 in the completion" in error["message"]
    assert "maximum context length is" in error["message"]
    assert LONG not in made and (made == ["a"] if "suffix" in body else made == [])


@pytest.mark.parametrize("body", [{"prompt": LONG}, {"messages": [{"role": "user", "content": LONG}]}])
def test_tokenize_counts_what_does_not_fit_up_to_a_limit(
    server: Running, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    assert server.post("/tokenize", body).json()["count"] > 12_000
    monkeypatch.setattr(tokens, "MAX_COUNTED", 70_000)
    error = error_of(server.post("/tokenize", body), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == next(iter(body))
    assert "at least" in error["message"] and "70000 bytes" in error["message"]


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """The interpreter's settings are those from before again."""
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)
    gc.unfreeze()


@pytest.mark.usefixtures("as_it_was")
def test_the_event_loop_waits_neither_long_for_a_thread_nor_for_the_garbage_collector() -> None:
    share_the_interpreter()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL)
    assert gc.get_freeze_count() > 10_000


@pytest.mark.usefixtures("as_it_was")
def test_a_served_model_shares_the_interpreter(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[float] = []

    def serve_nothing(app: Any, engine: Engine, bound: Any, settings: Any) -> bool:
        served.append(sys.getswitchinterval())
        engine.stop()
        return True

    monkeypatch.setattr(lifecycle, "serve", serve_nothing)
    with socket.socket() as bound:
        assert commands._load_and_serve(
            load_settings({"model": str(tiny_model), "threads": torch.get_num_threads()}), bound
        )
    assert served == [pytest.approx(SWITCH_INTERVAL)]
