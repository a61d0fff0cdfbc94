"""Training recipe: a TOML file, validated."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from policies.files.toml import TomlTable, read_toml
from policies.tasks import get_task
from server.models.config import Count, Layers

Phases = tuple[tuple[float, int], ...]


class ModelShape(TomlTable):
    d_model: Count
    n_layers: Layers
    n_heads: Count
    mlp_hidden_size: Count
    max_sequence_length: Count
    rope_theta: float = Field(10000.0, gt=0, allow_inf_nan=False)


class OptimizerSettings(TomlTable):
    """`muon` orthogonalises the updates of the blocks' matrices and leaves the rest to AdamW; `adamw` updates all."""

    name: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_steps: int = Field(100, ge=1)
    decay_share: float = Field(0.6, gt=0, le=1, description="last share of the run over which the rate falls to zero")
    clip: float = Field(1.0, gt=0)


class MicroBatch(TomlTable):
    """Rows that share one backward pass. A step's gradient is the sum over the micro-batches that take part in it.

    `kind`: `masked` rows are task problems with a random part of the response masked; `links` are chain problems in
    which only intermediate results are masked, with every copy that would reveal them; `equations` are rows of
    unrelated sums with only the results masked; `frontier` rows resemble a state of confident decoding: known up to a
    ragged edge, free words before it open, and padding masked for as long as the end of the text is.
    """

    name: str
    kind: Literal["masked", "links", "equations", "frontier"] = "masked"
    rows: dict[str, Annotated[int, Field(gt=0, le=1_000_000)]] = Field(
        min_length=1, description="problems per task; links and equations: one entry, any name"
    )
    length: int = Field(gt=0, description="tokens of the canvas; problems that do not fit are drawn again")
    longer_than: int = Field(0, ge=0, description="draw problems of more tokens than this only")
    block_share: float | None = Field(None, ge=0, le=1, description="instead of the recipe's")
    every: Phases = Field(((0.0, 1),), description="[progress from which, take part in every n-th step]; 0: never")

    @field_validator("every")
    @classmethod
    def _starts_at_zero(cls, value: Phases) -> Phases:
        if not value or value[0][0] != 0.0 or list(value) != sorted(value):
            raise ValueError("phases must be in order and begin at progress 0.0")
        return value

    @model_validator(mode="after")
    def _one_count(self) -> "MicroBatch":
        if self.kind in ("links", "equations") and len(self.rows) > 1:
            raise ValueError(f"micro_batch {self.name}: rows of kind {self.kind} have one entry, not {len(self.rows)}")
        return self

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the rows are drawn from."""
        if self.kind == "equations":
            return ()
        return ("chain",) if self.kind == "links" else tuple(self.rows)

    def takes_part(self, step: int, progress: float) -> bool:
        every = [n for start, n in self.every if start <= progress][-1]
        return every > 0 and step % every == 0


class Recipe(TomlTable):
    """A whole run. `max_minutes` ends it early, with the learning rate decayed to zero."""

    seed: int = 0
    steps: int = Field(gt=0)
    max_minutes: float | None = Field(None, gt=0)
    save_every: int = Field(100, gt=0)
    block_share: float = Field(0.3, ge=0, le=1, description="share of rows that look semi-autoregressive")
    block_lengths: tuple[int, ...] = (8, 16, 32)
    padding_weight: float = Field(0.1, ge=0, le=1, description="weight of padding after the first end-of-text")
    loss_weight: Literal["mean", "inverse_t"] = Field(
        "mean", description="divide a row's loss by its masked tokens, or by t times its length: equal in expectation"
    )
    model: ModelShape
    optimizer: OptimizerSettings
    micro_batch: tuple[MicroBatch, ...] = Field(min_length=1)

    @field_validator("micro_batch")
    @classmethod
    def _known_tasks(cls, value: tuple[MicroBatch, ...]) -> tuple[MicroBatch, ...]:
        for batch in value:
            for task in batch.tasks:
                try:
                    get_task(task)
                except KeyError as error:
                    raise ValueError(str(error.args[0])) from None
        return value

    @model_validator(mode="after")
    def _canvases_fit(self) -> "Recipe":
        for batch in self.micro_batch:
            if batch.length > self.model.max_sequence_length:
                raise ValueError(f"micro_batch {batch.name}: length {batch.length} is above max_sequence_length")
        return self


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises ValueError with one line that names the file and the field."""
    return read_toml(path, Recipe)[0]
