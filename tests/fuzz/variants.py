"""The same request in other words: what it must have in common with the first answer."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.fuzz.asking import Answer
from tests.fuzz.drawing import Case
from tests.fuzz.families import Subject
from tests.fuzz.judging import Problem, differences, judge

Fields = dict[str, Any]
Compare = Callable[[Answer, Answer], Iterator[Problem]]


@dataclass(frozen=True)
class Variant:
    """Another body, and what its answer must have in common with the case's own."""

    name: str
    body: Fields
    compare: Compare


def same(name: str, usage: bool = True) -> Compare:
    def compare(first: Answer, second: Answer) -> Iterator[Problem]:
        for difference in differences(first, second, usage):
            yield Problem(f"{name} is not the same", difference)

    return compare


def judged(subject: Subject, body: Fields, name: str) -> Compare:
    """By its own trajectory alone."""

    def compare(_: Answer, second: Answer) -> Iterator[Problem]:
        if second.status != 200:
            yield Problem(f"{name} fails", f"{second.status} {second.error}")
            return
        for problem in judge(subject, body, second):
            yield Problem(f"{name}: {problem.kind}", problem.detail)

    return compare


def variants_of(subject: Subject, case: Case, first: Answer, chance: random.Random) -> list[Variant]:
    """Streams always, and two of the others that go with the request."""
    body = case.body
    plain = {name: value for name, value in body.items() if name != "return_trajectory"}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = chance.choice((plain, body)) | stream
    found = [Variant("streamed", streamed, same("streamed"))]
    if first.status != 200:
        return found
    others = [with_logprobs(case, plain, chance), Variant("plain", plain, same("without a trajectory"))]
    others += [*with_stops(subject, case, first, chance), *with_an_end(subject, case, first, chance)]
    others += [*cached(subject, case), *cut(subject, case), *with_echo(case, plain)]
    return found + chance.sample(others, min(2, len(others)))


def with_logprobs(case: Case, plain: Fields, chance: random.Random) -> Variant:
    asked: Fields = {"logprobs": True} if "messages" in plain else {"logprobs": 0}
    if chance.random() < 0.5:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}

    def compare(first: Answer, second: Answer) -> Iterator[Problem]:
        yield from same("with logprobs")(first, second)
        for choice in second.choices:
            if len(choice.tokens) != len(choice.logprobs):
                yield Problem("logprobs", f"{len(choice.tokens)} tokens, {len(choice.logprobs)} logprobs")
        told = sum(len(choice.tokens) for choice in second.choices)
        counted = (second.usage or {}).get("completion_tokens", 0)
        # The token that ends a text is counted, and has no text; so may those be of which a stop is made.
        if told > counted or (told < counted - len(second.choices) and not case.body.get("stop")):
            yield Problem("logprobs", f"of {told} tokens, {counted} are counted")
        for choice in second.choices:
            if any(not -10_000 < number <= 1e-6 for number in choice.logprobs):
                yield Problem("logprobs", f"that are none: {choice.logprobs}")

    return Variant("logprobs", plain | asked, compare)


def with_stops(subject: Subject, case: Case, first: Answer, chance: random.Random) -> Iterator[Variant]:
    """A piece of the text as a stop, with a trajectory and without, streamed and whole."""
    text = first.choices[0].text
    if case.body.get("stop") or not text.strip("\ufffd\n "):
        return
    start = chance.randrange(len(text))
    piece = text[start : start + chance.choice((1, 1, 2, 3, 8))]
    if "\ufffd" in piece:
        return
    stops = chance.choice((piece, [piece], ["never", piece]))
    body = case.body | {"stop": stops}
    yield Variant("stop", body, judged(subject, body, "with a stop"))
    cuts = [found if (found := choice.text.find(piece)) >= 0 else len(choice.text) for choice in first.choices]

    def compare(first: Answer, second: Answer) -> Iterator[Problem]:
        texts = [choice.text[:at] for choice, at in zip(first.choices, cuts, strict=True)]
        got = [choice.text for choice in second.choices]
        if got != texts:
            yield Problem("a stop changes the text before it", f"{got}, not {texts}; {second.error.get('message')}")

    stream = {"stream": True, "stream_options": {"include_usage": True}} if chance.random() < 0.5 else {}
    yield Variant("stop's text", body | stream, compare)


def with_an_end(subject: Subject, case: Case, first: Answer, chance: random.Random) -> Iterator[Variant]:
    """A token that was committed as one that ends the text."""
    tokens = [token for each in first.choices[0].passes for token in each["tokens"]]
    if tokens:
        body = case.body | {"stop_token_ids": [chance.choice(tokens)]}
        yield Variant("end", body, judged(subject, body, "with an end"))


def cached(subject: Subject, case: Case) -> Iterator[Variant]:
    """What is exact: keys and values of the blocks before, in a model that sees no later ones."""
    if subject.family.causal:
        now = case.body.get("cache", "prefix")
        if now in ("none", "prefix"):
            other = "none" if now == "prefix" else "prefix"
            yield Variant("cache", case.body | {"cache": other}, same(f"cache {other} instead of {now}"))


def cut(subject: Subject, case: Case) -> Iterator[Variant]:
    """A longer text begins with the shorter one, in a model that sees no later blocks."""
    params = case.body.get("sampler_params", {})
    if not subject.family.causal or params.get("steps") is not None:
        return
    if case.body.get("sampler") in ("policy", "smc"):
        return  # one is told which part of the generation's forwards is used up; the other compares whole texts
    length = 3 if case.body["max_tokens"] > 16 else 64
    body = case.body | {"max_tokens": length}

    def compare(first: Answer, second: Answer) -> Iterator[Problem]:
        if second.status == 400 and second.error.get("param") in case.may_refuse:
            return  # the context is full
        if second.status != 200:
            yield Problem("another max_tokens fails", f"{second.status} {second.error}")
            return
        most = min(length, case.body["max_tokens"])
        for one, other in zip(first.choices, second.choices, strict=True):
            a, b = told(one.passes, most), told(other.passes, most)
            if a[: len(b)] != b[: len(a)]:
                yield Problem(
                    "max_tokens changes the text before it", f"{b} with {length}, {a} with {case.body['max_tokens']}"
                )

    yield Variant("cut", body, compare)


def told(passes: list[Fields], most: int) -> list[int]:
    """Tokens of a finished trajectory, as far as there are no gaps."""
    canvas: dict[int, int] = {}
    for each in passes:
        canvas |= dict(zip(each["positions"], each["tokens"], strict=True))
        for position in each.get("remasked", []):
            canvas.pop(position, None)
    length = next((n for n in range(most) if n not in canvas), most)
    return [canvas[n] for n in range(length)]


def with_echo(case: Case, plain: Fields) -> Iterator[Variant]:
    prompt = plain.get("prompt")
    if not isinstance(prompt, str):
        return

    def compare(first: Answer, second: Answer) -> Iterator[Problem]:
        if [prompt + choice.text for choice in first.choices] != [choice.text for choice in second.choices]:
            yield Problem("echo", f"{[choice.text for choice in second.choices]}; {second.error.get('message')}")

    yield Variant("echo", plain | {"echo": True}, compare)
