"""Modifiers around rules: worked examples, what they equal, their order, and what does not go together."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers import (
    BIDIRECTIONAL,
    Adjustment,
    AttentionPattern,
    CacheMode,
    Canvas,
    Modifier,
    ParameterError,
    Sampler,
    SamplerParams,
    Selection,
    Step,
    TokenChoice,
    get_modifier,
    get_sampler,
    list_modifiers,
    list_samplers,
)
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.loop.guard import incompatibility
from samplers.loop.row import Row
from samplers.loop.run import finish
from samplers.resources import bound
from tests.policies import tiny
from tests.samplers.models import MASK, VOCAB, Logits, events_of, predictor, random_logits, scripted, turn
from tests.samplers.steps import step_of

Around = tuple[Modifier, SamplerParams]
CREDIT = get_modifier("credit")


def around(name: str, **params: Any) -> Around:
    modifier = get_modifier(name)
    return modifier, modifier.Params(**params)


def row(rule: str, *modifiers: Around, params: dict[str, Any] | None = None, **options: Any) -> Row:
    sampler = get_sampler(rule)
    own = sampler.Params(**(params or {}))
    sampler = bound(sampler, own)
    canvas = Canvas.blank(
        options.pop("prompt", [1, 2]),
        options.pop("gen", 12),
        MASK,
        options.pop("block", 6),
        pattern=options.pop("pattern", BIDIRECTIONAL),
    )
    return Row(canvas, sampler, own, vocabulary=VOCAB, modifiers=modifiers, **options)


def story(each: Row, logits: Logits = random_logits) -> list[tuple[object, ...]]:
    """All that a generation's events say of it, in order."""
    (events,) = events_of([each], predictor(logits))
    assert all(event.error is None for event in events)
    return [(e.forward, e.positions, e.tokens, e.confidences, e.filled, e.text_tokens) for e in events]


# Credit


def test_credit_grows_with_every_step_that_agrees() -> None:
    """p = .80, .80, .85 of the likeliest of three tokens: fused .8648, .8896, .9296."""
    state, raised = None, []
    for p in (0.80, 0.80, 0.85):
        known = None if state is None else state["token"]
        named = None if known is None or not known.shape[2] else torch.full((1, 1, known.shape[2]), p)
        token = torch.full((1, 1), 3)
        step = step_of(CREDIT, [CREDIT.Params()], torch.tensor([[p]]), token=token, state=state, named=named)
        found = CREDIT.adjust(step)
        assert found is not None and found.confidence is not None and found.token is not None
        state = dict(found.state or {})
        raised.append(found.confidence.item())
        assert found.token.item() == 3
    assert raised == pytest.approx([0.8648, 0.8896, 0.9296], abs=5e-5)
    assert state is not None and state["credit"].item() == pytest.approx(2.3452, abs=5e-5)


def agreeing(canvas: Canvas) -> Tensor:
    """(.80 .15 .05) in the first two steps, then (.85 .10 .05), as far as position 0 goes."""
    done = int((canvas.generated != MASK).sum())
    p = torch.tensor([[1e-9] * VOCAB]).repeat(canvas.layout.length, 1)
    p[:, 3:6] = torch.tensor([0.80, 0.15, 0.05] if done < 2 else [0.85, 0.10, 0.05])
    p[:, 7] = 0.0
    for position in (1, 2):  # surer, so that they go first
        p[canvas.layout.prompt_length + position] = 1e-9
        p[canvas.layout.prompt_length + position, 7] = 0.999 - 0.001 * position
    return p.log()


def test_credit_raises_in_the_third_step_what_alone_stays_below() -> None:
    """Two surer positions go first, one a step."""
    alone, raised = (story(row("topk", *modifiers, gen=3, block=3), agreeing) for modifiers in ([], [around("credit")]))
    assert [found[1] for found in alone] == [found[1] for found in raised] == [[1], [2], [0]]
    assert alone[2][3] == pytest.approx([0.85], abs=1e-4) and raised[2][3] == pytest.approx([0.9296], abs=1e-4)


@settings(max_examples=20)
@given(
    params=st.fixed_dictionaries(
        {}, optional={"alpha": st.floats(0, 3), "gamma": st.floats(0, 2), "beta": st.floats(0, 1)}
    ),
    threshold=st.floats(0.01, 1),
    gen=st.integers(1, 16),
    block=st.integers(1, 16),
    ends=st.sampled_from([frozenset[int](), frozenset({7})]),
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=3),
)
def test_credit_around_a_threshold_is_the_sampler_credit(
    params: dict[str, float], threshold: float, gen: int, block: int, ends: frozenset[int], prompt: list[int]
) -> None:
    options: dict[str, Any] = {"gen": gen, "block": block, "end_ids": ends, "prompt": prompt}
    wrapped = row("threshold", around("credit", **params), params={"threshold": threshold}, **options)
    own = row("credit", params={**params, "threshold": threshold}, **options)
    assert story(wrapped) == story(own)


