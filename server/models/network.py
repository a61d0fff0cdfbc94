"""What the engine asks of a model: a class for each family does it."""

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
    """Match the name of a tensor against patterns, in which * stands for anything."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class ModelConfig(Protocol):
    """What every family's configuration says, under whatever names `config.json` has for it."""

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head."""

    @property
    def mask_token_id(self) -> int | None:
        """The mask token; None of a model without one, whose pattern says what is there instead."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text."""

    @property
    def max_length(self) -> int:
        """Longest canvas, in tokens."""


class Network(nn.Module):
    """A masked diffusion model. Module names are the checkpoint's own tensor names, so weights need no renaming.

    Attributes:
        Config: validates `config.json`.
        pattern: how it reads a canvas.
        block_length: what is denoised together unless a request says otherwise; None is full diffusion.
        ignored: patterns of names of tensors that are in checkpoints and not used.
        float32: patterns of names of tensors that stay float32 whatever type the others have: a rounded bias of a
            router sends tokens to other experts.
    """

    Config: ClassVar[type[BaseModel]]
    config: ModelConfig
    pattern: AttentionPattern = BIDIRECTIONAL
    block_length: int | None = None
    ignored: ClassVar[tuple[str, ...]] = ("*rotary_emb.*",)
    float32: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def own_name(cls, config: Any, name: str) -> str:
        """The name here of a tensor that files may hold under this one too, as a copy or in its place."""
        return name

    @classmethod
    def stacked(cls, config: Any, name: str) -> tuple[str, ...]:
        """The names here of tensors that files may hold one upon the other under this one; none for all others."""
        return ()

    @classmethod
    def stand_in(cls, name: str) -> str | None:
        """The tensor that has the values of this one, where a file has none like it; None where there must be one."""
        return None

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type of a tensor of that name, where the model's is `dtype`."""
        return torch.float32 if matches(name, self.float32) else dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert all tensors, as `to` does, but none that stays float32 to another type."""
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
        """For each layer, heads and size of a head of the keys and values that a token leaves."""

    def new_kv_cache(self, length: int, dtype: torch.dtype, device: torch.device) -> KeyValues:
        """Room for what is kept of a canvas of this length."""
        kept = [(2, length, *shape) for shape in self.cache_shapes]
        return KeyValues([torch.empty(shape, dtype=dtype, device=device) for shape in kept])

    def self_conditioning(self, logits: Tensor, wanted: StatisticsRequest) -> Tensor | None:
        """What the next forward of a canvas is to know of this one's logits [n, rows], if anything.

        [n, width], which comes back in the memory of the packed rows.
        """
        return None

    @abstractmethod
    def packed(self, batch: RaggedBatch) -> Tensor:
        """Normed last hidden states of the tokens that a packed batch wants, [wanted, width]."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., rows] of normed hidden states [..., width]."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """Normed last hidden states [batch, length, width] of rows of one length, ids [batch, length]."""
        count, length = tokens.shape
        row = Segment(0, length, length, length, None, self.pattern.causal_block)
        everything = torch.arange(tokens.numel(), device=tokens.device)
        return self.packed(RaggedBatch([row] * count, tokens.flatten(), everything)).view(count, length, -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, rows], where a `shifted` model says what comes next."""
        return self.head(self.hidden(tokens))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().__call__(*args, **kwargs)
        return out
