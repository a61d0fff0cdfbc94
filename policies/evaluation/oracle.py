"""The oracle: a near upper bound, for a sampler that knows which of the model's tokens are right."""

from collections.abc import Callable

import torch
from torch import Tensor

from policies.tasks import Problem, Task
from samplers import Canvas, Sampler, Selection, Step


class Oracle(Sampler):
    """Commit exactly the candidates whose token is right, in one generation of one problem.

    A token is right if the reference has it at that position, or a word that may stand for it, or end-of-text after the
    reference's end. Where a task has several solutions, the one counts that is still possible and agrees with most
    candidates. The oracle is greedy, so the bound is not strict; it reads the answer, so no server offers it.

    Args:
        solutions: token ids [solutions, gen_length], end-of-text after each.
        same: class of each interchangeable token id, from 1.
        canvas: the generation that this oracle is for.
    """

    name = "oracle"
    sees_region = True

    def __init__(self, solutions: Tensor, same: dict[int, int], canvas: Canvas) -> None:
        self._solutions = _merge(solutions, same)
        self._same = same
        self._canvas = canvas

    @classmethod
    def for_problem(
        cls,
        task: Task,
        problem: Problem,
        canvas: Canvas,
        encode: Callable[[str], list[int]],
        end_ids: frozenset[int],
    ) -> "Oracle":
        """Make the oracle of one problem. Words of several tokens are not interchangeable."""
        length = canvas.layout.gen_length
        end = min(end_ids, default=-1)
        rows = [(encode(text) + [end] * length)[:length] for text in task.solutions(problem)]
        groups = [[encode(word) for word in words] for words in task.interchangeable()]
        same = {ids[0]: i for i, group in enumerate(groups, 1) for ids in group if len(ids) == 1}
        same |= dict.fromkeys(end_ids, len(groups) + 1)
        return cls(torch.tensor(rows), same, canvas)

    def select(self, step: Step) -> Selection:
        return Selection(self.right(step.token[0], step.candidate[0])[None])

    def right(self, token: Tensor, candidate: Tensor) -> Tensor:
        """Candidates whose token is right, bool [width]; the arguments are of the whole generation region."""
        length = self._canvas.layout.gen_length
        commit = torch.zeros_like(candidate)
        token, candidate = token[:length], candidate[:length]
        agrees = _merge(token, self._same) == self._solutions
        committed = ~self._canvas.masked
        wrong = ((_merge(self._canvas.generated, self._same) != self._solutions) & committed).sum(dim=1)
        # Least wrong first, most agreement second: after a forced mistake no solution is wholly possible any more.
        target = ((agrees & candidate).sum(dim=1) - wrong * (length + 1)).argmax()
        commit[:length] = agrees[target] & candidate
        return commit


def _merge(tokens: Tensor, same: dict[int, int]) -> Tensor:
    """Token ids with each interchangeable class as one number below -1."""
    merged = tokens.clone()
    for token, group in same.items():
        merged[tokens == token] = -1 - group
    return merged
