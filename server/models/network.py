"""What the engine asks of a model: a class for each family does it."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from samplers import BIDIRECTIONAL, Scheme
from samplers.prediction import Wanted
from server.models.packed import KeyValues, Packed, Row


class ModelConfig(Protocol):
    """What every family's configuration says, under whatever names `config.json` has for it."""

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head."""

    @property
    def mask_token_id(self) -> int | None:
        """The mask token; None of a model without one, whose scheme says what is there instead."""

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
        scheme: how it reads a canvas.
        block_length: what is denoised together unless a request says otherwise; None is full diffusion.
        ignored: what the names of tensors begin with that are in checkpoints and not used.
    """

    Config: ClassVar[type[BaseModel]]
    config: ModelConfig
    scheme: Scheme = BIDIRECTIONAL
    block_length: int | None = None
    ignored: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def cache_shapes(self) -> Sequence[tuple[int, int]]:
        """For each layer, heads and size of a head of the keys and values that a token leaves."""

    def room(self, length: int, dtype: torch.dtype, device: torch.device) -> KeyValues:
        """Room for what is kept of a canvas of this length."""
        kept = [(2, length, *shape) for shape in self.cache_shapes]
        return KeyValues([torch.empty(shape, dtype=dtype, device=device) for shape in kept])

    def remembered(self, logits: Tensor, wanted: Wanted) -> Tensor | None:
        """What the next forward of a canvas is to know of this one's logits [n, rows], if anything.

        [n, width], which comes back in the memory of the packed rows.
        """
        return None

    @abstractmethod
    def packed(self, batch: Packed) -> Tensor:
        """Normed last hidden states of the tokens that a packed batch wants, [wanted, width]."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., rows] of normed hidden states [..., width]."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """Normed last hidden states [batch, length, width] of rows of one length, ids [batch, length]."""
        count, length = tokens.shape
        row = Row(0, length, length, length, None, self.scheme.causal_block)
        everything = torch.arange(tokens.numel(), device=tokens.device)
        return self.packed(Packed([row] * count, tokens.flatten(), everything)).view(count, length, -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, rows], where a `shifted` model says what comes next."""
        return self.head(self.hidden(tokens))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().__call__(*args, **kwargs)
        return out
