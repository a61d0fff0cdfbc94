"""What the block-causal families share: recorded forwards, and the sampling of their originals."""

from typing import Any

import torch
from torch import Tensor

from samplers import Selection, Step
from samplers.forward.span import ForwardSpan, KVSlot
from samplers.ranking import best
from samplers.rules.threshold import Threshold
from samplers.schedule import ScheduledParams, quota
from server.backends.torch.backend import TorchBackend
from tests.conformance.decoders import filtered
from tests.conformance.forwards import Tensors, compare, given
from tests.conformance.models import fed_logits
from tests.conformance.originals import stream_of
from tests.conformance.report import Difference, NotBuilt


def block_causal(backend: TorchBackend, ids: Tensor, size: int, expected: Tensor) -> None:
    """A whole forward in which no position sees a block of so many after its own."""
    length = ids.shape[1]
    found = fed_logits(backend, [given(row) for row in ids], [ForwardSpan(0, length, None, length, size)] * len(ids))
    compare("logits", found, expected)


def masked(backend: TorchBackend, name: str, tensors: Tensors) -> None:
    """A whole forward under a mask of zeros and ones, which says how long the blocks are."""
    block_causal(
        backend, tensors[f"{name}.input_ids"], block_of(tensors[f"{name}.attention_mask"]), tensors[f"{name}.logits"]
    )


def block_of(mask: Tensor) -> int:
    """The length of the blocks of a block-causal mask [length, length]. Raises Difference if it is none."""
    size = int(mask[0].sum())
    index = torch.arange(len(mask)) // size
    if not mask.bool().equal(index[:, None] >= index):
        raise Difference("the recorded mask is not block-causal")
    return size


def cached_prefix(backend: TorchBackend, tensors: Tensors, size: int) -> None:
    """A whole forward, and one over what follows a prefix that an earlier one knows."""
    (ids,) = tensors["cached_prefix.input_ids"]
    start, length = int(tensors["cached_prefix.prefix_len"]), len(ids)
    block_causal(backend, ids[None], size, tensors["cached_prefix.full_logits"])
    stop = start + tensors["cached_prefix.block_logits_with_cache"].shape[1]
    memory = KVSlot()
    fed_logits(backend, [given(ids)], [ForwardSpan(0, start, memory, start, size)])
    found = fed_logits(backend, [given(ids)], [ForwardSpan(start, stop, memory, min(stop, length), size)])
    compare("logits with a cache", found, tensors["cached_prefix.block_logits_with_cache"])


class Drawer:
    """Draws a token at each of some positions as `torch.multinomial` does, in one call for all of them."""

    def __init__(self, seed: int | None, temperature: float, top_k: int = 0, top_p: float = 1.0) -> None:
        self._generator = stream_of(seed)
        self._shape = temperature, top_k, top_p

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n], and how likely each was where it was drawn from, of logits [n, vocab]."""
        p = filtered(logits, *self._shape)
        token = torch.multinomial(p, 1, generator=self._generator)
        return token[:, 0], p.gather(1, token)[:, 0]


def within_range(threshold: float) -> float:
    """A threshold that a request may have, which lets the same confidences pass: those in 0 ... 1."""
    return min(max(threshold, 1e-30), 1.0)


class Strict(Threshold):
    """Theirs: what is surer than the threshold, which may be any number, not what is just as sure."""

    class Params(ScheduledParams):
        threshold: float

    def select(self, step: Step) -> Selection:
        return Selection(self.least(step) | (step.candidate & (step.confidence > step.param("threshold"))))

    def least(self, step: Step) -> Tensor:
        """What is committed whatever the threshold."""
        return best(step.confidence, step.candidate, quota(step))


def parameters(case: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """An original's keyword arguments. Raises NotBuilt if there are any that nobody reads."""
    if unknown := set(case["params"]) - set(defaults):
        raise NotBuilt(f"{case['function']} with {', '.join(sorted(unknown))}")
    return defaults | case["params"]
