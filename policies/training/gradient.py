"""Gradient steps on one batch of rollouts, in micro-batches and over all processes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.network.policy_network import UnmaskingPolicy, score
from policies.training.data_parallel import DataParallel
from policies.training.policy_gradient import clipped_loss, expert_mixture, log_prob, regularisation
from policies.training.recipe import Grpo
from policies.training.rollout import Rollout


@dataclass
class Batch:
    """Rollouts with their advantages.

    Attributes:
        advantage: float32 [rollouts].
        expert: bool [rollouts], decided by a rule.
        speed: [rollouts] in 0..1, or None for a policy that takes none.
    """

    rollout: Rollout
    advantage: Tensor
    expert: Tensor
    speed: Tensor | None


def gradient_steps(
    network: UnmaskingPolicy,
    reference: UnmaskingPolicy | None,
    optimizer: torch.optim.Optimizer,
    stage: Grpo,
    batch: Batch,
    world: DataParallel,
) -> dict[str, float]:
    """Take `stage.inner` steps on one batch.

    Returns gradient norm, clipped share and mean probability of a commit in the last step.

    Raises FloatingPointError if the gradient is not finite.
    """
    config, records, advantage = network.config, batch.rollout.records, batch.advantage
    assert records is not None
    total = len(batch.rollout.correct) * world.size
    weight = 1.0 / (batch.rollout.forwards[records.row] * total)
    if not (stage.entropy or stage.kl):
        # Groups without spread have no gradient.
        lines = (advantage[records.row] != 0).nonzero()[:, 0]
        records, weight = records[lines], weight[lines]
    if not world.total(len(records.row)):
        return {"gradient": 0.0, "clipped": 0.0, "probability": 0.0}
    pieces = [slice(i, i + stage.micro_batch) for i in range(0, len(records.row), stage.micro_batch)]
    olds: list[Tensor] = []
    norm, clipped, share = 0.0, 0.0, 0.0
    for step in range(stage.inner):
        optimizer.zero_grad(set_to_none=False)
        clipped = share = 0.0
        for n, piece in enumerate(pieces):
            part = records[piece]
            rows = part.row
            told = None if batch.speed is None else batch.speed[rows]
            logits = score(network, part.seen, told)
            new = log_prob(logits, part, config)
            if stage.experts:
                new = expert_mixture(new, batch.expert[rows], stage.group, len(stage.experts))
            if step == 0:
                olds.append(new.detach())
            loss = clipped_loss(new, olds[n], advantage[rows], weight[piece], stage.clip)
            before = None
            if reference is not None:
                with torch.no_grad():
                    before = score(reference, part.seen, told)
            loss = loss + regularisation(logits, before, part.candidates, weight[piece], stage.entropy, stage.kl)
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                clipped += float((((new - olds[n]).exp() - 1).abs() > stage.clip).sum())
                share += float((torch.sigmoid(logits) * part.candidates).sum())
        world.sum_gradients(network)
        norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), stage.gradient_clip))
        if not math.isfinite(norm):
            raise FloatingPointError("the gradient is not finite; lower the learning rate")
        optimizer.step()
    lines_count = max(1, len(records.row))
    candidates = max(1, int(records.candidates.sum()))
    return {"gradient": norm, "clipped": clipped / lines_count, "probability": share / candidates}
