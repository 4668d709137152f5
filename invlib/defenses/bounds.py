"""What no attacker can do: how often he may be right at most, whatever he tries and however long."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri

from invlib.defenses.accounting import Below, Neighbours, gaussian_mu, privacy_loss
from invlib.errors import ConfigError
from invlib.settings import Count, Factor, NotNegative, Positive, checks


@checks
def reconstruction_bound(kappa: Below, mu: NotNegative) -> float:
    r"""Return how often any attacker reconstructs at most, under mu-GDP.

    Success is the power of a test of "with this record" against "without it", of which kappa is the level:

    .. math:: \gamma(\kappa, \mu) = \Phi\big(\mu + \Phi^{-1}(\kappa)\big)

    It is an average over what the record may be, and speaks of what `gaussian_mu` was computed for: one
    example or one client, so many rounds.

    Args:
        kappa: how often somebody is right who does not see the update: 1/n for n candidates that are equally
            likely; for "as near as that", the share of images that the best single guess is near.
        mu: of `invlib.defenses.gaussian_mu`.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> round(reconstruction_bound(0.001, 1.0), 4)
        0.0183

    Source: Balle, Cherubin and Hayes 2022, arXiv 2201.04845; Hayes, Mahloujifar and Balle 2023, arXiv
    2302.07225; the closed form, Kaissis et al. 2023, arXiv 2307.03928.

    Taught in: chapter 8
    """
    return float(ndtr(mu + ndtri(kappa)))


@checks
def subsampled_bound(
    kappa: Below,
    noise_multiplier: Positive,
    *,
    rate: Factor,
    rounds: Count,
    neighbours: Literal["add or remove one"],
) -> float:
    r"""Return how often any attacker reconstructs at most, where the record takes part by chance.

    .. math:: \gamma(\kappa) = \min_\epsilon \big( \delta(\epsilon) + e^\epsilon \kappa \big)

    Every epsilon gives a bound that holds, so that the grid they are tried on may only make it looser.

    Args:
        kappa: as of `reconstruction_bound`.
        noise_multiplier: as of `invlib.defenses.gaussian_mu`.
        rate: with what probability the record takes part, each time anew and unknown to the attacker.
        rounds: how many there are.
        neighbours: the one relation for which this is computed.

    Raises:
        ConfigError: a setting is out of range.
        DependencyError: dp-accounting is not installed (the extra ``dp``).

    Source: Hayes, Mahloujifar and Balle 2023, arXiv 2302.07225; as a trade-off curve, Kulynych et al. 2025,
    arXiv 2507.06969.

    Taught in: chapter 8
    """
    grid = np.linspace(0.0, -np.log(min(kappa, 1 - kappa)), 4001)
    deltas = privacy_loss(noise_multiplier, rate, rounds).get_delta_for_epsilon(grid)
    above = deltas + np.exp(grid) * kappa
    below = 1 - np.exp(-grid) * (1 - deltas - kappa)  # the same with epsilon and the two worlds turned round
    return float(min(above.min(), below.min(), 1.0))


@checks
def noise_for(
    gamma: Below,
    kappa: Below,
    *,
    neighbours: Neighbours,
    rounds: Count = 1,
    rate: Factor = 1.0,
) -> float:
    """Return the least noise multiplier with which no attacker is right more often than gamma.

    It undoes `reconstruction_bound`, and, for a rate below 1 and up to one per cent more, `subsampled_bound`.

    Args:
        gamma: how often an attacker may be right.
        kappa: how often he is right without the update; less than gamma.
        neighbours: as of `invlib.defenses.gaussian_mu`.
        rounds: how many there are.
        rate: with what probability a contribution takes part in a round.

    Raises:
        ConfigError: a setting is out of range, gamma is not above kappa, or a rate below 1 comes with
            ``"replace one"``.
        DependencyError: dp-accounting is needed, for a rate below 1, and not installed (the extra ``dp``).

    Example:
        >>> round(noise_for(0.05, 0.001, neighbours="add or remove one", rounds=100), 2)
        6.92

    Taught in: chapter 8
    """
    if gamma <= kappa:
        raise ConfigError(f"gamma is {gamma}; expected more than kappa, {kappa}, what a guess gives")
    always = gaussian_mu(1.0, neighbours=neighbours, rounds=rounds) / float(ndtri(gamma) - ndtri(kappa))
    if rate == 1:
        return always
    if neighbours != "add or remove one":
        raise ConfigError(f"neighbours is {neighbours!r} with a rate of {rate}; expected 'add or remove one'")

    def allowed(noise: float) -> bool:
        return subsampled_bound(kappa, noise, rate=rate, rounds=rounds, neighbours=neighbours) <= gamma

    high, step = always, 2.0  # to take part always needs the most
    while step > 1.01:
        while allowed(high / step):
            high /= step
        step **= 0.5
    return high


@checks
def two_point_bound(distance: NotNegative, noise: Positive) -> float:
    r"""Return how often any attacker is right who has to choose between two equally likely inputs.

    .. math:: P(\text{right}) \le \Phi\Big(\frac{\lVert g(x) - g(x') \rVert}{2 s}\Big)

    It needs no derivative of the network and no clipping, and speaks of this pair alone.

    Args:
        distance: between the two updates before the noise, over all of their numbers.
        noise: :math:`s`, the standard deviation of the noise on each number.

    Raises:
        ConfigError: a setting is out of range.

    Source: Neyman and Pearson 1933, of two Gaussians.

    Taught in: chapter 8
    """
    return float(ndtr(distance / (2 * noise)))
