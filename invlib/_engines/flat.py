"""A network that takes the images of all restarts as one batch, though each restart has its own weights.

`torch.func.vmap` can map any network over stacks of weights, and pays for it in every operation. The networks
that are attacked are nearly all made of a few layers that treat every image by itself; for those it is enough
to tell the layers that have weights what a stack of them means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from invlib._engines.layers import convolution, fixed_batch_norm, lowered, product


class Unfit(Exception):
    """A network does something of which it is not known that it treats every image by itself."""


class Flat(TorchFunctionMode):
    """Within this context a network whose parameters are stacks takes one batch of all restarts' images.

    The client's loss becomes the sum over restarts. Whatever is not known to treat every image by itself is
    refused by `Unfit`: batch norm that learns from the batch, parameters that are used in other ways, and
    functions that are not listed here.

    Args:
        params: the stacks, by name.
        restarts: how many there are.
        images: ``(restarts * N, C, H, W)``.
        fixed: the parameters do not depend on the images, and all of a stack are the same.
        low: the type in which convolutions and fully connected layers multiply; None keeps the tensors' own.

    Attributes:
        loss: what the network's last function gave; None before it.
    """

    def __init__(
        self,
        *,
        params: Mapping[str, Tensor],
        restarts: int,
        images: Tensor,
        fixed: bool,
        low: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.stacks = {id(p) for p in params.values()}
        self.restarts, self.images, self.fixed, self.low = restarts, images, fixed, low
        self.loss: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.loss is not None:
            raise Unfit("something follows the loss")
        own = _OWN.get(func)
        if own is not None:
            return own(self, *args, **kwargs)
        if self._uses_a_stack([*args, *kwargs.values()]):
            raise Unfit(f"{resolve_name(func) or func} of a parameter")
        asks = getattr(func, "__name__", "") == "__get__"  # for a shape, say
        if not (asks or func in _APART or _leaves_images(func, args, kwargs)):
            raise Unfit(resolve_name(func) or str(func))
        return func(*args, **kwargs)

    def _uses_a_stack(self, values: Iterable[Any]) -> bool:
        return any(
            self._uses_a_stack(v) if isinstance(v, (list, tuple)) else id(v) in self.stacks for v in values
        )

    def conv2d(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if input.ndim != 4 or isinstance(kwargs.get("padding", args[1] if len(args) > 1 else 0), str):
            raise Unfit("conv2d of one image, or padded by name")
        found = convolution(
            lowered(input, self.low),
            lowered(weight, self.low),
            *args,
            **kwargs,
            fixed=self.fixed,
            first=input is self.images,
        )
        return self._biased(found.to(input.dtype), bias, 2)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if input.ndim != 2:
            raise Unfit("linear of more than two dimensions")
        found = product(
            lowered(input, self.low),
            lowered(weight, self.low),
            fixed=self.fixed,
            first=input is self.images,
        )
        return self._biased(found.to(input.dtype), bias, 0)

    def batch_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        found = fixed_batch_norm(*args, **kwargs, stack=self.restarts)
        if found is None:
            raise Unfit("batch norm that learns from the batch")
        return found

    def cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        plain = (weight, size_average, ignore_index, reduce, reduction) == (None, None, -100, None, "mean")
        if input.ndim != 2 or not plain:
            raise Unfit("cross entropy of another form")
        total = F.cross_entropy(input, target, reduction="sum", label_smoothing=label_smoothing)
        self.loss = total / (len(input) // self.restarts)
        return self.loss

    def _biased(self, found: Tensor, bias: Tensor | None, more: int) -> Tensor:
        if bias is None:
            return found
        ones = [1] * more
        if id(bias) not in self.stacks:
            return found + bias.view(-1, *ones)
        found = found.unflatten(0, (self.restarts, -1)) + bias.view(self.restarts, 1, -1, *ones)
        return torch.flatten(found, 0, 1)


def _dims(args: Sequence[Any], kwargs: Mapping[str, Any], name: str, default: Any = None) -> tuple[int, ...]:
    """Return which dimensions a function is about, its first argument's after that itself."""
    dims = args[1] if len(args) > 1 else kwargs.get(name, default)
    return tuple(dims) if isinstance(dims, (list, tuple)) else () if dims is None else (dims,)


def _leaves_images(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Say whether a function that can mix images of a batch does not, as it is called here."""
    x = args[0] if args else None
    if func in (torch.cat, Tensor.chunk, torch.chunk):
        at = 1 if func is torch.cat else 2
        return bool((args[at] if len(args) > at else kwargs.get("dim", 0)) > 0)
    if not isinstance(x, Tensor):
        return False
    if func in (torch.flatten, Tensor.flatten):
        return all(dim > 0 for dim in _dims(args, kwargs, "start_dim", 0))
    if func in (Tensor.mean, torch.mean, Tensor.amax, torch.amax, Tensor.sum, torch.sum):
        dims = _dims(args, kwargs, "dim")
        return bool(dims) and all(dim % x.ndim for dim in dims)
    if func in (Tensor.view, Tensor.reshape, torch.reshape):
        # Row by row, so that as many rows as before are the same rows.
        return _dims(args, kwargs, "shape")[:1] == (len(x),)
    if func is F.dropout:
        return not kwargs.get("training", args[2] if len(args) > 2 else True)
    if func is F.pad:
        return len(args[1] if len(args) > 1 else kwargs["pad"]) <= 2 * (x.ndim - 1)
    if func is Tensor.__getitem__:
        return isinstance(args[1], tuple) and args[1][:1] == (slice(None),)
    return False


_OWN: dict[Any, Callable[..., Tensor]] = {
    F.conv2d: Flat.conv2d,
    F.linear: Flat.linear,
    F.batch_norm: Flat.batch_norm,
    F.cross_entropy: Flat.cross_entropy,
}

# What treats every number, or every image, by itself, whatever its other arguments are.
_APART: set[Any] = {
    *(F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.hardtanh_),
    *(F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.hardswish, F.hardsigmoid),
    *(F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.tanh, torch.tanh, Tensor.tanh),
    *(Tensor.add, Tensor.add_, torch.add, Tensor.mul, torch.mul, Tensor.sub, torch.sub),
    *(F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.pixel_unshuffle, F.interpolate),
    *(Tensor.dim, Tensor.size, Tensor.__len__, Tensor.contiguous),
}
