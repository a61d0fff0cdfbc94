"""Weights laid out for the processor's matrix products, once, when a model is loaded for inference."""

import torch
from torch import Tensor, nn

from server.runtime.allocator import give_back_freed_memory

PORTIONS = 16
"""Times that the memory of plain weights goes back to the system: packed ones seldom fit where those were."""

PACKED_TYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN reads it.

    A plain layer multiplies through a library that does not use the widest instructions of every processor, or lays the
    weight out anew in every call: on such machines this is two to three times as fast, elsewhere no slower.
    Nothing can be learnt through it, and it has no plain weight.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def pack_linear_layers(network: nn.Module) -> None:
    """Put packed layers in the place of a network's plain ones, in place, one by one; on a processor only."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn:
        return
    parents = [module for module in network.modules() if type(module) is not nn.Linear]  # which would keep them alive
    portion = sum(weight.nbytes for weight in network.parameters()) // PORTIONS
    freed = 0
    for module in parents:
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype in PACKED_TYPES:
                setattr(module, name, PackedLinear(child))
                freed += child.weight.nbytes
                if freed > portion:
                    del child  # the last plain layer, which goes with the others
                    give_back_freed_memory(torch.device("cpu"))
                    freed = 0
