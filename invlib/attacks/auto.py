"""The attack to audit with: whichever of this project's is strongest on what the server saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from invlib.attacks.labels import infer
from invlib.attacks.matching import GradientMatching
from invlib.attacks.published import preset
from invlib.attacks.recursive import is_chain, recursive_inversion
from invlib.attacks.shifts import moves, settled
from invlib.autodiff.smoothing import Smoothing, rounded
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import ConfigError
from invlib.federated import observe
from invlib.optim import objectives, priors
from invlib.optim.coordinates import NaturalImages
from invlib.optim.optimizers import LBFGS

STEPS, TV, NATURAL, SHIFTS = 1200, 0.1, 1.0, 4  # what `best` takes where nothing else is said
_FADING = 0.03  # what is left of both at the end, when the kinks are sharp and the objective can be trusted
_FAINT = 0.1  # of white noise: a start near grey that is another one for each image and restart

# Distances of directions: at the first there is nothing left to polish, beyond the second the closed form
# failed (noise was added, say, or equations are missing) and a start from noise is better.
_EXACT, _USABLE = 1e-6, 0.1
_SHARPENINGS = 16  # at most: a factor of two each
_STAGE = 50  # evaluations at one sharpness: with fewer, line searches eat them
_SHIFTING = 500  # evaluations from which on there is time for shifted copies
_POLISH = 20  # iterations between two looks of the polish at the box


def best(
    *,
    steps: int = STEPS,
    restarts: int = 1,
    tv: float = TV,
    natural: float = NATURAL,
    shifts: int = SHIFTS,
    **settings: object,
) -> Callable[..., Reconstruction]:
    """Return the strongest attack that this project has, chosen by what the server saw.

    A single image behind a chain of layers that can be undone, such as LeNetZhu, is computed in closed form
    by `invlib.recursive_inversion`, and polished by L-BFGS on the squared distance where rounding left an
    error. Everything else is matched by direction, as in `invlib.inverting_gradients`, but

    - on a network whose kinks are round at first (`invlib.Smoothing`), which makes the cost smooth enough for
      L-BFGS. How round they are at first is measured: no rounder than turns the update as far as another
      image would;
    - in the coordinates of natural images (`invlib.NaturalImages`), from near plain grey, where L-BFGS finds
      what is large in an image before what is fine;
    - with the prior of those coordinates and total variation
      (`invlib.optim.priors.rounded_total_variation`), which weigh much while the kinks are round and the
      objective is only roughly right, and fade as they sharpen;
    - with the picture shifted on the way. A network that strides and then pools over all places hardly sees
      a shift by the product of its strides (4 pixels in ResNet20), so a search often ends in a shifted copy:
      the right picture in the wrong place. After a sixth of the evaluations what was found therefore competes
      with its copies up to two such strides away, each improved for a while, and again as long as a copy has
      the lower score. For a single image, and from 500 evaluations on.

    The reconstruction's ``note`` says which of the two it was.

    Args:
        steps: how many evaluations of the network's gradient one restart may use, those of shifted copies
            among them; a line search may end a few later. The sharpness changes every 50.
        restarts: how many starting points. Where copies are shifted, each of them searches for its sixth of
            the evaluations and the best by score goes on, so that ``restarts + 5`` sixths of ``steps`` are
            evaluated in all; elsewhere all of them go all the way. With ``prune=True`` fewer do, either way;
            `Reconstruction.evaluations` counts them.
        tv: the weight of total variation at the start, in units of the objective of a noise image: all
            gradients of a fresh network point nearly the same way, so that its objectives are small
            throughout.
        natural: the weight of the natural prior at the start, in the same unit.
        shifts: how many shifted copies compete at a time; 0 shifts nothing.
        settings: any other setting of `invlib.GradientMatching`, for the matching; an optimiser of one's own
            takes so many steps.

    Returns:
        An attack ``(model, observation, *, generator=None, callback=None, progress=False)``. It raises
        what `invlib.GradientMatching` raises.

    Raises:
        ConfigError: a setting is unknown or out of range.

    Source: this project's; its parts are Geiping et al. 2020, arXiv 2003.14053, and Zhu and Blaschko 2021,
    arXiv 2010.07733.

    Taught in: chapter 3
    """
    if steps < 1:
        raise ConfigError(f"best steps is {steps}; expected at least 1")
    # An optimiser that asks once a step can have another sharpness at each.
    stages = steps if "optimizer" in settings else max(1, steps // _STAGE)
    matching = preset(
        GradientMatching(
            optimizer=_quasi_newton(steps // stages),
            steps=stages,
            decay=None,
            restarts=restarts,
            smoothing=Smoothing(),
            fading=_FADING,
            coordinates=NaturalImages(),
            record_every=1,
        ),
        settings,
    )
    for name, weight in (("tv", tv), ("natural", natural), ("shifts", shifts)):
        if not weight >= 0:
            raise ConfigError(f"best {name} is {weight}; expected at least 0")

    def attack(
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        observation.validate(model)
        if is_chain(model, observation):
            found = recursive_inversion()(model, observation)
            if found.score <= _EXACT:
                return found
            if found.score <= _USABLE:
                return _polished(found, model, observation, matching, steps)
        unit, smoothing, asked = _noise(matching, model, observation)
        generator = generator or torch.Generator().manual_seed(0)
        search = replace(
            matching,
            priors=(
                *matching.priors,
                (natural * unit, (matching.coordinates or NaturalImages()).prior(observation.normalization)),
                (tv * unit, priors.rounded_total_variation),
            ),
            init=matching.init if "init" in settings else _faint(matching, observation, generator),
            smoothing=matching.smoothing if "smoothing" in settings else smoothing,
        )
        copies = min(shifts, steps // _STAGE // 2 - 2)  # a short search has room for few, or for none
        places = moves(model, observation) if steps >= _SHIFTING and copies else []
        if places:
            found = settled(
                search,
                model,
                observation,
                places=places,
                copies=copies,
                stage=max(1, _STAGE * search.steps // steps),
                asks=max(1, steps // search.steps),
                generator=generator,
                callback=callback,
                progress=progress,
            )
        else:
            found = search(model, observation, generator=generator, callback=callback, progress=progress)
        kinks = "as they are" if search.smoothing is None else "rounded on the way"
        kinks += ", and from shifted copies" if places else ""
        return replace(
            found,
            evaluations=found.evaluations + asked,
            note=f"gradient matching on a network whose kinks are {kinks}",
        )

    return attack


def _faint(matching: GradientMatching, observation: Observation, generator: torch.Generator) -> Tensor:
    """Draw starts near plain grey."""
    shape = (matching.restarts, observation.num_images, *observation.image_shape)
    noise = _FAINT * torch.randn(shape, generator=generator)
    return (matching.coordinates or NaturalImages()).images(noise)


def _noise(
    matching: GradientMatching, model: nn.Module, observation: Observation
) -> tuple[float, Smoothing, int]:
    """Return the objective of a noise image, how round kinks may be, and how many evaluations that took.

    Rounding that turns an update farther than another image does would hide the image altogether: a fresh
    network whose activations shrink from layer to layer needs far sharper kinks than a trained one.
    """
    shape = (observation.num_images, *observation.image_shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    some = next(model.parameters())
    images = observation.normalization.decode(noise.to(some)).clamp(0, 1)
    labels = infer(model, observation).labels if observation.labels is None else observation.labels
    labels = labels.to(some.device)
    unit = matching.scorer(model, observation, labels)(images)
    of_noise = observe(
        model,
        images,
        labels,
        observation.protocol,
        normalization=observation.normalization,
        training_mode=observation.training_mode,
        loss=matching.loss,
    )
    smoothing, asked, score = Smoothing(), 2, matching.scorer(model, of_noise, labels)
    for _ in range(_SHARPENINGS):
        asked += 1
        with rounded(smoothing.start):
            turned = score(images)
        if turned <= unit:
            break
        smoothing = Smoothing(start=2 * smoothing.start, end=2 * smoothing.end)
    return unit, smoothing, asked


def _quasi_newton(evaluations: int) -> LBFGS:
    # The curvature is kept from one sharpness to the next: it changes little, and learning it anew costs.
    # No tolerance: on a fresh ConvNet8 torch's own would end the search where it begins.
    return LBFGS(
        max_iter=evaluations,
        max_eval=evaluations,
        history_size=50,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search="strong_wolfe",
    )


def _polished(
    found: Reconstruction,
    model: nn.Module,
    observation: Observation,
    matching: GradientMatching,
    steps: int,
) -> Reconstruction:
    """Go on from a closed form that rounding or missing equations left inexact."""
    polish = GradientMatching(
        objective=objectives.l2,
        optimizer=_quasi_newton(min(_POLISH, steps)),
        decay=None,
        init=found.images,
        steps=max(1, steps // _POLISH),
        loss=matching.loss,
    )
    better = polish(model, observation)
    assert found.labels is not None  # the closed form always gives them
    score = matching.score(model, observation, better.images, found.labels)
    if not score < found.score:
        return found
    return replace(
        better,
        score=score,
        trial_scores=torch.tensor([score]),
        seconds=found.seconds + better.seconds,
        evaluations=found.evaluations + better.evaluations,
        note="closed form, layer by layer, polished by L-BFGS",
    )
