"""The stage that fits a policy to collected runs, a warm start for GRPO."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from policies.network.policy_network import UnmaskingPolicy, score
from policies.training.fit_losses import imitation_loss, outcome_loss
from policies.training.recipe import Fit, Label
from policies.training.runs import Runs
from policies.training.training_run import TrainingRun
from policies.training.transitions import Transitions

REPORT_EVERY = 50


def fit_stage(run: TrainingRun, number: int, stage: Fit) -> Iterator[dict[str, Any]]:
    """Fit the network to all runs that were collected before this stage; yields a line every 50 steps."""
    steps = fit(
        run.network,
        run.collected.before(number),
        label=stage.label,
        steps=stage.steps,
        batch=stage.batch,
        learning_rate=stage.learning_rate,
        seed=random.Random(f"{run.recipe.seed}/{number}/fit").getrandbits(31),
        threshold=stage.threshold,
    )
    losses: list[float] = []
    for step, loss in enumerate(steps, 1):
        losses.append(loss)
        if step % REPORT_EVERY == 0 or step == stage.steps:
            yield {"step": step, "of": stage.steps, "loss": sum(losses) / len(losses)}
            losses.clear()


def _neutral_score(network: UnmaskingPolicy, records: Transitions, speed: Tensor) -> Tensor:
    """Logits at a speed without its push: what is right does not depend on speed.

    Fitted at one speed only, a network would treat the others as noise.
    """
    if not network.config.takes_speed:
        return score(network, records.seen, None)
    return score(network, records.seen, speed) - network.pushed(speed)


def fit(
    network: UnmaskingPolicy,
    runs: Runs,
    *,
    label: Label,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    threshold: float = 0.9,
) -> Iterator[float]:
    """Take supervised steps of `batch` runs each; yields the loss of each."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (1 - step / steps) ** 0.5
        chosen = torch.randint(len(runs.good), (batch,), generator=generator)
        records, run = runs.batch(chosen)
        logits = _neutral_score(network, records, torch.rand(batch, generator=generator)[run])
        match label:
            case "outcome":
                loss = outcome_loss(logits, records.committed, run, runs.good[chosen])
            case "oracle":
                assert records.right is not None
                loss = imitation_loss(logits, records.right, records.candidates)
            case "imitation":
                loss = imitation_loss(logits, records.confidence >= threshold, records.candidates)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        yield loss.item()
