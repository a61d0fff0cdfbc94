"""Actors that decide in a rollout: a policy, a rule, a mixture of both by row, or an explorer."""

import random
from dataclasses import replace

import torch
from torch import Tensor

from policies.network.policy_network import LoadedPolicy, UnmaskingPolicy
from policies.training.rollout import Actor, Decision
from samplers import Sampler, SamplerParams, Statistic, Step
from samplers.columns import Columns
from samplers.learned.policy import bernoulli_draw, commit_at_least_one, dpls_draw, step_gumbel


class PolicyActor:
    """Draws from a policy, at temperature 1 by default as in training.

    Args:
        network: policy network, trained or in training.
        speed: [rollout rows] in 0..1, for policies that take it.
        shift: [rollout rows], subtracted from the logits: higher values commit less.
        temperature: [rollout rows].
        allow_empty: keep empty draws empty.
    """

    def __init__(
        self,
        network: UnmaskingPolicy,
        speed: Tensor | None = None,
        shift: Tensor | None = None,
        temperature: Tensor | None = None,
        allow_empty: bool = False,
    ) -> None:
        self._policy = LoadedPolicy(network)
        self.statistics, self.top, self.whole_region = (
            self._policy.statistics,
            self._policy.top,
            self._policy.whole_region,
        )
        self._speed = speed
        self._shift = shift
        self._temperature = temperature
        self._allow_empty = allow_empty

    def choose(self, step: Step, live: Tensor) -> Decision:
        logits = self._policy.score(step, None if self._speed is None else self._speed[live, None])
        if self._shift is not None:
            logits = logits - self._shift[live, None]
        if self._temperature is not None:
            logits = logits / self._temperature[live, None]
        if self._policy.action == "dpls":
            order, action = dpls_draw(logits, step.candidate, step_gumbel(step), self._policy.stop_logit)
            return Decision(action, action, order)
        action = bernoulli_draw(logits, step.candidate, step.uniform())
        return Decision(action, action if self._allow_empty else commit_at_least_one(action, logits, step.candidate))


class RuleActor:
    """A sampler with the same parameters in all rows.

    Args:
        block_length: length of the rule's own blocks inside the rollout's, as in expert steering: Fast-dLLM in short
            blocks guides a policy of full diffusion (arXiv 2512.09106, appendix F).
    """

    def __init__(self, sampler: Sampler, params: SamplerParams, block_length: int | None = None) -> None:
        self._sampler = sampler
        self._params = params
        self._block_length = block_length
        self.statistics, self.top, self.whole_region = sampler.statistics, sampler.top, sampler.whole_region

    def choose(self, step: Step, live: Tensor) -> Decision:
        if self._block_length is not None:
            step = replace(step, candidate=step.candidate & _first_block(step.candidate, self._block_length))
        count = len(step.params)
        columns = step.columns.keep(f"rule {id(self)}", lambda: Columns.of([self._params] * count))
        commit = self._sampler.select(replace(step, params=[self._params] * count, columns=columns)).commit
        commit = commit_at_least_one(commit, step.confidence, step.candidate)
        return Decision(commit, commit)


def _first_block(candidate: Tensor, block_length: int) -> Tensor:
    """Positions in the block of the first candidate, bool in the shape of `candidate`."""
    position = torch.arange(candidate.shape[1], device=candidate.device)
    return position // block_length == candidate.int().argmax(dim=1, keepdim=True) // block_length


class ExpertMixture:
    """Expert rows follow a rule, the others a policy.

    Args:
        expert: int64 [rollout rows]: -1 for the policy, otherwise index of the rule.
    """

    def __init__(self, policy: Actor, rules: list[RuleActor], expert: Tensor) -> None:
        self._choosers = [policy, *rules]
        self._expert = expert
        self.statistics = frozenset[Statistic]().union(*(each.statistics for each in self._choosers))
        self.top = max(each.top for each in self._choosers)
        self.whole_region = any(each.whole_region for each in self._choosers)

    def choose(self, step: Step, live: Tensor) -> Decision:
        chosen = self._expert[live]
        decision = self._choosers[0].choose(step, live)
        for number, rule in enumerate(self._choosers[1:]):
            mine = (chosen == number)[:, None]
            if bool(mine.any()):
                other = rule.choose(step, live)
                decision = Decision(
                    torch.where(mine, other.action, decision.action),
                    torch.where(mine, other.commit, decision.commit),
                    decision.order,
                )
        return decision


class Explorer:
    """Commits by a high threshold, and commits further candidates in one bold step (or in some rows at every step).

    The further candidates are a random part of a random confidence band, a random share, or all above a low threshold.
    The bands matter: they explore each confidence range separately from the others. With several `blocks`, two steps
    each, the bold step may be in any of them.
    """

    statistics = frozenset[Statistic]()
    top = 0
    whole_region = False

    def __init__(
        self,
        rows: int,
        seed: int,
        always: float,
        thresholds: tuple[float, ...] = (0.9, 0.95, 0.99),
        blocks: int = 1,
    ) -> None:
        rng = random.Random(f"explorer/{seed}")

        def each(draw: object) -> Tensor:
            assert callable(draw)
            return torch.tensor([draw() for _ in range(rows)])

        self._bold = each(lambda: rng.choice((0, 0, 0, 1, 1, 2, 3)) + (2 * rng.randrange(blocks) if blocks > 1 else 0))
        self._every = each(lambda: rng.random() < always)
        self._kind = each(lambda: rng.randrange(3))
        edges = torch.sort(torch.tensor([[rng.random(), rng.random()] for _ in range(rows)]), dim=1).values
        self._low, self._high = edges[:, 0], edges[:, 1]
        self._rate = each(lambda: rng.choice((0.05, 0.15, 0.3, 0.6, 1.0)))
        self._soft = each(lambda: rng.uniform(0.3, 0.9))
        self._safe = each(lambda: rng.choice(thresholds))

    def choose(self, step: Step, live: Tensor) -> Decision:
        confidence = step.confidence

        def column(values: Tensor) -> Tensor:
            return values[live, None]

        now = column(self._every) | (step.forward == column(self._bold))
        picked = step.uniform() < column(self._rate)
        band = (confidence >= column(self._low)) & (confidence <= column(self._high)) & picked
        options = torch.stack([band, picked, confidence >= column(self._soft)])
        extra = options[self._kind[live], torch.arange(len(live))]
        action = step.candidate & ((confidence >= column(self._safe)) | (extra & now))
        commit = commit_at_least_one(action, confidence, step.candidate)
        return Decision(commit, commit)
