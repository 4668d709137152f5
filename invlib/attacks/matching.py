"""Gradient matching: find images whose update looks like the observed one."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.base import (
    Settings,
    compared_by,
    index_of_best,
    likelihood_of,
    only_direction,
    with_labels,
    with_loss,
)
from invlib.attacks.doubts import doubted, doubts_of, length_doubts, says_nothing
from invlib.attacks.losses import taking_probabilities
from invlib.attacks.orders import likely_orders
from invlib.attacks.saturation import share_of_label, weighed
from invlib.autodiff.gradients import PLAIN, GradientMode
from invlib.autodiff.odds import log_odds
from invlib.autodiff.smoothing import Smoothing, rounded
from invlib.core.convert import as_images, as_labels
from invlib.core.fingerprint import describe
from invlib.core.network import in_mode, num_classes, probe, trainable_parameters
from invlib.core.observation import ClientStep, Loss, Observation, stackable, takes_mode, undefended
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import ConfigError, DoubtWarning
from invlib.federated import FedAvg, FedSGD
from invlib.federated.protocols import check_loss
from invlib.optim import objectives
from invlib.optim.coordinates import NaturalImages, Tiles
from invlib.optim.objectives import Compared, Layers, Objective
from invlib.optim.optimizers import Adam, Optimizer, Variable, per_restart
from invlib.optim.priors import AnyPrior, bound
from invlib.optim.schedules import StepDecay
from invlib.search.checkpoint import Checkpoint, try_writing
from invlib.search.engines import memory, selection
from invlib.search.hooks import Bar, Hook, Told
from invlib.search.interrupt import held
from invlib.search.problem import Problem, Update
from invlib.search.run import SearchResult, run
from invlib.search.settings import EngineName, Schedule, SearchSettings
from invlib.settings import Count, Factor, Finite, NotNegative, Rule, checked, taking

_ALWAYS = 1 << 28  # bytes of starting points that are drawn whatever memory is free
_NONE = 1e-5  # up to this a score is that of the client's own images, in float32
_REORDERED = 16  # up to so many images a score looks for other orders without being told
_SLACK = 1e-3  # how far rounding may take given images beyond black and white
MANY_LOCAL_STEPS = 10  # from here on they are computed anew in the backward pass

Images = Annotated[
    Tensor,
    # but for rounding; numbers that are not finite end the attack by its status
    Rule(
        "a tensor of images in [0, 1]",
        lambda x: (
            isinstance(x, Tensor) and x.is_floating_point() and not ((x < -_SLACK) | (x > 1 + _SLACK)).any()
        ),
    ),
]
Init = Literal["randn", "rand", "zeros"] | Images | Tiles


@dataclass(frozen=True, kw_only=True, repr=False)
class GradientMatching(Settings):
    r"""An attack that minimises the distance between the update of a guess and the observed update.

    .. math:: \min_x\; D\big(u(x, y),\, u^\ast\big) + \sum_k \alpha_k R_k(x)

    where :math:`u` is the client's own step, called on the guess. All restarts run together.

    Args:
        objective: :math:`D`, see `invlib.optim.objectives`; any ``(candidate, target) -> scalar``. Where the
            observation is of an `invlib.Defended` client, the default gives way to the likelihood of its
            defences.
        priors: pairs of a weight and a prior on the normalised images, see `invlib.optim.priors`. Weights are
            in units of the cosine distance; a likelihood of noise counts them by what it makes of that unit.
        optimizer: `invlib.Adam`, `invlib.SGD` or `invlib.LBFGS`.
        steps: how many steps.
        decay: when the step size falls; None keeps it.
        restarts: how many starting points.
        init: ``"randn"``, ``"rand"`` (uniform in [-1, 1]), ``"zeros"`` or
            `invlib.optim.coordinates.Tiles`, all in normalised units, or a tensor ``(N, C, H, W)`` or
            ``(R, N, C, H, W)`` in [0, 1].
        box: keep the images in [0, 1] by projection after every step.
        layers: which tensors of the update count, and how much.
        labels: ``"auto"`` takes the observed labels and infers them where they are hidden;
            ``"optimize"`` finds soft labels, one for each image, together with the images;
            ``"optimize_shared"`` finds one soft label for all images, as the 2020 code does.
        loss: the client's loss ``(logits, labels) -> scalar``; where the observation knows it, the default
            gives way to it.
        smoothing: a softplus in the place of ReLU while the images are optimised; None keeps ReLU. With it,
            each restart keeps its last iterate.
        fading: decay of the priors' weights: the part of them that is left at the last step, towards which
            they fall geometrically; 1 keeps them. Below that too, each restart keeps its last iterate.
        coordinates: optimise coordinates of natural images instead of pixels: ``"randn"`` and ``"zeros"``
            draw them, and there is no projection (only the images that are given back are in the box).
        median_every: apply a 3×3 median filter every so many steps.
        keep: ``"best"``, the iterate of each restart with the lowest measured cost, or ``"last"``.
        tolerance: stop when an objective falls to this.
        patience: stop when no restart improved its cost for so many steps.
        chunk: how many restarts run together; None takes as many as fit in memory, for which one restart is
            evaluated once beforehand, uncounted. A chunk that does not fit after all is halved.
        prune: successive halving: the worse half of the restarts stops at every tenth of the run, until one
            is left. Of 32 restarts that is a fifth of the work.
        engine: what runs the steps: ``"eager"``, one restart after another; ``"batched"``, all together;
            ``"graphed"``, captured as a CUDA graph; ``"auto"`` chooses, and `Reconstruction` says what.
        recompute: compute local steps anew in the backward pass, one by one, so that a client of many steps
            takes hardly more memory than one of a single step, and about half as much time again; None does
            so from 10 local steps on.
        log_odds: match the direction of the log-odds of the label (`invlib.autodiff.odds.log_odds`) in the
            place of cross-entropy: it is the same, without the factor that a network's certainty takes away.
            That needs labels that are classes, an objective that a factor does not change, as `cosine`, and
            one image of a client that sends one gradient; or a batch of `invlib.FedSGD` in evaluation mode,
            whose images each get the weight that fits best. None does so where all of that holds and the
            update says that labels had a probability above 0.9999; below, rounding alone would differ.
        precision: of the multiplications in convolutions and fully connected layers, forward and backward:
            ``"full"`` is that of the parameters; ``"bfloat16"`` is fast where the device has units for it.
            Scores are always measured in full.
        record_every: record the cost every so many steps.

    Raises:
        ConfigError: a setting is unknown or out of range.

    Source: Geiping et al. 2020, arXiv 2003.14053, equation 4; Zhu et al. 2019, arXiv 1906.08935.

    Taught in: chapter 2
    """

    objective: Compared = objectives.cosine
    priors: tuple[tuple[NotNegative, AnyPrior], ...] = ()
    optimizer: Optimizer = Adam(lr=0.1, signed=True)
    steps: Count = 2400
    decay: Schedule | None = StepDecay()
    restarts: Count = 1
    init: Init = "randn"
    box: bool = True
    layers: Layers = Layers()
    labels: Literal["auto", "optimize", "optimize_shared"] = "auto"
    loss: Annotated[Loss, taking("a function (logits, labels) -> scalar", 2)] = F.cross_entropy
    smoothing: Smoothing | None = None
    fading: Factor = 1.0
    coordinates: NaturalImages | None = None
    median_every: Count | None = None
    keep: Literal["best", "last"] = "best"
    tolerance: Finite | None = None
    patience: Count | None = None
    chunk: Count | None = None
    prune: bool = False
    engine: EngineName = "auto"
    recompute: bool | None = None
    log_odds: bool | None = None
    precision: Literal["full", "bfloat16"] = "full"
    record_every: Count = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prune and self.optimizer.together:
            per_restart(self.optimizer)
        if self.coordinates is not None and self.median_every is not None:
            raise ConfigError(
                f"GradientMatching median_every is {self.median_every}; expected None where coordinates are "
                "given, for a median filter works on pixels"
            )

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
        """Attack an observation.

        Ctrl-C ends the run and returns the best so far, with status ``interrupted``.

        Args:
            model: the model that the client received; it is not changed.
            observation: what the server saw.
            generator: draws the starting points; None makes one with seed 0.
            callback: called with `invlib.Progress` after each step; returning True stops the run.
            progress: show a progress bar.
            checkpoint: a file to which the state is written every 30 s, and from which an unfinished run
                with the same settings goes on; it is removed when the run is complete. Its owner alone may
                read it, for it holds the images so far. Where a later write fails, that is warned of, and
                the attack goes on.

        Raises:
            ObservationError: the observation does not fit the model.
            ConfigError: the init tensor has the wrong shape; the checkpoint is of another run, or could not
                tell this run from another one (a setting is a lambda, say).
            DataError: the checkpoint cannot be written where it is wanted.
        """
        began = time.perf_counter()
        checked("checkpoint", checkpoint, str | Path | None)
        if checkpoint is not None:
            try_writing(Path(checkpoint))
        model = observation.validate(model)
        if says_nothing(observation):
            self = replace(self, steps=1)
        problem = self.problem(model, observation)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        starts = self.starts(problem, observation, generator)
        hooks = hooks_of(callback, progress)
        saved = None
        if checkpoint is not None:
            saved = Checkpoint(Path(checkpoint), identity(self, model, observation, starts))
            saved.open(problem.like.device)
            hooks.insert(0, saved)
        seed = generator.initial_seed()
        found = self.searched(model, observation, problem, starts, hooks, began, seed=seed)
        if saved is not None:
            saved.keep() if found.status == "interrupted" else saved.remove()
        if (shuffled := self.in_likely_order(model, observation, found)) is not None:
            again = replace(self, init=found.images, restarts=1)
            found = nearer(found, again(model, shuffled, generator=generator, progress=progress))
        return doubted(found, [*doubts_of(model, observation), *length_doubts(model, observation, problem)])

    def in_likely_order(
        self, model: nn.Module, observation: Observation, found: Reconstruction
    ) -> Observation | None:
        """Return the observation of a client that shuffles, in the orders in which images found fit it best.

        None where the client does not shuffle, or no other order fits better.
        """
        protocol = observation.protocol
        unknown = _reorders(protocol, observation.num_images) and protocol.shuffle
        if not unknown or found.labels is None or found.status in ("interrupted", "non_finite"):
            return None
        client, _ = self._likely(model, observation, found.images, found.labels)
        return None if client is protocol else replace(observation, protocol=client)

    def _likely(
        self, model: nn.Module, observation: Observation, images: Tensor, labels: Tensor
    ) -> tuple[FedAvg, float]:
        def score(client: FedAvg) -> float:
            return self.scorer(model, replace(observation, protocol=client), labels)(images)

        assert isinstance(observation.protocol, FedAvg)
        return likely_orders(score, observation.protocol, observation.num_images)

    def searched(
        self,
        model: nn.Module,
        observation: Observation,
        problem: Problem,
        starts: list[Tensor],
        hooks: Sequence[Hook],
        began: float,
        *,
        seed: int,
    ) -> Reconstruction:
        """Run the search of a problem from its starting points, and choose among the restarts."""
        with in_mode(model, training=observation.training_mode, seed=seed):
            [result] = run(problem, starts, self.search, hooks)
            found = reconstruction(
                problem, result, observation, compared_by(self.objective, observation), began
            )
        known = likelihood_of(self.objective, observation)
        return found if known is None else replace(found, note=f"gradient matching by {known.words}")

    @property
    def search(self) -> SearchSettings:
        """The settings that the loop of the search reads."""
        return SearchSettings(**{f.name: getattr(self, f.name) for f in fields(SearchSettings)})

    def problem(self, model: nn.Module, observation: Observation, labels: Tensor | None = None) -> Problem:
        """Return what this attack minimises, for an observation that is known to fit the model.

        Labels that are not given are those of the observation, inferred or optimised.

        Raises:
            RecoveryError: labels are to be inferred and cannot be.
        """
        own = trainable_parameters(model)
        protocol, understands = observation.protocol, takes_mode(observation.protocol)
        if not understands:  # a client that knows nothing of engines may use torch's own tape
            own = {name: p.detach().requires_grad_() for name, p in own.items()}
        some = next(iter(own.values())).detach()
        target = [observation.update[name].to(some) for name in own]
        indices, weights = self.layers.choose(target)
        lower, upper = observation.normalization.box(dtype=some.dtype, device=some.device)
        boxed = self.box and self.coordinates is None
        images = Variable(name="images", low=lower, high=upper) if boxed else Variable(name="images")
        optimized = self.labels != "auto" and labels is None
        observation = with_loss(self.loss, observation)
        assert observation.loss is not None
        loss, classes = observation.loss, num_classes(model, observation.image_shape) if optimized else None
        if classes is not None:
            loss, doubts = taking_probabilities(loss, observation.num_images, classes, some)
            observation = replace(observation, notes=(*observation.notes, *doubts))
        elif labels is None:
            observation = with_labels(model, observation)
            labels = observation.labels
        else:
            labels = labels.to(some) if labels.is_floating_point() else labels.to(some.device)
        if labels is not None:
            check_loss(loss, some.new_zeros(len(labels), num_classes(model, observation.image_shape)), labels)
        known, compares = likelihood_of(self.objective, observation), self.objective
        if known is not None:
            observation = replace(observation, notes=(*observation.notes, *known.doubts))
        if isinstance(compares, objectives.Masked):
            compares.check([target[i] for i in indices])
        names, masks = list(own), [observation.sent.get(name) for name in own]
        unit = 1.0
        if not only_direction(compares, observation):
            # It knows itself what numbers that were not sent say.
            compares, masks = known, [None] * len(own)
            unit = known.unit([target[i] for i in indices])

        def update(
            inputs: Tensor,
            targets: Tensor,
            params: dict[str, Tensor] | None = None,
            mode: GradientMode = PLAIN,
            loss: Loss = loss,
        ) -> list[Tensor]:
            settings: dict[str, Any] = {
                "params": own if params is None else params,
                # What a forward pass writes into, in training mode, begins anew at each evaluation.
                "buffers": {
                    name: b.detach().clone() if observation.training_mode else b.detach()
                    for name, b in model.named_buffers()
                },
                "loss": loss,
            }
            if understands:
                sent = protocol(model, inputs, targets, **settings, mode=mode)
            else:
                with rounded(mode.sharpness), torch.enable_grad():
                    sent = protocol(model, inputs, targets, **settings)
            return [_sent_part(sent, names[i], masks[i]) for i in indices]

        def inputs(place: Tensor) -> Tensor:
            if self.coordinates is None:
                return place
            return observation.normalization.encode(self.coordinates.images(place))

        objective, compared = _weighted(compares, weights), [target[i] for i in indices]
        alpha = share_of_label(self.log_odds, model, observation, labels, objective, compared, update)
        step: Update = update
        if alpha is not None:
            # A factor does not count, and squares of very small numbers would be zero.
            largest = torch.stack([t.abs().max() for t in compared if t.numel()]).max()
            compared = [t / largest for t in compared]
            step = partial(update, loss=partial(log_odds, alpha=alpha))
            step = weighed(step, compared) if observation.num_images > 1 else step
        return Problem(
            update=step,
            objective=objective,
            target=compared,
            alpha=alpha,
            params=own,
            priors=tuple((unit * w, bound(prior, model, observation, labels)) for w, prior in self.priors),
            variables=[images, Variable(name="labels", signed=False)] if optimized else [images],
            labels=labels,
            classes=classes,
            notes=observation.notes,
            inputs=inputs,
            decode=observation.normalization.decode,
            encode=observation.normalization.encode,
            shape=(observation.num_images, *observation.image_shape),
            like=some,
            stackable=stackable(protocol),
            recompute=_recomputes(self.recompute, observation),
            compute_dtype=torch.bfloat16 if self.precision == "bfloat16" else None,
            activations=_activations(model, observation),
        )

    def starts(self, problem: Problem, observation: Observation, generator: torch.Generator) -> list[Tensor]:
        """Draw all starting points at once, on the CPU, so that neither device nor chunk changes them.

        Returns:
            ``(restarts, N, C, H, W)``, normalised or in coordinates; and logits where labels are optimised.

        Raises:
            ConfigError: the init tensor has the wrong shape.
        """
        shape = checked_starts(self.restarts, observation)
        generator = checked("generator", generator, torch.Generator)
        if isinstance(self.init, Tensor):
            if tuple(self.init.shape) not in (shape, shape[1:]):
                raise ConfigError(
                    f"GradientMatching init has shape {tuple(self.init.shape)}; "
                    f"expected {shape[1:]} or {shape}"
                )
            images = self.init.expand(shape).clone()
            if self.coordinates is None:
                images = observation.normalization.encode(images)
            else:
                images = self.coordinates.coordinates(images)
        elif isinstance(self.init, Tiles):
            images = self.init.draw(shape, generator)
        elif self.init == "zeros":
            images = torch.zeros(shape)
        elif self.init == "rand":
            images = (torch.rand(shape, generator=generator) - 0.5) * 2
        else:
            images = torch.randn(shape, generator=generator)
        starts = [images.to(problem.like)]
        if problem.classes is not None:
            rows = observation.num_images if self.labels == "optimize" else 1
            logits = [torch.randn(rows, problem.classes, generator=generator) for _ in range(self.restarts)]
            starts.append(torch.stack(logits).to(problem.like))
        return starts

    @torch.inference_mode(mode=False)
    def score(self, model: nn.Module, observation: Observation, images: Tensor, labels: Tensor) -> float:
        """Return the objective of some images, the number that restarts are chosen by.

        Args:
            model: the model that the client received.
            observation: what the server saw.
            images: ``(N, C, H, W)`` in [0, 1].
            labels: int64 ``(N,)`` or probabilities ``(N, classes)``.

        Raises:
            ObservationError: the observation does not fit the model.
        """
        model = observation.validate(model)
        images, labels = as_images(images), as_labels(labels, classes_only=False)
        score, protocol = self.scorer(model, observation, labels)(images), observation.protocol
        if not _reorders(protocol, observation.num_images) or score <= _NONE:
            return score
        _, least = self._likely(model, observation, images, labels)
        if least > _NONE or protocol.shuffle:
            return min(score, least) if protocol.shuffle else score
        doubt = (
            f"in the order of the protocol these images score {score:.1e}, and in another order for each "
            f"epoch {least:.1e}, which is what counts: the client shuffles (FedAvg(shuffle=True))"
        )
        warnings.warn(doubt, DoubtWarning, stacklevel=2)
        return least

    def scorer(self, model: nn.Module, observation: Observation, labels: Tensor) -> Callable[[Tensor], float]:
        """Return `score` as a function of images alone, of an observation that is known to fit the model."""
        problem = self.problem(model, observation, labels)

        def score(images: Tensor) -> float:
            with in_mode(model, training=observation.training_mode, seed=0):
                return float(selection.scores(problem, problem.encode(images)[None]))

        return score


def nearer(found: Reconstruction, other: Reconstruction) -> Reconstruction:
    """Return the one of two results with the lower score, and what both took."""
    evaluations, seconds = found.evaluations + other.evaluations, found.seconds + other.seconds
    best = other if other.score < found.score else found
    note = f"{best.note}; in a likely order of the client's minibatches".removeprefix("; ")
    kept = best.note if best is found else note
    return replace(best, evaluations=evaluations, seconds=seconds, note=kept)


def _sent_part(update: Mapping[str, Tensor], name: str, mask: Tensor | None) -> Tensor:
    if name not in update:
        raise ConfigError(f"the client's step gives no {name!r}; expected each trainable parameter")
    return update[name] if mask is None else update[name] * mask.to(update[name])


def identity(
    attack: Settings, model: nn.Module, observation: Observation, starts: list[Tensor]
) -> dict[str, Any]:
    """Return what a run that goes on from a checkpoint has to share with the run that wrote it."""
    parts = {"attack": attack, "observation": observation, "model": model, "starts": starts}
    try:
        return {name: describe(part, code=True) for name, part in parts.items()}
    except ConfigError as error:
        raise ConfigError(f"a checkpoint cannot tell this run from others: {error}") from error


def _reorders(protocol: ClientStep, num_images: int) -> TypeGuard[FedAvg]:
    """Say whether a client takes its images in minibatches, so that their order changes its update."""
    if not isinstance(protocol, FedAvg) or protocol.orders is not None:
        return False
    few = num_images <= _REORDERED or protocol.shuffle
    return few and protocol.batch_size is not None and protocol.batch_size < num_images


def _recomputes(asked: bool | None, observation: Observation) -> bool:
    client = undefended(observation.protocol)
    if asked is not None or not isinstance(client, FedAvg):
        return bool(asked)
    return len(client.batches(observation.num_images)) >= MANY_LOCAL_STEPS


def _activations(model: nn.Module, observation: Observation) -> int | None:
    """Return the bytes that layers put out for all images of all local steps, and of those steps' weights."""
    protocol, count = undefended(observation.protocol), observation.num_images
    if not stackable(protocol) or not isinstance(protocol, (FedSGD, FedAvg)):
        return None
    steps = protocol.batches(count) if isinstance(protocol, FedAvg) else [slice(None)]
    images = sum(len(torch.arange(count)[rows]) for rows in steps)
    weights = sum(p.nbytes for p in trainable_parameters(model).values())
    return images * probe(model, observation.image_shape)[1] + len(steps) * weights


