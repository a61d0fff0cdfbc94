"""Plain implementation of LLaDA's `generate`: one static batch, every position in every forward, the whole vocabulary.

This is the common practice that the engine is measured against: low-confidence remasking at temperature 0, arXiv
2502.09992, algorithm 5.
"""

import torch
from torch import Tensor

from server.models.network import Network


@torch.inference_mode()
def generate(
    network: Network, prompts: Tensor, gen_length: int, block_length: int, steps: int, mask_id: int
) -> tuple[Tensor, int]:
    """Denoise rows of one length together.

    Args:
        prompts: ids [batch, prompt length].
        steps: forwards of the whole generation, a multiple of the number of blocks.

    Returns:
        The canvases, [batch, length], and the number of forwards.
    """
    batch, start = prompts.shape
    x = torch.cat([prompts, torch.full((batch, gen_length), mask_id, device=prompts.device)], dim=1)
    blocks = gen_length // block_length
    forwards = 0
    for block in range(blocks):
        first, last = start + block * block_length, start + (block + 1) * block_length
        masks = (x[:, first:last] == mask_id).sum(dim=1)
        each = steps // blocks
        quota = masks[:, None] // each + (torch.arange(each, device=x.device) < (masks % each)[:, None]).long()
        for step in range(each):
            mask = x == mask_id
            logits = network(x)
            forwards += 1
            best = logits.argmax(dim=-1)
            p = logits.softmax(dim=-1)
            confidence = p.gather(-1, best[..., None])[..., 0]
            confidence[:, last:] = -torch.inf
            best = torch.where(mask, best, x)
            confidence = torch.where(mask, confidence, -torch.inf)
            for row in range(batch):
                chosen = confidence[row].topk(int(quota[row, step])).indices
                x[row, chosen] = best[row, chosen]
    return x, forwards
