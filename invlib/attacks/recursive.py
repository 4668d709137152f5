"""Closed forms, layer by layer: the image behind a chain of convolutions, without any search."""

from __future__ import annotations

import functools
import math
import time
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

from invlib.attacks.analytic import layer_input
from invlib.attacks.base import Settings, closed_form, with_labels
from invlib.attacks.chain import Stage, chain, outside, sent, undo
from invlib.attacks.doubts import doubted, doubts_of
from invlib.attacks.matching import GradientMatching
from invlib.core.calls import Call
from invlib.core.network import like
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import RecoveryError
from invlib.settings import Count, NotNegative

_Array = NDArray[np.float64]

_DENSE = 3072  # unknowns: up to here normal equations are factored, beyond they take too much memory and time
_SHIFT = 1e-8  # of their diagonal, which is all ones; from 1e-10 to 1e-6 the images are the same


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
        be undone (sigmoid, tanh, softplus, ELU, leaky ReLU; of ReLU the active units) up to a fully connected
        layer with a bias, whatever comes after it. Its score is the distance measured on the result, and
        ``evaluations`` is 1, for that measurement.

    Source: Zhu and Blaschko 2021 (R-GAP), arXiv 2010.07733; the weights are this project's.

    Taught in: chapter 3
    """
    return RecursiveInversion(tolerance=tolerance, iterations=iterations)


@dataclass(frozen=True, kw_only=True, repr=False)
class RecursiveInversion(Settings):
    """The attack that `recursive_inversion` returns."""

    tolerance: NotNegative = 1e-6
    iterations: Count = 5000

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
            RecoveryError: the model is no such chain, there is more than one image, or a gradient is zero in
                one of the layers.
        """
        began = time.perf_counter()
        model = observation.validate(model)
        if observation.num_images != 1:
            raise RecoveryError(f"num_images is {observation.num_images}; expected 1")
        inputs = _image(_chain(model, observation), observation, self.iterations)
        inputs = inputs.reshape(1, *observation.image_shape).to(like(model))
        found, observation = observation.normalization.decode(inputs), with_labels(model, observation)
        labels = observation.labels
        assert labels is not None
        images, measure = found.clamp(0, 1), GradientMatching().scorer(model, observation, labels)
        # rounding may leave the cosine a little above one
        score = max(0.0, measure(images))
        cut = outside(found, fits=score <= self.tolerance)
        evaluations = 1
        if cut and score > self.tolerance:
            cut, evaluations = outside(found, fits=measure(found) <= self.tolerance), 2
        what = "exact" if score <= self.tolerance and not cut else "approximate"
        note = f"{what}: the update of this image is {score:.1e} from the observed one in direction"
        result = closed_form(images, labels, score, objective="cosine", note=note, began=began)
        return doubted(
            replace(result, evaluations=evaluations),
            [*doubts_of(model, observation, closed=True), *filter(None, [cut])],
        )


def _chain(model: nn.Module, observation: Observation) -> tuple[tuple[Call, ...], list[Stage]]:
    """Return what is done to the image first, and the layers up to the one to begin with.

    That is the last one that is fully connected and has a bias, since its gradients alone tell its input.
    """
    found = chain(model, observation)
    heads = [k for k, s in enumerate(found.stages) if s.window is None and s.bias_name is not None]
    if not heads:
        ends = f"it ends in {found.stages[-1].name!r}" if found.stages else "it has no layers"
        raise RecoveryError(
            f"{type(model).__name__}: {found.why or ends}; expected a chain of convolutions, fully connected "
            "layers and activations that can be undone, up to a fully connected layer with a bias"
        )
    return found.first, list(found.stages[: heads[-1] + 1])


def _image(parts: tuple[tuple[Call, ...], list[Stage]], observation: Observation, iterations: int) -> Tensor:
    """Return the normalised input of the network, flat, float64, layer by layer from the last."""
    first, stages = parts
    head = stages[-1]
    sizes = _double(sent(observation, head.bias_name or "")).flatten()
    delta = _double(observation.mean_gradient(head.bias_name or "")).flatten()
    a = layer_input(head.gradient(_double(sent(observation, head.weight_name))), sizes).inputs
    behind = _double(head.weight).T @ delta
    for stage in reversed(stages[:-1]):
        z, back, slope = undo(stage.after, a)
        delta = back(behind.flatten())
        if not delta.any():
            raise RecoveryError(f"the gradient behind {stage.name!r} is all zero; expected an active unit")
        gradient = stage.gradient(_double(observation.mean_gradient(stage.weight_name)))
        weight = _double(stage.weight)
        if stage.bias is not None:
            bias = _double(stage.bias)
            z = (z.reshape(len(bias), -1) - bias[:, None]).flatten()
        if stage.window is None:
            a = layer_input(gradient, delta).inputs
            behind = weight.T @ delta
        else:
            a = _undo(stage, weight, z, slope.abs(), delta, gradient, iterations)
            behind = _backward(stage, delta)
    return undo(first, a)[0]


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _undo(
    stage: Stage,
    weight: Tensor,
    z: Tensor,
    slope: Tensor,
    delta: Tensor,
    gradient: Tensor,
    iterations: int,
) -> Tensor:
    """Solve the two sets of equations of a convolution for its input, by least squares."""
    pixels = math.prod(stage.shape)
    # unfold, given each pixel's own number, gives the pixel that each weight multiplies at each place
    numbers = torch.arange(1, pixels + 1, dtype=torch.float64).view(1, *stage.shape)
    meets = (_unfold(stage, numbers).long() - 1).numpy()  # (C kh kw, places), -1 in the padding
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


def _window(stage: Stage) -> tuple[list[int], list[int], list[int]]:
    assert stage.window is not None
    return stage.window


def _unfold(stage: Stage, images: Tensor) -> Tensor:
    stride, dilation, padding = _window(stage)
    height, width = stage.weight.shape[2:]
    return F.unfold(F.pad(images, padding), (height, width), dilation=tuple(dilation), stride=tuple(stride))[
        0
    ]


def _backward(stage: Stage, delta: Tensor) -> Tensor:
    """Return the gradient at the input of a convolution from the one at its output."""
    stride, dilation, padding = _window(stage)
    given = torch.zeros(1, *stage.shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        out = F.conv2d(F.pad(given, padding), _double(stage.weight), None, stride, 0, dilation)
        (behind,) = torch.autograd.grad(out, given, delta.view_as(out))
    return behind
