"""Layers whose second derivative is cheap: what the step of an attack walks through instead of torch's own.

Gradient matching differentiates the backward pass of a network. Torch can do that for every layer, but not
equally well: the image's part of the second derivative of a convolution is computed there by a convolution
whose *kernel* is a whole feature map, and batch norm with fixed statistics, which is one multiplication and
one addition, is differentiated twice as if its statistics could change. The layers here give the same
numbers for less.

A weight may also be a stack of weights, one for each restart, beside images of all restarts in one batch,
``(restarts * N, C, H, W)``. Where the attack knows that all of a stack are the same, it walks through the
first of them alone, and only the weights' own slopes are a matter of each restart.
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
        stack, window = self._stack(weight), (self.stride, self.padding, self.dilation)
        if stack is None:
            return torch.conv2d(x, weight, None, *window, self.groups)
        aside = _aside(x, stack)
        return _back(torch.conv2d(aside, weight.flatten(0, 1), None, *window, self.groups * stack), stack)

    def to_x(self, slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        stack = self._stack(weight)
        if stack is None:
            return self._slope(slope, x, weight, self.groups, 0)
        found = self._slope(
            _aside(slope, stack), _aside(x, stack), weight.flatten(0, 1), self.groups * stack, 0
        )
        return _back(found, stack)

    def to_weight(self, slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        stack = self._stack(weight)
        if stack is None:
            return self._slope(slope, x, weight, self.groups, 1)
        found: Tensor = self._slope(
            _aside(slope, stack), _aside(x, stack), weight.flatten(0, 1), self.groups * stack, 1
        ).unflatten(0, (stack, -1))
        return found

    def _stack(self, weight: Tensor) -> int | None:
        return len(weight) if weight.ndim > self.dims else None

    def _slope(self, slope: Tensor, x: Tensor, weight: Tensor, groups: int, which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        found: Tensor = _backward(
            slope, x, weight, None, self.stride, self.padding, self.dilation, False, [0, 0], groups, mask
        )[which]
        return found


@dataclass(frozen=True, kw_only=True)
class Multiply:
    """A fully connected layer: linear in its inputs and in its weight, a matrix or a stack of them."""

    dims = 2

    def out(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._by(x, weight.mT)

    def to_x(self, slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._by(slope, weight)

    def to_weight(self, slope: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if weight.ndim == self.dims:
            return slope.mT @ x
        slope, x = (t.unflatten(0, (len(weight), -1)) for t in (slope, x))
        return slope.mT @ x

    def _by(self, x: Tensor, matrix: Tensor) -> Tensor:
        if matrix.ndim == self.dims:
            return x @ matrix
        found: Tensor = (x.unflatten(0, (len(matrix), -1)) @ matrix).flatten(0, 1)
        return found


Kind = Convolve | Multiply


def _aside(x: Tensor, stack: int) -> Tensor:
    """(R N, C, H, W) to (N, R C, H, W): every restart is a group of channels with its own weight."""
    found: Tensor = x.unflatten(0, (stack, -1)).transpose(0, 1).flatten(1, 2)
    return found


def _back(x: Tensor, stack: int) -> Tensor:
    found: Tensor = x.unflatten(1, (stack, -1)).transpose(0, 1).flatten(0, 1)
    return found


def _shared(weight: Tensor, kind: Kind, fixed: bool) -> Tensor:
    """Return what to walk through: weights that are given are the same for all of a stack."""
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
        """Return what the two slopes feel of ``slope``, the images and the weight.

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
        fixed: the weight does not depend on the images: nobody asks for the attack's slope of it, and all
            weights of a stack are the same.
        first: the input is the network's, of which the client asks for no slope.
        mapped: `torch.func.vmap` is at work.
    """
    if isinstance(padding, str) or input.ndim != 4:
        return torch.conv2d(input, weight, None, stride, padding, dilation, groups)
    kind = Convolve(stride=_pair(stride), padding=_pair(padding), dilation=_pair(dilation), groups=groups)
    found: Tensor = (_Mapped if mapped else _Layer).apply(input, weight, kind, fixed, first)
    return found


def product(input: Tensor, weight: Tensor, *, fixed: bool, first: bool) -> Tensor:
    """Return a fully connected layer without its bias, ``(N, inputs)`` times ``(outputs, inputs)``.

    Arguments as for `convolution`.
    """
    found: Tensor = _Layer.apply(input, weight, Multiply(), fixed, first)
    return found


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
    found: Tensor = (input.unflatten(0, (stack, -1)) * scale).add_(shift).flatten(0, 1)
    return found


class Cheap(TorchFunctionMode):
    """Within this context a network's convolutions and fixed batch norms are cheap to differentiate twice.

    Args:
        fixed: the parameters do not depend on the images, so that an attack has no use for their gradient.
        least: multiplications below which a convolution is left to torch, since more is lost by the detour
            through Python than is gained.
        low: the type in which convolutions and fully connected layers multiply, there and back; None keeps
            the tensors' own. Everything else keeps theirs.
        mapped: the network is run by `torch.func.vmap`.

    Attributes:
        images: what the network is given, so that its first convolution is known; None where nobody said.
    """

    def __init__(
        self, *, fixed: bool, least: int = 0, low: torch.dtype | None = None, mapped: bool = False
    ) -> None:
        super().__init__()
        self.fixed, self.least, self.low, self.mapped = fixed, least, low, mapped
        self.images: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.conv2d:
            return self._conv2d(*args, **(kwargs or {}))
        if func is F.linear and self.low is not None:
            return self._linear(*args, **(kwargs or {}))
        if func is F.batch_norm:
            found = fixed_batch_norm(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if found is None else found
        return func(*args, **(kwargs or {}))

    def _conv2d(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        x, kernel = lowered(input, self.low), lowered(weight, self.low)
        # Images times weights, whatever the stride: an upper bound is good enough.
        if weight.numel() * input[:, 0].numel() < self.least:
            if self.low is None:
                return F.conv2d(input, weight, bias, *args, **kwargs)
            found = F.conv2d(x, kernel, None, *args, **kwargs)
        else:
            first = input is self.images
            found = convolution(x, kernel, *args, **kwargs, fixed=self.fixed, first=first, mapped=self.mapped)
        found = found.to(input.dtype)
        return found if bias is None else found + bias[:, None, None]

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = F.linear(lowered(input, self.low), lowered(weight, self.low)).to(input.dtype)
        return found if bias is None else found + bias


def lowered(tensor: Tensor, low: torch.dtype | None) -> Tensor:
    """Return the tensor in that type; None keeps its own."""
    return tensor if low is None else tensor.to(low)
