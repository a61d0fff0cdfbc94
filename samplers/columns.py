"""Parameters and lengths of rows as columns, [rows, 1], written when a row is admitted instead of in every step."""

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from pydantic import BaseModel
from torch import Tensor

Kind = Literal["float", "int", "bool"] | tuple[str, ...]
"""Type of a parameter's values; a tuple lists the values of an enumeration."""


@dataclass(frozen=True)
class ColumnSpec:
    """The parameters of a class that can be stored as columns, in order."""

    kinds: dict[str, Kind]

    def values(self, params: BaseModel) -> list[float]:
        """One number per column; NaN for null."""
        return [_number(getattr(params, name), kind) for name, kind in self.kinds.items()]


@lru_cache(maxsize=1024)
def columns_of(params: type[BaseModel]) -> ColumnSpec:
    """The columns of a parameter class. Other parameters are available only in `StepContext.params`."""
    found = {name: _kind(each.annotation) for name, each in params.model_fields.items()}
    return ColumnSpec({name: kind for name, kind in found.items() if kind is not None})


def _kind(annotation: Any) -> Kind | None:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin is Literal:
        values = get_args(annotation)
        return values if all(isinstance(value, str) for value in values) else None
    if origin in (Union, types.UnionType):
        kinds = [_kind(each) for each in get_args(annotation) if each is not type(None)]
        if set(kinds) == {"int", "float"}:
            return "float"
        return kinds[0] if len(kinds) == 1 else None
    if annotation is bool:
        return "bool"
    return "int" if annotation is int else "float" if annotation is float else None


def _number(value: Any, kind: Kind) -> float:
    if value is None:
        return math.nan
    return float(kind.index(value)) if isinstance(kind, tuple) else float(value)


@dataclass(frozen=True, eq=False)
class Columns:
    """Parameters of some rows. A value is converted once and cached as long as these rows stay together.

    Attributes:
        values: float64 [rows, parameters], NaN for null.
    """

    spec: ColumnSpec
    values: Tensor
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def _column(self, name: str) -> tuple[Tensor, Kind]:
        place = self._place(name)
        return self.values[:, place : place + 1], self.spec.kinds[name]

    def _place(self, name: str) -> int:
        try:
            return list(self.spec.kinds).index(name)
        except ValueError:
            raise KeyError(f"there is no numeric parameter {name!r}") from None

    def param(self, name: str, none: float | None = None) -> Tensor:
        """See `StepContext.param`."""
        key = name, none
        if key not in self._kept:
            column, kind = self._column(name)
            if not self.all_given(name):
                if none is None:
                    raise ValueError(f"parameter {name!r} may be null, and nothing is said to stand for it")
                column = column.masked_fill(column.isnan(), none)
            dtype = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}.get(str(kind), torch.int64)
            self._kept[key] = column.to(dtype)
        found: Tensor = self._kept[key]
        return found

    def keep(self, key: str, make: Callable[[], Any]) -> Any:
        """Cache a value derived from these rows' parameters."""
        if (own := ("kept", key)) not in self._kept:
            self._kept[own] = make()
        return self._kept[own]

    def exact(self, name: str) -> Tensor:
        """A numeric parameter of every row in full precision, float64 [rows, 1]; NaN for null."""
        return self._column(name)[0]

    def given(self, name: str) -> Tensor:
        """See `StepContext.given`."""
        if (key := (name, "given")) not in self._kept:
            self._kept[key] = ~self._column(name)[0].isnan()
        found: Tensor = self._kept[key]
        return found

    def all_given(self, name: str) -> bool:
        """True if no row's parameter is null."""
        return self._nulls(name) == 0

    def any_given(self, name: str) -> bool:
        """True if some row's parameter is not null; False if the parameter does not exist."""
        if name not in self.spec.kinds:
            return False
        return self._nulls(name) < len(self.values)

    def _nulls(self, name: str) -> int:
        """Number of rows whose parameter is null."""
        if "nulls" not in self._kept:
            self._kept["nulls"] = self.values.isnan().sum(dim=0).tolist()
        return int(self._kept["nulls"][self._place(name)])

    def option(self, name: str, value: str) -> Tensor:
        """See `StepContext.option`."""
        if (key := (name, "option", value)) not in self._kept:
            column, kind = self._column(name)
            if not isinstance(kind, tuple) or value not in kind:
                raise KeyError(f"parameter {name!r} has no value {value!r}")
            self._kept[key] = column == kind.index(value)
        found: Tensor = self._kept[key]
        return found

    def any_has(self, name: str, value: str) -> bool:
        """True if some row's enumerated parameter has this value."""
        return bool(self.keep(f"any {name} {value}", lambda: bool(self.option(name, value).any())))

    def all_have(self, name: str, value: str) -> bool:
        """True if every row's enumerated parameter has this value."""
        return bool(self.keep(f"all {name} {value}", lambda: bool(self.option(name, value).all())))

    @classmethod
    def of(cls, params: Sequence[BaseModel], device: torch.device | None = None) -> "Columns":
        """Columns of parameters of one class."""
        spec = columns_of(type(params[0]))
        values = torch.tensor([spec.values(each) for each in params], dtype=torch.float64, device=device)
        return cls(spec, values.view(len(params), len(spec.kinds)))


@dataclass(frozen=True)
class LayoutColumns:
    """Canvas lengths of some rows, int64 [rows, 1], and traits of their models, bool [rows, 1].

    Attributes:
        length, prompt_length, gen_length: number of positions of the whole canvas, of the prompt, and of the generation
            region.
        block_length, blocks: positions per block, and number of blocks.
        denoised_length: number of positions of all blocks, counted as whole: the steps of a schedule of one position
            per step.
        noise: vocabulary size of a model without a mask token; 0 if there is a mask token.
        strict: the family's own program requires a confidence above the threshold, not equal to it.
    """

    length: Tensor
    prompt_length: Tensor
    gen_length: Tensor
    block_length: Tensor
    blocks: Tensor
    denoised_length: Tensor
    noise: Tensor
    strict: Tensor
