"""Peak memory of serving, measured at start-up, so that no admitted request can exhaust memory."""

from dataclasses import dataclass

import torch
from torch import nn

from samplers import Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import next_query
from server.backends.torch.backend import TorchBackend
from server.engine.scheduler import Limits
from server.runtime.allocator import available_memory, give_back_freed_memory, peak_memory
from server.runtime.threads import run_in_own_thread

HEAP_FRAGMENTATION = 1.0625
"""Heap size after forwards of many different shapes, relative to one of the largest shape."""


class TooLittleMemoryError(Exception):
    """The configured limits do not fit into memory. One line that gives the numbers."""


@dataclass(frozen=True)
class MemoryBound:
    """Bytes needed besides what the process holds once the model is loaded.

    Attributes:
        weights: weights of the model.
        forward: the largest forward that the limits allow.
        cache: keys and values of as many canvases as may keep them, each of maximum length.
        available: bytes available for forward and cache.
    """

    weights: int
    forward: int
    cache: int
    available: int


def bound_memory(backend: TorchBackend, limits: Limits) -> MemoryBound:
    """Run the largest forward that the limits allow, and add up. Raises TooLittleMemoryError if memory is too small."""
    size: int = getattr(torch, backend.info.dtype).itemsize
    per_token = sum(2 * heads * width for heads, width in backend.network.cache_shapes)
    longest = min(backend.info.max_length, limits.tokens)
    cache = limits.memories * longest * per_token * size
    available = available_memory(backend.device)
    embedding = next(module for module in backend.network.modules() if isinstance(module, nn.Embedding))
    least = limits.tokens * embedding.embedding_dim * size * 8  # lower bound: states, norm, queries, keys, values
    if least > available:
        raise TooLittleMemoryError(_refusal(limits, "at least", least, cache, available))
    forward = run_in_own_thread(lambda: _largest_forward(backend, limits, longest))
    if forward + cache > available:
        raise TooLittleMemoryError(_refusal(limits, "", forward, cache, available))
    return MemoryBound(backend.info.parameters * size, forward, cache, available)


def _largest_forward(backend: TorchBackend, limits: Limits, longest: int) -> int:
    """Measured peak bytes of forwards over few long and many short canvases, with as many masks as the model allows."""
    sampler, pattern = get_sampler(backend.info.sampler), backend.info.pattern
    shapes = [
        (max(1, min(limits.rows, limits.tokens // length)), length) for length in (longest, _share(limits, longest))
    ]
    with peak_memory(backend.device) as peak:
        for count, length in shapes:
            given = 0 if pattern.causal_block is None else length - 1  # only a prompt is computed all at once
            block = None if pattern.noise is None else length  # the whole canvas may be a draft
            canvases = [
                Canvas.blank(
                    [0] * given, length - given, backend.info.mask_id, block, pattern=pattern, max_length=length
                )
                for _ in range(count)
            ]
            backend.predict(next_query([Row(canvas, sampler, sampler.Params()) for canvas in canvases]))
    give_back_freed_memory(backend.device)
    return int(peak.grown * HEAP_FRAGMENTATION) if backend.device.type == "cpu" else peak.grown


def _share(limits: Limits, longest: int) -> int:
    """Length of a canvas if the maximum number of rows share a forward."""
    return max(1, min(longest, limits.tokens // limits.rows))


def _refusal(limits: Limits, qualifier: str, forward: int, cache: int, available: int) -> str:
    need = " ".join(filter(None, (qualifier, megabytes(forward))))
    return (
        f"a forward of --max-batch-tokens {limits.tokens} takes {need}, and the caches that --max-batch {limits.rows} "
        f"allows up to {megabytes(cache)}, but only {megabytes(available)} are left beside the weights: "
        "lower them, or --max-model-len"
    )


def megabytes(count: int) -> str:
    """Human-readable number of bytes."""
    return f"{count / 1e6:,.0f} MB"
