"""Closed forms: the input of a fully connected layer follows from its gradient without any search."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor, nn

from invlib.attacks.base import Settings, closed_form, known_labels, of_classes, with_labels
from invlib.attacks.chain import Chain, Stage, chain, not_linear, outside, precise, sent, undo
from invlib.attacks.directions import BatchInputs as BatchInputs
from invlib.attacks.directions import batch_inputs as batch_inputs
from invlib.attacks.doubts import doubted, doubts_of
from invlib.attacks.noisy import NoisyInput, noisy_layer_input
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import RecoveryError
from invlib.settings import NotNegative


@dataclass(frozen=True, kw_only=True)
class LayerInput:
    """What a fully connected layer's gradient says about its input.

    Args:
        inputs: ``(in_features,)``.
        residual: how much of the weight gradient this one input leaves unexplained, in [0, 1];
            rounding error for a single input, large for a batch.
        kind: ``"exact"`` for one input, ``"mixture"`` for a weighted mean of several.

    Taught in: chapter 1
    """

    inputs: Tensor
    residual: float
    kind: Literal["exact", "mixture"]


def layer_input(weight_gradient: Tensor, bias_gradient: Tensor, *, tolerance: float = 1e-2) -> LayerInput:
    r"""Recover the input of a fully connected layer from its two gradients.

    For one input, :math:`\partial L/\partial W = \delta x^\top` and :math:`\partial L/\partial b = \delta`.
    Any row with :math:`\delta_i \neq 0` gives :math:`x`; the combination of all rows with the least error is

    .. math:: \hat x = \frac{(\partial L/\partial W)^\top\, \delta}{\|\delta\|^2}.

    For a batch both are sums over its inputs, and :math:`\hat x` is a mixture of them. Scaling both
    gradients by the same number changes nothing, so a FedAvg update may be given as well.

    Args:
        weight_gradient: ``(out_features, in_features)``.
        bias_gradient: ``(out_features,)``.
        tolerance: the residual up to which the result is called exact.

    Raises:
        RecoveryError: the shapes do not fit, or the bias gradient is zero or not finite.

    Source: Phong et al. 2018, IEEE TIFS 13(5); Geiping et al. 2020, arXiv 2003.14053, proposition 3.1.

    Taught in: chapter 1
    """
    _check_pair(weight_gradient, bias_gradient)
    # Scaled first: the squares of a small float32 gradient would underflow.
    scale = bias_gradient.abs().max()
    delta = bias_gradient / scale
    inputs = (weight_gradient / scale).T @ delta / delta.square().sum()
    residual = _residual(weight_gradient / scale, delta, inputs)
    return LayerInput(inputs=inputs, residual=residual, kind="exact" if residual <= tolerance else "mixture")


def row_inputs(weight_gradient: Tensor, bias_gradient: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return what each single row of a fully connected layer says of its input.

    Row i says :math:`(\partial L/\partial W_i) / \delta_i`. For one input all rows agree, but for
    rounding, which is worst where :math:`\delta_i` is small. For a batch each row is another mixture
    :math:`\sum_n \delta_{ni} x_n / \sum_n \delta_{ni}`, and a row whose unit is active for one input alone
    gives that input.

    Args:
        weight_gradient: ``(out_features, in_features)``.
        bias_gradient: ``(out_features,)``.

    Returns:
        The rows with a non-zero bias gradient, int64 ``(K,)``, and their quotients ``(K, in_features)``.

    Raises:
        RecoveryError: the shapes do not fit, or the bias gradient is zero or not finite.

    Source: Phong et al. 2018, IEEE TIFS 13(5); for batches, Fowl et al. 2022, arXiv 2110.13057.

    Taught in: chapter 1
    """
    _check_pair(weight_gradient, bias_gradient)
    rows = bias_gradient.nonzero().flatten()
    return rows, weight_gradient[rows] / bias_gradient[rows, None]


