"""The operations of `invlib.kernels`: arguments checked, implementation chosen."""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from invlib.errors import ConfigError, DeviceError
from invlib.kernels import reference
from invlib.kernels.checks import AdamStep, check_images, check_lists

Impl = Literal["reference", "triton"]

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def choose(impl: Impl | None, tensor: Tensor) -> Impl:
    """Return which implementation runs for a tensor like this one.

    Args:
        impl: the implementation asked for; None chooses from the tensor's device and dtype.
        tensor: any tensor of the call.

    Returns:
        ``"reference"`` or ``"triton"``.

    Raises:
        ConfigError: if impl is none of the three.
        DeviceError: if ``impl="triton"`` cannot run here; the message says why.
    """
    if impl is None:
        # A compiler fuses the reference by itself, and a graph being captured forbids the pointer upload.
        if not tensor.is_cuda or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return "reference"
        return "triton" if _obstacle(tensor) is None else "reference"
    if impl == "reference":
        return "reference"
    if impl == "triton":
        obstacle = _obstacle(tensor)
        if obstacle is not None:
            raise DeviceError(f"impl='triton' needs {obstacle}; use impl=None")
        return "triton"
    raise ConfigError(f"impl={impl!r} is unknown; choose None, 'reference' or 'triton'")


def gradient_statistics(
    candidate: Sequence[Tensor],
    target: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the three sums that every cosine of two gradients is made of, in one pass over both lists.

    With :math:`c_i` the candidate's tensors, :math:`t_i` the target's and :math:`w_i` the weights,

    .. math:: \Big(\sum_i w_i \langle c_i, t_i \rangle,\ \sum_i w_i \lVert c_i \rVert^2,\
              \sum_i w_i \lVert t_i \rVert^2\Big).

    The cosine of Geiping et al., *Inverting Gradients* (2020, arXiv 2003.14053) is the first over the root of
    the product of the others. Sums are taken in float32, or in float64 where a tensor is float64.

    Args:
        candidate: the gradients that a guess gives, one tensor of any shape per parameter; differentiable.
        target: the observed gradients, of the same shapes; a constant, no gradient flows to it.
        weights: one number per tensor; None weighs all alike.
        impl: see :func:`choose`.

    Returns:
        Dot product, squared norm of the candidate and squared norm of the target, each of shape ``()``.

    Raises:
        ConfigError: if the lists do not fit each other (the message names the tensor and both shapes), are
            empty or hold a tensor of zero size, or the weights do not fit them.
        DeviceError: if ``impl="triton"`` cannot run.
    """
    checked = check_lists(candidate, target, weights)
    if _choose_for_lists(impl, candidate, target) == "reference":
        return reference.gradient_statistics(candidate, target, checked)
    sums: tuple[Tensor, Tensor, Tensor] = _triton().gradient_statistics(candidate, target, checked)
    return sums


def squared_difference(
    candidate: Sequence[Tensor],
    target: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    impl: Impl | None = None,
) -> Tensor:
    r"""Return the squared Euclidean distance of two gradients, in one pass over both lists.

    .. math:: \sum_i w_i \lVert c_i - t_i \rVert^2

    The differences are taken before they are squared, so that nothing cancels when the two are close:
    expanding the square would lose all digits of a distance much smaller than the norms. This is the
    objective of Zhu et al., *Deep Leakage from Gradients* (2019, arXiv 1906.08935). Arguments, dtype of the
    sum, of shape ``()``, and errors as for `gradient_statistics`.
    """
    checked = check_lists(candidate, target, weights)
    if _choose_for_lists(impl, candidate, target) == "reference":
        return reference.squared_difference(candidate, target, checked)
    total: Tensor = _triton().squared_difference(candidate, target, checked)
    return total


def total_variation(
    images: Tensor, *, reduction: Literal["mean", "sum"] = "mean", impl: Impl | None = None
) -> Tensor:
    r"""Return the anisotropic total variation of images: how much neighbouring pixels differ.

    With :math:`x_{h,w}` the pixels of every image and channel, ``reduction="sum"`` is

    .. math:: \sum_{h,w} \lvert x_{h,w+1} - x_{h,w} \rvert + \sum_{h,w} \lvert x_{h+1,w} - x_{h,w} \rvert

    over all images and channels, and ``reduction="mean"`` divides each of the two sums by its own number of
    differences, which is the form used by Geiping et al., *Inverting Gradients* (2020, arXiv 2003.14053).
    Rudin, Osher and Fatemi (1992) introduced the prior. A direction in which images are one pixel long counts
    0. The gradient takes 0 for the derivative of the absolute value at 0.

    Args:
        images: shape ``(N, C, H, W)``, in any units; the result is in the same.
        reduction: ``"mean"`` or ``"sum"``.
        impl: see :func:`choose`.

    Returns:
        The value, of shape ``()``, in float32, or float64 for float64 images.

    Raises:
        ConfigError: if images has another number of dimensions, no numbers or no floating-point ones, or the
            reduction is unknown.
        DeviceError: if ``impl="triton"`` cannot run.
    """
    check_images(images, reduction)
    if choose(impl, images) == "reference":
        return reference.total_variation(images, reduction)
    value: Tensor = _triton().total_variation(images, reduction)
    return value


@torch.no_grad()
def adam_step_(
    x: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    signed: bool,
    low: Tensor | None,
    high: Tensor | None,
    impl: Impl | None = None,
) -> None:
    r"""Take one step of Adam in place, on the gradient or on its sign, and project the result on a box.

    With :math:`g` the gradient, or its sign where ``signed``, at step :math:`k = 1, 2, \dots`

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2, \\
        x &\leftarrow \min\!\Big(\max\!\Big(x - \mathrm{lr}\, \frac{m / (1 - \beta_1^k)}
        {\sqrt{v / (1 - \beta_2^k)} + \epsilon},\ \mathrm{low}\Big),\ \mathrm{high}\Big).

    Adam is from Kingma and Ba (2014, arXiv 1412.6980), bias correction and rounding as in `torch.optim.Adam`;
    sign and projection are those of Geiping et al., *Inverting Gradients* (2020, arXiv 2003.14053).

    Args:
        x: what is optimised, any shape, contiguous or not; changed in place.
        grad: its gradient, of the same shape; left as it is.
        m: running mean of the gradient, of the same shape, zeros before step 1; changed in place.
        v: running mean of its square, likewise.
        step: number of this step, from 1.
        lr: step size, in units of x.
        betas: decay of the two running means, in [0, 1).
        eps: added to the denominator.
        signed: whether to use the gradient's sign.
        low: lower bounds, broadcast against x, such as ``(1, C, 1, 1)``; None for none.
        high: upper bounds, likewise.
        impl: see :func:`choose`.

    Raises:
        ConfigError: if a tensor does not fit x, the step is below 1 or a beta is out of range.
        DeviceError: if ``impl="triton"`` cannot run.
    """
    how = AdamStep(step=step, lr=lr, betas=betas, eps=eps, signed=signed, low=low, high=high)
    how.check(x, grad=grad, m=m, v=v)
    module = reference if choose(impl, x) == "reference" else _triton()
    module.adam_step_(x, grad, m, v, how)


def _choose_for_lists(impl: Impl | None, candidate: Sequence[Tensor], target: Sequence[Tensor]) -> Impl:
    chosen = choose(impl, candidate[0])
    if chosen == "reference":
        return chosen
    for name, tensors in (("candidate", candidate), ("target", target)):
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        if len(dtypes) > 1 or tensors[0].dtype not in _TRITON_DTYPES:
            if impl is None:
                return "reference"
            raise DeviceError(
                f"impl='triton' needs one dtype of float16, bfloat16, float32 or float64 throughout {name}, "
                f"got {', '.join(dtypes)}; use impl=None"
            )
    return chosen


def _obstacle(tensor: Tensor) -> str | None:
    """Say what the Triton version lacks to run on this tensor, or None."""
    if tensor.dtype not in _TRITON_DTYPES:
        return f"float16, bfloat16, float32 or float64, got {tensor.dtype}"
    module = _load()
    if isinstance(module, ImportError):
        return f"the triton package, which cannot be used here ({module})"
    if module.INTERPRETED and tensor.device.type != "cpu":
        return f"a CPU tensor while TRITON_INTERPRET=1 is set, got {tensor.device}"
    if not module.INTERPRETED and not tensor.is_cuda:
        return f"a CUDA tensor (or TRITON_INTERPRET=1), got {tensor.device}"
    return None


@functools.cache
def _load() -> ModuleType | ImportError:
    # Imported at its first use: it takes most of a second, and Triton is not made for every platform.
    try:
        return importlib.import_module("invlib.kernels.triton")
    except ImportError as error:
        return error


def _triton() -> ModuleType:
    module = _load()
    assert isinstance(module, ModuleType)  # choose() said so
    return module
