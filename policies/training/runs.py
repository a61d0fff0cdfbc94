"""Recorded generations to fit warm starts to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from policies.files.atomic import write_file
from policies.files.regular import check_safetensors
from policies.training.rollout import Rollout
from policies.training.transitions import Transitions


@dataclass
class Runs:
    """Recorded generations. `good` is bool [runs], `ends` int64 [runs]: lines of run i are ends[i - 1] ... ends[i]."""

    records: Transitions
    good: Tensor
    ends: Tensor

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> "Runs":
        """Runs of several rollouts in order, with the lines of each run together."""
        return cls.join([_by_run(rollout) for rollout in rollouts])

    @classmethod
    def join(cls, parts: "Sequence[Runs]") -> "Runs":
        """All runs of several parts."""
        records = Transitions.join([part.records for part in parts])
        return cls(records, torch.cat([part.good for part in parts]), torch.cat(list(_shifted_ends(parts))))

    def save(self, path: Path) -> None:
        """Write them; a kill at any point leaves the old file or the new one."""
        tensors = self.records.tensors() | {"good": self.good, "ends": self.ends}
        write_file(path, save_tensors({name: value.contiguous() for name, value in tensors.items()}))

    @classmethod
    def load(cls, path: Path) -> "Runs":
        """Read what `save` wrote."""
        check_safetensors(path)
        found = load_file(path)
        return cls(Transitions.of(found), found["good"], found["ends"])

    def batch(self, runs: Tensor) -> tuple[Transitions, Tensor]:
        """Lines of these runs, and for each line the index into `runs`."""
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.ends[:-1]])
        lines = torch.cat([torch.arange(int(starts[i]), int(self.ends[i])) for i in runs.tolist()])
        counts = (self.ends - starts)[runs]
        return self.records[lines], torch.repeat_interleave(torch.arange(len(runs)), counts)


def _by_run(rollout: Rollout) -> Runs:
    records = rollout.records
    assert records is not None
    counts = torch.bincount(records.row, minlength=len(rollout.correct))
    return Runs(records[records.row.argsort(stable=True)], rollout.correct > 0, counts.cumsum(0))


def _shifted_ends(parts: Sequence[Runs]) -> Iterator[Tensor]:
    before = 0
    for part in parts:
        yield part.ends + before
        before += len(part.records.row)
