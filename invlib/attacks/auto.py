"""The attack to audit with: whichever of this project's is strongest on what the server saw."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from invlib.attacks.base import Settings, known_labels, likelihood_of, only_direction, with_labels, with_loss
from invlib.attacks.batches import Additive, Batching, additive, hidden_images
from invlib.attacks.buffers import with_statistics
from invlib.attacks.doubts import doubted, doubts_of, length_doubts, says_nothing
from invlib.attacks.likelier import likelier
from invlib.attacks.matching import GradientMatching, identity
from invlib.attacks.parts import Parts
from invlib.attacks.polish import polished
from invlib.attacks.published import preset
from invlib.attacks.shifts import Shifting, joined, moves
from invlib.attacks.starts import (
    DECAY,
    STAGE,
    coordinates,
    faint,
    mean_restarts,
    noise_image,
    quasi_newton,
    statistics,
)
from invlib.attacks.verified import EXACT, closest_closed_form, nearer_of
from invlib.autodiff.smoothing import Smoothing
from invlib.core.network import like
from invlib.core.observation import Observation, undefended
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import ConfigError, RecoveryError
from invlib.optim import objectives, priors
from invlib.optim.coordinates import NaturalImages
from invlib.optim.objectives import Layers
from invlib.optim.optimizers import LBFGS
from invlib.search.checkpoint import Checkpoint, try_writing
from invlib.settings import Count, FromZero, NotNegative, checked, checks

STEPS, TV, NATURAL, SHIFTS = 1200, 0.1, 1.0, 4  # what `best` takes where nothing else is said
# Distance of directions, as a share of a noise image's: up to it a closed form is polished, above it a search
# from noise ends nearer.
_NEAR = 1e-3
_PLAIN = (objectives.cosine, Layers(), "auto")  # objective, layers and labels of a search that is finished
_SHIFTING = 500  # evaluations from which on shifted copies are compared
_SHORT = 200  # evaluations of the schedule that a longer one is compared with where that stalls
_MUCH = 0.1  # of the distance: what the squared distance leaves of it where it is worth going on with


@checks
def best(
    *,
    evaluations: Count | None = None,
    steps: Count | None = None,
    restarts: Count = 1,
    tv: NotNegative = TV,
    natural: NotNegative = NATURAL,
    shifts: FromZero = SHIFTS,
    **settings: object,
) -> Best:
    """Return the strongest attack that this project has, chosen by what the server saw.

    Closed forms come first, the cheapest before the others: `invlib.fully_connected`, for a batch too where
    units of the first layer are active for one image alone; the direction that the first layer's rows share,
    with the one number that it leaves open found by trial (no bias is needed, whatever follows the layer and
    however many local steps there were); `invlib.recursive_inversion`. Each is checked by the client's own
    step: the update of its images has to be the observed one, of which a factor does not count. Hidden labels
    of a single image are tried where the inferred one does not fit. An exact closed form is returned at once,
    with status ``closed_form``; one that rounding left a little inexact is polished by L-BFGS on the squared
    distance. Where equations are missing, so that many images agree, a search decides among them.

    Everything else is matched by direction, as in `invlib.inverting_gradients`, but

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
      has the lower score. For a single image, and from 500 evaluations on;
    - of a batch, with turns. Where the updates of single images add up to that of the batch, as in evaluation
      mode, images of all restarts, their shifted copies, and what three restarts and more agree on, are
      chosen by what each adds (`invlib.crossover`). Then one after another is searched alone in what the
      others leave, from shifted copies too, and all go on together; from 500 evaluations on, and as often as
      three quarters of them allow. N gradients of single images count as one evaluation. Images that do
      not show in what was reached are named among the result's warnings;
    - with the batch-norm statistics of the batch beside the gradient, as equations, where the client ran in
      training mode and sent its buffers (`invlib.optim.priors.BatchStatistics`). In the end the images get
      the one brightness and contrast of each colour with which they hold best at the first layer.

    Where the cosine stalls before its evaluations are spent, as it does in single precision at small
    distances, the others go to the squared distance, in the same coordinates and without priors. What that
    gives is kept if it lowers the cosine, which is then summed in double precision and without cancellation.
    Where that leaves more than a tenth of the distance, 200 of them go to what ``evaluations=200`` would do,
    and the better of both is returned: a search that stalls is none the worse for having been a long one.
    One that spends all its evaluations may end in a worse minimum than a shorter one, though it seldom does:
    its sharpness changes more slowly.
    The status is ``converged`` where nothing is left to gain, and ``max_steps`` where the evaluations are
    spent. With another ``objective``, ``layers`` or ``labels`` the search ends where it stalls.

    Where the observation is of an `invlib.Defended` client whose defences leave more than a direction, a part
    of the evaluations goes to all of the above, with numbers that were not sent left out; the others begin at
    its result and lower the likelihood of the defences. Under noise that part is two thirds, and the natural
    prior counts in the rest as the negative logarithm of a probability. Without noise it is half, of whose
    steps none lowers the priors, since the cosine of rounded numbers is least at other images than the
    client's; the rest is without priors. Of both results the likelier is returned, by likelihood and prior.
    With fewer than 100 evaluations, or other settings than those above, the likelihood takes the place of the
    cosine from the start.

    Where noise is known and a fully connected layer is given the image itself, whose gradient shows through
    the noise, there is no search: the image is the mean of those that the noise leaves possible
    (`invlib.attacks.noisy.noisy_layer_input`), and its scale that with which the client's step is likeliest.

    Of a closed form and a search the one whose update is nearer is returned. Its ``note`` says what it was,
    which closed forms were tried and how near they came, or why none applies. What a network computes counts
    for them, not how its code is spelled: modules, functions and operators come to the same.

    Args:
        evaluations: how many evaluations of the network's gradient one restart may use, those of shifted
            copies among them; a line search may end a few later. The sharpness changes every 50. None
            takes 1,200. Checks of closed forms come on top: 2 for one that is exact, otherwise up to 100.
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
    stages = max(1, budget if "optimizer" in settings else budget // STAGE)
    matching = GradientMatching(
        optimizer=quasi_newton(max(1, budget // stages)),
        steps=stages,
        decay=None,
        restarts=restarts,
        smoothing=Smoothing(),
        fading=DECAY,
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
        matching: the search, where no closed form is exact.
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
    evaluations: Count = STEPS
    tv: NotNegative = TV
    natural: NotNegative = NATURAL
    shifts: FromZero = SHIFTS
    near_grey: bool = True
    measured_smoothing: bool = True

    @torch.inference_mode(mode=False)
    def __call__(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        checkpoint: str | Path | None = None,
    ) -> Reconstruction:
        """Attack an observation; arguments and errors as for `invlib.GradientMatching`.

        A run that goes on from a checkpoint computes closed forms anew, and has the results of all other
        parts: the search, shifted copies, each round of the polish.
        """
        checked("checkpoint", checkpoint, str | Path | None)
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None:
            try_writing(path)
        model = observation.validate(model)
        observation = with_loss(self.matching.loss, observation)
        if says_nothing(observation):
            self = replace(self, evaluations=1, matching=replace(self.matching, steps=1))
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        checked("generator", generator, torch.Generator)
        saved = None
        if path is not None:
            saved = Checkpoint(path, identity(self, model, observation, [generator.get_state()]))
            saved.open(like(model).device)
        with tqdm(
            disable=not progress, desc="closed forms", unit="evaluation", total=self.evaluations
        ) as bar:
            parts = Parts(model, generator=generator, callback=callback, bar=bar, saved=saved)
            found = self._found(model, observation, parts)
        if saved is not None and found.status != "interrupted":
            saved.remove()
        return doubted(found, doubts_of(model, observation))

    def _found(self, model: nn.Module, observation: Observation, parts: Parts) -> Reconstruction:
        closed, tried = closest_closed_form(model, observation, self.matching.loss)
        if closed is not None:
            parts.bar.total += closed.result.evaluations
            parts.bar.update(closed.result.evaluations)
        if closed is not None and closed.determined and (closed.share <= EXACT or closed.weighed):
            return doubted(closed.result, doubts_of(model, observation))
        plain = only_direction(self.matching.objective, observation)
        if closed is not None and closed.determined and closed.share <= _NEAR and plain:
            found = polished(self.matching, closed.result, model, observation, self.evaluations, parts)
            return doubted(found, tried.doubts)
        if self.matching.labels == "auto":
            observation = with_labels(model, observation)
        try:
            result = self._matched(model, observation, parts)
        except KeyboardInterrupt:  # before the first step
            if closed is None:
                raise
            return replace(closed.result, status="interrupted")
        if (shuffled := self.matching.in_likely_order(model, observation, result)) is not None:
            again = polished(
                self.matching, result, model, shuffled, self.evaluations // 2, parts, self.matching.steps
            )
            result = replace(again, note=f"{again.note}, in a likely order of the client's minibatches")
        result = self._coloured(result, model, observation)
        result = (
            result if closed is None else nearer_of(closed, result, model, observation, self.matching.loss)
        )
        note = result.note if result.note.startswith("closed") else f"{result.note}; {tried.why}"
        length = length_doubts(model, observation, self.matching.problem(model, observation))
        result, hidden = replace(result, note=note), list[str]()
        if (step := self._additive(model, observation)) is not None:
            hidden = hidden_images(step, result)
            result = replace(result, evaluations=result.evaluations + 3)  # two for the step, one for images
        return doubted(result, [*tried.doubts, *length, *hidden])

    def _matched(
        self, model: nn.Module, observation: Observation, parts: Parts, told: int = 0
    ) -> Reconstruction:
        """Match from noise, and spend what that leaves on the squared distance or on a short schedule."""
        if self._knows(observation):
            return self._likelier(model, observation, parts)
        result, spare, short = self._searched(model, observation, parts, told)
        told += self.matching.steps
        if not self._plain(observation) or spare < STAGE or result.status != "max_steps":
            return result
        reserve = math.ceil(_SHORT * mean_restarts(self.matching))
        if short is None or spare < reserve + STAGE:
            return polished(self.matching, result, model, observation, spare, parts, told)
        stalled, asked = result.score, result.evaluations
        result = polished(self.matching, result, model, observation, spare - reserve, parts, told)
        told, worth = max([told, *result.history.steps]), result.score < _MUCH * stalled
        if result.status == "interrupted" or (worth and result.status == "converged"):
            return result
        if worth:
            spare -= result.evaluations - asked
            return polished(self.matching, result, model, observation, spare, parts, told)
        try:
            other = short._matched(model, observation, parts, told)
        except KeyboardInterrupt:
            return replace(result, status="interrupted")
        nearer = other.score < result.score
        note = result.note + ("; a shorter schedule came nearer" if nearer else "")
        return replace(joined(result, other, 0, 0), note=note)

    def _likelier(self, model: nn.Module, observation: Observation, parts: Parts) -> Reconstruction:
        """Match as if numbers were sent as they are, then by the likelihood, and keep what is likelier.

        From a start far away a likelihood leads astray more often than a direction. Near the client's images
        it is the better of the two, most of all for rounded numbers: of these the cosine is least elsewhere.
        """
        known = likelihood_of(self.matching.objective, observation)
        share, fading = (2 / 3, self.matching.fading) if known.sigma else (1 / 2, 1.0)
        steps, optimizer, early = self.matching.steps, self.matching.optimizer, int(share * self.evaluations)
        if isinstance(optimizer, LBFGS):  # as many stages, each of them shorter
            most = optimizer.max_eval and max(1, int(share * optimizer.max_eval))
            optimizer = replace(optimizer, max_iter=max(1, int(share * optimizer.max_iter)), max_eval=most)
        else:
            steps = max(1, int(share * steps))
        matching = replace(self.matching, optimizer=optimizer, steps=steps, fading=fading)
        first, later = replace(self, evaluations=early, matching=matching), self.evaluations - early
        client = undefended(observation.protocol)
        naive = first._matched(model, replace(observation, protocol=client), parts)
        weight = self._least(observation) if self.natural else 0.0
        return likelier(
            self.matching,
            naive,
            model,
            observation,
            parts,
            evaluations=later,
            natural=weight,
            tv=self.tv * weight / (self.natural or 1),
            told=first.matching.steps,
        )

    def _searched(
        self, model: nn.Module, observation: Observation, parts: Parts, told: int
    ) -> tuple[Reconstruction, int, Best | None]:
        """Match from noise.

        Returns:
            The result; how many evaluations it left unused, for one restart; and the attack with a short
            schedule from the same start, where this one's is longer.
        """
        matching = self.matching
        unit, smoothing, asked = noise_image(matching, model, observation)
        natural, fading = self._weighed(observation, unit)
        step = self._additive(model, observation)
        tv = self.tv * unit * (natural / (self.natural * unit) if natural else 1)
        search = replace(
            matching,
            priors=(
                *matching.priors,
                (natural, coordinates(matching).prior(observation.normalization)),
                (tv, priors.rounded_total_variation),
                *statistics(model, observation, unit),
            ),
            fading=fading,
            init=faint(matching, observation, parts.generator) if self.near_grey else matching.init,
            smoothing=smoothing if self.measured_smoothing else matching.smoothing,
        )
        # A short search has evaluations for few copies, or for none.
        copies = min(self.shifts, self.evaluations // STAGE // (2 if step is None else 4) - 2)
        asked += 0 if step is None else 2
        shifting = self.evaluations >= _SHIFTING and copies > 0 and (step or observation.num_images == 1)
        places = moves(model, observation) if shifting else []
        if step is not None:
            fitting = step.room() // (observation.num_images * matching.restarts)
            places = sorted(places, key=lambda move: abs(move[0]) + abs(move[1]))[: max(0, fitting - 2)]
        share = mean_restarts(search)
        planned = self.evaluations * ((share + 5) / 6 if places or step else share)
        parts.bar.total += round(planned) - self.evaluations
        parts.bar.update(asked)
        stage = max(1, STAGE * search.steps // self.evaluations)
        per_step = max(1, self.evaluations // search.steps)
        if step is not None:
            result = Batching(
                search=search, places=tuple(places), copies=max(0, copies), stage=stage, per_step=per_step
            ).run(step, observation, parts)
        elif places:
            result = Shifting(
                search=search, places=tuple(places), copies=copies, stage=stage, per_step=per_step
            ).run(model, observation, parts)
        else:
            steps = told + search.steps
            result = parts.run(search, observation, spent=told, steps=steps, name="gradient matching")
        known = likelihood_of(search.objective, observation)
        note = f"gradient matching {'without' if search.smoothing is None else 'with'} smoothing"
        note += "" if known is None else f", by {known.words}"
        result = replace(
            result,
            evaluations=result.evaluations + asked,
            history=replace(result.history, steps=[told + step for step in result.history.steps]),
            note=note
            + (", of each image by itself too" if step else "")
            + (", and from shifted copies" if places else ""),
        )
        short = None
        if self.evaluations > _SHORT:
            fewer = max(1, round(search.steps * _SHORT / self.evaluations))
            begun = replace(matching, steps=fewer, init=search.init)
            short = replace(self, evaluations=_SHORT, shifts=0, near_grey=False, matching=begun)
        return result, min(self.evaluations, int(planned - result.evaluations)), short

    def _plain(self, observation: Observation) -> bool:
        """Say whether the search compares whole updates by their direction alone, as its sequels do."""
        search = self.matching
        plain = (search.objective, search.layers, search.labels) == _PLAIN
        return plain and only_direction(search.objective, observation)

    def _knows(self, observation: Observation) -> bool:
        """Say whether a defence leaves more to compare than a direction, with evaluations for both."""
        search = self.matching
        plain = (search.objective, search.layers, search.labels) == _PLAIN
        return plain and not only_direction(search.objective, observation) and self.evaluations >= 2 * STAGE

    def _weighed(self, observation: Observation, unit: float) -> tuple[float, float]:
        """Return the initial weight of the natural prior, and the part of it that is left at the last step.

        Against the likelihood of noise it falls no lower than to what makes it a negative log-probability,
        half the sum of squares.
        """
        weight, fading = self.natural * unit, self.matching.fading
        if only_direction(self.matching.objective, observation) or not weight:
            return weight, fading
        least = self._least(observation)
        return max(weight, least), max(fading, min(1.0, least / weight))

    def _least(self, observation: Observation) -> float:
        """Return the weight with which the natural prior is a negative log-probability; 0 without noise."""
        known = likelihood_of(self.matching.objective, observation)
        size = observation.num_images * math.prod(observation.image_shape)
        return size / 2 / known.unit(list(observation.update.values())) if known.sigma else 0.0

    def _coloured(self, found: Reconstruction, model: nn.Module, observation: Observation) -> Reconstruction:
        """Bring images to the colours and the contrast that were sent, on which updates hardly depend."""
        if not observation.training_mode or found.labels is None:
            return found
        try:
            images = with_statistics(model, observation, found.images).clamp(0, 1)
        except RecoveryError:
            return found
        score = self.matching.scorer(model, observation, found.labels)(images)
        note = f"{found.note}; colours and contrast by the statistics that were sent"
        return replace(found, images=images, score=score, evaluations=found.evaluations + 1, note=note)

    def _additive(self, model: nn.Module, observation: Observation) -> Additive | None:
        """Return the client's step where images of a batch are sought by themselves."""
        search = self.matching
        if not self._plain(observation) or observation.num_images == 1 or self.evaluations < _SHIFTING:
            return None
        try:
            return additive(model, observation, known_labels(model, observation), search)
        except RecoveryError:
            return None
