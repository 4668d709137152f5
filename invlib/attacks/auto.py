"""The attack to audit with: whichever of this project's is strongest on what the server saw."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from invlib.attacks.base import Attack, Settings, known_labels
from invlib.attacks.matching import GradientMatching
from invlib.attacks.published import preset
from invlib.attacks.recursive import is_chain, recursive_inversion
from invlib.attacks.shifts import Shifting, moves
from invlib.autodiff.smoothing import Smoothing, rounded
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import ConfigError
from invlib.federated import observe
from invlib.optim import objectives, priors
from invlib.optim.coordinates import NaturalImages
from invlib.optim.optimizers import LBFGS

STEPS, TV, NATURAL, SHIFTS = 1200, 0.1, 1.0, 4  # what `best` takes where nothing else is said
_DECAY = 0.03  # factor of both priors' weights at the last step, where the objective can be trusted
_FAINT = 0.1  # standard deviation of the noise around grey, so that images and restarts start apart

# Distances of directions: below the first there is nothing left to polish, above the second the closed form
# failed (noise was added, say, or equations are missing) and a start from noise is better.
_EXACT, _USABLE = 1e-6, 0.1
_SHARPENINGS = 16  # at most: a factor of two each
_STAGE = 50  # evaluations at one sharpness: with fewer, line searches use them up
_SHIFTING = 500  # evaluations from which on shifted copies are compared
_POLISH = 20  # iterations of the polish between two projections to the box


def best(
    *,
    evaluations: int | None = None,
    steps: int | None = None,
    restarts: int = 1,
    tv: float = TV,
    natural: float = NATURAL,
    shifts: int = SHIFTS,
    **settings: object,
) -> Best:
    """Return the strongest attack that this project has, chosen by what the server saw.

    A single image behind a chain of layers that can be undone, such as LeNetZhu, is computed in closed form
    by `invlib.recursive_inversion`, and polished by L-BFGS on the squared distance where rounding left an
    error. Everything else is matched by direction, as in `invlib.inverting_gradients`, but

    - with a softplus in the place of ReLU (`invlib.Smoothing`), which makes the cost smooth enough for
      L-BFGS. Its initial sharpness is measured: high enough that it changes the update less than another
      image does;
    - in the coordinates of natural images (`invlib.NaturalImages`), from near plain grey, where L-BFGS finds
      what is large in an image before what is fine;
    - with the prior of those coordinates and total variation
      (`invlib.optim.priors.rounded_total_variation`), whose weights decay as the softplus sharpens, since at
      first the objective is only roughly right;
    - with shifted copies. A network that strides and then pools over all places hardly sees a shift by the
      product of its strides (4 pixels in ResNet20), so a search often ends in a shifted copy: the right
      picture in the wrong place. After a sixth of the evaluations the result is therefore compared with
      copies of it shifted by up to two such strides, each improved for a while, and again as long as a copy
      has the lower score. For a single image, and from 500 evaluations on.

    The reconstruction's ``note`` says which of the two it was.

    Args:
        evaluations: how many evaluations of the network's gradient one restart may use, those of shifted
            copies among them; a line search may end a few later. The sharpness changes every 50. None
            takes 1,200.
        steps: another name of ``evaluations``.
        restarts: how many starting points. Where copies are shifted, each of them searches for its sixth of
            the evaluations and the best by score goes on, so that ``restarts + 5`` sixths of ``evaluations``
            are used in all; elsewhere all of them go all the way. With ``prune=True`` fewer do, either way;
            `Reconstruction.evaluations` counts them.
        tv: the initial weight of total variation, in units of the objective of a noise image: all gradients
            of a fresh network point nearly the same way, so that its objectives are small throughout.
        natural: the initial weight of the natural prior, in the same unit.
        shifts: how many shifted copies are compared at a time; 0 shifts nothing.
        settings: any other setting of `invlib.GradientMatching`, for the matching; with another optimiser
            a step is one evaluation.

    Returns:
        An attack; it raises what `invlib.GradientMatching` raises.

    Raises:
        ConfigError: a setting is unknown or out of range, or both ``evaluations`` and ``steps`` are given.

    Source: this project's; its parts are Geiping et al. 2020, arXiv 2003.14053, and Zhu and Blaschko 2021,
    arXiv 2010.07733.

    Taught in: chapter 3
    """
    if evaluations is not None and steps is not None:
        raise ConfigError(
            f"best evaluations is {evaluations} and steps is {steps}; expected one of them, since both are "
            "names of the same setting"
        )
    budget = next((given for given in (evaluations, steps) if given is not None), STEPS)
    # An optimiser that evaluates once a step can have another sharpness at each.
    stages = max(1, budget if "optimizer" in settings else budget // _STAGE)
    matching = GradientMatching(
        optimizer=_quasi_newton(max(1, budget // stages)),
        steps=stages,
        decay=None,
        restarts=restarts,
        smoothing=Smoothing(),
        fading=_DECAY,
        coordinates=NaturalImages(),
        record_every=1,
    )
    return Best(
        matching=preset(matching, settings),
        evaluations=budget,
        tv=tv,
        natural=natural,
        shifts=shifts,
        near_grey="init" not in settings,
        measured_smoothing="smoothing" not in settings,
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class Best(Settings):
    """The attack that `best` returns, with settings of the same names.

    Args:
        matching: the search, where there is no closed form.
        evaluations: of each restart.
        tv: in units of the objective of a noise image.
        natural: in the same unit.
        shifts: shifted copies at a time.
        near_grey: restarts begin near plain grey, and not as ``matching.init`` says.
        measured_smoothing: the sharpness is measured, and not that of ``matching.smoothing``.

    Raises:
        ConfigError: a setting is out of range.
    """

    matching: GradientMatching
    evaluations: int = STEPS
    tv: float = TV
    natural: float = NATURAL
    shifts: int = SHIFTS
    near_grey: bool = True
    measured_smoothing: bool = True

    def __post_init__(self) -> None:
        for name, least in (("evaluations", 1), ("tv", 0), ("natural", 0), ("shifts", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"best {name} is {getattr(self, name)}; expected at least {least}")

    def __call__(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        """Attack an observation; arguments and errors as for `invlib.GradientMatching`."""
        observation.validate(model)
        if is_chain(model, observation):
            closed = recursive_inversion()(model, observation)
            if closed.score <= _EXACT:
                return closed
            if closed.score <= _USABLE:
                return self._polished(closed, model, observation, callback, progress)
        matching = self.matching
        unit, smoothing, asked = _noise(matching, model, observation)
        generator = generator or torch.Generator().manual_seed(0)
        search = replace(
            matching,
            priors=(
                *matching.priors,
                (self.natural * unit, _coordinates(matching).prior(observation.normalization)),
                (self.tv * unit, priors.rounded_total_variation),
            ),
            init=_faint(matching, observation, generator) if self.near_grey else matching.init,
            smoothing=smoothing if self.measured_smoothing else matching.smoothing,
        )
        # A short search has evaluations for few copies, or for none.
        copies = min(self.shifts, self.evaluations // _STAGE // 2 - 2)
        places = moves(model, observation) if self.evaluations >= _SHIFTING and copies else []
        run: Attack = search
        if places:
            run = Shifting(
                search=search,
                places=tuple(places),
                copies=copies,
                stage=max(1, _STAGE * search.steps // self.evaluations),
                per_step=max(1, self.evaluations // search.steps),
            )
        result = run(model, observation, generator=generator, callback=callback, progress=progress)
        note = f"gradient matching {'without' if search.smoothing is None else 'with'} smoothing"
        return replace(
            result,
            evaluations=result.evaluations + asked,
            note=note + (", and from shifted copies" if places else ""),
        )

    def _polished(
        self,
        closed: Reconstruction,
        model: nn.Module,
        observation: Observation,
        callback: Callback | None,
        progress: bool,
    ) -> Reconstruction:
        """Go on from a closed form that rounding or missing equations left inexact."""
        polish = GradientMatching(
            objective=objectives.l2,
            optimizer=_quasi_newton(min(_POLISH, self.evaluations)),
            decay=None,
            init=closed.images,
            steps=max(1, self.evaluations // _POLISH),
            loss=self.matching.loss,
        )
        polished = polish(model, observation, callback=callback, progress=progress)
        assert closed.labels is not None  # the closed form always gives them
        # By direction, as the closed form is scored, whatever the objective of the matching.
        score = GradientMatching(loss=polish.loss).score(model, observation, polished.images, closed.labels)
        if not score < closed.score:
            interrupted = polished.status == "interrupted"
            return replace(closed, status="interrupted") if interrupted else closed
        return replace(
            polished,
            score=score,
            objective=closed.objective,
            trial_scores=torch.tensor([score]),
            seconds=closed.seconds + polished.seconds,
            evaluations=closed.evaluations + polished.evaluations,
            note="closed form, layer by layer, polished by L-BFGS",
        )


def _coordinates(matching: GradientMatching) -> NaturalImages:
    return matching.coordinates or NaturalImages()


def _faint(matching: GradientMatching, observation: Observation, generator: torch.Generator) -> Tensor:
    """Draw starts near plain grey."""
    shape = (matching.restarts, observation.num_images, *observation.image_shape)
    return _coordinates(matching).images(_FAINT * torch.randn(shape, generator=generator))


def _noise(
    matching: GradientMatching, model: nn.Module, observation: Observation
) -> tuple[float, Smoothing, int]:
    """Return the objective of a noise image, the smoothing to begin with, and how many evaluations that took.

    Smoothing that changes an update more than another image does would hide the image altogether: a fresh
    network whose activations shrink from layer to layer needs a far sharper softplus than a trained one.
    """
    shape = (observation.num_images, *observation.image_shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    some = next(model.parameters())
    images = observation.normalization.decode(noise.to(some)).clamp(0, 1)
    labels = known_labels(model, observation)
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
            changed = score(images)
        if changed <= unit:
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
