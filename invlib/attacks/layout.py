"""Where a vision transformer begins: its patch embedding and its positions, found by running it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.core.calls import MOVES, PRODUCTS, SAME, Call, Trace, trace
from invlib.core.network import forward, in_mode, like
from invlib.errors import RecoveryError

# Operations that may lie between the embedding and the positions: they choose, join, shift and scale.
_BETWEEN = MOVES | SAME | {"cat", "add", "sub", "mul", "div", "index", "index_select"}


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchStep:
    r"""A network's first step: :math:`z_t = W p_t + b + P_t` with patches :math:`p` and learned positions.

    Args:
        weight: the parameter's name that :math:`W` is of.
        positions: the parameter's name that :math:`P` is of.
        pixels: int64 ``(n, K)``, the input's numbers that the patches are made of.
        factor: float64 ``(n, K)``, by what they are multiplied first.
        offset: float64 ``(n, K)``, what is added to them then.
        weight_at: int64 ``(D, K)``, the parameter's numbers that :math:`W` is made of.
        positions_at: int64 ``(M,)``, the table's numbers that are added.
        added_to: int64 ``(M,)``, to which of the numbers of :math:`z`, ``(n, D)``, they are added.
        added_times: float64 ``(M,)``, by what those were multiplied before.
    """

    weight: str
    positions: str
    pixels: Tensor
    factor: Tensor
    offset: Tensor
    weight_at: Tensor
    positions_at: Tensor
    added_to: Tensor
    added_times: Tensor

    def of_weight(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as ``(D, K)``, in double precision."""
        return tensor.flatten().double()[self.weight_at]

    def of_positions(self, tensor: Tensor) -> Tensor:
        r"""Return a tensor of the table's shape as ``(n, D)``: of its gradient the error signals."""
        n, d = len(self.pixels), len(self.weight_at)
        rows = tensor.new_zeros(n * d, dtype=torch.float64)
        rows.index_add_(0, self.added_to, self.added_times * tensor.flatten().double()[self.positions_at])
        return rows.view(n, d)

    def patches(self, inputs: Tensor) -> Tensor:
        """Return the patches ``(n, K)`` of normalised inputs ``(1, C, H, W)``, in double precision."""
        return self.factor * inputs.flatten().double()[self.pixels] + self.offset


def patch_step(
    model: nn.Module,
    image_shape: tuple[int, ...],
    *,
    weight: str | None = None,
    positions: str | None = None,
) -> PatchStep:
    """Find a network's patch embedding and the learned positions that are added to it.

    The network is run with other numbers in the place of its parameters, and what it does is read off what
    enters its operations, however it is spelled: a convolution, a product, any order of the patches, with a
    class token or without. A gradient of the network's own then has to obey the identity.

    Args:
        model: the network; it is not changed.
        image_shape: ``(C, H, W)``.
        weight: name of the embedding's weight; None takes the first product with the image.
        positions: name of the table of positions; None takes the first that is added.

    Raises:
        RecoveryError: there is no such step; the message says what is in the way.
    """
    if like(model).itemsize < 4:  # numbers of entries are to be exact
        model = copy.deepcopy(model).float()
    own = {name: p.detach() for name, p in model.named_parameters()}
    for name in (weight, positions):
        if name is not None and name not in own:
            raise RecoveryError(
                f"{name!r} is no parameter of {type(model).__name__}; expected one of {[*own]}"
            )
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand(1, *image_shape, generator=generator).to(like(model))
    # Zero heads and tables tell nothing apart; in training they do not stay so.
    moved = {n: p + 0.05 * torch.randn(p.shape, generator=generator).to(p) for n, p in own.items()}
    ran = trace(model, probe, params=moved)
    start, weight = _product(model, ran, weight)
    path, added, positions = _sum(model, ran, start, positions)
    ramps = {n: torch.arange(own[n].numel(), device=own[n].device).to(own[n]) for n in (weight, positions)}
    again = trace(model, probe, params=moved | {n: ramp.view(own[n].shape) for n, ramp in ramps.items()})
    twins = [again.calls[ran.calls.index(call)] for call in (start, added)]

    before = _path_to(start)
    pixels, factor, offset = _affine(before, start, probe.shape, lambda x: _rows(start, x))
    places, times, _ = _affine(path, added, start.output.shape, lambda z: z)
    table = _constant(twins[1])
    assert table is not None
    table = table.expand(added.output.shape).long()
    used = times != 0
    numbers = torch.arange(start.output.numel(), device=probe.device).view(start.output.shape)
    rows = _tokens(start, numbers)
    order = rows.flatten().argsort()
    step = PatchStep(
        weight=weight,
        positions=positions,
        pixels=pixels.cpu(),
        factor=factor.cpu(),
        offset=offset.cpu(),
        weight_at=_weight(twins[0]).long().cpu(),
        positions_at=table[used].cpu(),
        added_to=order[places[used]].cpu(),
        added_times=times[used].cpu(),
    )
    _check(model, moved, probe, step)
    return step


def _no(model: nn.Module, why: str) -> RecoveryError:
    return RecoveryError(
        f"{type(model).__name__}: {why}; expected a linear patch embedding of the image to which a trained "
        "table of positions is added"
    )


def _product(model: nn.Module, ran: Trace, weight: str | None) -> tuple[Call, str]:
    """Return the embedding and the name of its weight."""
    for call in ran.calls:
        if call.op not in PRODUCTS | {"convolution"} or len(call.before) != 1:
            continue
        name = _owner(ran, _weight(call))
        if weight is None or name == weight:
            if name is None or not dict(model.named_parameters())[name].requires_grad:
                said = "computed" if name is None else f"{name!r}, which is frozen"
                raise _no(model, f"the weight of its first product ({call.op}) is {said}")
            return call, name
    raise _no(model, "no product of the image" + (f" with {weight!r}" if weight else ""))


