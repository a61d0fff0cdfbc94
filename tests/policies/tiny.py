"""Small policies with random weights."""

from typing import Any

import torch

from policies.network.config import PolicyConfig
from policies.network.policy_network import LoadedPolicy, UnmaskingPolicy
from policies.serving.checkpoint import PolicyCard, TrainedOn
from policies.training.recipe import PolicyRecipe
from samplers.learned.policy import Policy

SMALL: dict[str, Any] = {"hidden": 16, "heads": 2, "feedforward": 24, "output_bias": 0.0}
RICH: dict[str, Any] = SMALL | {
    "features": ["confidence", "doubt", "top", "top_logs", "entropy", "margin", "neighbours", "before", "place"],
    "top": 3,
}


def network(seed: int = 0, **config: Any) -> UnmaskingPolicy:
    """Random in every weight, those that start at zero too, so that every input matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = UnmaskingPolicy(PolicyConfig.model_validate(SMALL | config))
        with torch.no_grad():
            for p in made.parameters():
                p.add_(torch.randn_like(p) * 0.3)
    return made


def sampler(seed: int = 0, **config: Any) -> Policy:
    return Policy(LoadedPolicy(network(seed, **config)))


def card(**changes: Any) -> PolicyCard:
    """The card of a policy of the shape of `network`, with changes to `config` and to `trained_on`."""
    trained = {
        "model": "tiny",
        "model_digest": "0" * 64,
        "architecture": "LLaDAModelLM",
        "vocab_size": 12,
        "task": ("reverse",),
        "gen_lengths": (16,),
    }
    return PolicyCard(
        config=PolicyConfig.model_validate(SMALL | changes.get("config", {})),
        trained_on=TrainedOn.model_validate(trained | changes.get("trained_on", {})),
    )


def recipe(*stages: dict[str, Any], **changes: Any) -> PolicyRecipe:
    content = {"tasks": ["reverse"], "batch": 8, "check": 0, "policy": SMALL | {"region": False}, "stage": list(stages)}
    return PolicyRecipe.model_validate(content | changes)
