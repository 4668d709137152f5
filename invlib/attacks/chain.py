"""A network as a chain of layers that can be undone one by one, whatever its code looks like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from invlib.core.calls import MOVES, PRODUCTS, SAME, Call, Trace, along, trace
from invlib.core.observation import Observation, words_of
from invlib.errors import RecoveryError

# Rounding may leave an output at an end of the activation's range, where the inverse is infinite.
_EDGE = 1e-7


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """A layer, and what happens to its output up to the next one.

    Args:
        name: the layer's, for messages.
        weight: as it is multiplied: ``(out, in)``, or of a convolution ``(out, C, h, w)``.
        weight_name: of the parameter that it is a view of.
        parameter: that parameter.
        bias: ``(out,)``, or None.
        bias_name: of the parameter; None where there is no bias, or it is no parameter.
        shape: of one input: ``(features,)``, or of a convolution ``(C, H, W)``.
        window: stride and dilation of a convolution, and its padding left, right, above and below; None for
            a fully connected layer.
        output: the shape of its output, one image.
        after: the operations on its output, in order.
    """

    name: str
    weight: Tensor
    weight_name: str
    parameter: Tensor
    bias: Tensor | None
    bias_name: str | None
    shape: tuple[int, ...]
    output: tuple[int, ...]
    window: tuple[list[int], list[int], list[int]] | None = None
    after: tuple[Call, ...] = ()

    def gradient(self, update: Tensor) -> Tensor:
        """Return the update of the weight in the form in which the weight is multiplied."""
        # The same view of the update's numbers as `weight` is of the parameter's.
        own = torch.empty_strided(
            self.parameter.shape, self.parameter.stride(), dtype=update.dtype, device=update.device
        ).copy_(update)
        return own.as_strided(self.weight.shape, self.weight.stride(), 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """The layers from the image on, up to the logits or to what is in the way.

    Args:
        first: the operations on the image before the first layer.
        stages: the layers.
        why: what ends the chain before the logits, in words; empty where nothing does.
    """

    first: tuple[Call, ...]
    stages: tuple[Stage, ...]
    why: str


def chain(model: nn.Module, observation: Observation) -> Chain:
    """Follow an image through a network as long as each value is used once, by what can be undone."""
    if why := not_linear(observation):
        return Chain(first=(), stages=(), why=why)
    probe = torch.rand(1, *observation.image_shape, generator=torch.Generator().manual_seed(0))
    ran = trace(model, probe, training=observation.training_mode)
    needed: set[Call | None] = {ran.last} - {None}
    used: dict[Call | None, list[Call]] = {}  # by which calls each value is used, of those that matter
    for call in reversed(ran.calls):
        if call in needed:
            needed.update(call.before)
            for source in dict.fromkeys(call.before):
                used.setdefault(source, []).insert(0, call)
    if None not in used:
        return Chain(first=(), stages=(), why="its output cannot be followed back to the image")
    return _follow(ran, used, used[None], ())


def _follow(
    ran: Trace, used: dict[Call | None, list[Call]], users: list[Call], first: tuple[Call, ...]
) -> Chain:
    stages: list[Stage] = []
    while users:
        where = repr(stages[-1].name) if stages else "the image"
        if len(users) > 1:
            # What else the image goes into does not change the equations of the first layer.
            ways = [] if stages else [_follow(ran, used, [user], first) for user in users]
            names = " and ".join(dict.fromkeys(_word(user) for user in users))
            stop = Chain(first=first, stages=tuple(stages), why=f"what {where} gives goes into {names}")
            return next((way for way in ways if way.stages), stop)
        [call] = users
        try:
            if call.op in PRODUCTS | {"convolution"}:
                before = stages[-1].after if stages else first
                pad = _zeros(before[-1]) if before and call.op == "convolution" else None
                stage = _stage(ran, call, where, pad)
                if pad is not None and stages:
                    stages[-1] = replace(stages[-1], after=before[:-1])
                elif pad is not None:
                    first = before[:-1]
                stages.append(stage)
            elif stages and (bias := _bias(ran, call, stages[-1])) is not None:
                stages[-1] = replace(stages[-1], bias=bias.flatten(), bias_name=ran.name_of(bias))
            else:
                _check(call, where)
                if stages:
                    stages[-1] = replace(stages[-1], after=(*stages[-1].after, call))
                else:
                    first = (*first, call)
        except RecoveryError as error:
            return Chain(first=first, stages=tuple(stages), why=str(error))
        users = used.get(call, [])
    return Chain(first=first, stages=tuple(stages), why="")


def _word(call: Call) -> str:
    """Return an operation's name without what ATen adds to it."""
    return call.op.strip("_").removesuffix("_with_indices").removeprefix("native_")


