"""Layers whose second derivative is cheap, used in place of torch's own while an attack differentiates.

Gradient matching differentiates the backward pass of a network. Torch can do that for every layer, but not
equally well: the image's part of the second derivative of a convolution is computed there by a convolution
whose *kernel* is a whole feature map, and batch norm with fixed statistics, which is one multiplication and
one addition, is differentiated twice as if its statistics could change. The layers here give the same
numbers for less.

A weight may also be a stack of weights, one for each restart, beside images of all restarts in one batch,
``(restarts * N, C, H, W)``. Where all weights of a stack are known to be the same, the first of them is used
for all images, and only the gradients of the weights are computed for each restart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_FEW = 2**16  # numbers in the columns of one image; more of them take more memory than they save time
_backward = torch.ops.aten.convolution_backward


@dataclass(frozen=True, kw_only=True)
class Convolve:
    """A convolution: linear in its images and in its weight, which has four dimensions or is a stack."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    dims = 4

    def out(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the outputs."""
        stack, window = self._stack(weight), (self.stride, self.padding, self.dilation)
        if stack is None:
            return torch.conv2d(x, weight, None, *window, self.groups)
        aside = _aside(x, stack)
        return _back(torch.conv2d(aside, weight.flatten(0, 1), None, *window, self.groups * stack), stack)

    def to_x(self, slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to ``x``, given that of the outputs."""
        stack = self._stack(weight)
        if stack is None:
            return self._slope(slope, x, weight, self.groups, 0)
        output = self._slope(
            _aside(slope, stack), _aside(x, stack), weight.flatten(0, 1), self.groups * stack, 0
        )
        return _back(output, stack)

    def to_weight(self, slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to ``weight``, given that of the outputs."""
        stack = self._stack(weight)
        if stack is None:
            return self._slope(slope, x, weight, self.groups, 1)
        output: Tensor = self._slope(
            _aside(slope, stack), _aside(x, stack), weight.flatten(0, 1), self.groups * stack, 1
        ).unflatten(0, (stack, -1))
        return output

    def _stack(self, weight: Tensor) -> int | None:
        return len(weight) if weight.ndim > self.dims else None

    def _slope(self, slope: Tensor, x: Tensor, weight: Tensor, groups: int, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        output: Tensor = _backward(
            slope, x, weight, None, self.stride, self.padding, self.dilation, False, [0, 0], groups, mask
        )[which]
        return output


@dataclass(frozen=True, kw_only=True)
class Multiply:
    """A fully connected layer: linear in its inputs and in its weight, a matrix or a stack of them."""

    dims = 2

    def out(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the outputs."""
        return self._by(x, weight.mT)

    def to_x(self, slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to ``x``, given that of the outputs."""
        return self._by(slope, weight)

    def to_weight(self, slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to ``weight``, given that of the outputs."""
        if weight.ndim == self.dims:
            return slope.mT @ x
        slope, x = (t.unflatten(0, (len(weight), -1)) for t in (slope, x))
        return slope.mT @ x

    def _by(self, x: Tensor, matrix: Tensor) -> Tensor:
        if matrix.ndim == self.dims:
            return x @ matrix
        output: Tensor = (x.unflatten(0, (len(matrix), -1)) @ matrix).flatten(0, 1)
        return output


@dataclass(frozen=True, kw_only=True)
class Combine:
    """A convolution of the columns of `_Columns`: a weight, or a stack of them, times ``(N, K, P)``."""

    dims = 2

    def out(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the outputs."""
        return self._by(weight, x)

    def to_x(self, slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to ``x``, given that of the outputs."""
        return self._by(weight.mT, slope)

    def to_weight(self, slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient with respect to ``weight``, given that of the outputs."""
        each = torch.bmm(slope, x.mT)
        if weight.ndim == self.dims:
            return each.sum(0)
        return each if len(each) == len(weight) else each.unflatten(0, (len(weight), -1)).sum(1)

    def _by(self, matrix: Tensor, x: Tensor) -> Tensor:
        if matrix.ndim == self.dims:
            return torch.bmm(matrix.expand(len(x), -1, -1), x)
        count = len(x) // len(matrix)
        return torch.bmm(matrix if count == 1 else matrix.repeat_interleave(count, 0), x)


Kind = Convolve | Multiply | Combine


def _aside(x: Tensor, stack: int) -> Tensor:
    """(R N, C, H, W) to (N, R C, H, W): every restart is a group of channels with its own weight."""
    output: Tensor = x.unflatten(0, (stack, -1)).transpose(0, 1).flatten(1, 2)
    return output


def _back(x: Tensor, stack: int) -> Tensor:
    output: Tensor = x.unflatten(1, (stack, -1)).transpose(0, 1).flatten(0, 1)
    return output


def _shared(weight: Tensor, kind: Kind, fixed: bool) -> Tensor:
    """Return the weight to compute with: one for all of a stack whose weights are the same."""
    return weight[0] if fixed and weight.ndim > kind.dims else weight


class _Layer(torch.autograd.Function):
    """A layer without its bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: Kind, fixed: bool, first: bool) -> Tensor:
        ctx.kind, ctx.fixed, ctx.first = kind, fixed, first
        ctx.save_for_backward(x, weight)
        return kind.out(x, _shared(weight, kind, fixed))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # Grad mode is on in the client's own backward pass, which is differentiated and asks for nothing of
        # the images. It is off in the attack's, which has no use for parameters that do not depend on them.
        inner = torch.is_grad_enabled()
        wanted = (
            ctx.needs_input_grad[0] and not (inner and ctx.first),
            ctx.needs_input_grad[1] and (inner or not ctx.fixed),
        )
        return (*_Slopes.apply(slope, x, weight, ctx.kind, wanted, ctx.fixed), None, None, None)


class _Mapped(torch.autograd.Function):
    """The same for a layer that `torch.func.vmap` sees; without it, torch's bookkeeping is not worth it."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, kind: Kind, fixed: bool, first: bool) -> Tensor:
        return kind.out(x, _shared(weight, kind, fixed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.kind, ctx.fixed, ctx.first = inputs
        ctx.save_for_backward(x, weight)

    backward = _Layer.backward

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], x: Tensor, weight: Tensor, kind: Kind, fixed: bool, first: bool
    ) -> tuple[Tensor, int]:
        """Take a stack as one layer: its images as one batch, its weights, where they differ, as a stack."""
        size = info.batch_size
        x = x.expand(size, *x.shape) if dims[0] is None else x.movedim(dims[0], 0)
        weight = weight if dims[1] is None else weight.movedim(dims[1], 0)
        y = _Mapped.apply(x.flatten(0, 1), weight, kind, fixed, first)
        return y.unflatten(0, (size, -1)), 0


class _Slopes(torch.autograd.Function):
    """The backward pass of a layer, which can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any, slope: Tensor, x: Tensor, weight: Tensor, kind: Kind, wanted: tuple[bool, bool], fixed: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(slope, x, weight)
        ctx.kind, ctx.fixed = kind, fixed
        ctx.set_materialize_grads(False)
        return (
            kind.to_x(slope, x, _shared(weight, kind, fixed)) if wanted[0] else None,
            kind.to_weight(slope, x, weight) if wanted[1] else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_x: Tensor | None, to_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of both outputs with respect to ``slope``, the images and the weight.

        Both are linear in ``slope``, and the first is linear in the weight, the second in the images.
        """
        slope, x, weight = ctx.saved_tensors
        kind, of_slope, of_x, of_weight = ctx.kind, None, None, None
        if ctx.needs_input_grad[0]:
            parts = ((to_x, _shared(weight, kind, ctx.fixed)), (x, to_weight))
            for images, matrix in parts:
                if images is not None and matrix is not None:
                    part = kind.out(images, matrix)
                    of_slope = part if of_slope is None else of_slope.add_(part)
        if ctx.needs_input_grad[1] and to_weight is not None:
            of_x = kind.to_x(slope, x, to_weight)
        if ctx.needs_input_grad[2] and not ctx.fixed and to_x is not None:
            of_weight = kind.to_weight(slope, to_x, weight)
        return of_slope, of_x, of_weight, None, None, None


def convolution(
    input: Tensor,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    fixed: bool,
    first: bool,
    mapped: bool = False,
) -> Tensor:
    """Return a convolution without its bias, arguments as for `torch.nn.functional.conv2d`.

    Args:
        input: images, ``(N, C, H, W)``, or those of a stack in one batch.
        weight: a weight or a stack of them.
        stride: as in torch.
        padding: as in torch, but a name is left to torch, for it may be uneven.
        dilation: as in torch.
        groups: as in torch.
        fixed: the weight does not depend on the images: the attack needs no gradient of it, and all
            weights of a stack are the same.
        first: the input is the network's, for which the client needs no gradient.
        mapped: `torch.func.vmap` is at work.
    """
    if isinstance(padding, str) or input.ndim != 4:
        return torch.conv2d(input, weight, None, stride, padding, dilation, groups)
    kind = Convolve(stride=_pair(stride), padding=_pair(padding), dilation=_pair(dilation), groups=groups)
    if _as_columns(input, weight, kind, first):
        columns = _Columns.apply(input, list(weight.shape[-2:]), kind.stride, kind.padding)
        flat: Tensor = _Layer.apply(columns, weight.flatten(-3), Combine(), fixed, first)
        places = _places(input, kind.padding, list(weight.shape[-2:]), kind.stride)
        return flat.view(*flat.shape[:2], *places)
    output: Tensor = (_Mapped if mapped else _Layer).apply(input, weight, kind, fixed, first)
    return output


def _as_columns(x: Tensor, weight: Tensor, kind: Convolve, first: bool) -> bool:
    """Say whether matrices do for less than the library's convolutions, of which a stack has one group each.

    Measured on a CPU: they do, nearly twice as fast, for the first layer, whose columns are few and whose
    images need no gradient from the client, and for kernels of one pixel.
    """
    stacked = weight.ndim > kind.dims and x.device.type == "cpu"
    plain = kind.groups == 1 and kind.dilation == [1, 1] and (first or tuple(weight.shape[-2:]) == (1, 1))
    if not (stacked and plain):
        return False
    height, width = _places(x, kind.padding, list(weight.shape[-2:]), kind.stride)
    return weight[0, 0].numel() * height * width <= _FEW


def _places(x: Tensor, padding: list[int], kernel: list[int], stride: list[int]) -> list[int]:
    sides = zip(x.shape[2:], padding, kernel, stride, strict=True)
    return [(side + 2 * pad - k) // step + 1 for side, pad, k, step in sides]


class _Columns(torch.autograd.Function):
    """What the weights of a convolution multiply, ``(N, C, H, W)`` to ``(N, C kh kw, places)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
        ctx.sides, ctx.settings = list(x.shape[2:]), (kernel, stride, padding)
        # A copy of windows; torch's own takes twice as long.
        x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]]) if any(padding) else x
        windows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
        return windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return _Images.apply(slope, ctx.sides, *ctx.settings), None, None, None


class _Images(torch.autograd.Function):
    """The transpose of `_Columns`."""

    @staticmethod
    def forward(
        ctx: Any, slope: Tensor, sides: list[int], kernel: list[int], stride: list[int], padding: list[int]
    ) -> Tensor:
        ctx.settings = (kernel, stride, padding)
        output: Tensor = torch.ops.aten.col2im(slope, sides, kernel, [1, 1], padding, stride)
        return output

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        return _Columns.apply(x, *ctx.settings), None, None, None, None


def product(input: Tensor, weight: Tensor, *, fixed: bool, first: bool) -> Tensor:
    """Return a fully connected layer without its bias, ``(N, inputs)`` times ``(outputs, inputs)``.

    Arguments as for `convolution`.
    """
    output: Tensor = _Layer.apply(input, weight, Multiply(), fixed, first)
    return output


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value] * 2 if isinstance(value, int) else [int(v) for v in value] * (2 // len(value))


def fixed_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    stack: int = 1,
) -> Tensor | None:
    """Return a batch norm with fixed statistics; None where they are those of the batch.

    Arguments as for `torch.nn.functional.batch_norm`, but

    Args:
        input: ``(stack * N, C, ...)``.
        running_mean: as in torch.
        running_var: as in torch.
        weight: one for each channel, or a stack of them; None is 1.
        bias: likewise; None is 0.
        training: as in torch.
        momentum: has no say in fixed statistics.
        eps: as in torch.
        stack: how many restarts the batch holds, where weight and bias are stacks.
    """
    if training or running_mean is None or running_var is None:
        return None
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    if bias is not None:
        shift = shift + bias
    ones = [1] * (input.ndim - 2)
    # Not addcmul, whose backward pass multiplies everything by its factor of one and keeps the products.
    if scale.ndim == 1 and shift.ndim == 1:
        return (input * scale.view(-1, *ones)).add_(shift.view(-1, *ones))
    shape = (stack, 1, -1, *ones)
    scale, shift = (t.expand(stack, -1).view(shape) for t in (scale, shift))
    output: Tensor = (input.unflatten(0, (stack, -1)) * scale).add_(shift).flatten(0, 1)
    return output


class DoubleBackwardLayers(TorchFunctionMode):
    """Within this context convolutions and fixed batch norms are cheap to differentiate twice.

    Args:
        fixed: the parameters do not depend on the images, so that an attack has no use for their gradient.
        least: multiplications below which a convolution is left to torch, since the detour through Python
            costs more than it saves.
        compute_dtype: the type in which convolutions and fully connected layers multiply, forward and
            backward; None keeps the tensors' own. Everything else keeps theirs.
        mapped: the network is run by `torch.func.vmap`.

    Attributes:
        images: what the network is given, so that its first convolution is known; None where it is not.
    """

    def __init__(
        self, *, fixed: bool, least: int = 0, compute_dtype: torch.dtype | None = None, mapped: bool = False
    ) -> None:
        super().__init__()
        self.fixed, self.least, self.compute_dtype, self.mapped = fixed, least, compute_dtype, mapped
        self.images: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.conv2d:
            return self._conv2d(*args, **(kwargs or {}))
        if func is F.linear and self.compute_dtype is not None:
            return self._linear(*args, **(kwargs or {}))
        if func is F.batch_norm:
            output = fixed_batch_norm(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if output is None else output
        return func(*args, **(kwargs or {}))

    def _conv2d(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        x, kernel = cast(input, self.compute_dtype), cast(weight, self.compute_dtype)
        # Images times weights, whatever the stride: an upper bound is good enough.
        if weight.numel() * input[:, 0].numel() < self.least:
            if self.compute_dtype is None:
                return F.conv2d(input, weight, bias, *args, **kwargs)
            output = F.conv2d(x, kernel, None, *args, **kwargs)
        else:
            first = input is self.images
            output = convolution(
                x, kernel, *args, **kwargs, fixed=self.fixed, first=first, mapped=self.mapped
            )
        output = output.to(input.dtype)
        return output if bias is None else output + bias[:, None, None]

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(cast(input, self.compute_dtype), cast(weight, self.compute_dtype)).to(input.dtype)
        return output if bias is None else output + bias


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the tensor in that type; None keeps its own."""
    return tensor if dtype is None else tensor.to(dtype)
