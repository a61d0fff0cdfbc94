"""Requests over HTTP, whole or streamed, and their answers in one form."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

PATIENCE = 120.0
"""Seconds after which an answer counts as never given."""


@dataclass
class Choice:
    """One choice of an answer; `passes` is its trajectory."""

    text: str = ""
    finish: str | None = None
    passes: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Answer:
    """What came back. `error` is the body's of a refusal; status 0: nothing came in time, or the connection broke."""

    status: int
    choices: list[Choice] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)


async def ask(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Answer:
    """Send a request and read the answer to its end."""
    try:
        if body.get("stream"):
            return await _streamed(http, path, body)
        answer = await http.post(path, json=body)
        return _whole(answer.status_code, answer.json())
    except httpx.TimeoutException:
        return Answer(0, error={"message": f"no answer in {PATIENCE:.0f} s"})
    except (httpx.HTTPError, ValueError) as error:
        return Answer(0, error={"message": f"no answer: {error!r}"})


async def leave(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    """Ask for a stream and go away after its first bytes."""
    try:
        async with http.stream("POST", path, json=body | {"stream": True}) as answer:
            async for _ in answer.aiter_bytes():
                break
    except httpx.HTTPError:
        pass


def _whole(status: int, content: dict[str, Any]) -> Answer:
    if status != 200:
        return Answer(status, error=content.get("error") or {"message": str(content)})
    choices = []
    for told in sorted(content["choices"], key=lambda choice: int(choice["index"])):
        choice = Choice()
        _add(choice, told)
        choices.append(choice)
    return Answer(200, choices, content["usage"], used=content.get("unmask", {}))


async def _streamed(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Answer:
    async with http.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            return _whole(response.status_code, response.json())
        answer, choices, ended = Answer(200), dict[int, Choice](), False
        async for line in response.aiter_lines():
            if ended and line:
                raise ValueError("there is something after [DONE]")
            if not line.startswith("data: "):
                continue
            ended = line == "data: [DONE]"
            if ended:
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return Answer(500, error=event["error"])
            if event.get("usage") is not None:
                answer.usage = event["usage"]
            for told in event["choices"]:
                choice = choices.setdefault(told["index"], Choice())
                if choice.finish is not None:
                    raise ValueError("a choice goes on after its finish_reason")
                _add(choice, told)
    if not ended:
        raise ValueError("the stream ends without [DONE]")
    answer.choices = [choices[index] for index in sorted(choices)]
    return answer


def _add(choice: Choice, told: dict[str, Any]) -> None:
    """Add what an answer or a chunk says of a choice."""
    message = told.get("delta") or told.get("message") or told
    choice.text += message.get("content", message.get("text")) or ""
    choice.finish = told.get("finish_reason") or choice.finish
    choice.passes += told.get("trajectory") or []
    logprobs = told.get("logprobs") or {}
    if logprobs.get("content") is not None:
        choice.tokens += [token["token"] for token in logprobs["content"]]
        choice.logprobs += [token["logprob"] for token in logprobs["content"]]
    choice.tokens += logprobs.get("tokens") or []
    choice.logprobs += logprobs.get("token_logprobs") or []
