"""What must hold of an answer: its text, its reason to end and its usage all follow from the tokens it committed."""

import math
from collections.abc import Generator, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from tests.fuzz.asking import Answer, Choice
from tests.fuzz.families import Subject

FILLED = -1
"""Stands on a canvas where padding was settled after an end-of-text."""
REVISING = {"edit", "hierarchy_remask", "saber"}
"""Samplers that may change committed tokens of an open block, so that what is told is not what is committed."""


@dataclass(frozen=True)
class Problem:
    """Something that does not hold. Problems of one kind are told once a family and sampler."""

    kind: str
    detail: str


@dataclass(frozen=True)
class Ending:
    """What a canvas comes to: tokens up to and with the last that counts, their text, and why it ends there."""

    tokens: list[int]
    text: str
    reason: str


def judge(subject: Subject, body: dict[str, Any], answer: Answer) -> Iterator[Problem]:
    """Problems of one answer with a trajectory."""
    count = tokens = 0
    for choice in answer.choices:
        ending = yield from _judge_choice(subject, body, choice)
        if ending is None:
            return
        count += choice.passes[-1]["forward"] if choice.passes else 0
        tokens += len(ending.tokens)
    yield from _judge_usage(body, answer, tokens, count)


def _judge_choice(subject: Subject, body: dict[str, Any], choice: Choice) -> Generator[Problem, None, Ending | None]:
    ends: Set[int] = set(body.get("stop_token_ids") or []) | (set() if body.get("ignore_eos") else set(subject.ends))
    stops = _stops(body)
    canvas: dict[int, int] = {}
    before_last, several = 0, body.get("sampler") == "smc"
    for number, each in enumerate(choice.passes, start=1):
        if number == len(choice.passes) and stops and not several and body.get("sampler") not in REVISING:
            before = subject.decode(prefix(canvas, body["max_tokens"], ends))
            if any(stop in before for stop in stops):
                yield Problem("a forward after the stop", f"pass {number}: {before!r} has a stop already")
        try:
            if each["forward"] <= before_last if several else each["forward"] != number * views_of(body):
                raise ValueError(f"it says it is pass {each['forward']}")
            before_last = each["forward"]
            apply(canvas, each)
        except ValueError as error:
            yield Problem("a trajectory that cannot be", f"pass {number}: {error}")
            return None
    try:
        ending = end_of(subject, canvas, body["max_tokens"], ends, stops)
    except ValueError as error:
        yield Problem("the canvas is not finished", f"{error}; finish_reason {choice.finish}")
        return None
    if choice.text != ending.text:
        yield Problem("text is not that of the tokens", f"{choice.text!r}, the tokens say {ending.text!r}")
    if choice.finish != ending.reason:
        yield Problem("finish_reason", f"{choice.finish}, the tokens say {ending.reason}")
    return ending


def _judge_usage(body: dict[str, Any], answer: Answer, tokens: int, forwards: int) -> Iterator[Problem]:
    usage, details = answer.usage or {}, (answer.usage or {}).get("completion_tokens_details", {})
    found = {
        "completion_tokens": (usage.get("completion_tokens"), tokens),
        "total_tokens": (usage.get("total_tokens"), usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)),
        "forward_passes": (details.get("forward_passes"), forwards),
    }
    for name, (got, want) in found.items():
        if got != want:
            yield Problem(f"usage: {name}", f"{got}, not {want}")
    told = details.get("tokens_per_forward", math.nan)
    ratio = usage.get("completion_tokens", 0) / max(1, details.get("forward_passes", 1))
    if not math.isclose(told, ratio, rel_tol=1e-6, abs_tol=1e-9):
        yield Problem("usage: tokens_per_forward", f"{told}, not {ratio}")
    if (prompts := _prompts(body)) and not body.get("suffix") and usage.get("prompt_tokens") != prompts:
        yield Problem("usage: prompt_tokens", f"{usage.get('prompt_tokens')}, not {prompts}")
    if tokens > body["max_tokens"] * len(answer.choices):
        yield Problem("usage: more than max_tokens", f"{tokens}")