@pytest.mark.parametrize("rule", ["topk", "factor", "local_leap", "hierarchy", "sequential", "random"])
def test_credit_without_any_changes_nothing(rule: str) -> None:
    """With alpha 0 logits gain nothing: the rule alone, greedily."""
    plain, wrapped = story(row(rule)), story(row(rule, around("credit", alpha=0.0)))
    assert [found[:3] for found in plain] == [found[:3] for found in wrapped]
    for a, b in zip(plain, wrapped, strict=True):
        assert a[3] == pytest.approx(b[3], abs=1e-6)
    assert story(row(rule, around("credit", alpha=3.0))) != wrapped or rule == "sequential"


# Spacing


@pytest.mark.parametrize(("gap", "kept"), [(2, [0, 2, 5, 7]), (4, [0, 5])])
def test_spacing_keeps_the_surest_apart(gap: int, kept: list[int]) -> None:
    """Chosen 5, 6, 2, 0, 7, 3, best first."""
    spacing = get_modifier("spacing")
    confidence = torch.zeros(1, 8)
    for rank, position in enumerate([5, 6, 2, 0, 7, 3]):
        confidence[0, position] = 0.9 - 0.1 * rank
    step = step_of(spacing, [spacing.Params(min_gap_start=1, min_gap=gap)], confidence)
    found = spacing.after(step, Selection(confidence > 0))
    assert found.commit[0].nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize(("masks", "gap"), [(8, 8), (7, 7), (4, 4), (3, 3), (2, 2), (1, 2)])
def test_the_gap_shrinks_with_what_is_masked(masks: int, gap: int) -> None:
    """max(2, floor(masks * 8 / block)), of a block of 8."""
    spacing = get_modifier("spacing")
    confidence = torch.linspace(0.9, 0.1, 8)[None]
    candidate = torch.arange(8)[None] < masks
    step = step_of(spacing, [spacing.Params()], confidence, candidate)
    found = spacing.after(step, Selection(candidate)).commit[0].nonzero()[:, 0].tolist()
    assert found == list(range(0, masks, gap))


@pytest.mark.parametrize("rule", ["threshold", "topk", "factor", "entropy_bound", "margin", "hierarchy", "dream"])
def test_no_two_commits_of_a_step_are_near(rule: str) -> None:
    params = {"threshold": {"threshold": 0.1}, "topk": {"k": 6}, "factor": {"factor": 9.0}, "margin": {"k": 4}}
    each = row(rule, around("spacing", min_gap_start=1, min_gap=3), params=params.get(rule), gen=16, block=16)
    for found in story(each):
        positions = sorted(found[1])  # type: ignore[call-overload]
        assert positions and all(b - a >= 3 for a, b in pairwise(positions))


def test_spacing_changes_nothing_where_one_is_committed_a_step() -> None:
    assert story(row("topk", around("spacing"))) == story(row("topk"))


# Guidance


def guided(script: dict[bool, float]) -> Logits:
    """A token's logit with the prompt, and without it; all others are 0."""

    def logits(canvas: Canvas) -> Tensor:
        out = torch.zeros(canvas.layout.length, VOCAB)
        out[:, 5] = script[bool((canvas.tokens[: canvas.layout.prompt_length] != MASK).any())]
        return out

    return logits


def test_guidance_moves_logits_away_from_the_prompt_free_ones() -> None:
    """Scale 1.5, c 2, u 1 -> 3.5."""
    each = row("topk", around("guidance", scale=1.5), gen=1)
    ((forward, _, tokens, confidences, *_),) = story(each, guided({True: 2.0, False: 1.0}))
    expected = torch.tensor([3.5, *[0.0] * (VOCAB - 1)]).softmax(0)[0].item()
    assert (forward, tokens) == (2, [5])
    assert confidences == pytest.approx([expected], abs=1e-6)


def mixed(scale: float, negative: list[int] | None) -> Logits:
    """Guided logits, worked out by hand."""

    def logits(canvas: Canvas) -> Tensor:
        layout = canvas.layout
        without = canvas.tokens.clone()
        without[: layout.prompt_length] = MASK
        without[layout.prompt_length + layout.gen_length :] = MASK
        prompt = layout.prompt_length
        if negative is not None:
            without = torch.cat([torch.tensor(negative), canvas.tokens[prompt:]])
            prompt = len(negative)
        other = Canvas.blank([0] * prompt, len(without) - prompt, MASK)
        other.tokens[:] = without
        c, u = random_logits(canvas), random_logits(other)
        out = c.clone()
        out[layout.prompt_length :] = (scale + 1) * c[layout.prompt_length :] - scale * u[prompt:]
        return out

    return logits