def _stage(ran: Trace, call: Call, where: str, pad: list[int] | None) -> Stage:
    """Return the layer that a call is; ``pad`` is how many zeros were put around its input before."""
    if len(call.before) > 1:
        raise RecoveryError(f"{where} is followed by a product ({_word(call)}) of two values of the image")
    bias: Any
    window = None
    if call.op == "convolution":
        _, weight, bias, stride, padding, dilation, transposed, _, groups = call.args
        if transposed or groups != 1 or weight.ndim > 4:
            kind = "transposed" if transposed else f"{groups}-group" if groups > 1 else "3-dimensional"
            raise RecoveryError(f"{where} is followed by a {kind} convolution")
        padding = [side for side in reversed(padding) for _ in range(2)]
        shape = list(call.given.shape[1:])
        for k, more in enumerate(pad or []):
            padding[k] += more
            shape[-1 - k // 2] -= more
        if weight.ndim == 3:  # a signal is an image one pixel high
            shape, padding = [shape[0], 1, shape[1]], [*padding, 0, 0]
            weight, stride, dilation = weight[:, :, None], [1, *stride], [1, *dilation]
        window = (list(stride), list(dilation), padding)
    else:
        bias = call.args[0] if call.op in ("addmm", "addmv", "baddbmm") else None
        left, right = call.args[-2:]
        weight = left if right is call.given else right.mT
        weight = weight[0] if weight.ndim == 3 and len(weight) == 1 else weight
        if weight.ndim != 2 or call.given.numel() != weight.shape[1] or call.kwargs:
            raise RecoveryError(f"{where} is followed by a layer that is applied at several places")
        shape = [int(weight.shape[1])]
    name = ran.name_of(weight)
    if name is None:
        raise RecoveryError(f"{where} is followed by a {_word(call)} whose weight is computed")
    bias_name = ran.name_of(bias)
    for own in filter(None, (name, bias_name)):
        if sum(any(ran.name_of(a) == own for a in c.constants()) for c in ran.calls) > 1:
            raise RecoveryError(f"{own!r} is used more than once")
    return Stage(
        name=name.removesuffix(".weight"),
        weight=weight.detach(),
        weight_name=name,
        parameter=ran.params[name],
        bias=None if bias is None else bias.detach().flatten(),
        bias_name=bias_name,
        shape=tuple(shape),
        output=tuple(call.output.shape[1:]),
        window=window,
    )


def _zeros(call: Call) -> list[int] | None:
    """Return how many zeros a call puts around an image, if that is what it does."""
    if call.op != "constant_pad_nd" or any(call.args[2:]) or min(call.args[1]) < 0:
        return None
    sides = list(call.args[1])
    return sides if len(sides) <= 2 * (call.given.ndim - 2) else None


def _bias(ran: Trace, call: Call, stage: Stage) -> Tensor | None:
    """Return what a call adds to a layer's outputs, if it is a parameter with one number for each of them."""
    if call.op != "add" or call.kwargs or stage.bias is not None or len(call.before) > 1:
        return None
    if not all(order(after) is None for after in stage.after):
        return None
    [added] = call.constants()
    if ran.name_of(added) is None or added.numel() != len(stage.weight):
        return None
    whole = call.output.numel() == added.numel() if stage.window is None else along(added, call, 1)
    return added.detach() if whole else None


def order(call: Call) -> Tensor | None:
    """Return where each output of a move comes from, counted from 1, 0 for none; None where nothing moves."""
    if call.op in SAME | {"view", "_unsafe_view", "squeeze", "unsqueeze", "_reshape_alias"}:
        return None
    numbers = torch.arange(1, call.given.numel() + 1, device=call.given.device).view(call.given.shape)
    return torch.as_tensor(call.on(numbers)).flatten()


def _check(call: Call, where: str) -> None:
    """Refuse an operation that cannot be undone."""
    if len(call.before) > 1:
        raise RecoveryError(f"what {where} gives meets another value of the image in {_word(call)!r}")
    if call.op in SAME:
        return
    if call.op in MOVES:
        moved = order(call)
        if moved is not None and len(moved.unique()) - int(0 in moved) < call.given.numel():
            raise RecoveryError(f"{where} is followed by {_word(call)}, which leaves numbers out")
        return
    kind = _kind(call)
    if kind == "relu" and where == "the image":
        raise RecoveryError("the image is followed by relu, which leaves numbers out")
    if kind not in _UNDONE or call.output.shape != call.given.shape or call.kwargs.keys() - {"alpha"}:
        raise RecoveryError(f"{where} is followed by {_word(call)}")
    if kind in ("mul", "div") and not bool(torch.as_tensor(_other(call)).all()):
        raise RecoveryError(f"{where} is followed by {_word(call)} by zero")


def _kind(call: Call) -> str:
    """Return the operation, by one name for all spellings of the same function."""
    rest = list(call.args[1:])
    if (call.op, rest) in [("clamp", [0]), ("clamp", [0, None]), ("clamp_min", [0]), ("threshold", [0, 0])]:
        return "relu"
    if call.op == "maximum" and not torch.as_tensor(_other(call)).any():
        return "relu"
    return "negative " + call.op if call.op in ("sub", "div") and call.args[0] is not call.given else call.op


def _other(call: Call) -> Any:
    """Return the number or tensor that a call adds or multiplies by."""
    [other] = call.constants()[:1]
    return other * call.kwargs.get("alpha", 1)


def _number(call: Call, k: int, otherwise: float) -> float:
    return float(call.args[k]) if len(call.args) > k else otherwise


def _elu(call: Call) -> tuple[float, float, float]:
    """Return alpha, scale and input scale."""
    alpha = _number(call, 1, 1.0)
    if call.op == "celu":
        return alpha, 1.0, 1 / alpha
    return alpha, _number(call, 2, 1.0), _number(call, 3, 1.0)


def _elu_slope(call: Call, a: Tensor) -> Tensor:
    alpha, scale, rate = _elu(call)
    return torch.where(a > 0, torch.full_like(a, scale), (a + alpha * scale) * rate)


def _elu_inverse(call: Call, a: Tensor) -> Tensor:
    alpha, scale, rate = _elu(call)
    return torch.where(a > 0, a / scale, (a / (alpha * scale)).clamp_min(_EDGE - 1).log1p() / rate)


def _leaky_slope(call: Call, a: Tensor) -> Tensor:
    return torch.where(a > 0, torch.ones_like(a), torch.full_like(a, _number(call, 1, 0.01)))


def _constant(call: Call, a: Tensor) -> Tensor:
    return torch.as_tensor(_other(call)).to(a)


_Rule = Callable[[Call, Tensor], Tensor]
# Of each activation the slope and what went into it, both from what came out.
_UNDONE: dict[str, tuple[_Rule, _Rule]] = {
    # An output that is 0 comes back as 0 but for rounding, and its unit must not count as active. An inactive
    # unit has slope 0, and so its equation no weight.
    "relu": (lambda _, a: (a > 1e-5 * a.abs().max()).to(a.dtype), lambda _, a: a),
    "leaky_relu": (_leaky_slope, lambda c, a: a / _leaky_slope(c, a)),
    "sigmoid": (lambda _, a: a * (1 - a), lambda _, a: a.logit(_EDGE)),
    "tanh": (lambda _, a: 1 - a.square(), lambda _, a: a.clamp(_EDGE - 1, 1 - _EDGE).atanh()),
    "softplus": (
        lambda c, a: 1 - torch.exp(-_number(c, 1, 1.0) * a),
        lambda c, a: (_number(c, 1, 1.0) * a.clamp_min(_EDGE)).expm1().log() / _number(c, 1, 1.0),
    ),
    "elu": (_elu_slope, _elu_inverse),
    "celu": (_elu_slope, _elu_inverse),
    "exp": (lambda _, a: a, lambda _, a: a.clamp_min(_EDGE).log()),
    "reciprocal": (lambda _, a: -a.square(), lambda _, a: 1 / a),
    "neg": (lambda _, a: -torch.ones_like(a), lambda _, a: -a),
    "add": (lambda _, a: torch.ones_like(a), lambda c, a: a - _constant(c, a)),
    "sub": (lambda _, a: torch.ones_like(a), lambda c, a: a + _constant(c, a)),
    "mul": (lambda c, a: _constant(c, a).expand_as(a), lambda c, a: a / _constant(c, a)),
    "div": (lambda c, a: (1 / _constant(c, a)).expand_as(a), lambda c, a: a * _constant(c, a)),
}


def undo(calls: Sequence[Call], a: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
    """Go back through operations from what came out of the last.

    Args:
        calls: the operations, in the order in which they ran.
        a: what came out, flat.

    Returns:
        What went in, flat; a function that takes the gradient at the output to that at the input; and the
        slopes, in the places of what went in.
    """
    slopes = torch.ones_like(a)
    back: list[Callable[[Tensor], Tensor]] = []
    for call in reversed(calls):
        if call.op in SAME | MOVES:
            moved = order(call)
            if moved is not None:
                seen, size = moved > 0, call.given.numel()
                places = moved[seen] - 1

                def gather(values: Tensor, seen: Tensor = seen, at: Tensor = places, n: int = size) -> Tensor:
                    return values.new_zeros(n).index_put((at,), values[seen], accumulate=True)

                count = gather(torch.ones_like(a))
                a, slopes = gather(a) / count, gather(slopes) / count
                back.append(gather)
            continue
        slope_of, inverse = _UNDONE[_kind(call)]
        shaped = a.view(call.output.shape)
        slope = slope_of(call, shaped).flatten()
        # Rounding may leave an output a little out of range, where the slope has the wrong sign.
        slope = slope if _kind(call) in ("neg", "mul", "div", "reciprocal") else slope.clamp_min(0)
        a, slopes = inverse(call, shaped).flatten(), slopes * slope
        back.append(lambda values, slope=slope: values * slope)  # type: ignore[misc]

    def gradient(values: Tensor) -> Tensor:
        for one in back:
            values = one(values)
        return values

    return a, gradient, slopes


def sent(observation: Observation, name: str, model: nn.Module | None = None) -> Tensor:
    """Return one tensor of an update, which has to be there as a whole, at least in single precision.

    With the model, what weight decay did is taken off.

    Raises:
        RecoveryError: it was not sent, or only in part.
    """
    if name not in observation.update:
        raise RecoveryError(f"the update lacks {name!r}; expected it, since the input follows from it")
    if name in observation.sent and not observation.sent[name].all():
        share = float(observation.sent[name].double().mean())
        raise RecoveryError(f"only {share:.1%} of the numbers of {name!r} were sent; expected all of them")
    return precise(observation.update[name] if model is None else observation.without_decay(name, model))


def not_linear(observation: Observation) -> str:
    """Say why the update keeps no ratios of gradients; empty where the client does not say so, as of Adam."""
    if getattr(observation.protocol, "linear", True):
        return ""
    client = words_of(observation.protocol)
    return f"the update of {client} is no sum of gradients, whose rows would tell the input"


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor in single precision at least: sums of half precision overflow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def outside(images: Tensor, *, fits: bool) -> str:
    """Say what share of recovered numbers is no image's; empty where all are in [0, 1] but for 1e-3.

    Args:
        images: before they are cut off.
        fits: they explain the update, so that only what they were decoded with can be wrong.
    """
    share = 100 * float(((images < -1e-3) | (images > 1 + 1e-3)).double().mean())
    if not share:
        return ""
    said = f"{share:.0f}" if share >= 1 else f"{share:.1g}"
    # A few numbers are rounding where equations are nearly missing.
    question = ": is the normalization the client's?" if fits and share >= 1 else ""
    return f"{said} % of the numbers were outside [0, 1] and cut off{question}"
