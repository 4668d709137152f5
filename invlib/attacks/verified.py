"""Closed forms that are checked by the client's own step, since more of them run than are right."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment, minimize_scalar
from torch import Tensor, nn

from invlib.attacks.analytic import fully_connected, input_direction, of_noise
from invlib.attacks.base import closed_form, compared_by, known_labels, of_classes, only_direction
from invlib.attacks.chain import Chain, chain, outside
from invlib.attacks.layout import patch_step
from invlib.attacks.matching import GradientMatching
from invlib.attacks.patches import patch_embedding
from invlib.attacks.recursive import recursive_inversion
from invlib.core.calls import MOVES, SAME, logits_layer, logits_layer_inputs, trace
from invlib.core.network import in_mode, num_classes
from invlib.core.observation import Loss, Observation
from invlib.core.reconstruction import Reconstruction
from invlib.errors import DoubtWarning, RecoveryError
from invlib.optim import objectives

# Distances from the observed update, as shares of that of a noise image.
EXACT = 1e-6
_ENTRIES = 20_000_000  # of a matrix: some gigabytes while it is made
_SCALES = 24  # of the images in one direction that are tried, a factor of 2 ** (1 / 4) apart
_SIGNAL = 0.5  # of the strongest direction under noise: with less, what it points to is mostly noise
_WEIGHED = "from the first layer's gradient, its noise weighed"
_ASTRAY = 0.1  # distance of directions, as a share of a noise image's: above it a search found nothing
_TINY = 1e-300
_CLASSES = 32  # up to so many, a hidden label that is inferred wrong is looked for among all

Distance = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A closed form and how well the client's step on its images agrees with the observed update.

    Args:
        result: its score is the distance that `distance_of` measures.
        share: the score as a share of that of a noise image.
        determined: whether there are equations enough for no other image to agree as well.
        weighed: whether it is the mean of the images that known noise leaves possible, mostly signal. Images
            that a search finds may be likelier, but are farther away: density is highest where images are
            faint, and there are few of these.
    """

    result: Reconstruction
    share: float
    determined: bool
    weighed: bool = False


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What was tried of closed forms.

    Args:
        why: a clause on which ran and how near they came, or why none applies.
        doubts: what their numbers make doubtful, a sentence each.
    """

    why: str
    doubts: tuple[str, ...] = ()


def distance_of(model: nn.Module, observation: Observation, loss: Loss) -> Distance:
    r"""Return a function of images in [0, 1] and labels: how far their update is from the observed one.

    It is the cosine distance without its cancellation, which hides in float32 what is below 1e-7:

    .. math:: \tfrac12 \left\| \frac{u}{\|u\|} - \frac{u^\ast}{\|u^\ast\|} \right\|^2
              = 1 - \cos(u, u^\ast),

    summed in float64. A factor of the update, of clipping say, changes nothing. It is 1 where an update is
    all zero, and infinite where one is not finite. Where a client has defences that leave more than a
    direction, it is their likelihood.
    """
    likely = not only_direction(objectives.cosine, observation)

    def distance(images: Tensor, labels: Tensor) -> float:
        problem = GradientMatching(loss=loss).problem(model, observation, labels)
        with in_mode(model, training=observation.training_mode):
            update = problem.update(problem.encode(images.to(problem.like)), labels.to(problem.like.device))
        if likely:
            return float(
                problem.objective(*([t.detach().double() for t in u] for u in (update, problem.target)))
            )
        length, sent = _length(update), _length(problem.target)
        if not 0 < length < math.inf or sent == 0:
            return 1.0 if length == 0 or sent == 0 else math.inf
        gap = _length(
            [torch.sub(t, c, alpha=sent / length) for c, t in zip(update, problem.target, strict=True)]
        )
        return (gap / sent) ** 2 / 2

    return distance


def _length(update: list[Tensor]) -> float:
    return math.hypot(
        *(float(torch.linalg.vector_norm(part.detach(), dtype=torch.float64)) for part in update)
    )


def closest_closed_form(
    model: nn.Module, observation: Observation, loss: Loss
) -> tuple[Verified | None, Tried]:
    """Return the closed form whose update is nearest to the observed one, and what was tried.

    They are computed one by one, the cheapest first, up to one that is `EXACT`. Of a batch no other counts:
    they are mixtures of its images.

    Args:
        model: the model that the client received.
        observation: what the server saw, known to fit the model.
        loss: the client's.

    Returns:
        The nearest, None where none applies; and what was tried.
    """
    began, asked = time.perf_counter(), 0
    distance = distance_of(model, observation, loss)
    nearest, noise, shares = None, math.nan, dict[str, float]()
    refusals: list[str] = []
    doubts: list[str] = []
    for form, note in _candidates(model, observation, distance, refusals):
        assert form.labels is not None
        if math.isnan(noise):
            generator = torch.Generator().manual_seed(0)
            noise = distance(torch.rand(form.images.shape, generator=generator), form.labels)
            asked += 1
        score = distance(form.images, form.labels)
        asked += 1 + form.evaluations
        share = score / max(noise, torch.finfo(torch.float64).tiny)
        sure = form.certified is not None and bool(form.certified.all())
        if sure:  # by its own equations, also where dropout or rounding keeps the step from saying so
            share, note = min(share, EXACT), f"{note}, certified ({form.note})"
        doubts += [doubt for doubt in form.warnings if "normalization" in doubt]
        shares[note] = min(share, shares.get(note, math.inf))
        if observation.num_images > 1 and share > EXACT:
            continue  # mixtures
        if nearest is None or score < nearest.result.score or note == _WEIGHED:
            plain = only_direction(objectives.cosine, observation)
            how = "in direction" if plain else f"by {compared_by(objectives.cosine, observation)}"
            said = f"closed form, {note}: its update is {score:.1e} from the observed one {how}"
            checked = replace(
                form,
                score=score,
                objective=compared_by(objectives.cosine, observation),
                trial_scores=torch.tensor([score]),
                note=said,
                warnings=(),
            )
            nearest = Verified(
                result=checked,
                share=share,
                determined=_determined(model, observation, form.images),
                weighed=note == _WEIGHED,
            )
        if share <= EXACT or note == _WEIGHED:
            break
    tried = [f"{note}, at {share:.0e} of a noise image's distance" for note, share in shares.items()]
    if tried:
        why = f"closed forms were tried ({'; '.join(tried)})"
    else:
        why = f"no closed form applies: {'; '.join(dict.fromkeys(refusals)) or 'the labels are not told'}"
    tale = Tried(why=why, doubts=tuple(dict.fromkeys(doubts)))
    if nearest is None:
        return None, tale
    seconds = time.perf_counter() - began
    return replace(nearest, result=replace(nearest.result, seconds=seconds, evaluations=asked)), tale


def nearer_of(
    closed: Verified, found: Reconstruction, model: nn.Module, observation: Observation, loss: Loss
) -> Reconstruction:
    """Return a closed form or what a search found, whichever agrees better with the observed update.

    Where equations are missing many images agree, and the search's is the most natural of them: there the
    closed form is for a search that went astray.
    """
    form = closed.result
    least = form.score * (1 if closed.determined else max(1.0, _ASTRAY / max(closed.share, _TINY)))
    evaluations = form.evaluations + found.evaluations + 1
    spent: dict[str, Any] = {"evaluations": evaluations, "seconds": form.seconds + found.seconds}
    try:
        distance = distance_of(model, observation, loss)
        assert found.labels is not None
        if distance(found.images, found.labels) <= least:
            return replace(found, **spent)
    except KeyboardInterrupt:
        return replace(found, **spent, status="interrupted")
    stopped = found.status == "interrupted"
    return replace(
        form,
        **spent,
        status="interrupted" if stopped else "closed_form",
        note=form.note + "; a search came less near",
    )


def _candidates(
    model: nn.Module, observation: Observation, distance: Distance, refusals: list[str]
) -> Iterator[tuple[Reconstruction, str]]:
    """Yield what closed forms say, with labels, and from where they have it; and note why others refuse."""

    @contextmanager
    def tried() -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DoubtWarning)  # of what may not be the result
                yield
        except RecoveryError as error:
            refusals.append(str(error).partition("; expected")[0])

    if observation.num_images == 1:
        form = None
        with suppress(RecoveryError):
            patch_step(model, observation.image_shape)
            with tried():
                form = patch_embedding()(model, observation)
        if form is not None and form.labels is not None:
            yield form, "from the patch embedding and its positions"
    found = chain(model, observation)
    if not found.stages:
        refusals.append(found.why)
        return
    if found.stages[0].window is None:
        if observation.num_images == 1 and not only_direction(objectives.cosine, observation):
            form = None
            with tried():
                form = _weighed(model, observation, distance)
            if form is not None:
                yield form, _WEIGHED
        with suppress(RecoveryError):
            for guess in _guesses(model, observation):
                form = None
                with tried():
                    form = fully_connected(agreement=True)(model, guess)
                    if observation.num_images > 1:
                        form = _paired(model, observation, form)
                if form is not None and form.labels is not None:
                    yield form, "from the first layer's gradient"
        if observation.num_images == 1:
            form = None
            with tried():
                form = _scaled(model, observation, distance)
            if form is not None:
                yield form, "from the direction of the first layer's gradient"
    if observation.num_images > 1:
        if found.stages[0].window is not None:
            refusals.append(f"{observation.num_images} images and a convolution first")
    elif (entries := _entries(found)) > _ENTRIES:
        refusals.append(f"a convolution has {entries:.0e} products, and {_ENTRIES:.0e} are the most")
    else:
        form = None
        with tried():
            form = recursive_inversion()(model, observation)
        if form is not None:
            yield form, "layer by layer"


def _entries(found: Chain) -> int:
    """Return the most products in a convolution of one image: entries of the matrix that is to be undone."""
    sizes = []
    for stage in found.stages:
        if stage.window is not None:
            sizes.append(math.prod(stage.output) * stage.weight[0].numel())
    return max(sizes, default=0)


def _determined(model: nn.Module, observation: Observation, images: Tensor) -> bool:
    """Say whether the equations of a first convolution are as many as the image's pixels.

    Its outputs give one each, but for inactive units of ReLU, and its weight's gradient one for each of its
    numbers. The gradient of a fully connected layer always suffices.
    """
    calls = trace(model, observation.normalization.encode(images)).calls
    for k, call in enumerate(calls):
        if call.op == "convolution":
            after = next((c for c in calls[k + 1 :] if c.op not in SAME | MOVES | {"add"}), call)
            relu = after.op in ("relu", "clamp", "clamp_min", "threshold", "maximum")
            active = after.output.count_nonzero() if relu else call.output.numel()
            return bool(int(active) + call.args[1].numel() >= images.numel())
    return True


def _guesses(model: nn.Module, observation: Observation) -> Iterator[Observation]:
    """Yield the observation, and if its one label is hidden, again with each label that it may be."""
    yield observation
    classes = num_classes(model, observation.image_shape)
    hidden = observation.labels is None and of_classes(model, observation)
    if hidden and observation.num_images == 1 and classes <= _CLASSES:
        for label in range(classes):
            yield replace(observation, labels=torch.tensor([label]))


def _scaled(model: nn.Module, observation: Observation, distance: Distance) -> Reconstruction:
    """Look for the one number that `input_direction` leaves open, by the client's step.

    Raises:
        RecoveryError: the model does not begin with a fully connected layer, or labels cannot be inferred.
    """
    began, asked = time.perf_counter(), 0
    shape = (1, *observation.image_shape)
    direction, labels = input_direction(model, observation).view(shape), known_labels(model, observation)
    low, high = observation.normalization.box(dtype=direction.dtype, device=direction.device)

    def images(number: float) -> Tensor:
        return observation.normalization.decode(number * direction)

    def cost(number: float) -> float:
        nonlocal asked
        asked += 1
        return distance(images(number), labels)

    # The largest numbers of both signs at which all pixels are in the box, and smaller ones.
    size = direction.abs()
    counts = size > 1e-3 * size.max()  # a black pixel's number is rounding
    ends = [float(torch.where(direction * sign > 0, high, -low).div(size)[counts].min()) for sign in (1, -1)]
    if not max(ends) > 0:
        raise RecoveryError("the first layer's gradient is of no image in [0, 1], whatever its scale")
    grid = [
        [sign * end * 2 ** (-k / 4) for k in range(_SCALES)]
        for sign, end in zip((1, -1), ends, strict=True)
        if end > 0
    ]
    costs = {number: cost(number) for side in grid for number in side}
    near = min(costs, key=costs.__getitem__)
    found = minimize_scalar(
        lambda log: cost(math.copysign(math.exp(log), near)),
        bounds=(math.log(abs(near)) - 0.18, math.log(abs(near)) + 0.18),
        method="bounded",
        options={"xatol": 1e-9},
    )
    number = math.copysign(math.exp(found.x), near)
    cut = outside(images(number), fits=found.fun <= EXACT)
    form = closed_form(images(number).clamp(0, 1), labels, found.fun, objective="", note="", began=began)
    return replace(form, evaluations=asked, warnings=(cut,) if cut else ())


def _weighed(model: nn.Module, observation: Observation, distance: Distance) -> Reconstruction | None:
    """Return the mean of the images that noise leaves possible, its scale found by the client's step.

    Returns:
        None where no noise is known, or the first layer does not show through it.
    """
    began, asked = time.perf_counter(), 0
    if not (noise := float(getattr(observation.protocol, "noise", 0.0))):
        return None
    shape, labels = (1, *observation.image_shape), known_labels(model, observation)

    def images(inputs: Tensor) -> Tensor:
        return observation.normalization.decode(inputs.view(shape)).clamp(0, 1)

    def cost(inputs: Tensor) -> float:
        nonlocal asked
        asked += 1
        return distance(images(inputs), labels)

    told = of_noise(model, observation, noise, cost)
    if told is None or told.signal < _SIGNAL:
        return None
    form = closed_form(images(told.inputs), labels, told.residual, objective="", note="", began=began)
    return replace(form, evaluations=asked, expected_psnr=torch.tensor([told.expected_psnr]))


def _paired(model: nn.Module, observation: Observation, found: Reconstruction) -> Reconstruction:
    r"""Give the images of a batch their labels: in an update neither comes with an order.

    The gradient of the last layer's weight is :math:`(P - Y)^\top H / N` with the predictions, the labels and
    the layer's inputs of all images. Images give :math:`P` and :math:`H`, and so :math:`Y`.

    Raises:
        RecoveryError: no layer gives the logits, or it was not sent.
    """
    if not of_classes(model, observation):
        raise RecoveryError("the labels are no classes, by which images of a batch are told apart")
    count = observation.num_images
    layer = logits_layer(model, observation.image_shape)
    inputs = observation.normalization.encode(found.images)
    logits, given = logits_layer_inputs(model, inputs, training=observation.training_mode)
    gradient = observation.mean_gradient(layer.weight, model).to(logits).double()
    gradient = gradient.T if layer.transposed else gradient.flatten(1)
    hot = logits.double().softmax(-1) - count * (gradient @ torch.linalg.pinv(given.double())).T
    if observation.labels is None:
        return replace(found, labels=hot.argmax(-1))
    labels = observation.labels.to(hot.device)
    _, order = linear_sum_assignment(-hot[:, labels].T.cpu().numpy())
    images = found.images[torch.as_tensor(order, device=hot.device)]
    return replace(found, images=images, trials=images[None], labels=labels)
