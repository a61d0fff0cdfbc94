"""What a sampler is: it sees a step of the rows that chose it and says which candidates to commit."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from samplers.attention_pattern import AttentionPattern
from samplers.canvas import Layout
from samplers.forward.statistics import Statistic
from samplers.forward.token_choice import TokenChoice
from samplers.randomness import POSITIONS, uniform


class SamplerParams(BaseModel):
    """A sampler's parameters: its schema is documentation, its validation is what a request gets."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ParameterError(ValueError):
    """Parameters that do not fit the generation. `field` is the parameter's name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class SamplerError(RuntimeError):
    """A sampler or its input broke the contract; the generation it happened to cannot go on."""


@dataclass(frozen=True)
class Step:
    """One denoising step of the rows that share a sampler. Positions are relative to the generation region.

    All tensors are [rows, width], width being the longest generation region of the batch.

    Attributes:
        candidate: masked positions of the active block; nothing else may be committed.
        masked: masked positions of any block.
        token: what would be committed; at a committed position what the model would put there now.
        confidence: its probability; -inf where the sampler asked for nothing (see `Sampler.region`).
        extra: further statistics that the sampler asked for; undefined where it asked for nothing.
        params: each row's own parameters.
        layouts: each row's canvas.
        seed, forward: [rows, 1], the row's seed and the number of forwards it took part in before this one.
        block, block_step, block_masks: [rows, 1], the active block, forwards already spent on it, and how many masks a
            schedule shares out over it (see `Row`).
        top: float32 [rows, width, n], the largest probabilities, if the sampler asked for any.
        states: what the sampler keeps of each generation (see `Sampler.start`).
        named: float32 [rows, width, m], probabilities of the tokens that the sampler named.
        probability: float32, of the token in the model's unmodified distribution, where the confidence is another.
        current, given: the tokens now on the canvas, and positions that were never masked; for samplers that revise.
    """

    candidate: Tensor
    masked: Tensor
    token: Tensor
    confidence: Tensor
    extra: dict[Statistic, Tensor]
    params: Sequence[SamplerParams]
    layouts: Sequence[Layout]
    seed: Tensor
    forward: Tensor
    block: Tensor
    block_step: Tensor
    block_masks: Tensor
    top: Tensor | None = None
    states: Sequence[Any] = ()
    named: Tensor | None = None
    probability: Tensor | None = None
    current: Tensor | None = None
    given: Tensor | None = None

    def param(self, name: str) -> Tensor:
        """A parameter of every row, [rows, 1]."""
        values = [getattr(p, name) for p in self.params]
        return torch.tensor(values, device=self.candidate.device)[:, None]

    def uniform(self) -> Tensor:
        """Random numbers in [0, 1) from each row's own stream, [rows, width]."""
        position = torch.arange(self.candidate.shape[1], device=self.candidate.device)
        return uniform(self.seed, self.forward, position, POSITIONS)


@dataclass(frozen=True)
class Selection:
    """What to do: `commit` is bool [rows, width], a subset of the candidates.

    A row that commits nothing gets its surest candidate, unless the sampler says that it `waits`: then the forward is
    spent and the row stays as it is. Only training environments, which bound the forwards, run such a sampler;
    elsewhere its generation fails.

    Attributes:
        token, confidence: [rows, width], what to commit and how sure that is, where it is not the prediction's:
            tokens of the vocabulary, but not the mask token, and probabilities.
        replace: bool [rows, width], committed positions that take another token; for samplers that revise.
        remask: bool [rows, width], committed positions that are masked again; likewise.
        done: bool [rows], whether the block is finished; likewise. No mask may be left then.
        states: what the sampler keeps of each row from now on; None: what it kept before.
        draft: int64 [rows, width], what candidates hold from now on that are not committed; for samplers that draft.
    """

    commit: Tensor
    waits: bool = False
    token: Tensor | None = None
    confidence: Tensor | None = None
    replace: Tensor | None = None
    remask: Tensor | None = None
    done: Tensor | None = None
    states: Sequence[Any] | None = None
    draft: Tensor | None = None


