"""Random requests: all fields of a completion, with legal values up to the extremes, and now and then a wrong one."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.families import POLICY, Family, Subject
from tests.fuzz.judging import REVISING

LENGTHS = (1, 2, 3, 5, 7, 17, 31, 33, 64)
BLOCKS = (None, 1, 2, 3, 4, 8, 13, 100)
WORDS = (
    "Tom has 3 apples.",
    " He buys",
    " 5 more",
    " How many",
    "?",
    "\n",
    " naïve",
    " 好",
    "\U0001f600",
    "x" * 9,
    " 99",
)
SEVERAL = (0, 1, 3, 15)
TAKE_LONG = ("max_denoising_steps", "max_post_steps")
"""How often a block is done over: always drawn, and small where there are many blocks."""
LEAST = 1e-6
"""The least that is more than nothing."""

CHOOSES_TOKENS = ("credit",)
"""Rules and modifiers that choose tokens themselves, by their papers."""
NO_BASE = {*REVISING, "policy", "smc"}
"""Rules that no other can be built on."""

Fields = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        path: the route.
        body: what is sent; whole, with a trajectory.
        refused: the field that must be refused, if one must.
        may_refuse: fields that may be, because they need not go together.
    """

    path: str
    body: Fields
    refused: str | None = None
    may_refuse: frozenset[str] = field(default_factory=frozenset)


def draw_case(subject: Subject, cards: Sequence[Mapping[str, Any]], chance: random.Random) -> Case:
    """A random request that the model can answer, but for one in twenty.

    Args:
        cards: what `/v1/samplers` says.
    """
    family = subject.family
    chat = chance.random() < 0.15
    body: Fields = {"max_tokens": chance.choice(LENGTHS), "seed": chance.randrange(1000), "return_trajectory": True}
    body |= {"messages": draw_messages(chance)} if chat else {"prompt": draw_prompt(subject, chance)}
    legal = [b for b in BLOCKS if not family.divides or b is None or (family.block or 1) % b == 0]
    if chance.random() < 0.7:
        body["block_length"] = chance.choice(legal)
    if chance.random() < 0.25:
        body["max_tokens"] = one_in_the_last(body, family, chance)
    full = not chat and chance.random() < 0.05
    if full:
        left = subject.family.context - body["max_tokens"]
        body["prompt"] = chance.choices(subject.plain, k=left - chance.choice((0, 0, 1, 5)))
    there = [card for card in cards if card["available"] and card["kind"] == "sampler"]
    card = chance.choice(there)
    if family.drafts or chance.random() < 0.9:
        body["sampler"] = card["id"]
        body["sampler_params"] = draw_parameters(card["parameters"], chance)
    if body.get("sampler") == "smc":
        body["sampler_params"] |= draw_base([card["id"] for card in there if card["id"] not in NO_BASE], chance)
    if chance.random() < 0.2 and (
        around := [card for card in cards if card["kind"] == "modifier" and card["available"]]
    ):
        body["modifiers"] = draw_modifiers(around, chance)
    if body.get("sampler") == "policy":
        body["sampler_params"]["policy"] = POLICY.name
    for name in set(body.get("sampler_params", {})).intersection(TAKE_LONG):
        short = body.get("block_length") or family.block or max(LENGTHS)
        body["sampler_params"][name] = min(body["sampler_params"][name], 1 + 4 * short)
    if chance.random() < 0.5:
        body["cache"] = chance.choice(("none", "prefix", "dual"))
    if not family.drafts and chance.random() < 0.4:
        body["temperature"] = chance.choice((0, 0.01, 0.7, 1, 2))
        body["top_p"] = chance.choice((1, 0.9, 0.3, 1e-6))
        body["top_k"] = chance.choice((-1, 0, 1, 5, 1_000_000))
    for name, values, share in (
        ("ignore_eos", (True, False), 0.4),
        ("fill_after_end", (True, False), 0.4),
        ("stop_token_ids", (chance.sample(subject.plain, 3), chance.sample(subject.plain, 60), []), 0.3),
        ("stop", (["e", "zzz"], "a", [], "apples"), 0.2),
        ("n", (1, 2, 3), 0.2),
        ("priority", (-1, 5), 0.1),
    ):
        if chance.random() < share:
            body[name] = chance.choice(values)
    if not chat and not full and not family.causal and chance.random() < 0.25:
        body["suffix"] = chance.choice((" So the answer is 8.", "", "."))
    path = "/v1/chat/completions" if chat else "/v1/completions"
    params = body.get("sampler_params", {})
    may = frozenset(at_odds(body.get("sampler"), params, body.get("temperature", 0)))
    may |= frozenset(around_at_odds(body))
    # The last whole block of a full context may have no room.
    case = Case(path, body, may_refuse=may | {"max_tokens", "prompt"} if full and family.causal else may)
    return spoiled(case, subject, chance) if chance.random() < 0.05 else case


def at_odds(sampler: str | None, params: Fields, temperature: float) -> Iterator[str]:
    """Fields that may be refused, because they need not go together."""
    given = {name for name in ("k", "steps", "threshold") if params.get(name) is not None}
    if "steps" in given:
        yield "sampler_params.steps"  # fewer than blocks
    if {"k", "steps"} <= given or (sampler in ("margin", "entropy") and "threshold" in given and len(given) > 1):
        yield "sampler_params"
    if temperature and sampler in CHOOSES_TOKENS:
        yield "temperature"
    if sampler == "policy":
        yield from ("sampler_params", "sampler_params.cut", "sampler_params.temperature", "sampler_params.speed")


