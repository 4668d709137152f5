"""The kernels in plain torch: slow on a GPU, right everywhere, and what the Triton versions are held to.

Arguments were checked by `invlib.kernels`; the formulas stand there too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from invlib.kernels.checks import AdamStep, accumulator


def gradient_statistics(
    candidate: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted dot product and both squared norms, tensor by tensor."""
    dtype = accumulator(*candidate, *target)
    ours = [tensor.to(dtype) for tensor in candidate]
    theirs = [tensor.detach().to(dtype) for tensor in target]
    return (
        _weighted([_dot(c, t) for c, t in zip(ours, theirs, strict=True)], weights),
        _weighted([_dot(c, c) for c in ours], weights),
        _weighted([_dot(t, t) for t in theirs], weights),
    )


def squared_difference(
    candidate: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Weighted squared distance, tensor by tensor."""
    dtype = accumulator(*candidate, *target)
    differences = [c.to(dtype) - t.detach().to(dtype) for c, t in zip(candidate, target, strict=True)]
    return _weighted([_dot(d, d) for d in differences], weights)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # Not torch.dot: in float32 and under vmap it loses three digits over a million numbers, sum() none.
    return (a * b).sum()


def _weighted(parts: list[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([part if w == 1 else w * part for part, w in zip(parts, weights, strict=True)]).sum()


def total_variation(images: Tensor, reduction: str) -> Tensor:
    """Absolute differences of neighbouring pixels."""
    images = images.to(accumulator(images))
    across = (images[..., :, 1:] - images[..., :, :-1]).abs()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs()
    if reduction == "sum":
        return across.sum() + down.sum()
    # An image one pixel wide has no horizontal neighbours: its mean is 0, not 0/0.
    return across.sum() / max(across.numel(), 1) + down.sum() / max(down.numel(), 1)


def adam_step_(x: Tensor, grad: Tensor, m: Tensor, v: Tensor, how: AdamStep) -> None:
    """One step of Adam and the projection, in the order in which torch.optim.Adam computes it."""
    dtype, (beta1, beta2) = accumulator(x), how.betas
    g = (grad.sign() if how.signed else grad).to(dtype)
    mean = m.to(dtype).lerp(g, 1 - beta1)
    square = (v.to(dtype) * beta2).addcmul(g, g, value=1 - beta2)
    rate = how.lr / (1 - beta1**how.step)
    denominator = square.sqrt() / (1 - beta2**how.step) ** 0.5 + how.eps
    moved = x.to(dtype).addcdiv(mean, denominator, value=-rate)
    m.copy_(mean)
    v.copy_(square)
    if how.low is not None:
        moved = moved.maximum(how.low.to(dtype))
    if how.high is not None:
        moved = moved.minimum(how.high.to(dtype))
    x.copy_(moved)
