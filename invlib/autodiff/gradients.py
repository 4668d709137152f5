"""The client's gradient in a form that an attack can differentiate: four ways to the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from invlib.autodiff.layers import DoubleBackwardLayers
from invlib.autodiff.smoothing import rounded
from invlib.autodiff.stacked import NotStackable, StackedForward

SMALL = 3_000_000  # multiplications of a convolution: measured, see `DoubleBackwardLayers`

LossOf = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class GradientMode:
    """How a client computes its gradients.

    Args:
        kind: ``"transforms"``, `torch.func.grad`, which nests in every other transform; ``"tape"``, torch's
            own tape, with less overhead; ``"mapped"``, the tape with a leading dimension of restarts on
            every parameter, and inputs and labels of ``(N, restarts, ...)``; ``"stacked"``, the same with
            less overhead, for networks that treat every image by itself (`invlib.autodiff.stacked`).
        recompute: keep only the weights between local steps, and compute each step anew in the backward pass.
        sharpness: of the softplus that takes the place of each ReLU; None keeps ReLU.
        compute_dtype: the type in which convolutions and fully connected layers multiply; None keeps the
            tensors' own. Not supported by ``"transforms"``.
    """

    kind: Literal["transforms", "tape", "mapped", "stacked"] = "transforms"
    recompute: bool = False
    sharpness: float | None = None
    compute_dtype: torch.dtype | None = None


PLAIN = GradientMode()


def gradient(
    loss_of: LossOf,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    mode: GradientMode = PLAIN,
    *,
    fixed: bool | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of a loss by parameter name.

    Args:
        loss_of: maps parameters, inputs and labels to the loss.
        params: where the gradient is taken.
        inputs: normalised images.
        labels: of the images.
        mode: how it is computed.
        fixed: whether the parameters do not depend on the images, so that an attack needs no gradient with
            respect to them; None takes those that torch's tape knows no origin of.
    """
    with rounded(mode.sharpness):
        if mode.kind == "transforms":
            slopes: dict[str, Tensor] = torch.func.grad(loss_of)(dict(params), inputs, labels)
            return slopes
        fixed = all(p.is_leaf for p in params.values()) if fixed is None else fixed
        loss_in = _stacked_loss if mode.kind == "stacked" else _tape_loss
        loss = loss_in(loss_of, params, inputs, labels, mode, fixed)
        parts = torch.autograd.grad(loss, list(params.values()), create_graph=True, materialize_grads=True)
    return dict(zip(params, parts, strict=True))


def _tape_loss(
    loss_of: LossOf,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    mode: GradientMode,
    fixed: bool,
) -> Tensor:
    tape = mode.kind == "tape"
    layers = DoubleBackwardLayers(
        fixed=fixed, least=SMALL if tape else 0, compute_dtype=mode.compute_dtype, mapped=not tape
    )

    def loss(params: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        layers.images = inputs
        return loss_of(params, inputs, labels)

    with layers:
        if tape:
            return loss(params, inputs, labels)
        # Only the forward pass is mapped: what is differentiated is one graph of stacked tensors.
        mapped = torch.func.vmap(loss, in_dims=(0, 1, 1), randomness="different")
        return mapped(dict(params), inputs, labels).sum()


def _stacked_loss(
    loss_of: LossOf,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    mode: GradientMode,
    fixed: bool,
) -> Tensor:
    images, targets = (t.transpose(0, 1).flatten(0, 1) for t in (inputs, labels))
    stacked = StackedForward(
        params=params,
        restarts=inputs.shape[1],
        images=images,
        fixed=fixed,
        compute_dtype=mode.compute_dtype,
    )
    with stacked:
        loss = loss_of(params, images, targets)
    if loss is not stacked.loss:
        raise NotStackable("a loss that is not cross entropy")
    return loss


State = tuple[Mapping[str, Tensor], ...]
# One update of an optimiser: parameters, their gradient and what it keeps, to parameters and what it keeps.
Rule = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], State], tuple[dict[str, Tensor], State]]


def descend(
    loss_of: LossOf,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    rule: Rule,
    state: State = (),
    mode: GradientMode = PLAIN,
) -> tuple[dict[str, Tensor], State]:
    """Return the parameters after one step of an optimiser, and its state; arguments as for `gradient`.

    Args:
        loss_of: maps parameters, inputs and labels to the loss.
        params: before the step.
        inputs: normalised images.
        labels: of the images.
        rule: what the optimiser makes of a gradient.
        state: what it keeps from one step to the next: momentum, say, by parameter name.
        mode: how the gradient is computed.
    """
    if mode.kind == "transforms" or not mode.recompute:
        return rule(params, gradient(loss_of, params, inputs, labels, mode), state)
    names = list(params)
    values = [kept[name] for kept in (params, *state) for name in names]
    after = _RecomputedStep.apply(mode, loss_of, names, rule, inputs, labels, *values)
    now, *kept = _by_name(names, after)
    return now, tuple(kept)


def _by_name(names: list[str], values: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Part tensors into mappings, each of all names."""
    size = len(names)
    return [dict(zip(names, values[k : k + size], strict=True)) for k in range(0, len(values), size)]


class _RecomputedStep(torch.autograd.Function):
    """A local step of which only weights and state are kept; its graph is made anew in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        mode: GradientMode,
        loss_of: LossOf,
        names: list[str],
        rule: Rule,
        inputs: Tensor,
        labels: Tensor,
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.settings = (mode, loss_of, names, rule)
        ctx.save_for_backward(inputs, labels, *values)
        _, _, after = _step_on_copies(*ctx.settings, inputs, labels, *values)
        return tuple(p.detach() for p in after)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        soft = ctx.needs_input_grad[5]
        given, values, after = _step_on_copies(*ctx.settings, *ctx.saved_tensors)
        wanted = [given[0], *([given[1]] if soft else []), *values]
        parts = torch.autograd.grad(after, wanted, slopes, materialize_grads=True)
        return (None, None, None, None, parts[0], parts[1] if soft else None, *parts[-len(values) :])


def _step_on_copies(
    mode: GradientMode, loss_of: LossOf, names: list[str], rule: Rule, *saved: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Take the step on copies of what was saved: inputs and labels, what was kept, and that after it."""
    inputs, labels, *values = (t.detach() for t in saved)
    with torch.enable_grad():
        for tensor in (inputs, labels, *values):
            tensor.requires_grad_(tensor.is_floating_point())
        # These leaves stand for parameters that depend on the images.
        params, *state = _by_name(names, values)
        slopes = gradient(loss_of, params, inputs, labels, mode, fixed=False)
        now, state_after = rule(params, slopes, tuple(state))
        after = [kept[name] for kept in (now, *state_after) for name in names]
    return [inputs, labels], values, after
