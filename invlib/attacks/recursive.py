"""Closed forms, layer by layer: a chain of convolutions gives its image away without any search."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn

from invlib.attacks.analytic import SLOPES, layer_input
from invlib.attacks.labels import infer
from invlib.attacks.matching import GradientMatching
from invlib.core.network import record_layers
from invlib.core.observation import Observation
from invlib.core.reconstruction import Reconstruction
from invlib.errors import RecoveryError
from invlib.federated import FedAvg, FedSGD

_Array = NDArray[np.float64]


# Rounding may have pushed an output on the border of what the activation can give, whose inverse is infinite.
_EDGE = 1e-7
# What went into an activation, from what came out.
_INVERSES: dict[type[nn.Module], Callable[[nn.Module, Tensor], Tensor]] = {
    nn.Identity: lambda _, a: a,
    nn.Sigmoid: lambda _, a: a.logit(_EDGE),
    nn.Tanh: lambda _, a: a.clamp(_EDGE - 1, 1 - _EDGE).atanh(),
    nn.Softplus: lambda m, a: (m.beta * a.clamp_min(_EDGE)).expm1().log() / m.beta,  # type: ignore[operator]
    nn.LeakyReLU: lambda m, a: a / SLOPES[nn.LeakyReLU](m, a),
    # What a closed ReLU hides has slope 0, and so no equation.
    nn.ReLU: lambda _, a: a,
}


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A layer of the chain, the activation after it, and the shape of what goes into it."""

    name: str
    layer: nn.Conv2d | nn.Linear
    activation: nn.Module
    shape: tuple[int, ...]


def recursive_inversion(*, tolerance: float = 1e-6, iterations: int = 5000) -> Callable[..., Reconstruction]:
    r"""Return the closed-form attack on chains of convolutions: one layer after another, from the last.

    The last layer gives its input :math:`a_k` and :math:`\delta` in closed form. Below it, the activation
    undone gives :math:`z = \sigma^{-1}(a_k)` and :math:`\delta' = (W^\top \delta) \odot \sigma'(z)`, and
    the input :math:`a_{k-1}` of the convolution solves two sets of *linear* equations at once,

    .. math:: W' * a_{k-1} + b' = z, \qquad \delta' \star a_{k-1} = \partial L / \partial W',

    by least squares, and so on down to the image. An error :math:`\epsilon` in :math:`a_k` is one of
    :math:`\epsilon / \sigma'(z)` in :math:`z`, so that each equation of the first set is weighed by
    :math:`\sigma'(z)`: without this, saturated units cost 30 to 60 dB.

    Args:
        tolerance: the distance of directions, `invlib.optim.objectives.cosine`, between the update of the
            result and the observed one up to which the note says that it is exact.
        iterations: at most so many of the least-squares solver, for each layer.

    Returns:
        An attack ``(model, observation, *, generator=None) -> Reconstruction`` for one image and a chain of
        convolutions, fully connected layers and activations that can be undone (sigmoid, tanh, softplus,
        leaky ReLU; of ReLU the open units) that ends in a fully connected layer with a bias. Its score is
        the distance measured on the result, and ``evaluations`` is 1, for that measurement.

    Raises:
        RecoveryError: when called, on a model that is no such chain, on more than one image, or on a
            gradient that is zero on the way.

    Source: Zhu and Blaschko 2021 (R-GAP), arXiv 2010.07733; the weights are this project's.

    Taught in: chapter 3
    """

    def attack(
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: object = None,
        progress: bool = False,
    ) -> Reconstruction:
        began = time.perf_counter()
        observation.validate(model)
        if observation.num_images != 1:
            raise RecoveryError(f"num_images is {observation.num_images}; expected 1")
        inputs = _image(_chain(model, observation), observation, iterations)
        some = next(model.parameters())
        inputs = inputs.reshape(1, *observation.image_shape).to(some)
        images = observation.normalization.decode(inputs).clamp(0, 1)
        labels = observation.labels if observation.labels is not None else infer(model, observation).labels
        # rounding may leave the cosine a little above one
        score = max(0.0, GradientMatching().score(model, observation, images, labels.to(some.device)))
        what = "exact" if score <= tolerance else "approximate"
        return Reconstruction(
            images=images,
            labels=labels,
            score=score,
            trial_scores=torch.tensor([score]),
            trials=images[None],
            status="closed_form",
            seconds=time.perf_counter() - began,
            evaluations=1,
            note=f"{what}: the update of this image is {score:.1e} from the observed one in direction",
        )

    return attack


