"""Confidence intervals of measured shares."""

from math import sqrt

NORMAL_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share: never outside 0..1, sound near both ends (JASA 22 (1927), 209-212).

    Raises ValueError if there are no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials is no share")
    share, z2 = successes / trials, NORMAL_95**2
    centre = share + z2 / (2 * trials)
    half = NORMAL_95 * sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    low, high = ((centre + side * half) / (1 + z2 / trials) for side in (-1, 1))
    # At the ends the exact bound is the end itself; rounding would miss it.
    return (0.0 if successes == 0 else low, 1.0 if successes == trials else high)
