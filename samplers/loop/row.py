"""One generation from all masks to text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from samplers.canvas import Canvas, Layout
from samplers.columns import columns_of
from samplers.contract import Modifier, ParameterError, Sampler, SamplerParams
from samplers.forward.span import CacheMode, ForwardSpan
from samplers.forward.token_choice import GREEDY, TokenChoice
from samplers.loop import guard, hooks
from samplers.loop.batch import Batch
from samplers.loop.cache_plan import CachePlan
from samplers.loop.numbers import CHANGING, COUNT, NEVER, N
from samplers.loop.particles import Particles, copies_of
from samplers.loop.traits import Traits
from samplers.loop.view_canvas import ViewCanvas
from samplers.loop.window import enter
from samplers.randomness import slot_seed

NARROW = 3
"""Windows of up to 4 ** 3 positions share a part regardless of their width."""


@dataclass(eq=False)
class Row:
    """One generation from all masks to text. Its tensors are in a slot of a `Batch`.

    Raises ParameterError if the parameters do not fit, SamplerError if the sampler fails in its checks.

    Attributes:
        canvas: current content; the row's own, shared with no other.
        sampler, params: the rule and its parameters.
        choice: token choice at committed positions, unless the sampler sets its own.
        seed: random stream of the generation.
        end_ids: tokens that end the text. Empty: the whole region is denoised.
        fill_after_end: True: committing an end-of-text settles every masked position after it at once, as padding.
            False: those positions are denoised normally until everything before the end is settled.
        cache: cache mode of the generation's blocks.
        vocabulary: number of the model's tokens, if known: limits the tokens that a sampler may name and commit.
        modifiers: modifiers around the rule with their parameters, in order of application.
        slot_number: index of this canvas among those of the generation (see `Sampler.slots`).
        told: settled tokens that count as generated: those of the text up to and including the first end-of-text.
            Append-only: candidates are masked and thus not settled, and rules may revise only unsettled positions.
        traits: attributes of the sampler and its modifiers, as read when the generation began.
        given: bool [gen_length], positions that were not masked initially.
        views: further canvases of every forward; `weight` is that of the canvas itself.
        batch, slot: location of the tensors.
        now: the row's changing integers, as last read from its batch.
    """

    canvas: Canvas
    sampler: Sampler[Any]
    params: SamplerParams
    choice: TokenChoice = GREEDY
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    fill_after_end: bool = True
    cache: CacheMode = CacheMode.NONE
    vocabulary: int | None = None
    modifiers: Sequence[tuple[Modifier[Any], SamplerParams]] = ()
    slot_number: int = 0
    told: list[int] = field(default_factory=list, init=False)
    traits: Traits = field(init=False, repr=False)
    given: Tensor = field(init=False, repr=False)
    views: list[ViewCanvas] = field(default_factory=list, init=False, repr=False)
    weight: float = field(default=1.0, init=False)
    view_count: int = field(default=1, init=False)
    particles: "Particles[Row] | None" = field(default=None, init=False, repr=False)
    batch: Batch | None = field(default=None, init=False, repr=False)
    slot: int = field(default=-1, init=False)
    reported: int = field(default=0, init=False)
    window_width: int = field(default=0, init=False)
    key: Any = field(init=False, repr=False)
    column_values: dict[int, list[float]] = field(default_factory=dict, init=False, repr=False)
    _most_steps: int = field(default=0, init=False)
    _mask_id: int = field(default=-1, init=False)
    _text_length: int = field(default=0, init=False)
    _plan: CachePlan = field(init=False, repr=False)
    now: list[int] = field(default_factory=list, init=False, repr=False)
    _same_spans: list[ForwardSpan] | None = field(default=None, init=False, repr=False)
    _spans_stay: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        sampler, params, layout = self.sampler, self.params, self.canvas.layout
        modifiers = [modifier for modifier, _ in self.modifiers]
        if reason := guard.incompatibility(sampler, layout.pattern):
            raise ParameterError("sampler", reason)
        if reason := guard.incompatibility(sampler, layout.pattern, modifiers):
            raise ParameterError("modifiers", reason)
        owners: list[guard.Owner] = [sampler, *modifiers]
        for i, (owner, own) in enumerate(zip(owners, self.all_params, strict=True)):
            try:
                guard.check_params(owner, own, layout)
            except ParameterError as error:
                field = f"modifiers.{i - 1}.params.{error.field}" if i else error.field
                raise ParameterError(field, str(error)) from None
            self.column_values[id(own)] = guard.column_values(owner, columns_of(type(own)), own)
        self.traits = Traits.of(sampler, modifiers)
        self.key = (id(sampler), *map(id, modifiers), id(self.traits))
        if self.traits.chooses_tokens and self.choice.temperature > 0:
            kind, who = "sampler", owners[0]
            if not Traits.of(sampler).chooses_tokens:
                kind, who = "modifier", next(each for each in modifiers if each.chooses_tokens)
            name = guard.name_of(who)
            raise ParameterError("temperature", f"{kind} {name} chooses tokens itself; use temperature 0")
        self._most_steps = hooks.most_steps(sampler, self.traits, params)
        self._plan = CachePlan(self.cache)
        self._text_length = layout.text_length
        # Without a cache, every forward computes the whole canvas.
        self._spans_stay = not (self.keeps or layout.pattern.causal) and type(self).span is Row.span
        self.given = ~self.canvas.masked
        _ = self.part_key
        open_tokens = self.canvas.generated[self.canvas.masked]
        self._mask_id = int(open_tokens[0]) if len(open_tokens) else -1
        self._make_views()
        Batch().admit(self)
        assert self.batch is not None
        enter(self.batch, torch.tensor([self.slot]))
        self.read()
        self.told += self.canvas.generated[: self.now[N.TOLD]].tolist()
        if self.slot_number == 0:
            self._make_particles()

    def _make_particles(self) -> None:
        """Create further canvases if the rule denoises on several."""
        count = hooks.count(self.sampler, "slots", 1, hooks.MOST_CANVASES, self.params)
        if count > 1:
            others = [
                Row(
                    canvas,
                    self.sampler,
                    self.params,
                    self.choice,
                    self.seed,
                    self.end_ids,
                    self.fill_after_end,
                    self.cache,
                    self.vocabulary,
                    self.modifiers,
                    slot_number=i,
                )
                for i, canvas in enumerate(copies_of(self.canvas, count - 1), 1)
            ]
            self.particles = Particles([self, *others])

    def _make_views(self) -> None:
        """Create the further views of every forward."""
        first, *others = hooks.views(self.modifiers, self.canvas.layout, self.vocabulary)
        self.weight = first.weight
        self.view_count = 1 + len(others)
        self.views = [ViewCanvas.of(view, self.canvas, self.given, self._mask_id, self.cache) for view in others]

    @cached_property
    def part_key(self) -> tuple[bool, int]:
        """Key of rows that take steps together: their window widths are within a factor of four."""
        traits = self.traits
        region = traits.whole_region or traits.sees_region or "window" in traits.hooks[0]
        self.window_width = self.canvas.layout.gen_length
        if not region:
            self.window_width = min(self.canvas.layout.block_length, self.window_width)
        return region, max(NARROW, ((self.window_width - 1).bit_length() + 1) // 2)

    @property
    def suspect(self) -> guard.Owner:
        """The rule or modifier to blame for their joint result."""
        return guard.suspect(self.sampler, [modifier for modifier, _ in self.modifiers])

    @property
    def all_params(self) -> list[SamplerParams]:
        """Parameters of the rule, then of the modifiers in order."""
        return [self.params, *(params for _, params in self.modifiers)]

    def first_numbers(self) -> Tensor:
        """Integers of the row before it has entered a block, int64 [columns]."""
        layout, pattern = self.canvas.layout, self.canvas.layout.pattern
        n = [0] * COUNT
        n[N.SEED], n[N.SLOT] = slot_seed(self.seed, self.slot_number), self.slot_number
        n[N.LENGTH], n[N.PROMPT], n[N.GEN], n[N.TEXT] = (
            layout.length,
            layout.prompt_length,
            layout.gen_length,
            layout.text_length,
        )
        n[N.BLOCK_LENGTH], n[N.SHARED], n[N.BLOCKS] = layout.block_length, layout.shared, layout.blocks
        n[N.DENOISED], n[N.CAUSAL], n[N.NOISE] = layout.denoised_length, pattern.causal_block or 0, pattern.noise or 0
        n[N.STRICT], n[N.MASK_ID], n[N.FILL] = pattern.strict, self._mask_id, self.fill_after_end
        n[N.REVISES], n[N.DRAFTS], n[N.MOST] = self.traits.revises, self.traits.drafts, self._most_steps
        n[N.CONFINED] = self.cache is not CacheMode.NONE or pattern.causal
        n[N.VOCABULARY] = -1 if self.vocabulary is None else self.vocabulary
        n[N.SHIFTED], n[N.JUDGES], n[N.KEEPS] = pattern.shifted, pattern.judges_drawn, self.keeps
        n[N.GREEDY], n[N.WINDOW], n[N.SPANS_STAY] = self.choice == GREEDY, self.window_width, self._spans_stay
        n[N.BLANK] = bool(self.canvas.masked.all())
        n[N.EVEN] = not layout.shared and layout.gen_length % layout.block_length == 0
        n[N.END], n[N.ENTERED] = NEVER, -1
        return torch.tensor(n, dtype=torch.int64)

    def read(self) -> None:
        """Read the row's integers after they changed in its batch."""
        assert self.batch is not None
        self.now = self.batch.numbers[self.slot, :CHANGING].tolist()

    def tell(self, told: list[int]) -> list[int]:
        """Record newly settled text. Returns it without the end-of-text."""
        self.told += told
        text = self.told[self.reported : self.end]
        self.reported = len(self.told)
        return text

    @property
    def forwards(self) -> int:
        """Number of forward passes of this generation, every view counted."""
        if self.particles is not None:
            return self.particles.forwards
        return self.now[N.STEPS] * self.view_count

    @property
    def block(self) -> int:
        """Index of the active block."""
        return self.now[N.BLOCK]

    @property
    def block_step(self) -> int:
        """Number of forwards spent on the active block."""
        return self.now[N.BLOCK_STEP]

    @property
    def block_masks(self) -> int:
        """Number of masks that a schedule spreads over the active block: those it had when it became active.

        Block-causal models count the whole block, even where it holds the prompt's end, as their own programs do.
        """
        return self.now[N.BLOCK_MASKS]

    @block_masks.setter
    def block_masks(self, masks: int) -> None:
        assert self.batch is not None
        self.batch.numbers[self.slot, N.BLOCK_MASKS] = masks
        self.read()

    @property
    def settled(self) -> int:
        """Length of the committed prefix of the generation region, which can no longer change."""
        return self.now[N.SETTLED]

    @property
    def end(self) -> int | None:
        """Position of the first committed end-of-text in the generation region; None if there is none."""
        end = self.now[N.END]
        return None if end == NEVER else end

    @property
    def ended(self) -> bool:
        """True if the text ends with a settled end-of-text."""
        return self.now[N.TOLD] > self.now[N.END]

    @property
    def finished(self) -> bool:
        """True if everything is settled up to the end of the text, or up to and including an end-of-text."""
        if self.particles is not None:
            return self.particles.won is not None
        return self.lane_finished

    @property
    def lane_finished(self) -> bool:
        """True if this canvas needs no further forward."""
        return self.ended or self.now[N.SETTLED] >= self._text_length

    @property
    def lanes(self) -> "list[Row]":
        """Canvases of the generation, this one among them."""
        return [self] if self.particles is None else self.particles.lanes

    @property
    def layouts(self) -> list[Layout]:
        """Layouts of the canvas and of its further views."""
        return [self.canvas.layout, *(view.canvas.layout for view in self.views)]

    @property
    def passes(self) -> int:
        """Maximum number of canvases in one of its forwards: every view of every canvas."""
        return len(self.lanes) * self.view_count

    @property
    def cost(self) -> int:
        """Number of tokens that its next forward computes."""
        taking = [self] if self.particles is None else self.particles.active
        return sum(span.stop - span.start for lane in taking for span in lane.spans())

    def release(self) -> None:
        """Leave the batch and drop cached keys and values. The canvas stays readable."""
        for lane in self.lanes:
            for plan in (lane._plan, *(view.plan for view in lane.views)):
                plan.memory.content = None
            if lane.batch is not None:
                lane.batch.release(lane)
                lane.batch = None

    def forked(self) -> list[CachePlan]:
        """Copies of the cache plans of the canvas and of its views."""
        return [plan.forked() for plan in (self._plan, *(view.plan for view in self.views))]

    def take_plans(self, plans: list[CachePlan]) -> None:
        """Continue with these cache plans, in the order of `forked`."""
        self._plan = plans[0]
        for view, plan in zip(self.views, plans[1:], strict=True):
            view.plan = plan

    @property
    def completion_tokens(self) -> int:
        """Number of settled tokens up to and including the first end-of-text."""
        return len(self.told)

    def text_tokens(self) -> list[int]:
        """The settled tokens before the end-of-text."""
        return self.told[: self.end]

    @property
    def mask_id(self) -> int | None:
        """Id of the mask token; None if the model has none."""
        return self._mask_id if self.canvas.layout.pattern.noise is None else None

    @property
    def plan(self) -> CachePlan:
        """Cache plan of the canvas."""
        return self._plan

    @property
    def keeps(self) -> bool:
        """True if keys and values of the canvas are kept between forwards."""
        return self.cache is not CacheMode.NONE or self.canvas.layout.pattern.noise is not None

    def first_open(self) -> bool:
        """True if the block's first position is masked and is decided by the output at the position before it."""
        layout, start = self.canvas.layout, self.now[N.START]
        if not layout.pattern.shifted or not self.now[N.FIRST]:
            return False
        place = layout.block_place(self.block)
        return place > 0 and place >= layout.prompt_length + start

    def opens_block(self) -> bool:
        """True if the next forward decides only the block's first position.

        If outputs predict the next position, the first one is decided by the position before it, which forwards over
        the block alone do not compute (Fast-dLLM for Dream, and v2).
        """
        if self.block_step or not self.first_open():
            return False
        size = self.canvas.layout.pattern.causal_block
        if size is None:
            return self.cache is not CacheMode.NONE
        return self.canvas.layout.block_place(self.block) % size == 0

    def span(self) -> ForwardSpan:
        """Span of the next forward of this canvas."""
        return self._span_of(self._plan, self.canvas.layout)

    def _span_of(self, plan: CachePlan, layout: Layout) -> ForwardSpan:
        return plan.span(layout, self.block, self.block_step, self.opens_block(), self.first_open())

    def spans(self) -> list[ForwardSpan]:
        """Spans of the next forward of the canvas and of each further view."""
        if self._same_spans is not None:
            return self._same_spans
        found = [self.span(), *(self._span_of(view.plan, view.canvas.layout) for view in self.views)]
        if self._spans_stay:
            self._same_spans = found
        return found

    def asked_bounds(self) -> tuple[int, int]:
        """Range of region positions covered by the next forward for a sampler that requests more than candidates."""
        layout, span = self.canvas.layout, self.span()
        first, stop = self.now[N.START], self.now[N.STOP]
        size = layout.pattern.causal_block
        # Only positions that the active block sees and that see it.
        lowest = max(span.start, 0 if size is None else layout.block_place(self.block) // size * size)
        if self.traits.whole_region:
            first = max(0, lowest - layout.prompt_length)
            stop = min(layout.gen_length, span.stop - layout.prompt_length)
        if layout.pattern.shifted and layout.prompt_length + first == lowest > 0:
            first += 1  # the output before it is not computed, or belongs to another block
        return first, stop

    def candidates(self) -> Tensor:
        """Masked positions of the active block that the next forward decides, relative to the generation region."""
        start, stop = self.now[N.START], self.now[N.STOP]
        found = self.canvas.masked[start:stop].nonzero()[:, 0] + start
        return found[:1] if self.opens_block() else found

    def note_forward(self, spans: Sequence[ForwardSpan], block: int) -> None:
        """Record that these spans were computed while `block` was active."""
        for plan, layout, span in zip(
            (self._plan, *(view.plan for view in self.views)),
            (self.canvas.layout, *(view.canvas.layout for view in self.views)),
            spans,
            strict=True,
        ):
            plan.note(span, layout, block)


def lanes_of(rows: Sequence[Row]) -> list[Row]:
    """Canvases of these generations that take part in the next forward."""
    return [lane for row in rows for lane in ([row] if row.particles is None else row.particles.active)]
