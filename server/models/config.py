"""Common base of all families' configurations: defaults, refused variants, special tokens."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_LAYERS = 1000
"""Upper bound of layers, and of experts over all layers: building modules takes long, whatever their size."""
MAX_EXPERTS = 25_000
MAX_COUNT = 2**24
"""Upper bound of everything else: widths, heads, positions, vocabulary."""

Count = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Layers = Annotated[int, Field(gt=0, le=MAX_LAYERS)]
TokenIds = int | tuple[int, ...]


class CheckpointConfig(BaseModel):
    """Base of a family's configuration. Null entries count as missing, as in transformers' classes.

    Attributes:
        published: the original class's defaults, where they differ from the fields'.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
    published: ClassVar[dict[str, Any]] = {}

    rms_norm_eps: float = Field(1e-6, ge=0)
    eos_token_id: TokenIds = ()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return cls.published | {key: value for key, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _refuse_variants(self) -> Self:
        for key, value in self.built.items():
            if getattr(self, key) not in (value if isinstance(value, tuple) else (value,)):
                raise ValueError(f"{key} = {getattr(self, key)!r} is a variant that is not built (only {value!r} is)")
        return self

    @model_validator(mode="after")
    def _tokens_are_in_the_vocabulary(self) -> Self:
        mask: int | None = getattr(self, "mask_token_id", None)
        for key, ids in (("mask_token_id", () if mask is None else (mask,)), ("eos_token_id", self.end_ids)):
            for id in ids:
                if not 0 <= id < self.rows:
                    raise ValueError(f"{key} = {id} is outside the vocabulary of {self.rows}")
        return self

    @model_validator(mode="after")
    def _few_enough_experts(self) -> Self:
        layers, experts = getattr(self, "num_hidden_layers", 0), getattr(self, "num_experts", 0)
        if layers * experts > MAX_EXPERTS:
            raise ValueError(
                f"num_experts = {experts} in each of num_hidden_layers = {layers} are more than {MAX_EXPERTS} in all"
            )
        return self

    @property
    def built(self) -> dict[str, Any]:
        """Keys with the only values (or tuple of values) that the family's network implements."""
        return {}

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head."""
        raise NotImplementedError

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset((self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id)


class RotaryConfig(CheckpointConfig):
    """Configuration of a family whose layers all use the same, default rotary embedding."""

    rope_theta: float = Field(10_000.0, gt=0)
    partial_rotary_factor: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _flat_rotation(cls, data: Any) -> Any:
        """Merge the rotary parameters into the top level: transformers 5 nests them in `rope_parameters`.

        `rope_scaling` is the older name of that entry. Variants other than the default, and contradictory values, are
        refused.
        """
        if not isinstance(data, dict):
            return data
        flat = dict(data)
        for key in ("rope_scaling", "rope_parameters"):
            for name, value in _default_rotation(key, flat.pop(key, None)).items():
                if flat.get(name) not in (None, value):
                    raise ValueError(f"{name} = {flat[name]!r}, but {key} says {value!r}")
                flat[name] = value
        return flat


def _default_rotation(key: str, said: Any) -> dict[str, Any]:
    """Parameters of a default rotary embedding described in one entry. Raises ValueError for any other kind."""
    if not said:
        return {}
    if not isinstance(said, dict):
        raise ValueError(f"{key} = {said!r} is not an object")
    if isinstance(said.get("full_attention"), dict):  # nested by kind of layer; this family has only one kind
        said = said["full_attention"]
    if (said.get("rope_type") or said.get("type") or "default") != "default":
        raise ValueError(f"{key} = {said!r} is a variant that is not built (only the default rotation is)")
    names = ("rope_theta", "partial_rotary_factor")
    return {name: said[name] for name in names if said.get(name) is not None}
