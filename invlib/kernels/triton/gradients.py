"""Sums over two lists of gradients, and their gradient: one launch each, nothing concatenated."""

import functools
from collections.abc import Sequence
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
    to_front,
    unfold,
)


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    pointers,
    blocks,
    sizes,
    weights,
    partials,
    tensors,
    tiles,
    OURS: tl.constexpr,
    THEIRS: tl.constexpr,
    SUM: tl.constexpr,
    SHARED: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    index = tl.load(blocks + 2 * tile)
    start = tl.load(blocks + 2 * tile + 1)
    size = tl.load(sizes + index)
    weight = tl.load(weights + index)
    ours = tl.load(pointers + index).to(tl.pointer_type(OURS)) + row * size
    theirs = tl.load(pointers + tensors + index).to(tl.pointer_type(THEIRS))
    if not SHARED:
        theirs += row * size
    first = tl.zeros((BLOCK,), SUM)
    second = tl.zeros((BLOCK,), SUM)
    third = tl.zeros((BLOCK,), SUM)
    for k in tl.static_range(0, CHUNK, BLOCK):
        offsets = start + k + tl.arange(0, BLOCK)
        inside = offsets < size
        c = tl.load(ours + offsets, mask=inside, other=0.0).to(SUM)
        t = tl.load(theirs + offsets, mask=inside, other=0.0).to(SUM)
        if DIFFERENCE:
            first += (c - t) * (c - t)
        else:
            first += c * t
            second += c * c
            third += t * t
    if DIFFERENCE:
        tl.store(partials + program, weight * tl.sum(first))
    else:
        tl.store(partials + 3 * program, weight * tl.sum(first))
        tl.store(partials + 3 * program + 1, weight * tl.sum(second))
        tl.store(partials + 3 * program + 2, weight * tl.sum(third))


