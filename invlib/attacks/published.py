"""Attacks as papers published them: settings of gradient matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from invlib.attacks.matching import GradientMatching
from invlib.errors import ConfigError
from invlib.optim import objectives, priors
from invlib.optim.optimizers import LBFGS


def inverting_gradients(
    *, steps: int = 4800, restarts: int = 1, tv: float = 1e-2, **settings: object
) -> GradientMatching:
    """Return the attack of Geiping et al.: cosine objective, signed Adam, total variation, box.

    Args:
        steps: how many steps.
        restarts: how many starting points.
        tv: the weight of total variation.
        settings: any other setting of `GradientMatching`.

    Raises:
        ConfigError: a setting is unknown or out of range.

    Source: Geiping et al. 2020, arXiv 2003.14053, section 5.

    Taught in: chapter 2
    """
    return preset(
        GradientMatching(
            steps=steps, restarts=restarts, priors=((tv, priors.total_variation),) if tv else ()
        ),
        settings,
    )


def deep_leakage(*, steps: int = 300, restarts: int = 1, **settings: object) -> GradientMatching:
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


def improved_deep_leakage(*, steps: int = 300, restarts: int = 1, **settings: object) -> GradientMatching:
    """Return the attack of Zhao et al. (iDLG): as `deep_leakage`, with the label inferred beforehand.

    Arguments and errors as for `inverting_gradients`.

    Source: Zhao et al. 2020, arXiv 2001.02610.

    Taught in: chapter 2
    """
    return preset(replace(deep_leakage(steps=steps, restarts=restarts), labels="auto"), settings)


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
