"""All that who writes an unmasking rule must read: what a rule sees of a step, and what it answers."""

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
"""Named tensors, one entry per row: [rows, 1, ...] or [rows, width, ...], as their `StateSpec` says."""


class SamplerParams(BaseModel):
    """A rule's parameters: the schema is documentation, the validation is what a request gets."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


P = TypeVar("P", bound=SamplerParams, default=Any)


class ParameterError(ValueError):
    """Parameters that do not fit the generation. `field` is the parameter's name, `code` the kind of error."""

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class SamplerError(RuntimeError):
    """A sampler or its input broke the contract; the generation it happened to cannot go on."""


@dataclass(frozen=True)
class StateSpec:
    """One named tensor that a rule keeps between the steps of a generation.

    Attributes:
        fill: value before the first step.
        per: one entry a row, [rows, 1, ...], or one a position of the generation region, [rows, width, ...].
        lives: until the active block changes, or until the generation ends.
        shape: further dimensions. The last one may grow from step to step; new entries are filled with `fill`.
    """

    fill: float = 0.0
    dtype: torch.dtype = torch.float32
    per: Literal["row", "position"] = "row"
    lives: Literal["block", "generation"] = "block"
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class CanvasReader:
    """Canvases of some rows, read where somebody looks: copying all of them in each step would cost their length.

    Attributes:
        tokens: int64 [canvases, longest], of the whole batch.
        row: int64 [rows, 1], which of them are these rows'.
    """

    tokens: Tensor = field(repr=False)
    row: Tensor

    def at(self, place: Tensor) -> Tensor:
        """Tokens at canvas positions [rows, width], which are on the canvas."""
        return self.tokens[self.row, place]

    def take(self, rows: Tensor) -> "CanvasReader":
        """Of some of the rows, int64 [n]."""
        return CanvasReader(self.tokens, self.row[rows])


@dataclass(frozen=True)
class StepContext(Generic[P]):
    """Rows that share a sampler, as they are before a forward pass.

    Tensors are [rows, width] over the open window, or [rows, 1] for one number a row. Column j of a row stands for the
    position `position[row, j]` of its generation region; columns past the end of a row's window are no candidates.

    Attributes:
        candidate: masked positions of the active block; nothing else may be committed.
        masked: masked positions of the window, in any block.
        committed: positions of the active block that a revising rule may change: generated, not settled yet, and (in a
            step) told of by the forward.
        position: int64, relative to the generation region.
        seed, forward: the row's random stream, and steps that it took before this one: forwards, but for further views.
        block, block_start, block_step: the active block, its first position, and forwards already spent on it.
        block_masks: how many masks a schedule shares out over the block: those it had when it became active, or all of
            it in block-causal models.
        slot: which of the generation's canvases this is (see `Sampler.slots`).
        layout: lengths and traits of each row's canvas.
        params: each row's own parameters; `param` gives numbers as a column.
        state: what the rule keeps (see `Sampler.state`).
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
        """A numeric or boolean parameter of every row, [rows, 1]: float32, int64 or bool; `none` stands for null."""
        return self.columns.param(name, none)

    def given(self, name: str) -> Tensor:
        """Rows whose parameter is not null, bool [rows, 1]."""
        return self.columns.given(name)

    def option(self, name: str, value: str) -> Tensor:
        """Rows whose one-of-several parameter has this value, bool [rows, 1]."""
        return self.columns.option(name, value)

    def uniform(self, stream: int = POSITIONS) -> Tensor:
        """Random numbers in [0, 1) from each row's own stream, float64 [rows, width]."""
        return uniform(self.seed, self.forward, self.position, stream)

    def tokens_at(self, position: Tensor) -> Tensor:
        """Canvas tokens at region positions [rows, width], which may lie in prompt or suffix; -1 off the canvas."""
        place = position + self.layout.prompt_length
        there = (place >= 0) & (place < self.layout.length)
        return self.canvas.at(place.clamp(min=0).minimum(self.layout.length - 1)).masked_fill(~there, -1)

    @property
    def current(self) -> Tensor:
        """Tokens on the canvas now, int64 [rows, width]."""
        return self.tokens_at(self.position)