@triton.jit
def _gradients_kernel(  # type: ignore[no-untyped-def]
    pointers,
    blocks,
    sizes,
    weights,
    upstream,
    tensors,
    tiles,
    OURS: tl.constexpr,
    THEIRS: tl.constexpr,
    SUM: tl.constexpr,
    SHARED: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    index = tl.load(blocks + 2 * tile)
    start = tl.load(blocks + 2 * tile + 1)
    size = tl.load(sizes + index)
    weight = tl.load(weights + index)
    ours = tl.load(pointers + index).to(tl.pointer_type(OURS)) + row * size
    theirs = tl.load(pointers + tensors + index).to(tl.pointer_type(THEIRS))
    if not SHARED:
        theirs += row * size
    out = tl.load(pointers + 2 * tensors + index).to(tl.pointer_type(OURS)) + row * size
    if DIFFERENCE:
        along_difference = 2 * weight * tl.load(upstream + row)
    else:
        along_target = weight * tl.load(upstream + 3 * row)
        along_candidate = 2 * weight * tl.load(upstream + 3 * row + 1)
    for k in tl.static_range(0, CHUNK, BLOCK):
        offsets = start + k + tl.arange(0, BLOCK)
        inside = offsets < size
        c = tl.load(ours + offsets, mask=inside, other=0.0).to(SUM)
        t = tl.load(theirs + offsets, mask=inside, other=0.0).to(SUM)
        gradient = along_difference * (c - t) if DIFFERENCE else along_target * t + along_candidate * c
        tl.store(out + offsets, gradient.to(OURS), mask=inside)


@functools.lru_cache(maxsize=64)
def _layout(
    sizes: tuple[int, ...], weights: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tiles as (tensor, start) pairs, the sizes and the weights, on the device that reads them."""
    blocks = [(index, start) for index, size in enumerate(sizes) for start in range(0, size, CHUNK_SIZE)]
    return (
        torch.tensor(blocks, dtype=torch.int64, device=device),
        torch.tensor(sizes, dtype=torch.int64, device=device),
        torch.tensor(weights, dtype=dtype, device=device),
    )


@dataclass(frozen=True, kw_only=True)
class _Lists:
    """What a launch over two lists needs to know besides their tensors."""

    weights: tuple[float, ...]
    difference: bool  # squared difference, or the three statistics
    rows: int = 0  # size of the leading dimension that vmap added, 0 for none
    shared: bool = True  # one target for all rows

    @property
    def sums(self) -> int:
        """How many numbers a row gives."""
        return 1 if self.difference else 3

    def fold(
        self, batch: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
    ) -> tuple["_Lists", list[Tensor]]:
        """Make a batch dimension, wherever it is, part of the leading one."""
        count = len(self.weights)
        shared = self.shared and all(dim is None for dim in dims[count:])
        folded = []
        for position, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
            theirs = position >= count
            if theirs and shared:
                folded.append(tensor)
                continue
            tensor = to_front(tensor, dim, batch)
            if self.rows:
                if theirs and self.shared:
                    tensor = tensor.unsqueeze(1).expand(batch, self.rows, *tensor.shape[1:])
                tensor = tensor.flatten(0, 1)
            folded.append(tensor)
        return replace(self, rows=batch * max(self.rows, 1), shared=shared), folded

    def launch(
        self, kernel: Any, tensors: Sequence[Tensor], sums: Tensor, out: Sequence[Tensor] = ()
    ) -> None:
        """Start a kernel over all tiles of all rows; `sums` takes partial sums or gives their gradient."""
        count = len(self.weights)
        dense = [tensor.contiguous() for tensor in tensors]
        blocks, sizes, weights = self.layout(tensors)
        # From ordinary memory, and not blocking: the driver takes its copy at once and no stream waits.
        pointers = torch.tensor([tensor.data_ptr() for tensor in (*dense, *out)])
        launch(
            kernel,
            max(self.rows, 1) * len(blocks),
            sums,
            pointers.to(sums.device, non_blocking=True),
            blocks,
            sizes,
            weights,
            sums,
            count,
            len(blocks),
            OURS=TYPES[tensors[0].dtype],
            THEIRS=TYPES[tensors[count].dtype],
            SUM=TYPES[sums.dtype],
            SHARED=self.shared,
            DIFFERENCE=self.difference,
            CHUNK=CHUNK_SIZE,
            BLOCK=BLOCK_SIZE,
        )

    def layout(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `_layout` says of these tensors without their rows."""
        sizes = tuple(tensor.numel() // max(self.rows, 1) for tensor in tensors[: len(self.weights)])
        return _layout(sizes, self.weights, accumulator(*tensors), tensors[0].device)


class _ListSums(Function):
    """The sums over two lists, of shape ``(3,)`` or ``(1,)`` after the rows."""

    @staticmethod
    def forward(lists: _Lists, *tensors: Tensor) -> Tensor:
        tiles = len(lists.layout(tensors)[0])
        partials = tensors[0].new_empty((max(lists.rows, 1), tiles, lists.sums), dtype=accumulator(*tensors))
        lists.launch(_sums_kernel, tensors, partials)
        return partials.sum(1) if lists.rows else partials[0].sum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.lists = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _ListGradients.apply(ctx.lists, upstream, *ctx.saved_tensors)
        return (None, *gradients, *(None for _ in gradients))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], lists: _Lists, *tensors: Tensor) -> Any:
        folded, rows = lists.fold(info.batch_size, in_dims[1:], tensors)
        sums = _ListSums.apply(folded, *rows)
        return unfold(sums, info.batch_size, lists.rows), 0


class _ListGradients(LastDerivative):
    """The gradient of those sums with respect to the candidate, a tuple of tensors."""

    @staticmethod
    def forward(lists: _Lists, upstream: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = tuple(
            torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            for tensor in tensors[: len(lists.weights)]
        )
        lists.launch(_gradients_kernel, tensors, upstream.contiguous(), out)
        return out

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], lists: _Lists, upstream: Tensor, *tensors: Tensor
    ) -> Any:
        folded, rows = lists.fold(info.batch_size, in_dims[2:], tensors)
        upstream = to_front(upstream, in_dims[1], info.batch_size)
        if lists.rows:
            upstream = upstream.flatten(0, 1)
        gradients = _ListGradients.apply(folded, upstream, *rows)
        return tuple(unfold(g, info.batch_size, lists.rows) for g in gradients), (0,) * len(gradients)


def gradient_statistics(
    candidate: Sequence[Tensor], target: Sequence[Tensor], weights: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted dot product and both squared norms, in one launch."""
    dot, ours, theirs = _ListSums.apply(
        _Lists(weights=weights, difference=False), *candidate, *target
    ).unbind()
    return dot, ours, theirs


def squared_difference(
    candidate: Sequence[Tensor], target: Sequence[Tensor], weights: tuple[float, ...]
) -> Tensor:
    """Weighted squared distance, in one launch."""
    total: Tensor = _ListSums.apply(_Lists(weights=weights, difference=True), *candidate, *target).squeeze(0)
    return total