def _prompts(body: dict[str, Any]) -> int:
    """Tokens of the prompts, where they were given as such."""
    prompt = body.get("prompt")
    if not isinstance(prompt, list):
        return 0
    if isinstance(prompt[0], int):
        return len(prompt)
    return sum(len(each) for each in prompt) if all(isinstance(each, list) for each in prompt) else 0


def views_of(body: dict[str, Any]) -> int:
    """Forward passes of a step: guidance takes one more."""
    around = body.get("modifiers") or []
    return 1 + sum(each["name"] == "guidance" and each["params"]["scale"] > 0 for each in around)


def _stops(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop") or []
    return [stop] if isinstance(stop, str) else stop


def apply(canvas: dict[int, int], each: dict[str, Any]) -> None:
    """One forward pass of a trajectory. Raises ValueError where it commits or masks what it cannot."""
    replaced, remasked, filled = set(each.get("replaced", [])), set(each.get("remasked", [])), each["filled"]
    if len(each["positions"]) != len(each["tokens"]) or len(set(each["positions"])) != len(each["positions"]):
        raise ValueError(f"positions {each['positions']} and tokens {each['tokens']}")
    if not replaced <= set(each["positions"]):
        raise ValueError(f"replaced {sorted(replaced)} are not among the positions")
    for position in remasked:
        if position not in canvas or position in each["positions"]:
            raise ValueError(f"position {position} is masked again, where nothing stood or something is put")
    for position, token in zip(each["positions"], each["tokens"], strict=True):
        if (position in canvas) is not (position in replaced):
            raise ValueError(f"position {position} has {canvas.get(position, 'no token')}, and is committed again")
        canvas[position] = token
    for position in filled:
        if position in canvas:
            raise ValueError(f"position {position} is filled, but has {canvas[position]}")
        canvas[position] = FILLED
    for position in remasked:
        del canvas[position]


def prefix(canvas: dict[int, int], most: int, ends: Set[int]) -> list[int]:
    """Tokens before the first mask, and before the first that ends the text."""
    tokens: list[int] = []
    while len(tokens) < most and (token := canvas.get(len(tokens))) is not None and token not in ends:
        tokens.append(token)
    return tokens


def end_of(subject: Subject, canvas: dict[int, int], most: int, ends: Set[int], stops: Sequence[str]) -> Ending:
    """Where a text ends. Raises ValueError if there is a mask before that."""
    tokens = prefix(canvas, most, ends)
    if FILLED in tokens:
        raise ValueError(f"position {tokens.index(FILLED)} is padding, with no end-of-text before it")
    text = subject.decode(tokens)
    if any(stop in text for stop in stops):
        count = next(n for n in range(len(tokens) + 1) if any(s in subject.decode(tokens[:n]) for s in stops))
        cut = min(at for stop in stops if (at := subject.decode(tokens[:count]).find(stop)) >= 0)
        return Ending(tokens[:count], text[:cut], "stop")
    if len(tokens) == most:
        return Ending(tokens, text, "length")
    if len(tokens) not in canvas:
        raise ValueError(f"position {len(tokens)} is still masked")
    return Ending([*tokens, canvas[len(tokens)]], text, "stop")


def differences(one: Answer, other: Answer, usage: bool = True) -> Iterator[str]:
    """Where two answers differ that must not."""
    if one.status != other.status:
        yield f"status {other.status}, not {one.status}: {other.error.get('message')}"
        return
    if one.status != 200:
        return
    if len(one.choices) != len(other.choices):
        yield f"{len(other.choices)} choices, not {len(one.choices)}"
        return
    for first, second in zip(one.choices, other.choices, strict=True):
        if first.text != second.text:
            yield f"text {second.text!r}, not {first.text!r}"
        if first.finish != second.finish:
            yield f"finish_reason {second.finish}, not {first.finish}"
        if first.passes and second.passes and _commits(first) != _commits(second):
            yield "another trajectory"
    if usage and one.usage != other.usage:
        yield f"usage {other.usage}, not {one.usage}"


def _commits(choice: Choice) -> list[Any]:
    return [(each["positions"], each["tokens"], each["filled"]) for each in choice.passes]
