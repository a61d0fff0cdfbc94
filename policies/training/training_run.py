"""Shared objects of a run's stages."""

from collections.abc import Sequence
from dataclasses import dataclass

from policies.model_under_test import ModelUnderTest
from policies.network.policy_network import UnmaskingPolicy
from policies.tasks import Problem
from policies.training.collected import CollectedRuns
from policies.training.data_parallel import DataParallel
from policies.training.decoding_setup import DecodingSetup
from policies.training.recipe import PolicyRecipe
from policies.training.rollout import Actor, Rollout, rollout


@dataclass(frozen=True)
class TrainingRun:
    """A recipe, the frozen model and the policy that is trained on it."""

    recipe: PolicyRecipe
    model: ModelUnderTest
    network: UnmaskingPolicy
    setups: list[DecodingSetup]
    collected: CollectedRuns
    world: DataParallel

    def rollout(
        self,
        setup: DecodingSetup,
        problems: Sequence[Problem],
        actor: Actor,
        seeds: Sequence[int],
        *,
        allow_empty: bool = False,
        ask_oracle: bool = False,
    ) -> Rollout:
        """Roll out one generation for each problem, decoded and recorded as the recipe says; see `rollout`."""
        return rollout(
            self.model,
            setup.task,
            problems,
            actor,
            gen_length=setup.gen_length,
            block_length=setup.block_length,
            seeds=seeds,
            batch=self.recipe.batch,
            prompt_length=self.recipe.prompt_length,
            record=self.recipe.policy,
            allow_empty=allow_empty,
            ask_oracle=ask_oracle,
        )
