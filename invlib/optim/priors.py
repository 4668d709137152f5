"""What is known of images besides the distance of updates: ``(inputs) -> scalar``, lower is likelier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib import kernels
from invlib.core.network import classifier, forward, in_mode, like, trainable_parameters
from invlib.core.observation import Observation
from invlib.errors import ConfigError
from invlib.optim.statistics import LayerStatistics, batch_statistics
from invlib.settings import Checked, Positive, checked, whole

Prior = Callable[[Tensor], Tensor]
_Odd = Annotated[int, whole("an odd positive number", lambda n: n >= 1 and n % 2 == 1)]


class Unbound:
    """A prior that depends on what is attacked, and is made when an attack begins."""

    def of(self, model: nn.Module, observation: Observation, labels: Tensor | None) -> Prior:
        """Return the prior of a model and an observation; labels are None where they are optimised."""
        raise NotImplementedError


AnyPrior = Prior | Unbound


def bound(prior: AnyPrior, model: nn.Module, observation: Observation, labels: Tensor | None) -> Prior:
    """Return a prior as a function of images alone, arguments as for `Unbound.of`."""
    return prior.of(model, observation, labels) if isinstance(prior, Unbound) else prior


def total_variation(inputs: Tensor, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    r"""Return the anisotropic total variation of a batch: how much neighbouring pixels differ.

    .. math:: \frac{1}{n_h}\sum |x_{i,j+1} - x_{i,j}| + \frac{1}{n_v}\sum |x_{i+1,j} - x_{i,j}|

    Args:
        inputs: ``(N, C, H, W)``, in whatever units the attack works in.
        reduction: ``"mean"`` averages horizontal and vertical differences each over their own number,
            as above; ``"sum"`` adds them all up.

    Raises:
        ConfigError: wrong number of dimensions, a side under 2 pixels, or an unknown reduction.

    Source: Rudin, Osher and Fatemi 1992; as a prior for gradient matching, Geiping et al. 2020,
    arXiv 2003.14053, equation 4.

    Taught in: chapter 2
    """
    return kernels.total_variation(inputs, reduction=reduction)


def rounded_total_variation(inputs: Tensor, *, width: float = 1e-2) -> Tensor:
    r"""Return total variation that is smooth at zero, for optimisers that need a smooth cost.

    A side of one pixel has no neighbours, and its direction does not count.

    .. math:: \frac{1}{n_h}\sum \sqrt{(x_{i,j+1} - x_{i,j})^2 + \epsilon^2}
              + \frac{1}{n_v}\sum \sqrt{(x_{i+1,j} - x_{i,j})^2 + \epsilon^2}

    Args:
        inputs: ``(N, C, H, W)``, in whatever units the attack works in.
        width: :math:`\epsilon`, the difference below which a step between pixels counts less.

    Raises:
        ConfigError: width is not positive.

    Source: Charbonnier et al. 1994, "Two deterministic half-quadratic regularization algorithms".
    """
    checked("rounded_total_variation width", width, Positive)
    across = inputs[..., 1:] - inputs[..., :-1]
    down = inputs[..., 1:, :] - inputs[..., :-1, :]
    parts = ((d.square() + width**2).sqrt().mean() for d in (across, down) if d.numel())
    return sum(parts, inputs.new_zeros(()))


@dataclass(frozen=True, kw_only=True)
class SmoothTotalVariation(Checked):
    r"""Total variation that takes both directions together, raised to a power.

    .. math:: \frac{1}{n}\sum \big((x_{i,j+1} - x_{i,j})^2 + (x_{i+1,j} - x_{i,j})^2\big)^p

    over all :math:`n` numbers of the images; at the border the missing difference counts as 0.

    Args:
        power: :math:`p`; 1/2 is isotropic total variation, from 1 on it is smooth at zero.
        opponents: add the differences of each two colour channels as channels of their own, so that edges of
            colour count beside those of brightness; for three channels.

    Raises:
        ConfigError: power is not positive.

    Source: Mahendran and Vedaldi 2015, arXiv 1412.0035; opponents, Åström and Schnörr 2016,
    "Double-opponent vectorial total variation".
    """

    power: Positive
    opponents: bool = False

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the value for normalised images ``(N, C, H, W)``."""
        if self.opponents:
            inputs = torch.cat([inputs, inputs - inputs.roll(1, dims=1)], dim=1)
        across = F.pad(inputs[..., 1:] - inputs[..., :-1], (0, 1))
        down = F.pad(inputs[..., 1:, :] - inputs[..., :-1, :], (0, 0, 0, 1))
        # The root has no slope at zero.
        return (across.square() + down.square() + torch.finfo(inputs.dtype).eps).pow(self.power).mean()