def is_chain(model: nn.Module, observation: Observation) -> bool:
    """Return whether `recursive_inversion` applies: one image, one gradient, a chain that can be undone."""
    protocol = observation.protocol
    once = isinstance(protocol, FedSGD) or (isinstance(protocol, FedAvg) and len(protocol.batches(1)) == 1)
    if observation.num_images != 1 or not once:
        return False
    try:
        stages = _chain(model, observation)
    except RecoveryError:
        return False
    # Where ReLU closes half of the units, equations may be missing, and matching does better from noise.
    return not any(isinstance(stage.activation, nn.ReLU) for stage in stages)


def _chain(model: nn.Module, observation: Observation) -> list[_Stage]:
    """Return the layers in the order in which they run, checked to feed one another and nothing else."""
    some = next(model.parameters())
    probe = torch.rand(1, *observation.image_shape, generator=torch.Generator().manual_seed(0)).to(some)
    logits, ran = record_layers(model, probe)
    stages: list[_Stage] = []
    flowing = probe
    for call in ran:
        name, module = call.name, call.layer
        if not torch.equal(call.given.flatten(), flowing.flatten()):
            raise _no_chain(model, f"{name!r} does not take what the layer before it gives")
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        ):
            shape = tuple(call.given.shape[1:])
            stages.append(_Stage(name=name, layer=module, activation=nn.Identity(), shape=shape))
        elif type(module) in _INVERSES and not isinstance(module, nn.Identity):
            if not stages or not isinstance(stages[-1].activation, nn.Identity):
                raise _no_chain(model, f"{name!r} is an activation that follows no layer")
            last = stages[-1]
            stages[-1] = _Stage(name=last.name, layer=last.layer, activation=module, shape=last.shape)
        elif not isinstance(module, (nn.Flatten, nn.Identity, nn.Dropout)):
            raise _no_chain(model, f"{name!r} is {type(module).__name__}")
        flowing = call.output
    if not stages or not torch.equal(flowing, logits):
        raise _no_chain(model, "it has steps that are no layers")
    head = stages[-1]
    if not isinstance(head.layer, nn.Linear) or head.layer.bias is None:
        raise _no_chain(model, f"it ends in {head.name!r} ({type(head.layer).__name__})")
    return stages


def _no_chain(model: nn.Module, why: str) -> RecoveryError:
    return RecoveryError(
        f"{type(model).__name__}: {why}; expected a chain of convolutions, fully connected layers and "
        f"{', '.join(kind.__name__ for kind in _INVERSES)} that ends in a fully connected layer with a bias"
    )


