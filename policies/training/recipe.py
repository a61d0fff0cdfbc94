"""Training recipes: validated TOML files."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from policies.files.regular import MOST_LISTED, MOST_WORD
from policies.files.toml import TomlTable, read_toml
from policies.network.config import PolicyConfig
from policies.training.rewards import Form

MOST_ROWS = 1_000_000
"""Upper bound of counts; more is taken for a typing error."""

Label = Literal["outcome", "oracle", "imitation"]
"""See `Fit`."""

Length = Annotated[int, Field(gt=0, le=2**24)]


class Collect(TomlTable):
    """Collect runs: careful ones by a threshold with bold steps, or by the policy itself at random cuts."""

    kind: Literal["collect"] = "collect"
    runs: int = Field(gt=0)
    by: Literal["explorer", "policy"] = "explorer"
    always: float = Field(0.15, ge=0, le=1, description="explorer: share of runs that are bold at every step")
    thresholds: tuple[float, ...] = Field((0.9, 0.95, 0.99), min_length=1, description="explorer: how careful")
    shifts: float = Field(6.0, ge=0, description="policy: logits are lowered by up to this")


class Fit(TomlTable):
    """Supervised steps on all runs collected so far.

    Labels: `outcome`, whether a run came out right; `oracle`, which tokens were right in every state (the task must
    know its solutions); `imitation`, what a threshold would commit.
    """

    kind: Literal["fit"] = "fit"
    label: Label = "outcome"
    steps: int = Field(gt=0)
    batch: int = Field(42, gt=0, description="runs a step")
    learning_rate: float = Field(3e-3, gt=0)
    threshold: float = Field(0.9, gt=0, le=1, description="imitation: the rule's threshold")


class Shift(TomlTable):
    """Move the logits, `logit <- scale * (logit - logit(cut))`, so that draws are about right and still explore."""

    kind: Literal["shift"] = "shift"
    cut: float = Field(gt=0, lt=1)
    scale: float = Field(1.0, gt=0)


class Grpo(TomlTable):
    """Policy gradient on fresh rollouts."""

    kind: Literal["grpo"] = "grpo"
    updates: int = Field(gt=0, description="rollout batches")
    prompts: int = Field(16, gt=0, le=MOST_ROWS)
    group: int = Field(8, ge=2, le=MOST_ROWS)
    experts: tuple[float, ...] = Field((), description="thresholds of expert rollouts added to each group")
    expert_block_length: int | None = Field(32, gt=0)
    alphas: tuple[float, ...] = Field(
        (1.0,), min_length=1, max_length=MOST_LISTED, description="drawn anew for each group"
    )
    form: Form = "multiplicative"
    likelihood: float = Field(
        0.0, ge=0, description="weight of the mean log-probability of the committed tokens in the reward"
    )
    scale_by_deviation: bool = Field(False, description="divide advantages by a running deviation per alpha")
    inner: int = Field(2, gt=0, description="gradient steps on each rollout batch")
    clip: float = Field(0.5, gt=0)
    learning_rate: float = Field(3e-5, gt=0)
    warmup: int = Field(0, ge=0, description="updates")
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: float = Field(0.1, ge=0)
    gradient_clip: float = Field(0.2, gt=0)
    entropy: float = Field(0.0, ge=0)
    kl: float = Field(0.0, ge=0, description="weight of the divergence from the policy as this stage found it")
    allow_empty: bool = Field(False, description="an empty draw costs a forward, as in the paper's training")
    micro_batch: int = Field(4096, gt=0, description="recorded steps in one backward pass")

    @model_validator(mode="after")
    def _fits_together(self) -> "Grpo":
        if min(self.alphas) < 0:
            raise ValueError("alphas cannot be negative")
        return self


Stage = Annotated[Collect | Fit | Shift | Grpo, Field(discriminator="kind")]


class PolicyRecipe(TomlTable):
    """A whole run: stages one after the other.

    Attributes:
        tasks, block_lengths: sources of problems, and ways of decoding them; all pairs of the two take turns.
        gen_length: positions of the canvas; without it each task's own.
        save_every: GRPO updates between checkpoints; there is always one at a stage's end.
        check: number of held-out problems on which checkpoints are compared; 0 compares none.
    """

    seed: int = Field(0, ge=-(2**63), lt=2**63)
    tasks: tuple[Annotated[str, Field(max_length=MOST_WORD)], ...] = Field(min_length=1, max_length=MOST_LISTED)
    gen_length: Length | None = None
    block_lengths: tuple[Length | Literal["full"], ...] = Field(("full",), min_length=1, max_length=MOST_LISTED)
    prompt_length: int | None = Field(None, gt=0, description="only the last tokens of a longer prompt")
    batch: int = Field(64, gt=0, le=MOST_ROWS, description="rows of one forward pass")
    save_every: int = Field(10, gt=0)
    check: int = Field(100, ge=0)
    policy: PolicyConfig
    stage: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "PolicyRecipe":
        collected = False
        for i, stage in enumerate(self.stage):
            collected = collected or stage.kind == "collect"
            if stage.kind == "fit" and not collected:
                raise ValueError(f"stage {i}: there is nothing to fit to before a stage of kind collect")
            if stage.kind != "collect" and self.policy.action == "dpls" and stage.kind != "grpo":
                raise ValueError(f"stage {i}: {stage.kind} is for bernoulli actions")
            if stage.kind == "grpo" and len(stage.alphas) > 1 and not self.policy.takes_speed:
                raise ValueError(f"stage {i}: several alphas need policy.takes_speed = true")
            if stage.kind == "grpo" and stage.experts and self.policy.action == "dpls":
                raise ValueError(f"stage {i}: experts have no order of draws; use bernoulli actions")
        return self


def load_policy_recipe(path: Path) -> tuple[PolicyRecipe, dict[str, Any]]:
    """Read a recipe and its plain content. Raises ValueError with one line that names file and field."""
    return read_toml(path, PolicyRecipe)