def _sum(model: nn.Module, ran: Trace, start: Call, positions: str | None) -> tuple[list[Call], Call, str]:
    """Return the calls after the embedding, the sum with positions, and the name of their table."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    reached: dict[Call, list[Call]] = {start: []}
    blocked, width = [], _weight(start).shape[0]
    for call in ran.calls:
        path = reached.get(call.before[0]) if call.before and call.before[0] is not None else None
        if path is None:
            continue
        if len(call.before) > 1 or call.op not in _BETWEEN:
            blocked.append(call.op)
            continue
        reached[call] = [*path, call]
        other = _constant(call) if call.op == "add" else None
        if other is None or other.numel() <= width:
            continue
        name = _owner(ran, other)
        if name in trained and positions in (None, name):
            return path, call, name
        if name is None:
            blocked.insert(0, "add of fixed or computed positions (sinusoidal, say)")
        elif name not in trained:
            blocked.insert(0, f"add of {name!r}, which is frozen")
    end = f"before {blocked[0]!r}" if blocked else "at all"
    why = f"no trained positions are added to what {start.op!r} makes of the image, {end}"
    if any(call.op == "convolution" and call is not start for call in ran.calls):
        why = f"it begins with a convolutional stem: {why}"
    raise _no(model, why)


def _constant(call: Call) -> Tensor | None:
    return next((a for a in call.constants() if isinstance(a, Tensor)), None)


def _owner(ran: Trace, tensor: Tensor) -> str | None:
    """Return the parameter that a tensor's numbers are of, by some of them: no two parameters share many."""
    some = tensor.flatten()[:: max(1, tensor.numel() // 16)]
    for name, p in ran.params.items():
        if p.numel() >= tensor.numel() and all((p == number).any() for number in some):
            return name
    return None


def _path_to(call: Call) -> list[Call]:
    path: list[Call] = []
    while (before := call.before[0]) is not None:
        if len(before.before) != 1:
            raise RecoveryError(f"{before.op!r} joins two values of the image before the embedding")
        path.append(before)
        call = before
    return path[::-1]


def _weight(call: Call) -> Tensor:
    """Return the weight of a product as ``(D, K)``."""
    if call.op == "convolution":
        if call.args[6] or call.args[8] != 1 or call.given.ndim != 4:
            raise RecoveryError("the first product is a transposed, grouped or 1-d convolution")
        weight: Tensor = call.args[1].flatten(1)
        return weight
    other: Tensor = call.args[-1].mT if call.args[-2] is call.given else call.args[-2]
    return other.reshape(-1, *other.shape[-2:])[0]  # the same for all places where it is expanded


def _rows(call: Call, given: Tensor) -> Tensor:
    """Return the patches ``(n, K)`` that an embedding multiplies."""
    if call.op == "convolution":
        return F.unfold(given, call.args[1].shape[2:], call.args[5], call.args[4], call.args[3])[0].T
    given = given if call.args[-2] is call.given else given.mT
    return given.reshape(-1, given.shape[-1])


def _tokens(call: Call, output: Tensor) -> Tensor:
    """Return the output ``(n, D)`` of an embedding."""
    if call.op == "convolution":
        return output[0].flatten(1).T
    output = output if call.args[-2] is call.given else output.mT
    return output.reshape(-1, output.shape[-1])


def _affine(
    path: Sequence[Call], end: Call, shape: Sequence[int], then: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which number each number behind some calls is, times what and plus what."""

    def run(x: Tensor) -> Tensor:
        return then(reduce(lambda value, call: call.on(value), path, x.clone()))

    zeros = torch.zeros(tuple(shape), dtype=torch.float64, device=end.output.device)
    ramp = torch.arange(zeros.numel(), device=zeros.device).view(zeros.shape).to(zeros)
    offset = run(zeros)
    factor = run(zeros + 1) - offset
    index = torch.where(factor != 0, (run(ramp) - offset) / factor, 0).round().long()
    index = index.clamp(0, zeros.numel() - 1)
    noise = torch.rand(zeros.shape, generator=torch.Generator().manual_seed(0)).to(zeros)
    gap = run(noise) - (factor * noise.flatten()[index] + offset)
    if not gap.abs().max() < 1e-4 * (1 + factor.abs().max()):
        raise RecoveryError(
            f"{[call.op for call in path]} lie before {end.op!r}; expected operations that choose, shift and "
            "scale numbers, and no others"
        )
    return index, factor, offset


def _check(model: nn.Module, params: dict[str, Tensor], probe: Tensor, step: PatchStep) -> None:
    """Hold a gradient of the network's own against the identity."""
    leaves = {name: params[name].clone().requires_grad_() for name in (step.weight, step.positions)}
    with torch.enable_grad(), in_mode(model, training=False):
        logits = forward(model, params | leaves, None, probe)
        weight, table = torch.autograd.grad(logits.flatten()[0], [*leaves.values()])
    signals, seen = step.of_positions(table.cpu()), step.of_weight(weight.cpu())
    gap = (signals.T @ step.patches(probe.cpu()) - seen).norm() / seen.norm()
    if not gap < 1e-3:
        raise _no(
            model,
            f"{step.positions!r} or {step.weight!r} is used for more: a gradient of its own disobeys "
            f"dW = signals × patches by {float(gap):.1g}",
        )