class Sampler(ABC):
    """A stateless unmasking rule. Where it commits no candidate of a row, the loop commits the surest.

    Whatever a sampler raises, or answers that this contract does not allow, ends the generation that it was asked for,
    and no other (see `samplers.loop.guard`). It runs in the thread that serves everybody: what takes it long takes all long.
    Its attributes are read once, when a generation begins, and answers repeat at most 16 KiB of its parameters.

    Attributes:
        statistics: numbers that it wants beside token and confidence.
        top: how many of the largest probabilities it wants, at most 1024.
        region: whether it wants them for every position of the generation region, or for candidates only.
        revises: whether it may change what is committed in the active block. It is told of every position of the block,
            and says itself when the block is done.
        greedy: whether it chooses tokens itself, so that a temperature has no meaning.
        drafts: whether it is for models without a mask token: it writes a new draft of its candidates each step, and
            commits when it is content with one. Such models need one that does, others one that does not.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    statistics: frozenset[Statistic] = frozenset()
    top: int = 0
    region: bool = False
    revises: bool = False
    greedy: bool = False
    drafts: bool = False
    Params: ClassVar[type[SamplerParams]] = SamplerParams

    @abstractmethod
    def select(self, step: Step) -> Selection:
        """Which candidates to commit. Must not change its input, states included."""

    def start(self, params: SamplerParams) -> Any:
        """What it keeps of one generation between steps, as it is before the first."""
        return None

    def name_tokens(self, state: Any, positions: Tensor) -> Tensor | None:
        """Tokens whose probabilities it wants at positions of the generation region, int64 [n, m], -1 for none.

        `m` is at most 1024, or the length of the region where that is longer.
        """
        return None

    def bonus(self, params: SamplerParams, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Additions to logits: indices into `places`, tokens and values, at most 1024 for each place.

        A value may be minus infinity, which bans a token, but neither NaN nor infinity.

        Args:
            tokens: the canvas as it is, [length].
            places: positions on it of which the sampler is told, [n].
        """
        return None

    def post_steps(self, params: SamplerParams) -> int:
        """For one that revises: most forwards of a block beyond two a position, up to 10,000. Asked once."""
        return 0

    def draft_steps(self, params: SamplerParams) -> int:
        """For one that drafts: most forwards of a block, 1 to 10,000; the last one commits all. Asked once."""
        raise NotImplementedError

    def most_forwards(self, params: SamplerParams, layout: Layout) -> int:
        """Most forwards of a generation on such a canvas, known before the first: one a position, if nothing else."""
        if self.drafts:
            return layout.blocks * self.draft_steps(params)
        if self.revises:
            return 2 * layout.gen_length + layout.blocks * self.post_steps(params)
        return layout.gen_length

    def slots(self, params: SamplerParams) -> int:
        """Canvases that a generation is denoised on at a time."""
        return 1

    def views(self, params: SamplerParams) -> int:
        """Times that a forward computes each of them, as with and without the prompt."""
        return 1

    def choice(self, params: SamplerParams, block_step: int) -> TokenChoice | None:
        """How tokens are chosen in a block's step, where the sampler says so and not the request."""
        return None

    def incompatibility(self, pattern: AttentionPattern) -> str | None:
        """Why it cannot denoise what is read by this pattern; None if it can."""
        if self.drafts == (pattern.noise is not None):
            return None
        if self.drafts:
            return f"sampler {self.name} is for models without a mask token, and this one has one"
        return f"sampler {self.name} commits masked positions, and this model has no mask token"

    def check(self, params: SamplerParams, layout: Layout) -> None:
        """Raise ParameterError if the parameters do not fit this canvas."""
        return

    @classmethod
    def summary(cls) -> str:
        """The first sentence of the sampler's docstring."""
        return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """JSON schema of the parameters."""
        return cls.Params.model_json_schema()
