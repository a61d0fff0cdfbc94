"""Interface of a model network, implemented by one class per family."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol, Self

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from samplers import BIDIRECTIONAL, AttentionPattern
from samplers.forward.statistics import StatisticsRequest
from server.models.ragged_batch import KeyValues, RaggedBatch, Segment


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """True if a tensor's name matches any of the patterns, in which * stands for any text."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class ModelConfig(Protocol):
    """Properties common to all families' configurations, under whatever names `config.json` has for them."""

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head."""

    @property
    def mask_token_id(self) -> int | None:
        """Id of the mask token; None for a model without one, whose attention pattern defines the alternative."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text."""

    @property
    def max_length(self) -> int:
        """Longest canvas, in tokens."""


class Network(nn.Module):
    """A masked diffusion model. Modules are named as in the checkpoint, so that weights need no renaming.

    Attributes:
        Config: model of `config.json`, for its validation.
        pattern: attention pattern of a canvas.
        block_length: default number of positions denoised together; None is full diffusion.
        ignored: name patterns of checkpoint tensors that are not used.
        float32: name patterns of tensors that stay float32 whatever the model's dtype: a rounded router bias would send
            tokens to other experts.
    """

    Config: ClassVar[type[BaseModel]]
    config: ModelConfig
    pattern: AttentionPattern = BIDIRECTIONAL
    block_length: int | None = None
    ignored: ClassVar[tuple[str, ...]] = ("*rotary_emb.*",)
    float32: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def own_name(cls, config: Any, name: str) -> str:
        """Name in this network of a tensor that files may store under `name`, as a copy or instead."""
        return name

    @classmethod
    def stacked(cls, config: Any, name: str) -> tuple[str, ...]:
        """Names in this network of the tensors that files may store stacked under `name`; empty for other tensors."""
        return ()

    @classmethod
    def stand_in(cls, name: str) -> str | None:
        """Tensor whose values this one takes if a file lacks all of its kind; None if it is required."""
        return None

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Dtype of a tensor in a model of dtype `dtype`."""
        return torch.float32 if matches(name, self.float32) else dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert all tensors like `to`, but never convert those that stay float32."""
        if not self.float32:
            return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
        kept = {name: tensor for name, tensor in self.state_dict().items() if matches(name, self.float32)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            place, _, leaf = name.rpartition(".")
            owner = self.get_submodule(place)
            moved = getattr(owner, leaf)
            if moved.dtype != torch.float32:
                owner._buffers[leaf] = tensor.to(moved.device)
        return self

    @property
    @abstractmethod
    def cache_shapes(self) -> Sequence[tuple[int, int]]:
        """Number and size of key-value heads, for each layer."""

    def new_kv_cache(self, length: int, dtype: torch.dtype, device: torch.device) -> KeyValues:
        """Allocate the key-value cache of a canvas of this length."""
        kept = [(2, length, *shape) for shape in self.cache_shapes]
        return KeyValues([torch.empty(shape, dtype=dtype, device=device) for shape in kept])

    def self_conditioning(self, logits: Tensor, wanted: StatisticsRequest) -> Tensor | None:
        """Self-conditioning signal [n, width] for the next forward pass from logits [n, rows]; None if not used.

        It is passed to the next forward pass in the memory of the packed rows.
        """
        return None

    @abstractmethod
    def packed(self, batch: RaggedBatch) -> Tensor:
        """Normed last hidden states of the wanted tokens of a packed batch, [wanted, width]."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., rows] of normed hidden states [..., width]."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """Normed last hidden states [batch, length, width] of token ids [batch, length]."""
        count, length = tokens.shape
        row = Segment(0, length, length, length, None, self.pattern.causal_block)
        everything = torch.arange(tokens.numel(), device=tokens.device)
        return self.packed(RaggedBatch([row] * count, tokens.flatten(), everything)).view(count, length, -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, rows]; those of a `shifted` model are about the next position."""
        return self.head(self.hidden(tokens))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().__call__(*args, **kwargs)
        return out
