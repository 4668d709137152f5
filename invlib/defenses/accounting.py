"""How much differential privacy a clipped and noisy update has: mu, composition, and (epsilon, delta).

A *noise multiplier* is the standard deviation of the noise divided by the norm to which one contribution was
clipped, both of the same sum. Whose contribution was clipped is who is protected: one example, where each
example's gradient was; the client with all of its examples, where its whole update was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from scipy.optimize import brentq
from scipy.special import log_ndtr

from invlib.core.optional import package
from invlib.defenses.coarse import TopK
from invlib.defenses.transforms import Clip, MaskLayer
from invlib.errors import ConfigError
from invlib.settings import Count, Factor, NotNegative, Positive, checked, checks, real

# What one contribution may change: it is there or not, or there is another one in its place.
Neighbours = Literal["add or remove one", "replace one"]
Below = Annotated[float, real("a number in (0, 1)", lambda x: 0 < x < 1)]

_APART = {"add or remove one": 1.0, "replace one": 2.0}  # how far neighbours are apart, in clips


@dataclass(frozen=True, kw_only=True)
class Protection:
    """Whom a client's clip and noise protect, and how much.

    Args:
        unit: whose contribution is clipped, ``"one example"`` or ``"one client"``.
        noise_multiplier: the standard deviation of the noise, over the longest contribution to what is sent.
    """

    unit: Literal["one example", "one client"]
    noise_multiplier: float


def protection(client: Any, num_images: int) -> Protection:
    """Read off a client's defences what its noise is worth.

    Noise protects where a clip comes before it; what comes after it neither helps nor harms.

    Args:
        client: an `invlib.Defended` with Gaussian noise.
        num_images: how many images it has, which is taken to be known: to a mean over them, one contributes
            the clip divided by their number.

    Raises:
        ConfigError: the client tells of no noise (an observation does not show what is ``public=False``), or
            nothing bounds a contribution to what the noise is added to.

    Example:
        >>> import invlib as iv
        >>> noisy = iv.Defended(iv.FedSGD(), [iv.defenses.Clip(2.0), iv.defenses.GaussianNoise(1.0)])
        >>> protection(noisy, 8)
        Protection(unit='one client', noise_multiplier=0.5)

    Taught in: chapter 8
    """
    per_example = getattr(getattr(client, "client", None), "clip", None)
    unit: Literal["one example", "one client"] = "one client" if per_example is None else "one example"
    most = math.inf if per_example is None else per_example / checked("num_images", num_images, Count)
    for transform in getattr(client, "transforms", ()):
        if transform.noise > 0:
            if transform.law != "gaussian" or most == math.inf:
                raise ConfigError(f"{client!r} has {transform!r}; expected Gaussian noise after a clip")
            return Protection(unit=unit, noise_multiplier=transform.noise / most)
        if isinstance(transform, Clip):
            # Examples are clipped inside and the whole outside: one example may change the factor of all.
            unit, most = "one client", transform.norm
        elif not isinstance(transform, (TopK, MaskLayer)):  # neither of which makes an update longer
            most = math.inf
    raise ConfigError(f"{client!r} tells of no noise; expected a Defended with a clip and GaussianNoise")


@checks
def gaussian_mu(noise_multiplier: Positive, *, neighbours: Neighbours, rounds: Count = 1) -> float:
    r"""Return the mu of Gaussian differential privacy that clipping and Gaussian noise give.

    Nobody tells two neighbouring inputs apart better than one number drawn from N(0, 1) or N(mu, 1).

    .. math:: \mu = \frac{k}{\sigma} \sqrt{T}

    with :math:`k = 1` where neighbours differ by a contribution that is there or not, and 2 where there is
    another one in its place.

    Args:
        noise_multiplier: :math:`\sigma`, the noise's standard deviation over the clipping norm.
        neighbours: ``"add or remove one"`` or ``"replace one"``; a guarantee without it says nothing.
        rounds: :math:`T`, in how many rounds the contribution takes part, with fresh noise in each.

    Raises:
        ConfigError: a setting is out of range. No finite mu belongs to a multiplier of 0.

    Example:
        >>> gaussian_mu(4.0, neighbours="add or remove one", rounds=100)
        2.5

    Source: Dong, Roth and Su 2022, "Gaussian differential privacy", theorem 2.7 and corollary 3.3.

    Taught in: chapter 8
    """
    return _APART[neighbours] / noise_multiplier * math.sqrt(rounds)


@checks
def delta(mu: NotNegative, epsilon: NotNegative) -> float:
    r"""Return the smallest delta for which mu-GDP is (epsilon, delta)-differential privacy.

    .. math:: \delta = \Phi(-\epsilon/\mu + \mu/2) - e^\epsilon\, \Phi(-\epsilon/\mu - \mu/2)

    Args:
        mu: of `gaussian_mu`.
        epsilon: how much likelier anything may be made, as a logarithm.

    Raises:
        ConfigError: a setting is out of range.

    Source: Dong, Roth and Su 2022, corollary 2.13; Balle and Wang 2018, "Improving the Gaussian mechanism".
    """
    if mu == 0:
        return 0.0
    first, second = (float(log_ndtr(-epsilon / mu + side * mu / 2)) for side in (1, -1))
    # The difference of two numbers of which the second may be e^epsilon times something tiny.
    return max(0.0, -math.exp(first) * math.expm1(min(0.0, epsilon + second - first)))


@checks
def epsilon(mu: NotNegative, delta: Below) -> float:
    """Return the smallest epsilon for which mu-GDP is (epsilon, delta)-differential privacy.

    Args:
        mu: of `gaussian_mu`.
        delta: the probability with which epsilon may be exceeded.

    Raises:
        ConfigError: a setting is out of range.

    Source: Dong, Roth and Su 2022, corollary 2.13, solved for epsilon.
    """

    def excess(at: float) -> float:
        return _delta(mu, at) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = mu
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-12))


_delta = delta  # `epsilon` has an argument of that name


@checks
def classical_mu(
    epsilon: Positive,
    delta: Below,
    *,
    sensitivity: Positive,
    clip: Positive,
    neighbours: Neighbours,
    rounds: Count = 1,
) -> float:
    r"""Return the mu that a framework's noise really gives, which was set by the classical formula.

    The formula is proved for an epsilon below 1 only, and for one round. Frameworks use it for any; Flower's
    ``LocalDpMod`` lets its user name the sensitivity besides the clipping norm, and composes no rounds.

    .. math:: s = \frac{\text{sensitivity}}{\epsilon} \sqrt{2 \ln(1.25/\delta)}, \quad
        \mu = \frac{k\, \text{clip}}{s} \sqrt{T}

    Args:
        epsilon: as the framework was told.
        delta: as the framework was told.
        sensitivity: as the framework was told.
        clip: the norm to which one contribution is clipped.
        neighbours: as of `gaussian_mu`.
        rounds: as of `gaussian_mu`.

    Raises:
        ConfigError: a setting is out of range.

    Source: Dwork and Roth 2014, "The algorithmic foundations of differential privacy", theorem A.1.
    """
    noise = sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    return gaussian_mu(noise / clip, neighbours=neighbours, rounds=rounds)


@checks
def subsampled_epsilon(
    noise_multiplier: Positive,
    delta: Below,
    *,
    rate: Factor,
    rounds: Count,
    neighbours: Literal["add or remove one"],
) -> float:
    """Return the epsilon of rounds in each of which a contribution takes part by chance.

    Args:
        noise_multiplier: as of `gaussian_mu`.
        delta: the probability with which epsilon may be exceeded.
        rate: with what probability it takes part, each time anew and unknown to the attacker (Poisson
            sampling).
        rounds: how many there are.
        neighbours: the one relation for which this is computed.

    Raises:
        ConfigError: a setting is out of range.
        DependencyError: dp-accounting is not installed (the extra ``dp``).

    Source: Koskela et al. 2020, arXiv 1906.03049; Doroshenko et al. 2022, arXiv 2207.04380.
    """
    return float(privacy_loss(noise_multiplier, rate, rounds).get_epsilon_for_delta(delta))


def privacy_loss(noise_multiplier: float, rate: float, rounds: int) -> Any:
    """Return dp-accounting's distribution of the privacy loss of subsampled rounds, rounded upwards.

    Raises:
        DependencyError: dp-accounting is not installed.
    """
    package("dp_accounting", "dp")
    distributions = package("dp_accounting.pld.privacy_loss_distribution", "dp")
    once = distributions.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=rate, value_discretization_interval=1e-3
    )
    return once.self_compose(rounds)