def _weighted(
    objective: Objective, weights: list[float] | None
) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    if weights is None:
        return objective
    return partial(objective, weights=weights)


def hooks_of(callback: Callback | None, progress: bool) -> list[Hook]:
    """Return what an attack's arguments ask to be called after every step."""
    checked("callback", callback, Callback | None)
    return [Bar(show=progress), *([] if callback is None else [Told(callback)])]


def reconstruction(
    problem: Problem, result: SearchResult, observation: Observation, objective: str, began: float
) -> Reconstruction:
    """Score each restart of a search on the images that are given back, and choose by that score.

    The model has to be in the client's mode; ``objective`` names the score, and ``began`` is the start of
    the attack by `time.perf_counter`.
    """
    images = problem.decode(problem.inputs(result.values[0])).clamp(0, 1)
    logits = result.values[1] if len(result.values) > 1 else None
    together = 1 if result.engine in ("eager", "forward") else max(result.chunks)
    status, scores = result.status, list[Tensor]()
    try:
        with held():
            scores.append(selection.scores(problem, problem.encode(images), logits, together=together))
    except KeyboardInterrupt:
        if not scores:
            raise
        status = "interrupted"
    measured = torch.where(result.ran.to(scores[0].device), scores[0], torch.nan)
    best = index_of_best(measured)
    failed = status != "interrupted" and not torch.isfinite(measured).any()
    labels = problem.labels if logits is None else logits[best].argmax(-1).expand(observation.num_images)
    return Reconstruction(
        images=images[best],
        labels=None if labels is None else labels.clone(),
        score=float(measured[best]),
        objective=objective,
        trial_scores=measured,
        trials=images,
        status="non_finite" if failed else status,
        seconds=time.perf_counter() - began,
        evaluations=result.evaluations + images.shape[0],
        history=result.history,
        engine=result.engine,
        engine_reason=result.engine_reason,
        chunks=result.chunks,
        warnings=problem.notes,
    )


def checked_starts(restarts: int, observation: Observation) -> tuple[int, ...]:
    """Return the shape of all starting points; ConfigError where they alone would not fit in memory."""
    shape = (restarts, observation.num_images, *observation.image_shape)
    need, free = 4 * math.prod(shape), memory.available(torch.device("cpu"))
    if need > max(free, _ALWAYS):
        raise ConfigError(
            f"GradientMatching restarts is {restarts}; expected fewer, for the starting points alone would "
            f"take {memory.words(need)} where {memory.words(free)} are free"
        )
    return shape
