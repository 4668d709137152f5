"""How the client's gradient is computed while an attack differentiates it: three ways to the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from invlib._engines.flat import Flat, Unfit
from invlib._engines.layers import Cheap
from invlib.smoothing import rounded

SMALL = 3_000_000  # multiplications of a convolution: measured, see `Cheap`

LossOf = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How gradients are computed.

    Args:
        name: ``"transforms"``, `torch.func.grad`, which nests in every other transform; ``"tape"``, torch's
            own tape, with less overhead; ``"mapped"``, the tape with a leading dimension of restarts on
            every parameter, and inputs and labels of ``(N, restarts, ...)``; ``"flat"``, the same with less
            overhead, for networks that treat every image by itself (`invlib._engines.flat`).
        recompute: keep the weights between local steps alone, and compute each step anew on the way back.
        sharpness: of the network's kinks; None leaves them as they are.
        low: the type in which convolutions and fully connected layers multiply; None keeps the tensors' own.
            The transforms know none.
    """

    name: Literal["transforms", "tape", "mapped", "flat"] = "transforms"
    recompute: bool = False
    sharpness: float | None = None
    low: torch.dtype | None = None


_WAY: ContextVar[Way] = ContextVar("way", default=Way())  # noqa: B039 (it is frozen)


@contextmanager
def way(chosen: Way) -> Iterator[None]:
    """Within this context the gradients of a client are computed in that way."""
    token = _WAY.set(chosen)
    try:
        with rounded(chosen.sharpness):
            yield
    finally:
        _WAY.reset(token)


def gradient(
    loss_of: LossOf, params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Return the gradient of a loss by parameter name."""
    chosen = _WAY.get()
    if chosen.name == "transforms":
        found: dict[str, Tensor] = torch.func.grad(loss_of)(dict(params), inputs, labels)
        return found
    # The parameters of the first local step are given; those of a later one depend on the images.
    fixed = all(p.is_leaf for p in params.values())
    loss = (_flat if chosen.name == "flat" else _cheap)(loss_of, params, inputs, labels, fixed)
    parts = torch.autograd.grad(loss, list(params.values()), create_graph=True, materialize_grads=True)
    return dict(zip(params, parts, strict=True))


def _cheap(
    loss_of: LossOf, params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor, fixed: bool
) -> Tensor:
    chosen = _WAY.get()
    tape = chosen.name == "tape"
    cheap = Cheap(fixed=fixed, least=SMALL if tape else 0, low=chosen.low, mapped=not tape)

    def seen(params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        cheap.images = inputs
        return loss_of(params, inputs, labels)

    with cheap:
        if tape:
            return seen(params, inputs, labels)
        # Only the forward pass is mapped: what is differentiated is one graph of stacked tensors.
        mapped = torch.func.vmap(seen, in_dims=(0, 1, 1), randomness="different")
        return mapped(dict(params), inputs, labels).sum()


def _flat(
    loss_of: LossOf, params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor, fixed: bool
) -> Tensor:
    images, targets = (t.transpose(0, 1).flatten(0, 1) for t in (inputs, labels))
    flat = Flat(params=params, restarts=inputs.shape[1], images=images, fixed=fixed, low=_WAY.get().low)
    with flat:
        loss = loss_of(params, images, targets)
    if loss is not flat.loss:
        raise Unfit("a loss that is not cross entropy")
    return loss


def descend(
    loss_of: LossOf, params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor, lr: float
) -> dict[str, Tensor]:
    """Return the parameters after one step of gradient descent."""
    chosen = _WAY.get()
    if chosen.name == "transforms" or not chosen.recompute:
        slopes = gradient(loss_of, params, inputs, labels)
        return {name: p - lr * slopes[name] for name, p in params.items()}
    names = list(params)
    after = _Step.apply(chosen, loss_of, names, lr, inputs, labels, *params.values())
    return dict(zip(names, after, strict=True))


class _Step(torch.autograd.Function):
    """A local step of which only the weights are kept: its graph lives while it is walked back."""

    @staticmethod
    def forward(
        ctx: Any,
        chosen: Way,
        loss_of: LossOf,
        names: list[str],
        lr: float,
        inputs: Tensor,
        labels: Tensor,
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.chosen, ctx.fixed = chosen, (loss_of, names, lr)
        ctx.save_for_backward(inputs, labels, *values)
        with way(chosen):
            _, _, after = _walked(*ctx.fixed, inputs, labels, *values)
        return tuple(p.detach() for p in after)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        soft = ctx.needs_input_grad[5]
        with way(ctx.chosen):
            given, values, after = _walked(*ctx.fixed, *ctx.saved_tensors)
        wanted = [given[0], *([given[1]] if soft else []), *values]
        found = torch.autograd.grad(after, wanted, slopes, materialize_grads=True)
        return (None, None, None, None, found[0], found[1] if soft else None, *found[-len(values) :])


def _walked(
    loss_of: LossOf, names: list[str], lr: float, *saved: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Take the step on copies of what was saved: inputs and labels, parameters, and those after it."""
    inputs, labels, *values = (t.detach() for t in saved)
    with torch.enable_grad():
        for tensor in (inputs, labels, *values):
            tensor.requires_grad_(tensor.is_floating_point())
        # Times one: to `gradient`, parameters that are leaves do not depend on the images, and these do.
        before = [v * 1 for v in values]
        slopes = gradient(loss_of, dict(zip(names, before, strict=True)), inputs, labels)
        after = [p - lr * slopes[name] for name, p in zip(names, before, strict=True)]
    return [inputs, labels], values, after
