"""Data-parallel training over the processes of one `torchrun`, or in a single process."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class DataParallel:
    """Rank of this process and number of processes."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, backend: str = "gloo") -> "DataParallel":
        """Join the other processes if `torchrun` started this one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        dist.init_process_group(backend)
        return cls(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """True if this process writes the shared files."""
        return self.rank == 0

    def sum_gradients(self, network: nn.Module) -> None:
        """Add up every process's gradients, in place."""
        if self.size > 1:
            for p in network.parameters():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                dist.all_reduce(p.grad)

    def total(self, count: int) -> int:
        """Sum of a count over the processes."""
        if self.size == 1:
            return count
        value = torch.tensor(count)
        dist.all_reduce(value)
        return int(value)

    def gather(self, values: Tensor) -> Tensor:
        """Gather the lines of all processes in a single process's order: line i is of process i % size."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """Mean of each metric over the processes."""
        if self.size == 1:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.size).tolist(), strict=True))
