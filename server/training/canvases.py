"""Training rows: the tokens, the masked positions, and the loss weight of each masked token."""

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from policies.tasks import Task, get_task, split_of
from policies.tasks.chain import Chain, Piece, equation
from server.training.recipe import MicroBatch, Recipe
from server.training.tokenizer import END, MASK, special_id

MAX_MISSES = 10_000
"""Consecutive problems that may fail to fit a canvas before the recipe is refused."""


@dataclass(frozen=True)
class Rows:
    """Clean `tokens`, the boolean `masked`, and the loss `weight` of each masked token; all [rows, length]."""

    tokens: Tensor
    masked: Tensor
    weight: Tensor


def _nothing_fits(task: Task, batch: MicroBatch) -> str:
    return (
        f"of {MAX_MISSES} problems of task {task.name} none has more than {batch.longer_than} and fewer than "
        f"{batch.length} tokens, prompt and response together"
    )


class CanvasMaker:
    """Draws micro-batches. Rows depend on (seed, step, micro-batch) only: a resumed run sees the same rows."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.mask_id = special_id(tokenizer, MASK)
        self.end_id = special_id(tokenizer, END)

    def check(self) -> None:
        """Draw each micro-batch once, including those that start late. Raises ValueError if one cannot be drawn."""
        for batch in self.recipe.micro_batch:
            try:
                self.draw(batch, 0)
            except ValueError as error:
                raise ValueError(f"micro_batch {batch.name}: {error}") from None

    def draw(self, batch: MicroBatch, step: int) -> Rows:
        name = f"{self.recipe.seed}/{step}/{batch.name}"
        rng = random.Random(name)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        if batch.kind == "equations":
            return self._equations(batch, rng)
        if batch.kind == "links":
            return self._links(batch, rng)
        tokens, response = self._problems(batch, rng)
        if batch.kind == "frontier":
            masked, weight = self._frontier(tokens, response, self._free_words(batch), generator)
        else:
            share = self.recipe.block_share if batch.block_share is None else batch.block_share
            masked, weight = self._corrupt(tokens, response, share, generator)
        return Rows(tokens, masked, weight)

    def _fits(self, batch: MicroBatch, prompt: list[int], response: list[int]) -> bool:
        return batch.longer_than < len(prompt) + len(response) < batch.length

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def _problems(self, batch: MicroBatch, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Tokens of task problems padded with end-of-text, and the mask of their responses; both [rows, length]."""
        rows: list[tuple[list[int], list[int]]] = []
        for name, count in batch.rows.items():
            task, wanted, misses = get_task(name), len(rows) + count, 0
            while len(rows) < wanted:
                problem = task.draw(rng, "train")
                row = self._encode(problem.prompt), self._encode(problem.reference)
                if self._fits(batch, *row):
                    rows.append(row)
                    misses = 0
                elif (misses := misses + 1) == MAX_MISSES:
                    raise ValueError(_nothing_fits(task, batch))
        return self._lay_out(rows, batch.length)

    def _lay_out(self, rows: list[tuple[list[int], list[int]]], length: int) -> tuple[Tensor, Tensor]:
        tokens = torch.full((len(rows), length), self.end_id)
        for i, (prompt, response) in enumerate(rows):
            tokens[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        starts = torch.tensor([[len(prompt)] for prompt, _ in rows])
        return tokens, torch.arange(length) >= starts

    def _corrupt(
        self, tokens: Tensor, response: Tensor, block_share: float, g: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Masks at levels t ~ U(0, 1), spread evenly over the batch, and 1/t weights (LLaDA, arXiv 2502.09992, eq. 5).

        A fraction `block_share` of the rows resembles a semi-autoregressive state: everything before a block known,
        everything after it masked and not scored.
        """
        rows, _ = response.shape
        t = (torch.rand(1, generator=g) + torch.randperm(rows, generator=g) / rows) % 1
        position = response.cumsum(1) - 1
        lengths = torch.tensor(self.recipe.block_lengths)
        block_length = lengths[torch.randint(len(lengths), (rows,), generator=g)][:, None]
        block = position // block_length
        used = position.masked_fill(~response | (tokens == self.end_id), 0).amax(1, keepdim=True) // block_length + 1
        active = (torch.rand(rows, 1, generator=g) * used).long()
        semi = torch.rand(rows, 1, generator=g) < block_share
        scored = response & (~semi | (block == active))
        later = semi & response & (block > active)
        noise = (torch.rand(tokens.shape, generator=g) < t[:, None]) & scored
        padding = self._padding(tokens)
        worth = torch.ones(tokens.shape).masked_fill(padding, self.recipe.padding_weight)
        weight = noise * worth
        if self.recipe.loss_weight == "mean":
            scale = weight.sum(1, keepdim=True)
        else:
            scale = t[:, None] * (scored * worth).sum(1, keepdim=True)
        return noise | later, weight / scale.clamp(min=0.1)

    def _frontier(self, tokens: Tensor, response: Tensor, free: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw states as confident decoding leaves them: the chance of a mask rises over a random width of positions.

        Uniform masks hardly ever show such states. The mask depends on positions and on which words are free, never on
        the value of a masked token, so that the cross-entropy keeps its minimum.
        """
        rows, _ = response.shape
        position = response.cumsum(1) - 1
        used = (response & ~self._padding(tokens)).sum(1, keepdim=True)
        edge = torch.rand(rows, 1, generator=g) * used
        width = 2.0 ** (torch.rand(rows, 1, generator=g) * 5)
        chance = torch.sigmoid((position - edge) / width)
        open_words = torch.isin(tokens, free) * torch.rand(rows, 1, generator=g)
        masked = (torch.rand(tokens.shape, generator=g) < torch.maximum(chance, open_words)) & response
        padding = self._padding(tokens) & response
        end = (response & (position == used - 1) & masked).any(1, keepdim=True)
        masked = torch.where(padding, end, masked)
        weight = masked * torch.ones(tokens.shape).masked_fill(padding, self.recipe.padding_weight)
        return masked, weight / weight.sum(1, keepdim=True).clamp(min=0.1)

    def _padding(self, tokens: Tensor) -> Tensor:
        """Mask of end-of-text tokens that follow an end-of-text token."""
        return (tokens == self.end_id) & (tokens.roll(1, 1) == self.end_id)

    def _free_words(self, batch: MicroBatch) -> Tensor:
        """Ids of the interchangeable words of the batch's tasks."""
        words = [word for name in batch.rows for group in get_task(name).interchangeable() for word in group]
        return torch.tensor([self._piece_id(word) for word in words], dtype=torch.long)

    def _equations(self, batch: MicroBatch, rng: random.Random) -> Rows:
        (count,) = batch.rows.values()
        size = len(equation(random.Random(0)))
        if batch.length < size:
            raise ValueError(f"an equation has {size} tokens, and does not fit into a length of {batch.length}")
        drills = [[piece for _ in range(batch.length // size) for piece in equation(rng)] for _ in range(count)]
        tokens = torch.tensor([self._ids(pieces) for pieces in drills])
        masked = torch.tensor([[value is not None for _, value in pieces] for pieces in drills])
        return Rows(tokens, masked, masked / masked.sum(1, keepdim=True))

    def _links(self, batch: MicroBatch, rng: random.Random) -> Rows:
        (count,) = batch.rows.values()
        chain = Chain()
        rows: list[tuple[list[int], list[int]]] = []
        hidden: list[list[int]] = []
        misses = 0
        while len(rows) < count:
            if (misses := misses + 1) > MAX_MISSES:
                raise ValueError(_nothing_fits(chain, batch))
            problem, pieces = chain.sample_worked(rng)
            row = self._encode(problem.prompt), self._ids(pieces)
            if split_of(problem.key) != "train" or not self._fits(batch, *row):
                continue
            values = {value for _, value in pieces if value is not None}
            chosen = {value for value in values if rng.random() < 0.6} or values
            rows.append(row)
            misses = 0
            hidden.append([len(row[0]) + i for i, (_, value) in enumerate(pieces) if value in chosen])
        tokens, _ = self._lay_out(rows, batch.length)
        masked = torch.zeros(tokens.shape, dtype=torch.bool)
        for i, positions in enumerate(hidden):
            masked[i, positions] = True
        return Rows(tokens, masked, masked / masked.sum(1, keepdim=True))

    def _ids(self, pieces: list[Piece]) -> list[int]:
        return [self._piece_id(text) for text, _ in pieces]

    def _piece_id(self, text: str) -> int:
        ids = self._encode(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, and must be one")
        return ids[0]