def _check_pair(weight_gradient: Tensor, bias_gradient: Tensor) -> None:
    if weight_gradient.ndim != 2 or bias_gradient.shape != weight_gradient.shape[:1]:
        raise RecoveryError(
            f"the weight gradient has shape {tuple(weight_gradient.shape)} and the bias gradient "
            f"{tuple(bias_gradient.shape)}; expected (out, in) and (out,)"
        )
    if not torch.isfinite(bias_gradient).all():
        raise RecoveryError("the bias gradient has NaN or infinite numbers; expected finite ones")
    if not bias_gradient.any():
        raise RecoveryError(
            "the bias gradient is zero in every row, so the input cannot be divided out; expected at least "
            "one non-zero row (there is none where all units are inactive, or the loss is zero)"
        )


def _residual(weight_gradient: Tensor, delta: Tensor, inputs: Tensor) -> float:
    left = (weight_gradient - torch.outer(delta, inputs)).norm() / weight_gradient.norm()
    return float(left) if math.isfinite(float(left)) else 0.0


def layer_input_of(model: nn.Module, observation: Observation, layer: str) -> LayerInput:
    """Recover the input of a named fully connected layer of a model: `layer_input` by name.

    Args:
        model: the model that the client received.
        observation: what the server saw.
        layer: the layer's name in ``model.named_modules()``.

    Raises:
        RecoveryError: there is no such layer, it has no bias, the update lacks it, or its bias gradient is
            zero.

    Taught in: chapter 1
    """
    if why := not_linear(observation):
        raise RecoveryError(f"{why}; expected a client of SGD")
    module = dict(model.named_modules()).get(layer)
    if not isinstance(module, nn.Linear) or module.bias is None:
        known = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is not None]
        raise RecoveryError(
            f"{layer!r} is {type(module).__name__}; "
            f"expected a fully connected layer with a bias, one of {known}"
        )
    return layer_input(sent(observation, f"{layer}.weight", model), sent(observation, f"{layer}.bias", model))


# Of a batch: rows that are compared with one another, in so many random directions, and the share of their
# length by which two may differ that say the same.
_ROWS, _VIEWS, _AGREEING = 4096, 16, 1e-5


def _stages(model: nn.Module, observation: Observation) -> Chain:
    """Return the layers from the image on, of which the first sees all numbers of the image at once."""
    found = chain(model, observation)
    if not found.stages or found.stages[0].window is not None:
        first = f"convolution {found.stages[0].name!r}" if found.stages else f"nothing to undo ({found.why})"
        raise RecoveryError(
            f"{type(model).__name__} begins with {first}; expected a fully connected layer on all "
            f"{math.prod(observation.image_shape)} numbers of the image (use layer_input_of for the input of "
            "a later layer, or gradient matching for the image)"
        )
    ends = [k for k, stage in enumerate(found.stages) if stage.window is not None]
    return replace(found, stages=found.stages[: ends[0]], why="a convolution") if ends else found