@dataclass(frozen=True)
class Step(StepContext[P]):
    """One denoising step: the context, and what the forward pass says.

    Attributes:
        token: what would be committed; at a committed position what the model would put there now; -1 where nothing
            was asked.
        confidence: probability of that token, float32; -inf where nothing was asked (see `Sampler.whole_region`).
        extra: further statistics that the rule asked for; undefined where nothing was asked.
        top: float32 [rows, width, n], the largest probabilities, if the rule asked for any.
        named: float32 [rows, width, m], probabilities of the tokens that the rule named.
        probability: of the token in the model's unmodified distribution, where the confidence is another.
    """

    token: Tensor
    confidence: Tensor
    extra: Mapping[Statistic, Tensor]
    top: Tensor | None = None
    named: Tensor | None = None
    probability: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """The decision of a step; tensors are [rows, width] as in `Step`.

    A row that commits nothing gets its surest candidate, unless the rule says that it `waits`: then the forward is
    spent and the row stays as it is. Only training environments, which bound the forwards, run such a rule;
    elsewhere its generation fails.

    Attributes:
        commit: bool, a subset of the candidates.
        remask: bool, committed positions that are masked again; for rules that revise.
        replace: bool, committed positions that take another token; likewise.
        token, confidence: what to commit and how sure that is, where it is not the step's: tokens of the vocabulary
            but not the mask token, and probabilities.
        done: bool [rows], blocks that are finished; None: those without a mask; for rules that revise.
        draft: int64, what uncommitted candidates hold from now on; for rules that draft.
        state: new values of any of the rule's state tensors; those left out stay.
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
    """A canvas as the model shall see it in every step; its logits count `weight` in the sum that statistics are of.

    Each view is a forward pass of its generation.

    Attributes:
        prompt: None: the canvas itself; "masked": with mask tokens in place of all that was given; token ids: with
            these in the prompt's place.
    """

    weight: float = 1.0
    prompt: Literal["masked"] | tuple[int, ...] | None = None


@dataclass(frozen=True)
class Window:
    """Masks of region positions `start` to before `stop`, int64 [rows, 1] each, are candidates."""

    start: Tensor
    stop: Tensor


@dataclass(frozen=True)
class TokenBonus:
    """Additions to logits, [rows, width, n] each: int64 tokens (-1 for none), and float32 values.

    A value may be minus infinity, which bans a token, but neither NaN nor infinity.
    """

    token: Tensor
    value: Tensor


@dataclass(frozen=True)
class Slots(Generic[P]):
    """The canvases of one generation at a barrier.

    Attributes:
        params: the rule's parameters.
        state: the rule's per-row state, [slots, 1, ...].
        uniform: the generation's own random number in [0, 1) for this barrier.
        finished: bool [slots], canvases that need no further forward.
    """

    params: P
    state: State
    uniform: float
    finished: Tensor


@dataclass(frozen=True)
class Resampling:
    """What becomes of the canvases of one generation at a barrier.

    Attributes:
        ancestors: the canvas that each one goes on from, int64 [slots].
        state: new values of the rule's per-row state, [slots, 1, ...], after that.
    """

    ancestors: Tensor
    state: State = field(default_factory=dict)


class Resources(Protocol):
    """Auxiliaries by kind and name: policies, samplers, twins, reward models, heads."""

    def find(self, kind: str, name: str | None) -> Any:
        """The resource; with no name, the only one of its kind. Raises ParameterError without it."""

    def missing(self, kind: str) -> str | None:
        """Why there is none of this kind; None if there is one."""


class _Described:
    """What rules and modifiers say of themselves."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    statistics: frozenset[Statistic] = frozenset()
    top: int = 0
    state: Mapping[str, StateSpec] = {}
    requires: ClassVar[Mapping[str, str]] = {}
    Params: ClassVar[type[SamplerParams]] = SamplerParams

    @classmethod
    def summary(cls) -> str:
        """First sentence of the docstring."""
        return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """JSON schema of the parameters."""
        return cls.Params.model_json_schema()