@pytest.mark.parametrize("negative", [None, [4], [5, 6, 7, 8]])
@pytest.mark.parametrize("rule", ["topk", "threshold", "entropy_bound", "edit", "credit", "random", "saber"])
def test_guidance_is_the_rule_on_guided_logits(rule: str, negative: list[int] | None) -> None:
    options = {} if negative is None else {"negative_prompt": negative}
    found = story(row(rule, around("guidance", scale=0.7, **options), end_ids=frozenset({9})))
    expected = story(row(rule, end_ids=frozenset({9})), mixed(0.7, negative))
    assert [each[1:3] for each in found] == [each[1:3] for each in expected]
    assert [each[0] for each in found] == [2 * each[0] for each in expected], "every view counts"  # type: ignore[operator]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_guidance_of_no_scale_is_no_guidance(temperature: float) -> None:
    choice = TokenChoice(temperature)
    assert story(row("topk", around("guidance", scale=0.0), choice=choice)) == story(row("topk", choice=choice))


@pytest.mark.parametrize("cache", list(CacheMode))
@pytest.mark.parametrize("pattern", [BIDIRECTIONAL, AttentionPattern(causal_block=6), AttentionPattern(shifted=True)])
def test_every_view_has_its_own_span_and_memory(cache: CacheMode, pattern: AttentionPattern) -> None:
    each = row("topk", around("guidance", scale=1.0), cache=cache, pattern=pattern)
    memories: set[tuple[int, ...]] = set()

    def predict(query: Query) -> Prediction:
        assert len(query.canvases) == len(query.spans) == 2 and query.mixture is not None
        first, second = query.spans
        assert (first.start, first.stop, first.visible) == (second.start, second.stop, second.visible)
        memories.add(tuple(id(span.memory) for span in query.spans))
        return predictor()(query)

    finish([each], predict)
    assert len(memories) == 1, "each view keeps its place"
    assert len(set(memories.pop())) == (1 if cache is CacheMode.NONE else 2)


def test_rows_with_and_without_views_share_a_step() -> None:
    def make() -> list[Row]:
        return [
            row("topk", gen=8),
            row("topk", around("guidance", scale=2.0), gen=9),
            row("margin", around("guidance", scale=0.0), gen=5),
            row(
                "entropy", around("spacing"), around("guidance", scale=0.5, negative_prompt=[8, 8, 8]), gen=16, block=16
            ),
        ]

    together = make()
    finish(together, predictor())
    for a, b in zip(together, make(), strict=True):
        finish([b], predictor())
        assert (a.told, a.forwards) == (b.told, b.forwards)


def test_a_negative_prompt_must_be_encoded_and_of_this_model() -> None:
    for negative, field in (("words", "negative_prompt"), ([VOCAB], "modifiers"), ([10**9], "modifiers")):
        with pytest.raises(ParameterError) as caught:
            row("topk", around("guidance", scale=1.0, negative_prompt=negative))
        assert field in caught.value.field


def test_a_negative_prompt_keeps_the_blocks_of_a_block_causal_model() -> None:
    pattern = AttentionPattern(causal_block=6)
    with pytest.raises(ParameterError, match="must differ by a multiple of that"):
        row("topk", around("guidance", scale=1.0, negative_prompt=[3]), pattern=pattern)
    finish([row("topk", around("guidance", scale=1.0, negative_prompt=[3] * 8), pattern=pattern)], predictor())


# Order


class Halve(Modifier[SamplerParams]):
    """Halve confidences."""

    name = "halve"

    def adjust(self, step: Step) -> Adjustment:
        return Adjustment(confidence=step.confidence / 2)


class Cap(Modifier[SamplerParams]):
    """Cut confidences off at 0.6."""

    name = "cap"

    def adjust(self, step: Step) -> Adjustment:
        return Adjustment(confidence=step.confidence.clamp(max=0.6))


class First(Modifier[SamplerParams]):
    """Keep the first of what is chosen."""

    name = "first"

    def after(self, step: Step, selection: Selection) -> Selection:
        return Selection(selection.commit & (selection.commit.cumsum(dim=1) == 1))


class Beside(Modifier[SamplerParams]):
    """Add the candidate to the right of what is chosen."""

    name = "beside"

    def after(self, step: Step, selection: Selection) -> Selection:
        right = torch.nn.functional.pad(selection.commit, (1, 0))[:, :-1]
        return Selection(selection.commit | (right & step.candidate))


def plain(modifier: Modifier) -> Around:
    return modifier, SamplerParams()


