"""Forward passes of an original, whole or with a cache, against ours."""

from collections.abc import Callable

import torch
from torch import Tensor

from samplers import Canvas, Layout
from samplers.forward.span import ForwardSpan, KVSlot
from server.backends.torch.backend import TorchBackend
from server.engine import Backend
from server.models.layers import rotate
from server.models.ragged_batch import KeyValues
from tests.conformance.models import fed_logits
from tests.conformance.report import Difference, NotBuilt

TOLERANCE = 1e-4

Tensors = dict[str, Tensor]
ForwardCheck = Callable[[Backend, str, Tensors], None]


def given(tokens: Tensor) -> Canvas:
    """A canvas of tokens without a mask."""
    return Canvas(Layout(0, len(tokens), len(tokens)), tokens, torch.zeros(len(tokens), dtype=torch.bool))


def whole(backend: Backend, name: str, tensors: Tensors) -> None:
    """Rows of one length, padded at the left or not at all; ours are never padded.

    Where an engine gives no logits, both are compared as log-probabilities.
    """
    tokens = tensors[f"{name}.input_ids"]
    mask = tensors.get(f"{name}.attention_mask", torch.ones_like(tokens))
    for ids, valid, expected in zip(tokens, mask.bool(), tensors[f"{name}.logits"], strict=True):
        canvas, logits = given(ids[valid]), expected[valid]
        found = fed_logits(backend, [canvas], [ForwardSpan(0, len(canvas.tokens))])[0]
        if isinstance(backend, TorchBackend):
            compare("logits", found, logits)
        else:
            compare("log-probabilities", found, logits.log_softmax(dim=-1))


def cached(backend: Backend, name: str, tensors: Tensors) -> None:
    """A full forward, and the keys and values that it leaves; the original keeps keys before their rotation."""
    backend = _keeping(backend)
    logits, memory = _remember(backend, tensors)
    compare("logits", logits, tensors[f"{name}.full_logits"][0])
    states = memory.content
    assert isinstance(states, KeyValues)
    length = len(logits)
    cos, sin = (table[:length] for table in backend.network._rotation(length, torch.float32))
    for layer, (key, value) in enumerate(states.states):
        expected = rotate(_positions_first(tensors[f"{name}.past_key_{layer}_pre_rope"], key), cos, sin)
        compare(f"keys of layer {layer}", key, expected)
        compare(f"values of layer {layer}", value, _positions_first(tensors[f"{name}.past_value_{layer}"], value))


def _positions_first(recorded: Tensor, ours: Tensor) -> Tensor:
    """A row's keys or values [1, length, heads * head_dim] or [1, heads, length, head_dim], in the shape of ours."""
    return recorded.view(ours.shape) if recorded.dim() == 3 else recorded[0].transpose(0, 1)


def part(backend: Backend, name: str, tensors: Tensors) -> None:
    """Some positions, the others known from the full forward before."""
    backend = _keeping(backend)
    _, memory = _remember(backend, tensors)
    tokens = tensors["cached.full_input_ids"][0].clone()
    fed = tensors[f"{name}.input_ids"][0]
    replaced = tensors.get(f"{name}.replace_position")
    start = int(tensors[f"{name}.prefix_len"]) if replaced is None else int(replaced[0].int().argmax())
    tokens[start : start + len(fed)] = fed
    found = fed_logits(backend, [given(tokens)], [ForwardSpan(start, start + len(fed), memory)])[0]
    compare("logits", found, tensors[f"{name}.logits"][0])


def _keeping(backend: Backend) -> TorchBackend:
    """The engine that keeps keys and values."""
    if not isinstance(backend, TorchBackend):
        raise NotBuilt("keys and values kept on this engine")
    return backend


def _remember(backend: TorchBackend, tensors: Tensors) -> tuple[Tensor, KVSlot]:
    canvas, memory = given(tensors["cached.full_input_ids"][0]), KVSlot()
    return fed_logits(backend, [canvas], [ForwardSpan(0, len(canvas.tokens), memory)])[0], memory


def compare(what: str, ours: Tensor, originals: Tensor) -> None:
    apart = (ours - originals).abs().max().item()
    if not apart <= TOLERANCE:
        raise Difference(f"{what} are up to {apart:.2e} apart, {TOLERANCE:.0e} is allowed")


CHECKS: dict[str, ForwardCheck] = {
    "single": whole,
    "batch": whole,
    "batch_left_padded": whole,
    "cached": cached,
    "prefix_cache": part,
    "dual_cache": part,
}