def l2_norm(inputs: Tensor) -> Tensor:
    """Return the mean square of the inputs, which pulls them to the data's mean.

    Args:
        inputs: ``(N, C, H, W)``, normalised.

    Source: Yin et al. 2021, arXiv 2104.07586, section 3.2.
    """
    return inputs.square().mean()


def batch_norm_statistics(model: nn.Module, statistics: Mapping[str, Tensor] | None = None) -> Prior:
    r"""Return a prior that compares a batch's statistics at each batch-norm layer with known ones.

    The prior is :math:`\sum_l \|\mu_l(x) - \mu_l\|_2 + \|\sigma^2_l(x) - \sigma^2_l\|_2`, where the known
    values are the model's running statistics, or those in ``statistics``.

    Args:
        model: a model with batch-norm layers.
        statistics: buffer name → tensor, for example what a client sent; None takes the model's own.

    Raises:
        ConfigError: the model has no batch-norm layer with running statistics.

    Source: Yin et al. 2021, arXiv 2104.07586, equation 6.

    Taught in: chapter 3
    """
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has 0 batch-norm layers with running statistics; expected at least one"
        )
    params = trainable_parameters(model)
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()} | dict(statistics or {})

    def prior(inputs: Tensor) -> Tensor:
        terms: list[Tensor] = []

        def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                x = arguments[0]
                axes = [0, *range(2, x.ndim)]
                mean, variance = x.mean(axes), x.var(axes, correction=0)
                terms.append(_norm(mean - buffers[f"{name}.running_mean"]))
                terms.append(_norm(variance - buffers[f"{name}.running_var"]))

            return hook

        _run(model, params, buffers, inputs, {name: compare(name) for name in layers})
        return torch.stack(terms).sum()

    return prior


@dataclass(frozen=True)
class BatchNormStatistics(Unbound):
    """`batch_norm_statistics` of whichever model is attacked, by the buffers that the client sent, if any.

    Where the client sent none, the model's own running statistics are the known ones.

    Source: Yin et al. 2021, arXiv 2104.07586, equation 6.
    """

    def of(self, model: nn.Module, observation: Observation, labels: Tensor | None) -> Prior:
        """Return the prior; raises what `batch_norm_statistics` raises."""
        some = like(model)
        return batch_norm_statistics(model, {n: b.to(some.device) for n, b in observation.buffers.items()})


