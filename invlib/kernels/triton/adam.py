"""Signed Adam with projection on a box: one launch that reads and writes everything once."""

import math

import triton
import triton.language as tl
from torch import Tensor

from invlib.kernels.checks import AdamStep, accumulator
from invlib.kernels.triton.common import BLOCK_SIZE, TYPES, launch, sign


@triton.jit
def _adam_kernel(  # type: ignore[no-untyped-def]
    x,
    grad,
    m,
    v,
    low,
    high,
    size,
    low_repeat,
    low_count,
    high_repeat,
    high_count,
    rate: tl.float64,
    pull1: tl.float64,
    beta2: tl.float64,
    pull2: tl.float64,
    root: tl.float64,
    eps: tl.float64,
    SIGNED: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SUM: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(OFFSET) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    g = tl.load(grad + offsets, mask=inside, other=0.0).to(SUM)
    if SIGNED:
        g = sign(g).to(SUM)
    mean = tl.load(m + offsets, mask=inside, other=0.0).to(SUM)
    square = tl.load(v + offsets, mask=inside, other=0.0).to(SUM)
    here = tl.load(x + offsets, mask=inside, other=0.0).to(SUM)
    # The numbers 1 - beta come as such: taken in float32 here, 1 - 0.999 would be off in its fifth digit.
    mean += tl.full((), pull1, SUM) * (g - mean)
    square = tl.full((), beta2, SUM) * square + tl.full((), pull2, SUM) * g * g
    tl.store(m + offsets, mean.to(m.dtype.element_ty), mask=inside)
    tl.store(v + offsets, square.to(v.dtype.element_ty), mask=inside)
    here -= tl.full((), rate, SUM) * (
        mean / (tl.sqrt(square) / tl.full((), root, SUM) + tl.full((), eps, SUM))
    )
    # Comparisons instead of tl.minimum and tl.maximum: a NaN stays a NaN, so that a lost restart shows.
    if LOW:
        bound = tl.load(low + (offsets // low_repeat) % low_count, mask=inside, other=0.0).to(SUM)
        here = tl.where(here < bound, bound, here)
    if HIGH:
        bound = tl.load(high + (offsets // high_repeat) % high_count, mask=inside, other=0.0).to(SUM)
        here = tl.where(here > bound, bound, here)
    tl.store(x + offsets, here.to(x.dtype.element_ty), mask=inside)


def _box(bound: Tensor | None, x: Tensor) -> tuple[Tensor, int, int]:
    """Return a bound's values, how often each repeats in x, and how many there are before they recur."""
    if bound is None:
        return x, 1, 1
    shape = (1,) * (x.ndim - bound.ndim) + tuple(bound.shape)
    long = [axis for axis, n in enumerate(shape) if n > 1]
    if len(long) > 1:  # varies along several axes, unlike the box of an image: spell it out
        return bound.expand(x.shape).contiguous(), 1, x.numel()
    repeat = math.prod(x.shape[long[0] + 1 :]) if long else 1
    return bound.contiguous(), repeat, bound.numel()


def adam_step_(x: Tensor, grad: Tensor, m: Tensor, v: Tensor, how: AdamStep) -> None:
    """One step of Adam and the projection, in one launch."""
    if x.numel() == 0:
        return
    targets = (x, m, v)
    dense = [tensor.contiguous() for tensor in targets]
    low_values, *low_pattern = _box(how.low, x)
    high_values, *high_pattern = _box(how.high, x)
    beta1, beta2 = how.betas
    launch(
        _adam_kernel,
        triton.cdiv(x.numel(), BLOCK_SIZE),
        x,
        dense[0],
        grad.contiguous(),
        dense[1],
        dense[2],
        low_values,
        high_values,
        x.numel(),
        *low_pattern,
        *high_pattern,
        how.lr / (1 - beta1**how.step),
        1 - beta1,
        beta2,
        1 - beta2,
        math.sqrt(1 - beta2**how.step),
        how.eps,
        SIGNED=how.signed,
        LOW=how.low is not None,
        HIGH=how.high is not None,
        SUM=TYPES[accumulator(x)],
        OFFSET=tl.int64 if x.numel() >= 2**31 - BLOCK_SIZE else tl.int32,
        BLOCK=BLOCK_SIZE,
    )
    for tensor, result in zip(targets, dense, strict=True):
        if result is not tensor:
            tensor.copy_(result)