def _image(stages: list[_Stage], observation: Observation, iterations: int) -> Tensor:
    """Go down the chain and return the normalised input of its first layer, flat, float64."""
    gradients = {name: tensor.detach().cpu().double() for name, tensor in observation.update.items()}
    head = stages[-1]
    delta = observation.protocol.mean_gradient(gradients[f"{head.name}.bias"], 1)
    a = layer_input(gradients[f"{head.name}.weight"], gradients[f"{head.name}.bias"]).inputs
    behind = _double(head.layer.weight).T @ delta
    for stage in reversed(stages[:-1]):
        kind = type(stage.activation)
        # rounding may leave an output a little beyond its border, where the slope has the wrong sign
        z, slope = _INVERSES[kind](stage.activation, a), SLOPES[kind](stage.activation, a).clamp_min(0)
        delta = behind.flatten() * slope
        if not delta.any():
            raise RecoveryError(f"the gradient behind {stage.name!r} is all zero; expected an active unit")
        gradient = observation.protocol.mean_gradient(gradients[f"{stage.name}.weight"], 1)
        weight = _double(stage.layer.weight)
        if stage.layer.bias is not None:
            bias = _double(stage.layer.bias)
            z = (z.reshape(len(bias), -1) - bias[:, None]).flatten()
        if isinstance(stage.layer, nn.Linear):
            scale = delta.abs().max()
            a = (gradient / scale).T @ (delta / scale) / (delta / scale).square().sum()
            behind = weight.T @ delta
        else:
            a = _undo(stage, weight, z, slope, delta, gradient, iterations)
            behind = _backward(stage, delta)
    return a


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _undo(
    stage: _Stage,
    weight: Tensor,
    z: Tensor,
    slope: Tensor,
    delta: Tensor,
    gradient: Tensor,
    iterations: int,
) -> Tensor:
    """Solve the two sets of equations of a convolution for its input, by least squares."""
    layer = stage.layer
    assert isinstance(layer, nn.Conv2d)
    pixels = math.prod(stage.shape)
    # unfold, given each pixel's own number, tells which pixel every weight meets at every place
    numbers = torch.arange(1, pixels + 1, dtype=torch.float64).view(1, *stage.shape)
    meets = (_unfold(layer, numbers).long() - 1).numpy()  # (C kh kw, places), -1 in the padding
    out, places = len(weight), meets.shape[1]
    taps = weight.reshape(out, -1).numpy()
    tap, place = np.nonzero(meets >= 0)
    pixel = meets[tap, place]
    channel = np.repeat(np.arange(out), len(pixel))
    tap, place, pixel = (np.tile(index, out) for index in (tap, place, pixel))

    def equations(row: Any, value: Any, rows: int, known: Tensor, trust: Tensor) -> tuple[Any, _Array]:
        scale = (trust / np.abs(value).max()).numpy()
        matrix = sparse.csr_matrix((value, (row, pixel)), shape=(rows, pixels))
        return sparse.diags(scale) @ matrix, known.numpy() * scale

    forward = equations(channel * places + place, taps[channel, tap], out * places, z, slope / slope.max())
    backward = equations(
        channel * len(meets) + tap,
        delta.reshape(out, places).numpy()[channel, place],
        out * len(meets),
        gradient.flatten(),
        torch.ones(out * len(meets), dtype=torch.float64),
    )
    matrix = sparse.vstack([forward[0], backward[0]]).tocsr()
    # Columns of equal length: the solver then needs half as many iterations.
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(0)).ravel())
    length[length == 0] = 1.0
    found = lsmr(
        matrix @ sparse.diags(1 / length),
        np.concatenate([forward[1], backward[1]]),
        atol=1e-11,
        btol=1e-11,
        conlim=0,
        maxiter=iterations,
    )[0]
    return torch.from_numpy(found / length)


def _unfold(layer: nn.Conv2d, images: Tensor) -> Tensor:
    padding = _padding(layer)
    return F.unfold(
        F.pad(images, padding),
        layer.kernel_size,
        dilation=layer.dilation,
        stride=layer.stride,
    )[0]


def _padding(layer: nn.Conv2d) -> list[int]:
    """Return how much is padded left, right, above and below."""
    return list(layer._reversed_padding_repeated_twice)


def _backward(stage: _Stage, delta: Tensor) -> Tensor:
    """Return the gradient at the input of a convolution from the one at its output."""
    layer = stage.layer
    assert isinstance(layer, nn.Conv2d)
    weight = _double(layer.weight)
    given = torch.zeros(1, *stage.shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        out = F.conv2d(
            F.pad(given, _padding(layer)),
            weight,
            None,
            layer.stride,
            0,
            layer.dilation,
        )
        (behind,) = torch.autograd.grad(out, given, delta.view_as(out))
    return behind
