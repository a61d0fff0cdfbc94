"""One generation on its way from all masks to text."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.contract import ParameterError, Sampler, SamplerParams
from samplers.forward.span import CacheMode, ForwardSpan
from samplers.forward.statistics import LogitBonus, Statistic
from samplers.forward.token_choice import GREEDY, TokenChoice
from samplers.loop import guard
from samplers.loop.cache_plan import CachePlan
from samplers.loop.guard import ContractError, Traits
from samplers.randomness import NOISE, uniform


@dataclass(eq=False)
class Row:
    """One generation on its way from all masks to text.

    Raises ParameterError if the parameters do not fit, SamplerError if the sampler fails when it is asked about them.

    Attributes:
        canvas: what there is so far.
        sampler, params: the rule that chooses what to commit.
        choice: how a committed position's token is chosen, unless the sampler says so itself.
        seed: the generation's random stream.
        end_ids: tokens that end the text. Empty: the whole region is denoised.
        fill_after_end: committing an end-of-text settles every masked position after it at once, as padding. Off,
            those positions are denoised like any other until everything before the end is settled.
        cache: what is kept from a block's first forward for those after it.
        vocabulary: number of the model's tokens, if it is known: what a sampler may name and commit.
        forwards: forward passes that this generation took part in.
        block, block_step, block_masks: the active block, forwards spent on it, and how many masks a schedule shares out
            over it: those it had when it became active. The programs of block-causal models count the whole block, also
            where it holds the prompt's end.
        settled: length of the committed prefix of the generation region: what can no longer change.
        told: the settled tokens that count as generated: those of the text, up to and including the first end-of-text.
            Only ever appended to: a candidate is masked, so not settled, and a revision of what is settled is refused.
        state: what the sampler keeps between steps.
        traits: the sampler's attributes, as they were to begin with.
        token_choice: how the next forward chooses tokens.
        given: bool [gen_length], positions that were not masked to begin with.
    """

    canvas: Canvas
    sampler: Sampler
    params: SamplerParams
    choice: TokenChoice = GREEDY
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    fill_after_end: bool = True
    cache: CacheMode = CacheMode.NONE
    vocabulary: int | None = None
    forwards: int = 0
    block: int = field(default=0, init=False)
    block_step: int = field(default=0, init=False)
    block_masks: int = field(default=0, init=False)
    settled: int = field(default=0, init=False)
    told: list[int] = field(default_factory=list, init=False)
    state: Any = field(init=False, repr=False)
    traits: Traits = field(init=False, repr=False)
    token_choice: TokenChoice = field(init=False, repr=False)
    given: Tensor = field(init=False, repr=False)
    _closed: int = field(default=0, init=False)
    _entered: int = field(default=-1, init=False)
    _most_steps: int = field(default=0, init=False)
    _mask_id: int = field(default=-1, init=False)
    _cache: CachePlan = field(init=False, repr=False)
    _opens: bool = field(default=False, init=False)
    _feed: ForwardSpan = field(init=False, repr=False)
    _candidates: Tensor = field(init=False, repr=False)
    end: int | None = field(default=None, init=False)
    """Position of the first committed end-of-text in the generation region."""

    def __post_init__(self) -> None:
        sampler, params = self.sampler, self.params
        if incompatibility := guard.incompatibility(sampler, self.canvas.layout.pattern):
            raise ParameterError("sampler", incompatibility)
        guard.check_params(sampler, params, self.canvas.layout)
        self.traits = Traits.of(sampler)
        if self.traits.greedy and self.choice.temperature > 0:
            raise ParameterError(
                "sampler", f"sampler {guard.name_of(sampler)} chooses tokens itself; use temperature 0"
            )
        self._most_steps = guard.most_steps(sampler, self.traits, params)
        self.state = guard.start(sampler, params)
        self.token_choice = self.choice
        self._cache = CachePlan(self.cache)
        self.given = ~self.canvas.masked
        open_tokens = self.canvas.generated[self.canvas.masked]
        self._mask_id = int(open_tokens[0]) if len(open_tokens) else -1
        self._begin_step()

    def _begin_step(self) -> list[int]:
        """Settle what follows an end-of-text, and find what the next forward is about; returns what became padding.

        A block of which a forward would say nothing any more is closed: where a block's first position is decided by
        the position before it, it is not told again, and one block may hold no other.
        """
        filled = self._fill()
        self._enter_block()
        while (
            self.traits.revises and not self.finished and not len(self._candidates) and not len(self.asked(self._feed))
        ):
            self._close_block()
            filled += self._fill()
            self._enter_block()
        return filled

    def _enter_block(self) -> None:
        """Make the first block with a mask the active one, and note what follows from the masks, once a step."""
        layout = self.canvas.layout
        self.settled = self.canvas.settled
        if self.traits.revises:
            self.settled = min(self.settled, self._closed)
        self.told += self.canvas.generated[len(self.told) : self._told_stop].tolist()
        block = min(layout.block_of(self.settled), layout.blocks - 1)
        start = layout.block_start(block)
        self._candidates = self.canvas.masked[start : layout.block_stop(block)].nonzero()[:, 0] + start
        if block != self._entered:
            self.block, self.block_step, self._entered = block, 0, block
            whole = layout.pattern.causal_block is not None
            self.block_masks = layout.block_length if whole else len(self._candidates)
            if layout.pattern.noise is not None:
                self.canvas.generated[self._candidates] = self._noise(layout.pattern.noise)
        self._opens = self._opens_block()
        if self._opens:
            self._candidates = self._candidates[:1]
        self._feed = self._cache.feed(layout, self.block, self.block_step, self._opens, self._first_open())

    def _first_open(self) -> bool:
        """Whether the block's first position is masked, and is decided by the output at the position before it."""
        layout = self.canvas.layout
        start, place = layout.block_start(self.block), layout.block_place(self.block)
        given = place < layout.prompt_length + start
        return layout.pattern.shifted and place > 0 and not given and bool(self.canvas.masked[start])

    def _noise(self, vocabulary: int) -> Tensor:
        """What the candidates of a new block hold where there is no mask token."""
        numbers = uniform(torch.tensor(self.seed), torch.tensor(self.forwards), self._candidates, NOISE)
        return (numbers * vocabulary).long()

    def _opens_block(self) -> bool:
        """Whether the next forward decides the block's first position only.

        Where outputs are about the next position, that one is decided by the position before it, which forwards that
        feed no more than the block do not compute (Fast-dLLM for Dream, and v2).
        """
        size = self.canvas.layout.pattern.causal_block
        if self.block_step or not self._first_open():
            return False
        if size is None:
            return self.cache is not CacheMode.NONE
        return self.canvas.layout.block_place(self.block) % size == 0

    @property
    def _told_stop(self) -> int:
        """End of the settled text, end-of-text included."""
        stop = min(self.settled, self.canvas.layout.text_length)
        return stop if self.end is None else min(stop, self.end + 1)

    @property
    def ended(self) -> bool:
        """Whether the text ends with a settled end-of-text."""
        return self.end is not None and len(self.told) > self.end

    @property
    def finished(self) -> bool:
        """Everything up to the end of the text, or up to and including an end-of-text, is settled."""
        return self.ended or self.settled >= self.canvas.layout.text_length

    @property
    def completion_tokens(self) -> int:
        """Settled tokens up to and including the first end-of-text: what counts as generated."""
        return len(self.told)

    def text_tokens(self) -> list[int]:
        """The settled tokens before the end-of-text."""
        return self.told[: self.end]

    def span(self) -> ForwardSpan:
        """What the next forward computes of this canvas."""
        return self._feed

    def asked(self, fed: ForwardSpan) -> Tensor:
        """Positions that the sampler wants to be told of, of those that a forward decides."""
        layout = self.canvas.layout
        if self._opens or not (self.traits.region or self.traits.revises):
            return self._candidates
        first, stop = layout.block_start(self.block), layout.block_stop(self.block)
        lowest = max(fed.start, self._model_block)
        if self.traits.region:
            first, stop = max(0, lowest - layout.prompt_length), min(layout.gen_length, fed.stop - layout.prompt_length)
        if layout.pattern.shifted and layout.prompt_length + first == lowest > 0:
            first += 1  # what the output before it says is not computed, or another block's to say
        return torch.arange(first, stop)

    @property
    def _model_block(self) -> int:
        """Place of the first of those positions that the active block sees, and that see it; all of them is 0."""
        layout = self.canvas.layout
        size = layout.pattern.causal_block
        return 0 if size is None else layout.block_place(self.block) // size * size

    def choose(self) -> None:
        """Let the sampler say how the next forward chooses tokens. Raises SamplerError; then the request says it."""
        self.token_choice = self.choice
        if "choice" in self.traits.hooks:
            self.token_choice = guard.choice(self.sampler, self.params, self.block_step) or self.choice

    def named(self, positions: Tensor) -> Tensor | None:
        """Tokens that the sampler names at these positions, int64 [n, m]. Raises SamplerError."""
        if "name_tokens" not in self.traits.hooks:
            return None
        widest = max(guard.MOST_NUMBERS, self.canvas.layout.gen_length)
        return guard.names(self.sampler, self.state, positions, widest, self.vocabulary)

    def bonus(self, positions: Tensor) -> LogitBonus | None:
        """What the sampler adds to the logits of these positions. Raises SamplerError."""
        if "bonus" not in self.traits.hooks:
            return None
        places = positions + self.canvas.layout.prompt_length
        return guard.bonus(self.sampler, self.params, self.canvas.tokens, places, self.vocabulary)

    @property
    def judges_drawn(self) -> bool:
        """Whether the next forward's confidences are of the distributions that tokens are drawn from."""
        return self.canvas.layout.pattern.judges_drawn and self.token_choice.temperature > 0

    @property
    def statistics(self) -> frozenset[Statistic]:
        """Numbers that the next forward is to give beside token and confidence."""
        own = self.traits.statistics
        return own | {Statistic.CHOSEN_CONFIDENCE} if self.judges_drawn else own

    @property
    def last_chance(self) -> bool:
        """Whether a block that is revised or drafted has had all the forwards it may have, but for the next."""
        if self.traits.drafts:
            return self.block_step + 1 >= self._most_steps
        bound = 2 * self.canvas.layout.block_size(self.block) + self._most_steps
        return self.traits.revises and self.block_step + 1 >= bound

    @property
    def mask_id(self) -> int | None:
        """The token that stands for a mask; None where there is none."""
        return self._mask_id if self.canvas.layout.pattern.noise is None else None

    def candidates(self) -> Tensor:
        """Masked positions of the active block, relative to the generation region."""
        return self._candidates

    def draft(self, tokens: Tensor) -> None:
        """Write tokens [gen_length or more] where the candidates are, which stay candidates."""
        self.canvas.generated[self._candidates] = tokens[self._candidates]

    def commit(self, positions: Tensor, tokens: Tensor) -> list[int]:
        """Fix positions to tokens; returns the positions after an end-of-text that this settles as padding."""
        self._cache.note(self.span(), self.canvas.layout, self.block)
        self._write(positions, tokens)
        self._note_end(positions.tolist(), tokens.tolist())
        return self._turn()

    def revise(self, positions: Tensor, tokens: Tensor, remask: Tensor, done: bool) -> list[int]:
        """Fix positions to tokens, whatever is there, mask others again, and close the block if it is done.

        What it holds counts from then on, end-of-text too; returns what that settles as padding.
        """
        self._check_open(torch.cat([positions, remask]))
        self._cache.note(self.span(), self.canvas.layout, self.block)
        self._write(positions, tokens)
        self.canvas.generated[remask] = self._mask_id
        self.canvas.masked[remask] = True
        layout = self.canvas.layout
        if done and not bool(self.canvas.masked[layout.block_start(self.block) : layout.block_stop(self.block)].any()):
            self._close_block()
        return self._turn()

    def _close_block(self) -> None:
        """Settle what the active block holds."""
        start = self._closed
        self._closed = self.canvas.layout.block_stop(self.block)
        self._note_end(list(range(start, self._closed)), self.canvas.generated[start : self._closed].tolist())

    def _check_open(self, positions: Tensor) -> None:
        """Raise ContractError for a position outside the active block, or one that is settled: it was told."""
        layout = self.canvas.layout
        first, stop = max(self.settled, layout.block_start(self.block)), layout.block_stop(self.block)
        if bool(((positions < first) | (positions >= stop)).any()):
            raise ContractError(f"only positions {first} to {stop - 1} may change now, not all of {positions.tolist()}")

    def _write(self, positions: Tensor, tokens: Tensor) -> None:
        self.canvas.generated[positions] = tokens
        self.canvas.masked[positions] = False

    def _note_end(self, positions: list[int], tokens: list[int]) -> None:
        ends = [p for p, t in zip(positions, tokens, strict=True) if t in self.end_ids]
        if ends:
            self.end = min(ends) if self.end is None else min(self.end, *ends)

    def _turn(self) -> list[int]:
        """Count the forward, and go on to the next step; returns what became padding."""
        self.forwards += 1
        self.block_step += 1
        return self._begin_step()

    def _fill(self) -> list[int]:
        """Settle every mask after an end-of-text as padding, where that is wanted; returns their positions."""
        if self.end is None or not self.fill_after_end:
            return []
        after = self.canvas.masked.clone()
        after[: self.end] = False
        filled: list[int] = after.nonzero()[:, 0].tolist()
        self.canvas.generated[after] = self.canvas.generated[self.end]
        self.canvas.masked[after] = False
        return filled
