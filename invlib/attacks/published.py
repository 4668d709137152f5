"""Attacks as papers published them: settings of gradient matching.

All of them are for a server that is honest but curious: it sends the model that it should, and looks. What a
malicious server does is left out. It changes the model or its weights before it sends them: a layer that
keeps single images apart (Fowl et al. 2022, Boenisch et al. 2023), or a classifier that silences all images
but one (Wen et al. 2022). Left out too are attacks on text, and searches at growing resolution (Ghiasi et al.
2022): `invlib.best` goes from coarse to fine in the coordinates of natural images.

The closed forms of papers are `invlib.fully_connected` and `invlib.recursive_inversion` (R-GAP).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from invlib.attacks.matching import GradientMatching
from invlib.errors import ConfigError
from invlib.optim import objectives, priors
from invlib.optim.coordinates import Tiles
from invlib.optim.optimizers import LBFGS, Adam
from invlib.optim.priors import AnyPrior
from invlib.optim.schedules import CosineDecay
from invlib.settings import Count, NotNegative, checks


@checks
def inverting_gradients(
    *, steps: Count = 4800, restarts: Count = 1, tv: NotNegative = 0.1, **settings: object
) -> GradientMatching:
    """Return the attack of Geiping et al.: cosine objective, signed Adam, total variation, box.

    Args:
        steps: how many steps.
        restarts: how many starting points.
        tv: the weight of total variation; the default is that of the configuration of 2020's code. Of a
            single smooth image, a fresh and shallow network tells enough for a weight of 0.01 to be better.
        settings: any other setting of `GradientMatching`.

    Raises:
        ConfigError: a setting is unknown or out of range.

    Source: Geiping et al. 2020, arXiv 2003.14053, section 5.

    Taught in: chapter 2
    """
    return preset(
        GradientMatching(
            priors=_weighted((tv, priors.total_variation)),
            steps=steps,
            restarts=restarts,
        ),
        settings,
    )


@checks
def deep_leakage(*, steps: Count = 300, restarts: Count = 1, **settings: object) -> GradientMatching:
    """Return the attack of Zhu et al. (DLG): squared distance, L-BFGS, soft labels optimised, no box.

    Arguments and errors as for `inverting_gradients`; a step is up to 20 iterations of L-BFGS.

    Source: Zhu et al. 2019, arXiv 1906.08935, algorithm 1.
    """
    return preset(
        GradientMatching(
            objective=objectives.l2,
            optimizer=LBFGS(),
            decay=None,
            box=False,
            labels="optimize",
            steps=steps,
            restarts=restarts,
        ),
        settings,
    )


@checks
def improved_deep_leakage(*, steps: Count = 300, restarts: Count = 1, **settings: object) -> GradientMatching:
    """Return the attack of Zhao et al. (iDLG): as `deep_leakage`, with the label inferred beforehand.

    Arguments and errors as for `inverting_gradients`.

    Source: Zhao et al. 2020, arXiv 2001.02610.

    Taught in: chapter 2
    """
    return preset(replace(deep_leakage(steps=steps, restarts=restarts), labels="auto"), settings)


@checks
def beyond_inferring(
    *, steps: Count = 400, restarts: Count = 1, tv: NotNegative = 0.2352, **settings: object
) -> GradientMatching:
    """Return the attack of Wang et al.: squared distance, L-BFGS, smooth total variation, box.

    The weight of total variation is that of the paper, 1.5e-4 for a sum over 2 channels of 28 × 28 pixels, as
    one for the mean that is used here. Left out is the generative network which the paper trains on what
    was found.

    Args:
        steps: how many steps, of up to 20 iterations of L-BFGS each.
        restarts: how many starting points.
        tv: the weight of `invlib.optim.priors.SmoothTotalVariation`, with power 1.25.
        settings: any other setting of `GradientMatching`.

    Raises:
        ConfigError: a setting is unknown or out of range.

    Source: Wang et al. 2019, arXiv 1812.00535 ("Beyond Inferring Class Representatives").
    """
    smooth = priors.SmoothTotalVariation(power=1.25)
    return preset(
        GradientMatching(
            objective=objectives.l2,
            priors=_weighted((tv, smooth)),
            optimizer=LBFGS(),
            decay=None,
            steps=steps,
            restarts=restarts,
        ),
        settings,
    )


@checks
def client_privacy_leakage(
    *, steps: Count = 300, restarts: Count = 1, label_weight: NotNegative = 1.0, **settings: object
) -> GradientMatching:
    r"""Return the attack of Wei et al. (CPL): squared distance, L-BFGS, patterned start, fitting predictions.

    .. math:: \min_x\; \|u(x, y) - u^\ast\|^2 + \alpha\, \|p(x) - e_y\|^2

    Arguments and errors as for `beyond_inferring`, and

    Args:
        steps: how many steps, of up to 20 iterations of L-BFGS each.
        restarts: how many starting points.
        label_weight: :math:`\alpha`, of `invlib.optim.priors.Prediction`.
        settings: any other setting of `GradientMatching`.

    Source: Wei et al. 2020, arXiv 2004.10397 ("A Framework for Evaluating Gradient Leakage Attacks in
    Federated Learning"); pattern and box as in the library *breaching*, and a line search, without which
    L-BFGS diverges from most starts.
    """
    return preset(
        GradientMatching(
            objective=objectives.l2,
            priors=_weighted((label_weight, priors.Prediction())),
            optimizer=LBFGS(line_search="strong_wolfe"),
            decay=None,
            init=Tiles(side=16),
            steps=steps,
            restarts=restarts,
        ),
        settings,
    )


@checks
def see_through_gradients(
    *,
    steps: Count = 20_000,
    restarts: Count = 1,
    tv: NotNegative = 0.1,
    norm: NotNegative = 1e-3,
    batch_norm: NotNegative = 100.0,
    **settings: object,
) -> GradientMatching:
    """Return the attack of Yin et al. (GradInversion): squared distance, Adam, and priors of image quality.

    Weights are the paper's over that of its gradient distance, 1e-3: 1e-4, 1e-6 and 0.1. Left out are what
    ties restarts to each other (group consistency, with images registered), and the noise that is added to
    every step.

    Args:
        steps: how many steps; the first 50 warm up, and the step size falls along a cosine.
        restarts: how many starting points.
        tv: the weight of total variation.
        norm: the weight of `invlib.optim.priors.l2_norm`.
        batch_norm: the weight of `invlib.optim.priors.BatchNormStatistics`; 0 for a model that has none.
        settings: any other setting of `GradientMatching`.

    Raises:
        ConfigError: a setting is unknown or out of range; when called, the model has no batch norm.

    Source: Yin et al. 2021, arXiv 2104.07586 ("See through Gradients").
    """
    weighted = _weighted(
        (tv, priors.total_variation),
        (norm, priors.l2_norm),
        (batch_norm, priors.BatchNormStatistics()),
    )
    return preset(
        GradientMatching(
            objective=objectives.l2,
            priors=weighted,
            optimizer=Adam(lr=0.1),
            decay=CosineDecay(warmup=50),
            steps=steps,
            restarts=restarts,
        ),
        settings,
    )


@checks
def modern(
    *,
    steps: Count = 24_000,
    restarts: Count = 1,
    tv: NotNegative = 0.1,
    features: NotNegative = 0.1,
    **settings: object,
) -> GradientMatching:
    """Return `inverting_gradients` with the parts that later work added, as the library *breaching* has them.

    A patterned start, warm-up and a cosine decay, total variation over colours too, and the input of the last
    layer, of which the update tells the mean. Where breaching shrinks small slopes towards the end
    ("soft" sign), the plain gradient is taken here.

    Args:
        steps: how many steps.
        restarts: how many starting points.
        tv: the weight of `invlib.optim.priors.SmoothTotalVariation`, with power 1/2 and opponents.
        features: the weight of `invlib.optim.priors.LastLayerInput`.
        settings: any other setting of `GradientMatching`.

    Raises:
        ConfigError: a setting is unknown or out of range.

    Source: Geiping et al., breaching 0.1.2, attack "modern"; its parts are Geiping et al. 2020,
    arXiv 2003.14053, and Wei et al. 2020, arXiv 2004.10397.
    """
    weighted = _weighted(
        (tv, priors.SmoothTotalVariation(power=0.5, opponents=True)),
        (features, priors.LastLayerInput()),
    )
    return preset(
        GradientMatching(
            priors=weighted,
            optimizer=Adam(lr=0.1),
            decay=CosineDecay(warmup=50),
            init=Tiles(side=4),
            steps=steps,
            restarts=restarts,
        ),
        settings,
    )


def _weighted(*weighted: tuple[float, AnyPrior]) -> tuple[tuple[float, AnyPrior], ...]:
    """Return the priors whose weights are not 0."""
    return tuple((weight, prior) for weight, prior in weighted if weight)


def preset(attack: GradientMatching, settings: Mapping[str, object]) -> GradientMatching:
    """Return the attack with some settings replaced, whose names are checked first.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    unknown = [name for name in settings if name not in GradientMatching.__dataclass_fields__]
    if unknown:
        raise ConfigError(
            f"unknown setting {', '.join(map(repr, unknown))}; expected some of "
            f"{', '.join(GradientMatching.__dataclass_fields__)}"
        )
    return replace(attack, **settings)  # type: ignore[arg-type]
