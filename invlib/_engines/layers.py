"""Layers whose second derivative is cheap: what the step of an attack walks through instead of torch's own.

Gradient matching differentiates the backward pass of a network. Torch can do that for every layer, but not
equally well: the image's part of the second derivative of a convolution is computed there by a convolution
whose *kernel* is a whole feature map, and batch norm with fixed statistics, which is one multiplication and
one addition, is differentiated twice as if its statistics could change. The layers here give the same
numbers for less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_backward = torch.ops.aten.convolution_backward

Window = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


class _Convolution(torch.autograd.Function):
    """A convolution with a bias or without one."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, window: Window, fixed: bool, first: bool) -> Tensor:
        stride, padding, dilation, groups = window
        return torch.conv2d(x, weight, None, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.window, ctx.fixed, ctx.first = inputs
        ctx.save_for_backward(x, weight)

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
        return (*_Slopes.apply(slope, x, weight, ctx.window, wanted, ctx.fixed), None, None, None)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], x: Tensor, weight: Tensor, window: Window, fixed: bool, first: bool
    ) -> tuple[Tensor, int]:
        """Take a stack of convolutions: by images where they share a weight, by groups where they do not."""
        stride, padding, dilation, groups = window
        if dims[1] is None:
            x = x.movedim(dims[0], 0)
            y = _Convolution.apply(x.flatten(0, 1), weight, window, fixed, first)
            return y.unflatten(0, x.shape[:2]), 0
        size = info.batch_size
        weight = weight.movedim(dims[1], 0)
        x = x.expand(size, *x.shape) if dims[0] is None else x.movedim(dims[0], 0)
        # (R, N, C, H, W) to (N, R C, H, W): every restart is a group of channels with its own weight.
        x = x.transpose(0, 1).flatten(1, 2)
        y = _Convolution.apply(
            x, weight.flatten(0, 1), (stride, padding, dilation, groups * size), fixed, first
        )
        return y.unflatten(1, (size, -1)), 1


class _Slopes(torch.autograd.Function):
    """The backward pass of a convolution, which can be differentiated once."""

    @staticmethod
    def forward(
        ctx: Any,
        slope: Tensor,
        x: Tensor,
        weight: Tensor,
        window: Window,
        wanted: tuple[bool, bool],
        fixed: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(slope, x, weight)
        ctx.window, ctx.fixed = window, fixed
        ctx.set_materialize_grads(False)
        return _slopes(slope, x, weight, window, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_x: Tensor | None, to_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return what the two slopes feel of ``slope``, the images and the weight.

        Both are linear in ``slope``, and the first is linear in the weight, the second in the images.
        """
        slope, x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.window
        of_slope = of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            for images, kernel in ((to_x, weight), (x, to_weight)):
                if images is not None and kernel is not None:
                    part = torch.conv2d(images, kernel, None, stride, padding, dilation, groups)
                    of_slope = part if of_slope is None else of_slope.add_(part)
        if ctx.needs_input_grad[1] and to_weight is not None:
            of_x, _ = _slopes(slope, x, to_weight, ctx.window, (True, False))
        if ctx.needs_input_grad[2] and not ctx.fixed and to_x is not None:
            _, of_weight = _slopes(slope, to_x, weight, ctx.window, (False, True))
        return of_slope, of_x, of_weight, None, None, None


def _slopes(
    slope: Tensor, x: Tensor, weight: Tensor, window: Window, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = window
    found: tuple[Tensor | None, Tensor | None, None] = _backward(
        slope, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False]
    )
    return found[0], found[1]


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value] * 2 if isinstance(value, int) else [int(v) for v in value] * (2 // len(value))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    fixed: bool,
    first: bool,
) -> Tensor:
    if isinstance(padding, str) or input.ndim != 4:  # padding by name may be uneven; torch knows how
        return torch.conv2d(input, weight, None, stride, padding, dilation, groups)
    window = (_pair(stride), _pair(padding), _pair(dilation), groups)
    found: Tensor = _Convolution.apply(input, weight, window, fixed, first)
    return found


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale
    if bias is not None:
        shift = shift + bias
    shape = (-1, *[1] * (input.ndim - 2))
    return torch.addcmul(shift.view(shape), input, scale.view(shape))


class Cheap(TorchFunctionMode):
    """Within this context a network's convolutions and fixed batch norms are cheap to differentiate twice.

    Args:
        fixed: the parameters do not depend on the images, so that an attack has no use for their gradient.
        least: multiplications below which a convolution is left to torch, since more is lost by the detour
            through Python than is gained.
        low: the type in which convolutions and fully connected layers multiply, there and back; None keeps
            the tensors' own. Everything else keeps theirs.

    Attributes:
        images: what the network is given, so that its first convolution is known; None where nobody said.
    """

    def __init__(self, *, fixed: bool, least: int = 0, low: torch.dtype | None = None) -> None:
        super().__init__()
        self.fixed, self.least, self.low = fixed, least, low
        self.images: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.conv2d:
            return self._conv2d(*args, **(kwargs or {}))
        if func is F.linear and self.low is not None:
            return self._linear(*args, **(kwargs or {}))
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _conv2d(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        x, kernel = self._lowered(input), self._lowered(weight)
        # Images times weights, whatever the stride: an upper bound is good enough.
        if weight.numel() * input[:, 0].numel() < self.least:
            if self.low is None:
                return F.conv2d(input, weight, bias, *args, **kwargs)
            found = F.conv2d(x, kernel, None, *args, **kwargs)
        else:
            found = _conv2d(x, kernel, *args, **kwargs, fixed=self.fixed, first=input is self.images)
        found = found.to(input.dtype)
        return found if bias is None else found + bias[:, None, None]

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = F.linear(self._lowered(input), self._lowered(weight)).to(input.dtype)
        return found if bias is None else found + bias

    def _lowered(self, tensor: Tensor) -> Tensor:
        return tensor if self.low is None else tensor.to(self.low)
