"""/v1/chat/completions through the openai client."""

import json
import threading
from typing import Any

import pytest

from tests.api.serving import NAME, Running, error_of, serving
from tests.tiny import write_tiny_model

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "How many "}, {"type": "text", "text": "apples?"}]},
]
RENDERED = "system: Be short.\nuser: How many \napples?\nassistant:"
"""Parts of a text are lines: what vLLM and llama.cpp do too."""


@pytest.fixture(scope="module")
def whole(server: Running) -> Any:
    with server.client() as client:
        return client.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=20, logprobs=True)


def test_the_answer_is_the_completion_of_the_rendered_chat(server: Running, whole: Any) -> None:
    (choice,) = whole.choices
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    plain = server.complete(prompt=RENDERED, max_tokens=20)
    assert choice.message.content == plain["choices"][0]["text"]
    assert whole.usage.to_dict() == plain["usage"]


def test_logprobs_have_the_tokens_bytes(whole: Any) -> None:
    content = whole.choices[0].logprobs.content
    assert len(content) == 20
    for token in content:
        assert token.logprob <= 0 and token.top_logprobs == []
        data = bytes(token.bytes)
        try:
            assert token.token == data.decode()
        except UnicodeDecodeError:
            assert token.token == "".join(f"\\x{byte:02x}" for byte in data)
    together = b"".join(bytes(token.bytes) for token in content)
    assert together.decode("utf-8", "replace") == whole.choices[0].message.content


@pytest.mark.parametrize("number", [1, 2])
def test_the_stream(server: Running, whole: Any, number: int) -> None:
    with server.client() as client:
        chunks = list(
            client.chat.completions.create(
                model=NAME,
                messages=MESSAGES,
                max_tokens=20,
                n=number,
                logprobs=True,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    *parts, last = chunks
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == 20 * number
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    for index in range(number):
        mine = [chunk.choices[0] for chunk in parts if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
        assert all(choice.delta.role is None for choice in mine[1:])
        assert "".join(choice.delta.content or "" for choice in mine) == whole.choices[0].message.content
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        tokens = [token for choice in mine if choice.logprobs for token in choice.logprobs.content or []]
        expected = whole.choices[0].logprobs.content
        assert [token.token for token in tokens] == [token.token for token in expected]
        # Two rows in a forward are added up in another order than one.
        logs = [token.logprob for token in expected]
        assert [token.logprob for token in tokens] == pytest.approx(logs, abs=1e-4)


def test_a_stream_says_nothing_before_there_is_text(server: Running, whole: Any) -> None:
    body = {"messages": MESSAGES, "max_tokens": 20, "n": 2, "block_length": 1, "stream": True}
    received: list[str] = []
    with server.gate.closed():
        stream = server.http.stream("POST", "/v1/chat/completions", json=body)
        with stream as answer:
            assert answer.status_code == 200, "the head comes at once"
            reader = threading.Thread(target=lambda: received.extend(answer.iter_lines()))
            reader.start()
            reader.join(0.5)
            assert received == []
            server.gate.let_through()
            reader.join(30)
    events = [json.loads(line[6:])["choices"][0] for line in received if line.startswith("data: {")]
    for index in (0, 1):
        first, second, *_ = [choice for choice in events if choice["index"] == index]
        assert first["delta"] == {"role": "assistant", "content": ""} and first["finish_reason"] is None
        assert second["delta"]["content"]


@pytest.mark.parametrize("fields", [{}, {"return_trajectory": True}])
def test_a_stream_without_text_still_has_a_role(server: Running, whole: Any, fields: dict[str, Any]) -> None:
    stop = whole.choices[0].message.content[:1]
    body = {"messages": MESSAGES, "max_tokens": 20, "stop": [stop], "stream": True, **fields}
    lines = server.post("/v1/chat/completions", body).text.split("\n\n")
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["delta"].get("role") for choice in choices[1:]] == [None] * (len(choices) - 1)
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == ""
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.asyncio
async def test_the_async_client_streams(server: Running, whole: Any) -> None:
    async with server.async_client() as client:
        stream = await client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=20, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(texts) == whole.choices[0].message.content


def test_developers_are_what_system_used_to_be(server: Running, whole: Any) -> None:
    messages = [{"role": "developer", "content": "Be short."}, MESSAGES[1]]
    answer = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 20}).json()
    assert answer["choices"][0]["message"]["content"] == whole.choices[0].message.content


def test_two_names_for_the_length_must_agree(server: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 4}
    assert error_of(server.post("/v1/chat/completions", body), 400)["param"] == "max_tokens"
    agreed = server.post("/v1/chat/completions", body | {"max_tokens": 4})
    assert agreed.json()["usage"]["completion_tokens"] == 4


def test_an_error_names_the_fields_of_a_chat(server: Running) -> None:
    long = [{"role": "user", "content": "apples " * 300}]
    error = error_of(server.post("/v1/chat/completions", {"messages": long}), 400)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    body = {"messages": MESSAGES, "max_completion_tokens": 250}
    error = error_of(server.post("/v1/chat/completions", body), 400)
    assert (error["param"], error["code"]) == ("max_completion_tokens", "context_length_exceeded")


def test_a_model_without_chat_template_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = write_tiny_model(tmp_path_factory.mktemp("models") / "plain", chat_template=None)
    with serving(model) as plain:
        error = error_of(plain.post("/v1/chat/completions", {"messages": MESSAGES}), 400)
    assert error["param"] == "messages"
    assert "no chat template" in error["message"]