class Sampler(_Described, ABC, Generic[P]):
    """An unmasking rule: a pure choice over batched tensors. Where it commits no candidate of a row, the loop commits
    the surest.

    Whatever a sampler raises, or answers that this contract does not allow, ends the generation that it was asked for,
    and no other (see `samplers.loop.guard`). It runs in the thread that serves everybody: what takes it long takes all
    long. Its attributes are read once, when a generation begins; answers repeat at most 16 KiB of its parameters.

    Attributes:
        statistics: numbers that it wants beside token and confidence.
        top: how many of the largest probabilities it wants, at most 1024.
        state: what it keeps between steps, by name.
        requires: parameter -> kind of the auxiliary that it names (see `bind`).
        whole_region: wants statistics of every position of the generation region, not of candidates only; its window
            is the region then.
        sees_region: its window is the generation region, though statistics are of candidates only.
        revises: may change what is committed in the active block, and is told of every position of the block.
        chooses_tokens: chooses tokens itself, so that a temperature has no meaning.
        drafts: for models without a mask token: writes a new draft of its candidates each step, and commits when it is
            content with one. Such models need one that does, others one that does not.
        counts_commits: keeps account of what it commits, so that no modifier may drop some of it.
        barrier: when the canvases of one generation wait for each other: after every step or every block.
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
        """Which candidates to commit. Must not change its input."""

    def name_tokens(self, context: StepContext[P]) -> Tensor | None:
        """Tokens whose probabilities it wants, int64 [rows, width, m], -1 for none; m is at most 1024.

        `context.current[..., None]` are those on the canvas now.
        """
        return None

    def bonus(self, context: StepContext[P]) -> TokenBonus | None:
        """Additions to logits, at most 1024 for each position."""
        return None

    def choice(self, context: StepContext[P]) -> TokenChoices | None:
        """How tokens are chosen in this step, [rows, 1] each, where the rule says so and not the request."""
        return None

    def window(self, context: StepContext[P]) -> Window | None:
        """Where candidates are, if not in the first block with a mask. The loop keeps the first mask inside.

        Block-causal models and caches allow nothing beyond the active block.
        """
        return None

    def post_steps(self, params: P) -> int:
        """For one that revises: most forwards of a block beyond two a position, up to 10,000. Asked once."""
        return 0

    def draft_steps(self, params: P) -> int:
        """For one that drafts: most forwards of a block, 1 to 10,000; the last one commits all. Asked once."""
        raise NotImplementedError

    def most_forwards(self, params: P, layout: Layout) -> int:
        """Most forwards of one canvas, known before the first: one a position, if nothing else."""
        if self.drafts:
            return layout.blocks * self.draft_steps(params)
        if self.revises:
            return 2 * layout.gen_length + layout.blocks * self.post_steps(params)
        return layout.gen_length

    def slots(self, params: P) -> int:
        """Canvases that a generation is denoised on at a time."""
        return 1

    @classmethod
    def has_slots(cls) -> bool:
        """Whether it may denoise on several canvases."""
        return cls.slots is not Sampler.slots

    def resample(self, slots: Slots[P]) -> Resampling | None:
        """The canvases that go on after a barrier; None: each from its own."""
        return None

    def winner(self, slots: Slots[P]) -> int:
        """The canvas whose text is the generation's, once all have ended."""
        return 0

    def incompatibility(self, pattern: AttentionPattern) -> str | None:
        """Why it cannot denoise what is read by this pattern; None if it can."""
        if self.drafts == (pattern.noise is not None):
            return None
        if self.drafts:
            return f"sampler {self.name} is for models without a mask token, and this one has one"
        return f"sampler {self.name} commits masked positions, and this model has no mask token"

    def bind(self, resources: Resources, params: P) -> "Sampler[Any]":
        """The sampler to run, with the auxiliaries that it `requires`. Raises ParameterError."""
        return self

    def check(self, params: P, layout: Layout) -> None:
        """Raise ParameterError if the parameters do not fit this canvas."""
        return


@dataclass(frozen=True)
class Adjustment:
    """What a modifier makes of a step before the rule sees it: fields as in `Step`, None for no change.

    `state`: new values of the modifier's own state.
    """

    token: Tensor | None = None
    confidence: Tensor | None = None
    candidate: Tensor | None = None
    state: State | None = None


class Modifier(_Described, ABC, Generic[P]):
    """A change around any rule: `"modifiers": [{"name": "guidance", "params": {"scale": 1.5}}]` in a request.

    Several are composed in the order given: each adjusts what the one before left, and filters what the rule and those
    before chose. Attributes are those of `Sampler`; steps carry the modifier's own parameters and state.
    """

    chooses_tokens: bool = False

    def views(self, params: P, views: Sequence[View]) -> Sequence[View]:
        """The views of every step, given those without this modifier."""
        return views

    def name_tokens(self, context: StepContext[P]) -> Tensor | None:
        """See `Sampler.name_tokens`."""
        return None

    def bonus(self, context: StepContext[P]) -> TokenBonus | None:
        """See `Sampler.bonus`."""
        return None

    def adjust(self, step: Step[P]) -> Adjustment | None:
        """Change what the rule sees of a step. Must not change its input."""
        return None

    def after(self, step: Step[P], selection: Selection) -> Selection:
        """Change what the rule chose. Where nothing is left to commit, the loop commits the surest candidate."""
        return selection

    def incompatibility(
        self, sampler: Sampler[Any], pattern: AttentionPattern, before: Sequence["Modifier[Any]"]
    ) -> str | None:
        """Why it cannot be around this rule on such a model, after these modifiers; None if it can."""
        return None

    def check(self, params: P, layout: Layout) -> None:
        """Raise ParameterError if the parameters do not fit this canvas."""
        return
