"""Request of a step for one canvas, in the form sent to vLLM's workers inside a pooling request.

Numbers are sent as bytes: for a list of a few hundred, msgpack would take longer than the model takes for a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.forward.prediction import Prediction
from samplers.forward.statistics import LogitBonus, Statistic, StatisticsRequest
from samplers.forward.token_choice import TokenChoices

TASK = "token_classify"
"""vLLM's pooling task that returns numbers for single positions."""

INSTRUCTION = "unmask"
"""Key of the packed instruction in a pooling request's keyword arguments."""

PackedInstruction = dict[str, Any]
"""Of bytes, strings, numbers, lists and dicts only."""


@dataclass(frozen=True)
class Instruction:
    """Positions and statistics requested of one canvas.

    Attributes:
        position: int64 [n], positions on the canvas.
        wanted: statistics of each of these positions.
        logits: True to return all logits instead, for views of a generation that are mixed elsewhere: vLLM may compute
            them in different batches.
    """

    position: Tensor
    wanted: StatisticsRequest
    logits: bool = False

    @property
    def columns(self) -> int:
        """Number of columns of the answer (see `Prediction.table`)."""
        return self.wanted.columns

    def pack(self) -> PackedInstruction:
        """Convert to plain data; absent or empty fields are left out."""
        wanted = self.wanted
        packed: PackedInstruction = {"position": _pack(self.position, torch.int32)}
        if wanted.statistics:
            packed["statistics"] = sorted(wanted.statistics)
        if wanted.only:
            packed["only"] = {name: _pack(rows, torch.bool) for name, rows in wanted.only.items()}
        if self.logits:
            packed["logits"] = True
        if wanted.choices is not None:
            packed["choices"] = [
                _pack(wanted.choices.temperature, torch.float64),
                _pack(wanted.choices.top_p, torch.float64),
                _pack(wanted.choices.top_k, torch.int64),
            ]
        if wanted.uniform is not None:
            packed["uniform"] = _pack(wanted.uniform, torch.float64)
        if wanted.top:
            packed["top"] = wanted.top
        if wanted.named is not None:
            packed["named"] = [wanted.named.shape[1], _pack(wanted.named, torch.int32)]
        if wanted.bonus is not None:
            packed["bonus"] = [
                _pack(wanted.bonus.index, torch.int32),
                _pack(wanted.bonus.token, torch.int32),
                _pack(wanted.bonus.value, torch.float32),
            ]
        return packed

    @classmethod
    def unpack(cls, packed: PackedInstruction) -> "Instruction":
        """Inverse of `pack`."""
        position = _unpack(packed["position"], torch.int32).long()
        choices = named = bonus = None
        if "choices" in packed:
            temperature, top_p, top_k = packed["choices"]
            choices = TokenChoices(
                _unpack(temperature, torch.float64), _unpack(top_p, torch.float64), _unpack(top_k, torch.int64)
            )
        if "named" in packed:
            width, tokens = packed["named"]
            named = _unpack(tokens, torch.int32).long().view(-1, width)
        if "bonus" in packed:
            index, token, value = packed["bonus"]
            bonus = LogitBonus(
                _unpack(index, torch.int32).long(), _unpack(token, torch.int32).long(), _unpack(value, torch.float32)
            )
        wanted = StatisticsRequest(
            statistics=frozenset(Statistic(name) for name in packed.get("statistics", ())),
            only={name: _unpack(rows, torch.bool) for name, rows in packed.get("only", {}).items()},
            choices=choices,
            uniform=_unpack(packed["uniform"], torch.float64) if "uniform" in packed else None,
            top=packed.get("top", 0),
            named=named,
            bonus=bonus,
        )
        return cls(position, wanted, packed.get("logits", False))


def together(asked: Sequence[Instruction]) -> StatisticsRequest:
    """Request for all positions of several instructions, concatenated."""
    return StatisticsRequest.join([each.wanted for each in asked], [len(each.position) for each in asked])


def answers(asked: Sequence[Instruction], prediction: Prediction) -> list[Tensor]:
    """The prediction for `together`, split into one answer per instruction: float32 [n, columns]."""
    found, first = [], 0
    for each in asked:
        stop = first + len(each.position)
        found.append(prediction.part(first, stop).table(each.wanted))
        first = stop
    return found


def read(answer: Tensor, wanted: StatisticsRequest) -> Prediction:
    """Convert an answer to a prediction of the requested statistics."""
    named = None if wanted.named is None else wanted.named.shape[1]
    return Prediction.of_table(answer, wanted.statistics, wanted.top or None, named)


def _pack(values: Tensor, dtype: torch.dtype) -> bytes:
    return values.to(dtype).cpu().numpy().tobytes()


def _unpack(data: bytes, dtype: torch.dtype) -> Tensor:
    # A bytearray, because a tensor over bytes would be read-only.
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
