"""Gradient statistics on a CPU: the sums of the reference, with their gradient written by hand.

Autograd of the reference goes back through every product and every sum of each tensor, which costs more than
the sums. By hand it is one line for each tensor. Like the Triton versions it can be differentiated once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from invlib.kernels.checks import accumulator

PART = 2**15  # numbers whose gradient is made at once


def gradient_statistics(
    candidate: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted dot product and both squared norms."""
    theirs = [t.detach() for t in target]
    # In parts, so that backward frees a part's candidates before it makes the next part's gradients.
    sums = [
        _Statistics.apply(tuple(weights[part]), *candidate[part], *theirs[part]) for part in _parts(candidate)
    ]
    dot, ours = (each[0] if len(each) == 1 else torch.stack(each).sum(0) for each in zip(*sums, strict=True))
    dtype = accumulator(*candidate, *target)
    parts = [w * (t := tensor.to(dtype)).mul(t).sum() for tensor, w in zip(theirs, weights, strict=True)]
    return dot, ours, torch.stack(parts).sum()


def _parts(tensors: Sequence[Tensor]) -> list[slice]:
    """Cut a list into parts of at least so many numbers."""
    cuts, size = [0], 0
    for k, tensor in enumerate(tensors, 1):
        size += tensor.numel()
        if size >= PART or k == len(tensors):
            cuts.append(k)
            size = 0
    return [slice(*ends) for ends in itertools.pairwise(cuts)]


class _Statistics(torch.autograd.Function):
    """Both sums in which the candidate has a part; tensors may have a leading dimension of a stack."""

    @staticmethod
    def forward(weights: tuple[float, ...], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        candidate, target = _halves(tensors)
        return _sums(weights, candidate, target, stacked=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.weights = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_dot: Tensor, of_norm: Tensor) -> tuple[Tensor | None, ...]:
        return _slopes(ctx, of_dot, of_norm)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], weights: tuple[float, ...], *tensors: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        stacks = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, dims[1:], strict=True)
        ]
        return _Stacked.apply(weights, *stacks), (0, 0)


class _Stacked(torch.autograd.Function):
    """The same for a stack of candidates; a stack of stacks is left to torch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: tuple[float, ...], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        candidate, target = _halves(tensors)
        return _sums(weights, candidate, target, stacked=True)

    setup_context = _Statistics.setup_context

    @staticmethod
    def backward(ctx: Any, of_dot: Tensor, of_norm: Tensor) -> tuple[Tensor | None, ...]:
        return _slopes(ctx, of_dot, of_norm)


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def _sums(
    weights: tuple[float, ...], candidate: Sequence[Tensor], target: Sequence[Tensor], *, stacked: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(*candidate, *target)

    def total(a: Tensor, b: Tensor, weight: float) -> Tensor:
        product = a.to(dtype) * b.to(dtype)
        # sum(()) would sum over all dimensions, so a stack of single numbers is left as it is.
        single = stacked and product.ndim == 1
        part = product if single else product.sum(tuple(range(stacked, product.ndim)))
        return part if weight == 1 else weight * part

    dots = [total(c, t, w) for c, t, w in zip(candidate, target, weights, strict=True)]
    norms = [total(c, c, w) for c, w in zip(candidate, weights, strict=True)]
    return torch.stack(dots).sum(0), torch.stack(norms).sum(0)


def _slopes(ctx: Any, of_dot: Tensor, of_norm: Tensor) -> tuple[Tensor | None, ...]:
    candidate, target = _halves(ctx.saved_tensors)
    slopes: list[Tensor] = list(candidate)
    # The largest first: the candidate and the gradient of one tensor are held at once, so the peak comes
    # before the others' gradients are there.
    for k in sorted(range(len(candidate)), key=lambda k: -candidate[k].numel()):
        c, t, weight = candidate[k], target[k], ctx.weights[k]
        # One slope for each of a stack, in front of the tensor's own dimensions.
        shape = (*of_dot.shape, *[1] * (c.ndim - of_dot.ndim))
        slope = torch.addcmul(
            t * (weight * of_dot).view(shape), (2 * weight * of_norm).view(shape), c.to(of_norm.dtype)
        )
        slopes[k] = slope.to(c.dtype)
    return None, *slopes, *[None] * len(target)
