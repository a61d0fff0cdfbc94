"""The sampler contract: everything needed to write an unmasking rule.

A rule subclasses `Sampler`, declares its parameters in `Params`, and implements `select(step) -> Selection`. The loop
makes one `Step` per forward pass for all rows that share the rule, and carries out the `Selection`. A row is one canvas
of one generation. A `Modifier` wraps any rule.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from typing_extensions import TypeVar

from samplers.attention_pattern import AttentionPattern
from samplers.canvas import Layout
from samplers.columns import Columns, LayoutColumns
from samplers.forward.statistics import Statistic
from samplers.forward.token_choice import TokenChoices
from samplers.randomness import POSITIONS, uniform

State = Mapping[str, Tensor]
"""Named tensors with one entry per row: [rows, 1, ...] or [rows, width, ...], as declared in their `StateSpec`."""


class SamplerParams(BaseModel):
    """A rule's parameters: the schema is documentation, the validation is what a request gets."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


P = TypeVar("P", bound=SamplerParams, default=Any)


class ParameterError(ValueError):
    """Parameters that do not fit the generation. `field` is the name of the parameter, `code` the kind of error."""

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class SamplerError(RuntimeError):
    """A breach of the contract by a sampler or its input. Ends the generation that it occurred in."""


@dataclass(frozen=True)
class StateSpec:
    """A named tensor that a rule keeps between the steps of a generation.

    Attributes:
        fill: value before the first step.
        per: "row" for one entry per row, [rows, 1, ...]; "position" for one per position of the generation region,
            [rows, width, ...].
        lives: lifetime: until the active block changes, or until the generation ends.
        shape: further dimensions. The last one may grow from step to step; new entries are set to `fill`.
    """

    fill: float = 0.0
    dtype: torch.dtype = torch.float32
    per: Literal["row", "position"] = "row"
    lives: Literal["block", "generation"] = "block"
    shape: tuple[int, ...] = ()


class CanvasReader:
    """Whole canvases of some rows, read on demand: a copy in each step would cost their full length.

    What it returns is a copy; the canvases themselves are out of a rule's reach.

    Args:
        tokens: int64 [canvases, longest canvas] of the whole batch.
        row: int64 [rows, 1], indices of these rows' canvases.
    """

    def __init__(self, tokens: Tensor, row: Tensor) -> None:
        self.__tokens = tokens
        self.__row = row

    def at(self, place: Tensor) -> Tensor:
        """Tokens at positions [rows, width] of the canvas, which must be on it."""
        return self.__tokens[self.__row, place]

    def take(self, rows: Tensor) -> "CanvasReader":
        """Canvases of some of the rows, int64 [n]."""
        return CanvasReader(self.__tokens, self.__row[rows])


