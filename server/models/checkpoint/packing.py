"""Weights packed for the CPU's matrix kernels, once, when a model is loaded for inference."""

import torch
from torch import Tensor, nn

from server.runtime.allocator import give_back_freed_memory

RELEASES = 16
"""Number of times that freed plain weights are returned to the system: packed weights seldom reuse their memory."""

PACKED_TYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """Linear layer with its weight in oneDNN's layout.

    Plain layers use a library that lacks some CPUs' widest instructions, or repack the weight in every call: there
    packing is two to three times as fast, elsewhere no slower. Inference only: it has no gradient and no plain weight.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def pack_linear_layers(network: nn.Module) -> None:
    """Replace a network's linear layers by packed ones, in place and one by one. CPU only."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn:
        return
    # Without the linear layers themselves, which the list would keep alive.
    parents = [module for module in network.modules() if type(module) is not nn.Linear]
    portion = sum(weight.nbytes for weight in network.parameters()) // RELEASES
    freed = 0
    for module in parents:
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.device.type == "cpu" and child.weight.dtype in PACKED_TYPES:
                setattr(module, name, PackedLinear(child))
                freed += child.weight.nbytes
                if freed > portion:
                    del child  # the last reference to the plain layer, to be returned with the others
                    give_back_freed_memory(torch.device("cpu"))
                    freed = 0
