"""Warm starts: fit a policy to what whole runs turned out to be, or to what a rule would do, before GRPO."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from policies.files.atomic import write_file
from policies.files.regular import check_safetensors
from policies.network.observation import Observation
from policies.network.policy_network import UnmaskingPolicy, score
from policies.training.rollout import Rollout, Transitions

Label = Literal["outcome", "oracle", "imitation"]

_RECORDS = ("row", "candidates", "action", "committed", "confidence", "order", "right")
_SEEN = ("features", "masked", "valid", "time", "tokens")


@dataclass
class Runs:
    """Recorded generations. `good` is bool [runs], `ends` int64 [runs]: lines of run i are ends[i - 1] ... ends[i]."""

    records: Transitions
    good: Tensor
    ends: Tensor

    @classmethod
    def of(cls, rollouts: list[Rollout]) -> "Runs":
        """Rollouts one after the other, the lines of each run together."""
        parts, good, ends, before = [], [], [], 0
        for rollout in rollouts:
            assert rollout.records is not None
            order = rollout.records.row.argsort(stable=True)
            counts = torch.bincount(rollout.records.row, minlength=len(rollout.correct))
            parts.append(pick(rollout.records, order))
            good.append(rollout.correct > 0)
            ends.append(counts.cumsum(0) + before)
            before += len(order)
        return cls(join(parts), torch.cat(good), torch.cat(ends))

    @classmethod
    def join(cls, parts: "list[Runs]") -> "Runs":
        """All runs of several."""
        ends, before = [], 0
        for part in parts:
            ends.append(part.ends + before)
            before += len(part.records.row)
        return cls(join([part.records for part in parts]), torch.cat([part.good for part in parts]), torch.cat(ends))

    def save(self, path: Path) -> None:
        """Write them; a kill at any point leaves the old file or the new one."""
        records, seen = self.records, self.records.seen
        tensors: dict[str, Tensor | None] = {
            **{name: getattr(records, name) for name in _RECORDS},
            **{f"seen.{name}": getattr(seen, name) for name in _SEEN},
            "good": self.good,
            "ends": self.ends,
        }
        there = {name: value.contiguous() for name, value in tensors.items() if value is not None}
        write_file(path, save_tensors(there))

    @classmethod
    def load(cls, path: Path) -> "Runs":
        """What `save` wrote."""
        check_safetensors(path)
        found = load_file(path)
        seen = Observation(**{name: found.get(f"seen.{name}") for name in _SEEN})  # type: ignore[arg-type]
        records = Transitions(seen=seen, **{name: found.get(name) for name in _RECORDS})  # type: ignore[arg-type]
        return cls(records, found["good"], found["ends"])

    def batch(self, runs: Tensor) -> tuple[Transitions, Tensor]:
        """The lines of these runs, and which of them each belongs to."""
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.ends[:-1]])
        lines = torch.cat([torch.arange(int(starts[i]), int(self.ends[i])) for i in runs.tolist()])
        counts = (self.ends - starts)[runs]
        return pick(self.records, lines), torch.repeat_interleave(torch.arange(len(runs)), counts)


def pick(records: Transitions, lines: Tensor) -> Transitions:
    """Some lines."""
    return Transitions(
        row=records.row[lines],
        seen=records.seen[lines],
        candidates=records.candidates[lines],
        action=records.action[lines],
        committed=records.committed[lines],
        confidence=records.confidence[lines],
        order=None if records.order is None else records.order[lines],
        right=None if records.right is None else records.right[lines],
    )


def _padded(records: Transitions, length: int) -> Transitions:
    """Positions that belong to no region up to `length`."""
    if (more := length - records.candidates.shape[1]) == 0:
        return records
    seen = records.seen
    return Transitions(
        row=records.row,
        seen=Observation(
            F.pad(seen.features, (0, 0, 0, more)),
            F.pad(seen.masked, (0, more)),
            F.pad(seen.valid, (0, more)),
            seen.time,
            None if seen.tokens is None else F.pad(seen.tokens, (0, more), value=-1),
        ),
        candidates=F.pad(records.candidates, (0, more)),
        action=F.pad(records.action, (0, more)),
        committed=F.pad(records.committed, (0, more)),
        confidence=F.pad(records.confidence, (0, more), value=-torch.inf),
        order=None if records.order is None else F.pad(records.order, (0, more), value=-1),
        right=None if records.right is None else F.pad(records.right, (0, more)),
    )


def join(parts: list[Transitions]) -> Transitions:
    """Lines one after the other, padded to the longest region."""
    length = max(part.candidates.shape[1] for part in parts)
    parts = [_padded(part, length) for part in parts]
    seen = [part.seen for part in parts]
    tokens = [each.tokens for each in seen if each.tokens is not None]
    orders = [part.order for part in parts if part.order is not None]
    rights = [part.right for part in parts if part.right is not None]
    return Transitions(
        row=torch.cat([part.row for part in parts]),
        seen=Observation(
            torch.cat([each.features for each in seen]),
            torch.cat([each.masked for each in seen]),
            torch.cat([each.valid for each in seen]),
            torch.cat([each.time for each in seen]),
            torch.cat(tokens) if tokens else None,
        ),
        candidates=torch.cat([part.candidates for part in parts]),
        action=torch.cat([part.action for part in parts]),
        committed=torch.cat([part.committed for part in parts]),
        confidence=torch.cat([part.confidence for part in parts]),
        order=torch.cat(orders) if orders else None,
        right=torch.cat(rights) if rights else None,
    )


def outcome_loss(logits: Tensor, committed: Tensor, run: Tensor, good: Tensor) -> Tensor:
    """Negative log-likelihood of which runs came out right, if each commit is harmless with chance sigmoid(logit).

    A run is right if all its commits were harmless (a noisy-and): no reference and no label per position is needed.

    Args:
        logits: [n, length].
        committed: bool [n, length].
        run: int64 [n], which run each line belongs to.
        good: bool [runs].
    """
    each = (F.logsigmoid(logits) * committed).sum(dim=1)
    total = torch.zeros(len(good)).index_add(0, run, each).clamp(max=-1e-5)
    return -torch.where(good, total, torch.log(-torch.expm1(total))).mean()


def imitation_loss(logits: Tensor, target: Tensor, candidates: Tensor) -> Tensor:
    """Cross-entropy to a set of commits, bool [n, length], over candidates."""
    each = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    return each[candidates].mean()


def _neutral_score(network: UnmaskingPolicy, records: Transitions, speed: Tensor) -> Tensor:
    """Logits without what speed adds to them, at any speed: what is right does not depend on it.

    Fitted at one speed only, a network would read the others as noise.
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
    """Supervised steps of `batch` runs each; yields each step's loss."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    network.train().requires_grad_(True)
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