@dataclass(frozen=True)
class StepContext(Generic[P]):
    """Rows that share a sampler, in their state before a forward pass.

    Tensors are [rows, width] over the open window, or [rows, 1] for one value per row. Column j of a row is position
    `position[row, j]` of its generation region. Columns past the end of a row's window are not candidates.

    Attributes:
        candidate: bool, masked positions of the active block (or of the rule's `Window`). Only these may be committed.
        masked: bool, masked positions of the window, in any block.
        committed: bool, positions of the active block that a revising rule may change: generated, not yet settled, and
            (in a step) covered by the forward pass.
        position: int64, relative to the start of the generation region.
        seed: int64, random stream of the row.
        forward: int64, number of steps that the row took before this one. Further views do not count here.
        block, block_start, block_step: index of the active block, its first position, and number of forwards already
            spent on it.
        block_masks: number of masks that a schedule spreads over the block: those it had when it became active; all of
            its positions in block-causal models.
        slot: index of the canvas within its generation (see `Sampler.slots`).
        layout: lengths and traits of each row's canvas.
        params: parameters of each row. `param` returns numeric ones as a column.
        state: the rule's own state (see `Sampler.state`).
        canvas: the rows' whole canvases (see `tokens_at`).
    """

    candidate: Tensor
    masked: Tensor
    committed: Tensor
    position: Tensor
    seed: Tensor
    forward: Tensor
    block: Tensor
    block_start: Tensor
    block_step: Tensor
    block_masks: Tensor
    slot: Tensor
    layout: LayoutColumns
    params: Sequence[P]
    columns: Columns = field(repr=False)
    state: State = field(repr=False)
    canvas: CanvasReader = field(repr=False)

    def param(self, name: str, none: float | None = None) -> Tensor:
        """A numeric or boolean parameter of every row, [rows, 1]: float32, int64 or bool. `none` replaces null."""
        return self.columns.param(name, none)

    def given(self, name: str) -> Tensor:
        """Mask of rows whose parameter is not null, bool [rows, 1]."""
        return self.columns.given(name)

    def option(self, name: str, value: str) -> Tensor:
        """Mask of rows whose enumerated parameter has this value, bool [rows, 1]."""
        return self.columns.option(name, value)

    def uniform(self, stream: int = POSITIONS) -> Tensor:
        """Random numbers in [0, 1) from each row's own stream, float64 [rows, width]."""
        return uniform(self.seed, self.forward, self.position, stream)

    def tokens_at(self, position: Tensor) -> Tensor:
        """Canvas tokens at region positions [rows, width], which may lie in prompt or suffix; -1 outside the canvas."""
        place = position + self.layout.prompt_length
        there = (place >= 0) & (place < self.layout.length)
        return self.canvas.at(place.clamp(min=0).minimum(self.layout.length - 1)).masked_fill(~there, -1)

    @property
    def current(self) -> Tensor:
        """Tokens now on the canvas, int64 [rows, width]."""
        return self.tokens_at(self.position)


@dataclass(frozen=True)
class Step(StepContext[P]):
    """One denoising step: the context and the results of the forward pass.

    A position is covered if the forward pass computed statistics of it: by default all candidates (see
    `Sampler.whole_region` and `Sampler.revises`).

    Attributes:
        token: int64, token to commit at a candidate; at a committed position, the token that the model would choose
            now; -1 where not covered.
        confidence: float32, probability of that token; -inf where not covered.
        extra: further statistics that the rule declared, float32; undefined where not covered.
        top: float32 [rows, width, n], the n largest probabilities, if the rule declared `top`.
        named: float32 [rows, width, m], probabilities of the tokens from `Sampler.name_tokens`.
        probability: probability of the token in the model's unmodified distribution, if `confidence` is a different
            one.
    """

    token: Tensor
    confidence: Tensor
    extra: Mapping[Statistic, Tensor]
    top: Tensor | None = None
    named: Tensor | None = None
    probability: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """The decision of a step. Tensors are [rows, width] as in `Step`.

    If a row commits nothing, the loop commits its candidate of highest confidence. With `waits`, it does not: the
    forward is spent and the row stays as it is. Only training environments, which bound the number of forwards, allow
    `waits`; elsewhere it fails the generation.

    Attributes:
        commit: bool, a subset of the candidates.
        remask: bool, committed positions to mask again; revising rules only.
        replace: bool, committed positions that take another token; revising rules only.
        token, confidence: tokens to commit and their probabilities, if they differ from those of the step. Tokens must
            be in the vocabulary and not the mask token.
        done: bool [rows], rows whose active block is finished; None: rows without a mask in it. Revising rules only.
        draft: int64, new content of uncommitted candidates; drafting rules only.
        state: new values of the rule's state tensors; omitted ones keep their values.
    """

    commit: Tensor
    remask: Tensor | None = None
    replace: Tensor | None = None
    token: Tensor | None = None
    confidence: Tensor | None = None
    done: Tensor | None = None
    draft: Tensor | None = None
    state: State | None = None
    waits: bool = False


@dataclass(frozen=True)
class View:
    """A canvas as the model sees it in every step.

    Statistics are computed from the weighted sum of the logits of all views. Each view costs its generation one forward
    pass per step.

    Attributes:
        weight: factor of the view's logits in the sum.
        prompt: None: the canvas itself; "masked": mask tokens in place of all given tokens; token ids: a replacement of
            the prompt.
    """

    weight: float = 1.0
    prompt: Literal["masked"] | tuple[int, ...] | None = None


