"""How tokens are chosen."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenChoice:
    """How a candidate's token is chosen from its distribution: greedily, or drawn at a temperature after filtering.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draw from the smallest set of tokens whose probabilities reach this sum.
        top_k: draw from this many likeliest tokens; 0 does not limit.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


GREEDY = TokenChoice()
