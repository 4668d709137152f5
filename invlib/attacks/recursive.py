"""Closed forms, layer by layer: the image behind a chain of convolutions, without any search."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import cholesky, solve_triangular
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor, nn

from invlib.attacks.analytic import SLOPES, layer_input
from invlib.attacks.base import Settings, closed_form, known_labels
from invlib.attacks.matching import GradientMatching
from invlib.core.network import record_layers
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import RecoveryError
from invlib.settings import Count, NotNegative

_Array = NDArray[np.float64]

# Rounding may leave an output at an end of the activation's range, where the inverse is infinite.
_EDGE = 1e-7
_DENSE = 3072  # unknowns: up to here normal equations are factored, beyond they take too much memory and time
_SHIFT = 1e-8  # of their diagonal, which is all ones; from 1e-10 to 1e-6 the images are the same
# What went into an activation, from what came out.
_INVERSES: dict[type[nn.Module], Callable[[nn.Module, Tensor], Tensor]] = {
    nn.Identity: lambda _, a: a,
    nn.Sigmoid: lambda _, a: a.logit(_EDGE),
    nn.Tanh: lambda _, a: a.clamp(_EDGE - 1, 1 - _EDGE).atanh(),
    nn.Softplus: lambda m, a: (m.beta * a.clamp_min(_EDGE)).expm1().log() / m.beta,  # type: ignore[operator]
    nn.LeakyReLU: lambda m, a: a / SLOPES[nn.LeakyReLU](m, a),
    # An inactive unit has slope 0, and so its equation no weight.
    nn.ReLU: lambda _, a: a,
}


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A layer of the chain, the activation after it, and the shape of what goes into it."""

    name: str
    layer: nn.Conv2d | nn.Linear
    activation: nn.Module
    shape: tuple[int, ...]


def recursive_inversion(*, tolerance: float = 1e-6, iterations: int = 5000) -> RecursiveInversion:
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
        An attack for one image and a chain of convolutions, fully connected layers and activations that can
        be undone (sigmoid, tanh, softplus, leaky ReLU; of ReLU the active units) that ends in a fully
        connected layer with a bias. Its score is the distance measured on the result, and ``evaluations`` is
        1, for that measurement.

    Source: Zhu and Blaschko 2021 (R-GAP), arXiv 2010.07733; the weights are this project's.

    Taught in: chapter 3
    """
    return RecursiveInversion(tolerance=tolerance, iterations=iterations)


@dataclass(frozen=True, kw_only=True, repr=False)
class RecursiveInversion(Settings):
    """The attack that `recursive_inversion` returns."""

    tolerance: NotNegative = 1e-6
    iterations: Count = 5000

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
            RecoveryError: the model is no such chain, there is more than one image, or a gradient is zero in
                one of the layers.
        """
        began = time.perf_counter()
        observation.validate(model)
        if observation.num_images != 1:
            raise RecoveryError(f"num_images is {observation.num_images}; expected 1")
        inputs = _image(_chain(model, observation), observation, self.iterations)
        inputs = inputs.reshape(1, *observation.image_shape).to(next(model.parameters()))
        images = observation.normalization.decode(inputs).clamp(0, 1)
        labels = known_labels(model, observation)
        # rounding may leave the cosine a little above one
        score = max(0.0, GradientMatching().score(model, observation, images, labels))
        what = "exact" if score <= self.tolerance else "approximate"
        note = f"{what}: the update of this image is {score:.1e} from the observed one in direction"
        result = closed_form(images, labels, score, objective="cosine", note=note, began=began)
        return replace(result, evaluations=1)


def _chain(model: nn.Module, observation: Observation) -> list[_Stage]:
    """Return the layers in the order in which they run, checked to feed one another and nothing else."""
    probe = torch.rand(1, *observation.image_shape, generator=torch.Generator().manual_seed(0))
    logits, calls = record_layers(model, probe)
    stages: list[_Stage] = []
    flowing = probe.to(logits)
    for call in calls:
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
            stages[-1] = replace(stages[-1], activation=module)
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
    """Return the normalised input of the chain's first layer, flat, float64, layer by layer from the last."""
    gradients = {name: tensor.detach().cpu().double() for name, tensor in observation.update.items()}
    head = stages[-1]
    delta = observation.protocol.mean_gradient(gradients[f"{head.name}.bias"], 1)
    a = layer_input(gradients[f"{head.name}.weight"], gradients[f"{head.name}.bias"]).inputs
    behind = _double(head.layer.weight).T @ delta
    for stage in reversed(stages[:-1]):
        kind = type(stage.activation)
        # rounding may leave an output a little out of range, where the slope has the wrong sign
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
            a = layer_input(gradient, delta).inputs
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
    # unfold, given each pixel's own number, gives the pixel that each weight multiplies at each place
    numbers = torch.arange(1, pixels + 1, dtype=torch.float64).view(1, *stage.shape)
    meets = (_unfold(layer, numbers).long() - 1).numpy()  # (C kh kw, places), -1 in the padding
    out, places = len(weight), meets.shape[1]
    taps = weight.reshape(out, -1).numpy()
    trust = (slope / slope.max() / np.abs(taps).max()).reshape(out, places).numpy()
    signal = (delta / delta.abs().max()).reshape(out, places).numpy()
    known = np.concatenate([z.numpy() * trust.ravel(), (gradient / delta.abs().max()).flatten().numpy()])
    tap, place = np.nonzero(meets >= 0)
    channel = np.repeat(np.arange(out), len(tap))
    tap, place = (np.tile(index, out) for index in (tap, place))
    values = np.concatenate([taps[channel, tap] * trust[channel, place], signal[channel, place]])
    rows = np.concatenate([channel * places + place, out * places + channel * len(meets) + tap])
    pixel = np.tile(meets[tap, place], 2)
    matrix = sparse.csr_matrix((values, (rows, pixel)), shape=(len(known), pixels))
    return torch.from_numpy(_least_squares(matrix, known, iterations))


def _least_squares(matrix: Any, known: _Array, iterations: int) -> _Array:
    """Return the solution of least norm, in units of the columns' lengths, among those of least squares.

    The iteration runs in the coordinates of the Cholesky factor of the normal equations, where a few steps do
    for thousands. They are shifted, so that the factor exists where equations are missing, and directions
    that the equations hardly tell are left as they are instead of fitted to errors.
    """
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(0)).ravel())
    length[length == 0] = 1.0
    matrix = (matrix @ sparse.diags(1 / length)).tocsr()

    def solve(values: _Array, trans: int = 0) -> Any:
        return values

    if matrix.shape[1] <= _DENSE:
        normal = (matrix.T @ matrix).toarray()
        normal[np.diag_indices_from(normal)] += _SHIFT
        factor = cholesky(normal.T, overwrite_a=True, check_finite=False)  # transposed: as LAPACK stores it
        solve = functools.partial(solve_triangular, factor, check_finite=False)
    operator = LinearOperator(
        matrix.shape,
        matvec=lambda values: matrix @ solve(values),
        rmatvec=lambda values: solve(matrix.T @ values, trans=1),
        dtype=np.float64,
    )
    solution = lsmr(operator, known, atol=1e-11, btol=1e-11, conlim=0, maxiter=iterations)[0]
    return np.asarray(solve(solution) / length)


def _unfold(layer: nn.Conv2d, images: Tensor) -> Tensor:
    padded = F.pad(images, _padding(layer))
    return F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)[0]


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
        out = F.conv2d(F.pad(given, _padding(layer)), weight, None, layer.stride, 0, layer.dilation)
        (behind,) = torch.autograd.grad(out, given, delta.view_as(out))
    return behind