@dataclass(frozen=True)
class Window:
    """Range of region positions whose masks are candidates: `start` to `stop` (exclusive), int64 [rows, 1] each."""

    start: Tensor
    stop: Tensor


@dataclass(frozen=True)
class TokenBonus:
    """Additions to logits, [rows, width, n] each: int64 tokens (-1: unused) and float32 values.

    Minus infinity bans a token. NaN and plus infinity are errors.
    """

    token: Tensor
    value: Tensor


@dataclass(frozen=True)
class Slots(Generic[P]):
    """The canvases of one generation at a barrier.

    Attributes:
        params: parameters of the rule.
        state: per-row state of the rule, [slots, 1, ...].
        uniform: random number in [0, 1) from the generation's own stream, for this barrier.
        finished: bool [slots], canvases that need no further forward.
    """

    params: P
    state: State
    uniform: float
    finished: Tensor


@dataclass(frozen=True)
class Resampling:
    """The canvases of one generation after a barrier.

    Attributes:
        ancestors: index of the canvas that each one continues, int64 [slots].
        state: new values of the rule's per-row state, [slots, 1, ...], applied after the copy.
    """

    ancestors: Tensor
    state: State = field(default_factory=dict)


class Resources(Protocol):
    """Table of auxiliaries by kind and name: policies, samplers, twins, reward models, heads."""

    def find(self, kind: str, name: str | None) -> Any:
        """Look up a resource; without a name, the only one of its kind. Raises ParameterError if there is none."""

    def missing(self, kind: str) -> str | None:
        """Reason for the absence of resources of this kind; None if there are some."""


class _Described:
    """Declarations common to rules and modifiers."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    statistics: frozenset[Statistic] = frozenset()
    top: int = 0
    state: Mapping[str, StateSpec] = {}
    requires: ClassVar[Mapping[str, str]] = {}
    Params: ClassVar[type[SamplerParams]] = SamplerParams

    @classmethod
    def summary(cls) -> str:
        """First paragraph of the docstring."""
        return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """JSON schema of the parameters."""
        return cls.Params.model_json_schema()


class Sampler(_Described, ABC, Generic[P]):
    """An unmasking rule: a pure choice over batched tensors.

    If it commits no candidate of a row, the loop commits the one of highest confidence. An exception, or an answer
    outside the contract, ends the generation concerned and no other (see `samplers.loop.guard`). Samplers run in the
    thread that serves all requests: a slow one slows them all. Attributes are read once, when a generation begins.
    Responses repeat at most 16 KiB of a sampler's parameters.

    Attributes:
        statistics: statistics per position to compute besides token and confidence.
        top: number of largest probabilities to compute, at most 1024.
        state: tensors to keep between steps, by name.
        requires: kind of the auxiliary that each of these parameters names (see `bind`).
        whole_region: compute statistics at every position of the generation region instead of candidates only; the
            window is then the region.
        sees_region: make the window the generation region, with statistics of candidates only.
        revises: may change committed positions of the active block; statistics cover every position of the block.
        chooses_tokens: the rule chooses tokens itself, so a temperature has no effect.
        drafts: for models without a mask token: writes a new draft of the candidates each step and commits once a draft
            is good enough. Such models require a drafting rule; all others refuse one.
        counts_commits: the rule keeps account of its commits, so modifiers must not drop any of them.
        barrier: point at which the canvases of one generation wait for each other: after every step or every block.
    """

    whole_region: bool = False
    sees_region: bool = False
    revises: bool = False
    chooses_tokens: bool = False
    drafts: bool = False
    counts_commits: ClassVar[bool] = False
    barrier: ClassVar[Literal["step", "block"]] = "block"

    @abstractmethod
    def select(self, step: Step[P]) -> Selection:
        """Choose the candidates to commit. Must not modify its input."""

    def name_tokens(self, context: StepContext[P]) -> Tensor | None:
        """Tokens whose probabilities to compute, int64 [rows, width, m], -1: unused; m is at most 1024.

        `context.current[..., None]` names the tokens now on the canvas.
        """
        return None

    def bonus(self, context: StepContext[P]) -> TokenBonus | None:
        """Additions to logits, at most 1024 per position."""
        return None

    def choice(self, context: StepContext[P]) -> TokenChoices | None:
        """Token choice of this step, [rows, 1] each, if the rule overrides that of the request."""
        return None

    def window(self, context: StepContext[P]) -> Window | None:
        """Range of candidates, if not the first block with a mask. The loop extends it to contain the first mask.

        Block-causal models and caches restrict candidates to the active block.
        """
        return None

    def post_steps(self, params: P) -> int:
        """Maximum forwards per block beyond two per position, up to 10,000; revising rules only. Called once."""
        return 0

    def draft_steps(self, params: P) -> int:
        """Maximum forwards per block, 1 to 10,000; drafting rules only. The last one commits everything. Called
        once."""
        raise NotImplementedError

    def most_forwards(self, params: P, layout: Layout) -> int:
        """Maximum forwards of one canvas, known before the first. The default for plain rules is one per position."""
        if self.drafts:
            return layout.blocks * self.draft_steps(params)
        if self.revises:
            return 2 * layout.gen_length + layout.blocks * self.post_steps(params)
        return layout.gen_length

    def slots(self, params: P) -> int:
        """Number of canvases that a generation is denoised on at the same time."""
        return 1

    @classmethod
    def has_slots(cls) -> bool:
        """True if the rule may denoise on several canvases."""
        return cls.slots is not Sampler.slots

    def resample(self, slots: Slots[P]) -> Resampling | None:
        """Canvases to continue with after a barrier; None: every canvas continues itself."""
        return None

    def winner(self, slots: Slots[P]) -> int:
        """Index of the canvas whose text becomes the generation's, once all have ended."""
        return 0

    def incompatibility(self, pattern: AttentionPattern) -> str | None:
        """Reason why the rule cannot denoise for a model with this attention pattern; None if it can."""
        if self.drafts == (pattern.noise is not None):
            return None
        if self.drafts:
            return f"sampler {self.name} is for models without a mask token, and this one has one"
        return f"sampler {self.name} commits masked positions, and this model has no mask token"

    def bind(self, resources: Resources, params: P) -> "Sampler[Any]":
        """The sampler to run, with the auxiliaries that it `requires`. Raises ParameterError if one is missing."""
        return self

    def check(self, params: P, layout: Layout) -> None:
        """Raise ParameterError if the parameters do not fit this canvas."""
        return