def network_input(model: nn.Module, observation: Observation) -> tuple[Tensor, float]:
    r"""Recover the input of a network of fully connected layers, even where the first have no bias.

    The lowest layer with a bias gives its input :math:`a` and its :math:`\delta`. Below it,
    :math:`\delta' = (W^\top \delta) \odot \sigma'(a)` is the gradient at the layer before, whose input is
    :math:`(\partial L/\partial W')^\top \delta' / \|\delta'\|^2`, and so on down to the image. Where no
    layer has a bias, the last one still gives input and :math:`\delta` up to one number, which the
    softmax's own equation :math:`\mathrm{softmax}(W a) - e_y = \delta` fixes.

    Args:
        model: a chain of fully connected layers and activations (ReLU, leaky ReLU, ELU, sigmoid, tanh,
            softplus), as modules, functions or operators.
        observation: what the server saw of *one* image; FedAvg is exact only where the first layer has a
            bias, since later layers' inputs change from step to step.

    Returns:
        The normalised input ``(C * H * W,)`` and the residual of the layer at the image.

    Raises:
        RecoveryError: the model is no such chain, or a layer's gradient is zero or was not sent.

    Source: Geiping et al. 2020, arXiv 2003.14053, proposition 3.1; without biases, compare Zhu and
    Blaschko 2021 (R-GAP), arXiv 2010.07733.
    """
    found = _stages(model, observation)
    stages = found.stages
    biased = [(k, s.bias_name) for k, s in enumerate(stages) if s.bias_name is not None]
    if not biased and (found.why or stages[-1].after):
        why = f" ({found.why})" if found.why else ""
        raise RecoveryError(
            f"no layer up to {stages[-1].name!r} has a bias, and it is not the last one of "
            f"{type(model).__name__}{why}; expected a bias before what cannot be undone"
        )
    top = biased[0][0] if biased else len(stages) - 1
    weights = [stage.gradient(sent(observation, stage.weight_name, model)) for stage in stages[: top + 1]]
    if biased:
        delta = sent(observation, biased[0][1], model)
        inputs = layer_input(weights[top], delta.flatten()).inputs
    else:
        # The head's delta is one of the mean gradient, and so have to be the weights below it.
        weights = [
            stage.gradient(precise(observation.mean_gradient(stage.weight_name, model))) for stage in stages
        ]
        delta, inputs = _unbiased_head(model, observation, stages[-1])
    for k in range(top, 0, -1):
        below = stages[k - 1]
        _, behind, _ = undo(below.after, inputs)
        delta = behind(stages[k].weight.to(delta).T @ delta.flatten())
        if not delta.any():
            raise RecoveryError(f"the gradient behind {below.name!r} is all zero; expected an active unit")
        inputs = layer_input(weights[k - 1], delta).inputs
    residual = _residual(weights[0] / delta.abs().max(), delta.flatten() / delta.abs().max(), inputs)
    return undo(found.first, inputs)[0], residual


def input_direction(model: nn.Module, observation: Observation) -> Tensor:
    r"""Return the input of a first fully connected layer up to one number, whatever comes after it.

    Its weight gradient is :math:`\delta x^\top`, and the sum of several local steps is
    :math:`(\sum_k \delta_k)\, x^\top`, so that its rows are all multiples of the one image.

    Args:
        model: a model that begins with a fully connected layer on all numbers of the image.
        observation: what the server saw of *one* image.

    Returns:
        The normalised input over its length, ``(C * H * W,)``; its sign is arbitrary.

    Raises:
        RecoveryError: the model begins with something else, or the layer was not sent.

    Source: this project's, of the same equation as `layer_input`.
    """
    found = _stages(model, observation)
    gradient = found.stages[0].gradient(sent(observation, found.stages[0].weight_name, model))
    matrix = gradient.double() / gradient.abs().max().clamp_min(torch.finfo(gradient.dtype).tiny)
    direction = matrix[matrix.norm(dim=1).argmax()]
    for _ in range(20):  # power iterations: noise apart, the first is exact
        direction = matrix.T @ (matrix @ direction)
        direction = direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
    return direction.to(gradient)