def around_at_odds(body: Fields) -> Iterator[str]:
    """The same of what is around a sampler, or of several canvases: too many tokens for a forward."""
    names = [each["name"] for each in body.get("modifiers", [])]
    params = body.get("sampler_params", {})
    rules = {body.get("sampler"), params.get("base"), *names}
    if rules.intersection(CHOOSES_TOKENS):
        yield from ("temperature", "modifiers")
    if "smc" in rules:
        yield "sampler_params"
    if "guidance" in names:
        yield from ("modifiers", f"modifiers.{names.index('guidance')}.params.negative_prompt")


def draw_base(bases: Sequence[str], chance: random.Random) -> Fields:
    """The rule that several canvases are written with, and their number."""
    base = chance.choice(bases)
    return {"particles": chance.choice((1, 2, 3)), "base": base, "base_params": {"k": 2} if base == "topk" else {}}


def draw_modifiers(cards: Sequence[Mapping[str, Any]], chance: random.Random) -> list[Fields]:
    """One or two of them, in any order."""
    found = []
    for card in chance.sample(list(cards), chance.choice((1, 1, min(2, len(cards))))):
        params = {"scale": chance.choice((0, 0.5, 1.5))} if card["id"] == "guidance" else None
        if params is not None and chance.random() < 0.5:
            params["negative_prompt"] = chance.choice(WORDS)
        found.append(
            {"name": card["id"], "params": draw_parameters(card["parameters"], chance) if params is None else params}
        )
    return found


def one_in_the_last(body: Fields, family: Family, chance: random.Random) -> int:
    """A number of tokens with which the last block has one position of the region."""
    length = body.get("block_length") or family.block or 1
    prompt = body.get("prompt")
    # A block-causal model's blocks are counted from the prompt's start.
    before = len(prompt) if family.causal and isinstance(prompt, list) and isinstance(prompt[0], int) else 0
    return (-before % length) + 1 + length * chance.choice((0, 0, 1, 2) if length <= 16 else (0,))


def draw_prompt(subject: Subject, chance: random.Random) -> Any:
    """A text, tokens, or two of either; of 1 to 40 tokens, whole blocks among them."""

    def tokens() -> list[int]:
        return chance.choices(subject.plain, k=chance.choice((1, 4, 8, 16, 32, *range(1, 41))))

    def text() -> str:
        return "".join(chance.choices(WORDS, k=chance.randint(1, 5)))

    one = chance.choice((tokens, tokens, text))
    return [one(), one()] if chance.random() < 0.1 else one()


def draw_messages(chance: random.Random) -> list[Fields]:
    said = [{"role": "user", "content": "".join(chance.choices(WORDS, k=2))}]
    return [{"role": "system", "content": "Be brief."}, *said] if chance.random() < 0.3 else said


def draw_parameters(schema: Mapping[str, Any], chance: random.Random) -> Fields:
    """Some of a sampler's parameters, as its JSON schema allows them."""
    return {
        name: draw_value(kind, chance)
        for name, kind in schema.get("properties", {}).items()
        if name in TAKE_LONG or chance.random() < 0.5
    }


def draw_value(schema: Mapping[str, Any], chance: random.Random) -> Any:
    """A value that a schema allows; half of them at an end of the range."""
    if "anyOf" in schema:
        return draw_value(chance.choice(schema["anyOf"]), chance)
    if "enum" in schema:
        return chance.choice(schema["enum"])
    kind = schema.get("type")
    if kind in ("string", "object") and "default" in schema:
        return schema["default"]
    if kind == "boolean":
        return chance.random() < 0.5
    if kind == "integer":
        low, high = schema.get("minimum", 0), schema.get("maximum", 1_000_000)
        return chance.choice([*(low + number for number in SEVERAL), high])
    if kind == "number":
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", 0)), schema.get("maximum", 1)
        first = low + LEAST if "exclusiveMinimum" in schema else low
        last = schema["exclusiveMaximum"] - LEAST if "exclusiveMaximum" in schema else high
        between = chance.uniform(first, min(last, 1.0))
        return chance.choice((first, last, between, between))
    assert kind in ("null", "string"), f"a kind of parameter that nobody draws: {schema}"
    return None


def spoiled(case: Case, subject: Subject, chance: random.Random) -> Case:
    """The same with one field that must be refused."""
    family = subject.family
    wrong: list[tuple[str, Any]] = [
        ("block_length", 0),
        ("block_length", -4),
        ("block_length", "8"),
        ("block_length", 2.5),
        ("max_tokens", 0),
        ("max_tokens", 100_000),
        ("cache", "both"),
        ("n", 0),
        ("top_p", 0),
        ("stop_token_ids", [1_000_000]),
        ("sampler", "nobody"),
    ]
    if family.divides:
        wrong += [("block_length", 3), ("block_length", 2 * (family.block or 1))]
    if family.causal and "messages" not in case.body:
        wrong += [("suffix", " The end.")]
    if family.drafts:
        wrong += [("sampler", "topk"), ("temperature", 0.5)]
    name, value = chance.choice(wrong)
    body = case.body | {name: value}
    if name == "sampler":
        body.pop("sampler_params", None)
    return Case(case.path, body, refused=name, may_refuse=case.may_refuse)
