"""Total variation of images, and its gradient: one launch each."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from invlib.kernels.checks import accumulator
from invlib.kernels.triton.common import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    TYPES,
    LastDerivative,
    launch,
    sign,
    to_front,
    unfold,
)


@triton.jit
def _variation_kernel(  # type: ignore[no-untyped-def]
    images,
    partials,
    size,
    height,
    width,
    tiles,
    across: tl.float64,
    down: tl.float64,
    SUM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    x = images + (program // tiles).to(tl.int64) * size
    horizontal = tl.zeros((BLOCK,), SUM)
    vertical = tl.zeros((BLOCK,), SUM)
    for k in tl.static_range(0, CHUNK, BLOCK):
        offsets = (program % tiles) * CHUNK + k + tl.arange(0, BLOCK)
        inside = offsets < size
        has_right = inside & (offsets % width + 1 < width)
        has_lower = inside & ((offsets // width) % height + 1 < height)
        here = tl.load(x + offsets, mask=inside, other=0.0).to(SUM)
        right = tl.load(x + offsets + 1, mask=has_right, other=0.0).to(SUM)
        lower = tl.load(x + offsets + width, mask=has_lower, other=0.0).to(SUM)
        horizontal += tl.where(has_right, tl.abs(right - here), 0.0)
        vertical += tl.where(has_lower, tl.abs(lower - here), 0.0)
    # tl.full turns the factors into the dtype of the sums, whether they arrive as numbers or as Triton
    # scalars.
    total = tl.full((), across, SUM) * tl.sum(horizontal) + tl.full((), down, SUM) * tl.sum(vertical)
    tl.store(partials + program, total)


@triton.jit
def _variation_gradient_kernel(  # type: ignore[no-untyped-def]
    images,
    upstream,
    out,
    size,
    height,
    width,
    tiles,
    across: tl.float64,
    down: tl.float64,
    SUM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    x = images + row * size
    factor = tl.load(upstream + row)
    horizontal = factor * tl.full((), across, SUM)
    vertical = factor * tl.full((), down, SUM)
    for k in tl.static_range(0, CHUNK, BLOCK):
        offsets = (program % tiles) * CHUNK + k + tl.arange(0, BLOCK)
        inside = offsets < size
        column = offsets % width
        line = (offsets // width) % height
        here = tl.load(x + offsets, mask=inside, other=0.0).to(SUM)
        # A neighbour beyond the border is loaded as the pixel itself: a difference of 0 has sign 0.
        left = tl.load(x + offsets - 1, mask=inside & (column > 0), other=0.0).to(SUM)
        right = tl.load(x + offsets + 1, mask=inside & (column + 1 < width), other=0.0).to(SUM)
        upper = tl.load(x + offsets - width, mask=inside & (line > 0), other=0.0).to(SUM)
        lower = tl.load(x + offsets + width, mask=inside & (line + 1 < height), other=0.0).to(SUM)
        left = tl.where(column > 0, left, here)
        right = tl.where(column + 1 < width, right, here)
        upper = tl.where(line > 0, upper, here)
        lower = tl.where(line + 1 < height, lower, here)
        gradient = horizontal * (sign(here - left) - sign(right - here))
        gradient += vertical * (sign(here - upper) - sign(lower - here))
        tl.store(out + row * size + offsets, gradient.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, kw_only=True)
class _Variation:
    """What a launch over images needs to know besides them."""

    across: float  # factor of the horizontal differences
    down: float  # factor of the vertical ones
    rows: int = 0  # size of the leading dimension that vmap added, 0 for none

    def launch(self, kernel: Any, images: Tensor, *buffers: Tensor) -> None:
        """Start a kernel over all tiles of all rows; the buffers are its further tensors."""
        size, tiles = self.tiling(images)
        launch(
            kernel,
            max(self.rows, 1) * tiles,
            images,
            images.contiguous(),
            *buffers,
            size,
            images.shape[-2],
            images.shape[-1],
            tiles,
            self.across,
            self.down,
            SUM=TYPES[accumulator(images)],
            CHUNK=CHUNK_SIZE,
            BLOCK=BLOCK_SIZE,
        )

    def tiling(self, images: Tensor) -> tuple[int, int]:
        """Return how many numbers and how many tiles a row has."""
        size = images.numel() // max(self.rows, 1)
        return size, triton.cdiv(size, CHUNK_SIZE)

    def fold(self, batch: int, dim: int | None, tensor: Tensor) -> Tensor:
        """Make a batch dimension, wherever it is, part of the leading one."""
        tensor = to_front(tensor, dim, batch)
        return tensor.flatten(0, 1) if self.rows else tensor


class _TotalVariation(Function):
    """The weighted sum of absolute differences of each row of images."""

    @staticmethod
    def forward(variation: _Variation, images: Tensor) -> Tensor:
        tiles = variation.tiling(images)[1]
        partials = images.new_empty((max(variation.rows, 1), tiles), dtype=accumulator(images))
        variation.launch(_variation_kernel, images, partials)
        return partials.sum(1) if variation.rows else partials.sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.variation = inputs[0]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        return None, _TotalVariationGradient.apply(ctx.variation, upstream, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], variation: _Variation, images: Tensor) -> Any:
        rows = replace(variation, rows=info.batch_size * max(variation.rows, 1))
        values = _TotalVariation.apply(rows, variation.fold(info.batch_size, in_dims[1], images))
        return unfold(values, info.batch_size, variation.rows), 0


class _TotalVariationGradient(LastDerivative):
    """Its gradient with respect to the images."""

    @staticmethod
    def forward(variation: _Variation, upstream: Tensor, images: Tensor) -> Tensor:
        out = torch.empty(images.shape, dtype=images.dtype, device=images.device)
        variation.launch(_variation_gradient_kernel, images, upstream.contiguous(), out)
        return out

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], variation: _Variation, upstream: Tensor, images: Tensor
    ) -> Any:
        rows = replace(variation, rows=info.batch_size * max(variation.rows, 1))
        gradient = _TotalVariationGradient.apply(
            rows,
            variation.fold(info.batch_size, in_dims[1], upstream),
            variation.fold(info.batch_size, in_dims[2], images),
        )
        return unfold(gradient, info.batch_size, variation.rows), 0


def total_variation(images: Tensor, reduction: str) -> Tensor:
    """Absolute differences of neighbouring pixels, in one launch."""
    n, c, h, w = images.shape
    mean = reduction == "mean"
    variation = _Variation(
        across=1 / max(n * c * h * (w - 1), 1) if mean else 1.0,
        down=1 / max(n * c * (h - 1) * w, 1) if mean else 1.0,
    )
    value: Tensor = _TotalVariation.apply(variation, images)
    return value