def _unbiased_head(model: nn.Module, observation: Observation, head: Stage) -> tuple[Tensor, Tensor]:
    """Return delta and input of a last layer without bias, from its weight gradient and the softmax."""
    gradient = head.gradient(precise(observation.mean_gradient(head.weight_name, model)))
    if not of_classes(model, observation):
        raise RecoveryError(f"the labels are no classes, by which the scale of {head.name!r} is found")
    label = int(known_labels(model, observation)[0])
    columns, sizes, rows = torch.linalg.svd(gradient.double(), full_matrices=False)
    u, s, v = columns[:, 0], sizes[0], rows[0]
    if u[label] > 0:
        u, v = -u, -v
    weight = head.weight.to(gradient.device).double()
    logits = weight @ v * s
    hot = F.one_hot(torch.tensor(label), len(u)).to(logits)

    def gap(log_alpha: float) -> float:
        alpha = math.exp(log_alpha)
        return float((logits / alpha).softmax(0)[label] - 1 - alpha * u[label])

    # delta_y lies in (-1, 0), so alpha lies in (0, 1 / |u_y|); several roots are told apart by all classes.
    end = math.log(1 / abs(float(u[label])))
    grid = [end - 12 + 12 * k / 400 for k in range(401)]
    values = [gap(g) for g in grid]
    roots = [
        math.exp(brentq(gap, a, b))
        for a, b, fa, fb in zip(grid, grid[1:], values, values[1:], strict=False)
        if fa * fb <= 0 and fa != fb
    ]
    if not roots:
        raise RecoveryError(
            f"no scale of {head.name!r} fits the softmax of class {label}; expected one, so the update "
            "is not that of one image under cross-entropy"
        )
    alpha = min(roots, key=lambda a: float(((logits / a).softmax(0) - hot - a * u).norm()))
    return (alpha * u).to(gradient), (s / alpha * v).to(gradient)


def fully_connected(*, tolerance: float = 1e-2, agreement: bool = False) -> FullyConnected:
    """Return the closed-form attack on networks whose first layers are fully connected.

    One image comes back as it was, up to rounding, or from an update whose noise is told (`invlib.Defended`)
    as likely as can be, by `invlib.attacks.noisy.noisy_layer_input`. A batch does not: each row of the first
    layer gives a mixture of the images, and the attack returns as many of them as there are images, those
    that lie nearest to [0, 1] and differ, and says in ``note`` that they are mixtures.

    Hidden labels are inferred by `invlib.attacks.labels.infer`: exactly for one image, as an estimate, in
    ascending order, for a batch. The images do not depend on them, so that where the update does not tell
    them (its last fully connected layer was frozen) they are None, and ``note`` says why.

    Args:
        tolerance: the residual up to which a single image is called exact.
        agreement: of a batch return first what several rows say alike. Units that are active for one image
            alone do so, and hardly ever two mixtures.

    Returns:
        An attack; its score is the share of the first layer's gradient left unexplained.

    Source: Geiping et al. 2020, arXiv 2003.14053, proposition 3.1.

    Taught in: chapter 1
    """
    return FullyConnected(tolerance=tolerance, agreement=agreement)