@dataclass(frozen=True)
class BatchStatistics(Unbound):
    r"""How far a batch is from the statistics that the client's own left in the buffers that it sent.

    They are no guess but equations, two for each channel of each batch-norm layer, which the client's batch
    obeys to rounding. The network runs with the client's statistics in the place of those of the guess, so
    that each image is seen as it would be among the client's. The value is
    :math:`\frac1L\sum_l \frac1{C_l}\sum_c ((\mu_{lc}(x) - \mu_{lc})/\sigma_{lc})^2
    + \log^2(\sigma_{lc}(x)/\sigma_{lc})`; after several local steps they hold as far as the weights have
    not moved.

    Source: this project's, from `invlib.optim.statistics.batch_statistics`; compare Yin et al. 2021,
    arXiv 2104.07586, equation 6.
    """

    def of(self, model: nn.Module, observation: Observation, labels: Tensor | None) -> Prior:
        """Return the prior; raises what `invlib.optim.statistics.batch_statistics` raises."""
        params, some = trainable_parameters(model), like(model)
        layers = {name: layer.to(some) for name, layer in batch_statistics(model, observation).items()}
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        for name, layer in layers.items():
            buffers |= {f"{name}.running_mean": layer.mean, f"{name}.running_var": layer.variance}

        def prior(inputs: Tensor) -> Tensor:
            terms: list[Tensor] = []

            def compared(layer: LayerStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
                return lambda _, given: terms.append(layer.gaps(given[0]).square().sum(0).mean())

            _run(model, params, buffers, inputs, {name: compared(layer) for name, layer in layers.items()})
            return torch.stack(terms).mean()

        return prior


@dataclass(frozen=True)
class Prediction(Unbound):
    r"""How far the network's predictions are from the labels, :math:`\frac1N\sum\|p(x) - e_y\|^2`.

    It suits a network that has learned: one that is fresh predicts no label, of no image.

    Source: Wei et al. 2020, arXiv 2004.10397.
    """

    def of(self, model: nn.Module, observation: Observation, labels: Tensor | None) -> Prior:
        """Return the prior of a model and labels.

        Raises:
            ConfigError: the labels are optimised.
        """
        known, params = _given(labels, self), trainable_parameters(model)

        def prior(inputs: Tensor) -> Tensor:
            with in_mode(model, training=False):
                predicted = forward(model, params, None, inputs).softmax(1)
            wanted = F.one_hot(known, predicted.shape[1]).to(predicted)
            return (predicted - wanted).square().sum(1).mean()

        return prior


@dataclass(frozen=True)
class LastLayerInput(Unbound):
    r"""How far what enters the last fully connected layer is from what the update says of it.

    The update of row :math:`y` of the weights over that of its bias is the mean of the layer's inputs over
    the images of class :math:`y`, mostly. The prior is the mean square of the difference.

    Source: the analytic input of a layer, Phong et al. 2018; as a term beside the cosine, the attack "modern"
    of Geiping's *breaching*.
    """

    def of(self, model: nn.Module, observation: Observation, labels: Tensor | None) -> Prior:
        """Return the prior of a model, an observation and labels.

        Raises:
            ConfigError: the labels are optimised, or the last layer has no bias.
            RecoveryError: the model has no fully connected layer.
        """
        known, (weight, bias), params = _given(labels, self), classifier(model), trainable_parameters(model)
        if bias is None:
            raise ConfigError(f"LastLayerInput needs a bias in the last layer; {weight!r} has none beside it")
        rows, sizes = (observation.update[name].to(params[name])[known] for name in (weight, bias))
        told = torch.where(sizes[:, None] != 0, rows / sizes[:, None], 0)
        layer = model.get_submodule(weight.removesuffix("weight").removesuffix("."))

        def prior(inputs: Tensor) -> Tensor:
            seen: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
            try:
                with in_mode(model, training=False):
                    forward(model, params, None, inputs)
            finally:
                handle.remove()
            return (seen[-1] - told).square().mean()

        return prior


def _given(labels: Tensor | None, prior: object) -> Tensor:
    if labels is None:
        raise ConfigError(f"{type(prior).__name__} needs labels; expected labels='auto', not optimised ones")
    return labels if labels.ndim == 1 else labels.argmax(1)


def _run(
    model: nn.Module,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    inputs: Tensor,
    hooks: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...]], None]],
) -> None:
    """Run the network in evaluation mode, with a look at what is given to some of its layers."""
    handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        with in_mode(model, training=False):
            forward(model, params, buffers, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _norm(x: Tensor) -> Tensor:
    return x.square().sum().clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def median_filter(images: Tensor, size: int = 3) -> Tensor:
    """Return every pixel replaced by the median of the square around it, reflected at the border.

    The square is no higher and wider than reflection of so small an image allows; of one pixel it is one.

    Args:
        images: ``(N, C, H, W)``.
        size: the side of the square, odd.

    Raises:
        ConfigError: size is even or not positive.

    Taught in: chapter 2
    """
    half = checked("median_filter size", size, _Odd) // 2
    down, across = (min(half, side - 1) for side in images.shape[-2:])
    padded = F.pad(images, (across, across, down, down), mode="reflect")
    windows = padded.unfold(2, 2 * down + 1, 1).unfold(3, 2 * across + 1, 1)
    return windows.flatten(-2).median(-1).values
