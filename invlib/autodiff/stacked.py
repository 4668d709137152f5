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

from invlib.autodiff.layers import cast, convolution, fixed_batch_norm, product
from invlib.autodiff.odds import log_odds


class NotStackable(Exception):
    """A network does something of which it is not known that it treats every image by itself."""


class StackedForward(TorchFunctionMode):
    """Within this context a network whose parameters are stacks takes one batch of all restarts' images.

    The client's loss becomes the sum over restarts. Whatever is not known to treat every image by itself is
    refused by `NotStackable`: batch norm that learns from the batch, parameters that are used in other ways,
    and functions that are not listed here.

    Args:
        params: the stacks, by name.
        restarts: how many there are.
        images: ``(restarts * N, C, H, W)``.
        fixed: the parameters do not depend on the images, and all of a stack are the same.
        compute_dtype: the type in which convolutions and fully connected layers multiply; None keeps the
            tensors' own.

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
        compute_dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.stacks = {id(p) for p in params.values()}
        self.restarts, self.images = restarts, images
        self.fixed, self.compute_dtype = fixed, compute_dtype
        self.loss: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.loss is not None:
            raise NotStackable("something follows the loss")
        own = _OWN.get(func)
        if own is not None:
            return own(self, *args, **kwargs)
        if self._uses_a_stack([*args, *kwargs.values()]):
            raise NotStackable(f"{resolve_name(func) or func} of a parameter")
        asks = getattr(func, "__name__", "") == "__get__"  # for a shape, say
        if not (asks or func in _APART or _leaves_images(func, args, kwargs)):
            raise NotStackable(resolve_name(func) or str(func))
        return func(*args, **kwargs)

    def _uses_a_stack(self, values: Iterable[Any]) -> bool:
        return any(
            self._uses_a_stack(v) if isinstance(v, (list, tuple)) else id(v) in self.stacks for v in values
        )

    def conv2d(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Take the place of `torch.nn.functional.conv2d`."""
        if input.ndim != 4 or isinstance(kwargs.get("padding", args[1] if len(args) > 1 else 0), str):
            raise NotStackable("conv2d of one image, or padded by name")
        output = convolution(
            cast(input, self.compute_dtype),
            cast(weight, self.compute_dtype),
            *args,
            **kwargs,
            fixed=self.fixed,
            first=input is self.images,
        )
        return self._biased(output.to(input.dtype), bias, 2)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Take the place of `torch.nn.functional.linear`."""
        if input.ndim != 2:
            raise NotStackable("linear of more than two dimensions")
        output = product(
            cast(input, self.compute_dtype),
            cast(weight, self.compute_dtype),
            fixed=self.fixed,
            first=input is self.images,
        )
        return self._biased(output.to(input.dtype), bias, 0)

    def batch_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take the place of `torch.nn.functional.batch_norm`."""
        output = fixed_batch_norm(*args, **kwargs, stack=self.restarts)
        if output is None:
            raise NotStackable("batch norm that learns from the batch")
        return output

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
        """Take the place of `torch.nn.functional.cross_entropy`, and end the network."""
        plain = (weight, size_average, ignore_index, reduce, reduction) == (None, None, -100, None, "mean")
        if input.ndim != 2 or not plain:
            raise NotStackable("cross entropy of another form")
        total = F.cross_entropy(input, target, reduction="sum", label_smoothing=label_smoothing)
        self.loss = total / (len(input) // self.restarts)
        return self.loss

    def log_odds(self, logits: Tensor, labels: Tensor, *, alpha: float = 1.0) -> Tensor:
        """Take the place of `invlib.autodiff.odds.log_odds`, and end the network."""
        self.loss = self.restarts * log_odds(logits, labels, alpha=alpha)
        return self.loss

    def _biased(self, output: Tensor, bias: Tensor | None, more: int) -> Tensor:
        if bias is None:
            return output
        ones = [1] * more
        if id(bias) not in self.stacks:
            return output + bias.view(-1, *ones)
        output = output.unflatten(0, (self.restarts, -1)) + bias.view(self.restarts, 1, -1, *ones)
        return torch.flatten(output, 0, 1)


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
    F.conv2d: StackedForward.conv2d,
    F.linear: StackedForward.linear,
    F.batch_norm: StackedForward.batch_norm,
    F.cross_entropy: StackedForward.cross_entropy,
    log_odds: StackedForward.log_odds,
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