@dataclass(frozen=True, kw_only=True, repr=False)
class FullyConnected(Settings):
    """The attack that `fully_connected` returns."""

    tolerance: NotNegative = 1e-2
    agreement: bool = False

    @torch.inference_mode(mode=False)
    def __call__(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        """Attack an observation. Nothing is drawn and there are no steps: the three options do nothing.

        Raises:
            ObservationError: the observation does not fit the model.
            RecoveryError: the closed form does not apply to this model or gradient.
        """
        began = time.perf_counter()
        model = observation.validate(model)
        more: dict[str, Tensor] = {}
        noise = float(getattr(observation.protocol, "noise", 0.0))
        told = of_noise(model, observation, noise) if noise and observation.num_images == 1 else None
        doubts = doubts_of(model, observation, closed=told is None)
        if told is not None:
            flat, residual = told.inputs.flatten(), told.residual
            inputs = flat[None]
            more["expected_psnr"] = torch.tensor([told.expected_psnr])
            note = (
                f"likeliest: one image under noise of {noise:.1e} in each number; expected PSNR "
                f"{told.expected_psnr:.0f} dB"
            )
        elif observation.num_images == 1:
            flat, residual = network_input(model, observation)
            inputs = flat[None]
            fits = residual <= self.tolerance
            images = observation.normalization.decode(inputs.view(1, *observation.image_shape))
            cut = outside(images, fits=fits)
            doubts += [cut] if cut else []
            what = "exact" if fits and not cut else "approximate"
            note = f"{what}: one image explains all but {residual:.1e} of the first layer's gradient"
        else:
            inputs, residual, count, agreed = _mixtures(model, observation, self.agreement)
            shown = (
                f"several rows agree on {agreed} of the {len(inputs)} shown, the others"
                if agreed
                else (f"the {len(inputs)} shown")
            )
            note = (
                f"mixtures: {count} rows of the first layer each give a weighted mean of the "
                f"{observation.num_images} images; {shown} lie nearest to the range of images"
            )
        labels: Tensor | None = None
        try:
            known = with_labels(model, observation)
            labels, doubts = known.labels, [*doubts, *known.notes]
        except RecoveryError as error:
            note += f"; the labels are unknown: {error}"
        result = closed_form(
            observation.normalization.decode(inputs.view(-1, *observation.image_shape)).clamp(0, 1),
            labels,
            residual,
            objective="unexplained share of the first layer's gradient",
            note=note,
            began=began,
            **more,
        )
        return doubted(result, doubts)


def of_noise(
    model: nn.Module,
    observation: Observation,
    noise: float,
    unlikely: Callable[[Tensor], float] | None = None,
) -> NoisyInput | None:
    """Return `noisy_layer_input` of a network's first layer, or None.

    It is None where that layer has no bias, or is given something else than the image.
    """
    found = _stages(model, observation)
    first, shape = found.stages[0], observation.image_shape
    like = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    as_it_is = torch.equal(undo(found.first, like.flatten())[0].flatten(), like.flatten())
    if first.bias_name is None or not as_it_is:
        return None
    weight, bias = (sent(observation, name, model) for name in (first.weight_name, first.bias_name))
    return noisy_layer_input(
        first.gradient(weight),
        bias.flatten(),
        noise,
        like=like,
        normalization=observation.normalization,
        unlikely=unlikely,
    )


def _mixtures(model: nn.Module, observation: Observation, agreement: bool) -> tuple[Tensor, float, int, int]:
    """Return what rows say of a batch, its residual, how many they are, and on how many images some agree."""
    found = _stages(model, observation)
    first = found.stages[0]
    if first.bias_name is None:
        raise RecoveryError(
            f"{first.name!r} has no bias and the batch has {observation.num_images} images; expected 1"
        )
    weight = first.gradient(sent(observation, first.weight_name, model))
    bias = sent(observation, first.bias_name, model).flatten()
    numbers, rows = row_inputs(weight, bias)
    groups = _agreeing(rows, bias[numbers], observation.num_images) if agreement else []
    agreed = [layer_input(weight[numbers[group]], bias[numbers[group]]).inputs for group in groups]
    rows = torch.stack([undo(found.first, row)[0] for row in (*agreed, *rows)])
    images = observation.normalization.decode(rows.view(-1, *observation.image_shape)).flatten(1)
    outside = (images - images.clamp(0, 1)).square().mean(1)
    outside[: len(agreed)] = -1
    chosen: list[int] = []
    for k in outside.argsort(stable=True).tolist():
        # Two rows of units that are active for one image alone agree to rounding: keep one of them.
        if all((images[k] - images[c]).square().mean() > 1e-6 for c in chosen):
            chosen.append(k)
        if len(chosen) == observation.num_images:
            break
    while len(chosen) < observation.num_images:
        chosen.append(chosen[-1])
    return rows[chosen], layer_input(weight, bias).residual, len(numbers), len(agreed)


def _agreeing(rows: Tensor, delta: Tensor, count: int) -> list[Tensor]:
    """Return the largest groups of rows, at most so many, that say the same but for rounding.

    Units that are active for one image alone do so; two mixtures hardly ever do.
    """
    kept = delta.abs().argsort(descending=True)[:_ROWS]
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(rows.shape[1], _VIEWS, dtype=torch.float64, generator=generator).to(rows.device)
    seen = rows[kept].double() @ views
    near = torch.cdist(seen, seen) <= _AGREEING * seen.norm(dim=1)
    groups: list[Tensor] = []
    while len(groups) < count:
        group = near[near.sum(1).argmax()].nonzero().flatten()
        if len(group) < 2:
            break
        groups.append(kept[group])
        near[group] = False
        near[:, group] = False
    return groups
