"""The record of a step of a generation, passed from the loop to its listeners."""

from dataclasses import dataclass, field

from samplers.contract import SamplerError


class ForwardError(SamplerError):
    """Failure of a generation's forward pass, raised from its cause. Not a fault of the sampler."""


@dataclass(slots=True)
class StepEvent:
    """One forward pass of one generation. Positions are relative to its generation region.

    Positions from the text's length on belong to the last block but not to the text.

    Attributes:
        forward: number of the generation's forward passes so far, including this one.
        positions, tokens, confidences: commits of this pass.
        filled: positions after the end-of-text that became padding.
        settled: number of tokens generated so far: length of the text's prefix that can no longer change, including the
            end-of-text but not padding.
        text_tokens: tokens that settled with this pass, without the end-of-text.
        replaced: committed positions that had another token before; a subset of `positions`.
        remasked: positions that were masked again.
        draft: for drafting samplers, the token that would be committed now at each open position of the block, in
            order.
        error: reason why the generation cannot go on; all other fields are then empty.
    """

    forward: int = 0
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    settled: int = 0
    text_tokens: list[int] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    remasked: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    error: SamplerError | None = None
