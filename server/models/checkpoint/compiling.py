"""Compilation of layers with torch.compile for few static shapes, each compiled or captured as a CUDA graph once."""

from torch import nn

SMALLEST = 64
"""Smallest static shape, in tokens."""
PER_OCTAVE = 4
"""Number of shapes between two powers of two: at most a fifth of a forward pass is padding."""


def padded_size(count: int) -> int:
    """Smallest static shape for this number of tokens."""
    if count <= SMALLEST:
        return SMALLEST
    step = (1 << (count - 1).bit_length() - 1) // PER_OCTAVE
    return -(-count // step) * step


def shapes_up_to(count: int) -> int:
    """Number of static shapes for up to this many tokens."""
    size, found = SMALLEST, 1
    while size < count:
        size, found = padded_size(size + 1), found + 1
    return found


def compile_layers(network: nn.Module, tokens: int, backend: str = "inductor") -> None:
    """Compile each layer before and after attention, in place. Attention itself is not compiled: its shapes vary.

    Args:
        tokens: largest number of tokens of a forward pass.
        backend: backend of `torch.compile`; on a GPU, inductor captures CUDA graphs.
    """
    import torch._dynamo

    # Layers share code, and so one limit: shapes of all tokens, of the wanted tokens, and of both combined.
    limit = 4 * shapes_up_to(tokens) ** 2
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, limit)
    on_gpu = any(weight.device.type == "cuda" for weight in network.parameters())
    mode = "reduce-overhead" if on_gpu and backend == "inductor" else None
    for layer in _layers(network):
        for name in ("project", "finish"):
            setattr(layer, name, torch.compile(getattr(layer, name), dynamic=False, backend=backend, mode=mode))


def _layers(network: nn.Module) -> list[nn.Module]:
    found = [module for module in network.modules() if hasattr(module, "project") and hasattr(module, "finish")]
    if not found:
        raise ValueError(f"{type(network).__name__} has no layers that can be compiled")
    return found