@dataclass(frozen=True)
class Adjustment:
    """Changes that a modifier makes to a step before the rule sees it: fields as in `Step`, None for no change.

    Attributes:
        state: new values of the modifier's own state.
    """

    token: Tensor | None = None
    confidence: Tensor | None = None
    candidate: Tensor | None = None
    state: State | None = None


class Modifier(_Described, ABC, Generic[P]):
    """A change around any rule: `"modifiers": [{"name": "guidance", "params": {"scale": 1.5}}]` in a request.

    Modifiers apply in the order given: each adjusts the step that the previous one left, and filters the selection that
    the rule and the previous ones made. Attributes are those of `Sampler`. Steps carry the modifier's own parameters
    and state.
    """

    chooses_tokens: bool = False

    def views(self, params: P, views: Sequence[View]) -> Sequence[View]:
        """The views of every step, given the views without this modifier."""
        return views

    def name_tokens(self, context: StepContext[P]) -> Tensor | None:
        """See `Sampler.name_tokens`."""
        return None

    def bonus(self, context: StepContext[P]) -> TokenBonus | None:
        """See `Sampler.bonus`."""
        return None

    def adjust(self, step: Step[P]) -> Adjustment | None:
        """Change the step before the rule sees it. Must not modify its input."""
        return None

    def after(self, step: Step[P], selection: Selection) -> Selection:
        """Change the rule's selection. In a row left without commits, the loop commits the candidate of highest
        confidence."""
        return selection

    def incompatibility(
        self, sampler: Sampler[Any], pattern: AttentionPattern, before: Sequence["Modifier[Any]"]
    ) -> str | None:
        """Reason why the modifier cannot wrap this rule, after the modifiers `before`, on such a model; None if it
        can."""
        return None

    def check(self, params: P, layout: Layout) -> None:
        """Raise ParameterError if the parameters do not fit this canvas."""
        return