def test_modifiers_apply_in_the_order_in_which_they_are_given() -> None:
    """Each adjusts what the one before left, and filters what the rule and those before chose."""
    script = {0: (2, 0.9), 1: (3, 0.8), 2: (4, 0.1), 3: (5, 0.1)}
    model = predictor(scripted(script, offset=2))

    def step(*modifiers: Modifier) -> tuple[list[int], list[float]]:
        each = row("threshold", *map(plain, modifiers), params={"threshold": 0.3}, gen=4, block=4)
        (event,) = turn([each], model)
        return event.positions, event.confidences

    assert step(Halve(), Cap())[1] == pytest.approx([0.45, 0.4])
    assert step(Cap(), Halve())[1] == pytest.approx([0.3, 0.3], abs=1e-6)
    assert step(First(), Beside())[0] == [0, 1]
    assert step(Beside(), First())[0] == [0]
    assert step(Beside())[0] == [0, 1, 2]


def test_a_modifiers_parameters_and_state_are_its_own() -> None:
    """Two rules of one parameter name, each with its own value; credit's state beside a sampler's."""
    each = row("saber", around("credit"), params={"n": 1})
    finish([each], predictor())
    assert each.batch is not None
    specs = [set(layer.specs) for layer in each.batch.groups[each.key].layers]
    assert specs == [set(get_sampler("saber").state), {"token", "credit"}]


# What does not go together


NONSENSE = [
    ("credit", ["credit"], BIDIRECTIONAL, "modifier credit chooses tokens itself, and so does sampler credit"),
    (
        "entropy",
        ["credit"],
        BIDIRECTIONAL,
        "modifier credit raises confidences only, and sampler entropy reads entropy",
    ),
    ("dream", ["credit"], BIDIRECTIONAL, "and sampler dream reads chosen_confidence, chosen_entropy, chosen_margin"),
    ("smc", ["credit"], BIDIRECTIONAL, "all texts of sampler smc were the same"),
    ("smc", ["spacing"], BIDIRECTIONAL, "modifier spacing drops commits, of which sampler smc keeps account"),
    ("saber", ["spacing"], BIDIRECTIONAL, "modifier spacing drops commits, of which sampler saber keeps account"),
    ("topk", ["credit", "credit"], BIDIRECTIONAL, "modifier credit is given twice"),
    ("topk", ["guidance", "spacing", "guidance"], BIDIRECTIONAL, "modifier guidance is given twice"),
    (
        "diffusion_gemma",
        ["guidance"],
        AttentionPattern(noise=VOCAB),
        "modifier guidance is for models with a mask token",
    ),
    ("diffusion_gemma", ["spacing"], AttentionPattern(noise=VOCAB), "sampler diffusion_gemma commits whole blocks"),
    ("diffusion_gemma", ["credit"], AttentionPattern(noise=VOCAB), "and so does sampler diffusion_gemma"),
]


@pytest.mark.parametrize(("rule", "modifiers", "pattern", "words"), NONSENSE)
def test_what_makes_no_sense_is_refused_by_name(
    rule: str, modifiers: list[str], pattern: AttentionPattern, words: str
) -> None:
    sampler = get_sampler(rule)
    own = sampler.Params()
    with pytest.raises(ParameterError) as caught:
        Row(
            Canvas.blank([1], 4, None if pattern.noise else MASK, pattern=pattern),
            bound(sampler, own),
            own,
            modifiers=[around(name, **({"scale": 1.0} if name == "guidance" else {})) for name in modifiers],
        )
    assert caught.value.field == "modifiers" and words in str(caught.value)


def test_credit_has_no_temperature() -> None:
    with pytest.raises(ParameterError, match="credit chooses tokens itself; use temperature 0"):
        row("topk", around("credit"), choice=TokenChoice(0.5))


def test_all_that_is_not_refused_runs() -> None:
    """Every pair of modifiers around every rule that it fits."""
    params = {"guidance": {"scale": 1.0}}
    rules: list[tuple[str, Sampler]] = [
        (each.name, bound(each, each.Params())) for each in list_samplers() if each.name != "policy"
    ]
    rules.append(("policy", tiny.sampler(region=False)))
    ran = set()
    for name, sampler in rules:
        pattern = AttentionPattern(noise=VOCAB) if sampler.drafts else BIDIRECTIONAL
        for first in list_modifiers():
            for second in list_modifiers():
                pair = [first, second]
                if incompatibility(sampler, pattern, pair) is not None:
                    continue
                canvas = Canvas.blank([1], 5, None if sampler.drafts else MASK, 3, pattern=pattern)
                modifiers = [around(each.name, **params.get(each.name, {})) for each in pair]
                finish([Row(canvas, sampler, sampler.Params(), vocabulary=VOCAB, modifiers=modifiers)], predictor())
                ran.add((name, first.name, second.name))
    assert {("threshold", a.name, b.name) for a in list_modifiers() for b in list_modifiers() if a is not b} <= ran
