"""Layers through torch's compiler: few static shapes, so that each is compiled, or recorded as a CUDA graph, once."""

from torch import nn

SMALLEST = 64
"""Tokens of the smallest shape."""
PER_OCTAVE = 4
"""Shapes between one power of two and the next: at most a fifth of a forward is padding."""


def padded_size(count: int) -> int:
    """The least of the static shapes that holds so many tokens."""
    if count <= SMALLEST:
        return SMALLEST
    step = (1 << (count - 1).bit_length() - 1) // PER_OCTAVE
    return -(-count // step) * step


def shapes_up_to(count: int) -> int:
    """How many static shapes there are for up to so many tokens."""
    size, found = SMALLEST, 1
    while size < count:
        size, found = padded_size(size + 1), found + 1
    return found


def compile_layers(network: nn.Module, tokens: int, backend: str = "inductor") -> None:
    """Compile what is before and after attention in each layer, in place; attention is left, its shapes are the rows'.

    Args:
        tokens: most of a forward.
        backend: of `torch.compile`; on a GPU, inductor records CUDA graphs.
    """
    import torch._dynamo

    # Layers share their code, so that one limit holds for all: shapes of all tokens, of the wanted ones, of both.
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
