"""What a network does with an image, operation by operation, however its code is spelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from invlib.core.network import blank, forward, in_mode, placed, unwrapped
from invlib.errors import RecoveryError

# Operations that give the same numbers in the same order.
SAME = {"clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh"}
# Operations that only choose where numbers stand.
MOVES = {
    *("view", "_unsafe_view", "_reshape_alias", "reshape", "squeeze", "unsqueeze", "flatten", "permute"),
    *("transpose", "t", "flip", "roll", "select", "slice", "expand", "constant_pad_nd", "pixel_unshuffle"),
    *("pixel_shuffle", "channel_shuffle", "movedim"),
}
# Operations that take only the shape of what they are given.
_SHAPES = {
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"),
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One operation on what depends on the images.

    Args:
        op: its name in ATen, without the underscore of in-place forms, such as ``"convolution"``.
        func: what ran.
        args: what it was given.
        kwargs: what it was given by name.
        given: its first argument that depends on the images.
        before: the calls that gave its arguments, None for the images themselves.
        output: what it gave, of several the first.
    """

    op: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Tensor
    before: tuple[Call | None, ...]
    output: Tensor

    def on(self, given: Tensor) -> Any:
        """Run the operation on something else in the place of ``given``."""
        swapped = tree_map_only(Tensor, lambda t: given if t is self.given else t, (self.args, self.kwargs))
        return self.func(*swapped[0], **swapped[1])

    def constants(self) -> list[Any]:
        """Return its other arguments, numbers and tensors that do not depend on the images."""
        return [a for a in self.args if a is not self.given]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A run of a network.

    Args:
        output: the logits.
        calls: what ran on the images, in order.
        last: the call that gave the logits; None where none is known to.
        params: the parameters that it ran with, by name.
    """

    output: Tensor
    calls: list[Call]
    last: Call | None
    params: Mapping[str, Tensor]

    def name_of(self, tensor: object) -> str | None:
        """Return the name of the parameter of which a tensor is a view with all of its numbers, else None."""
        if not isinstance(tensor, Tensor):
            return None
        for name, p in self.params.items():
            if (
                tensor.numel() == p.numel()
                and tensor.data_ptr() == p.data_ptr()
                and 0 not in [s for s, side in zip(tensor.stride(), tensor.shape, strict=True) if side > 1]
            ):
                return name
        return None


class _Recorder(TorchDispatchMode):
    """Notes every operation on the images or on what came of them."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.images = images
        # Everything that was seen is kept, so that no identity and no address is given out twice.
        self.kept: list[Any] = [images]
        self.known: dict[int, int] = {id(images): -1}  # tensors, by the call that gave them; -1: the images
        self.memory: dict[int, int] = {_address(images): -1}  # memory, by the call that last wrote to it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sources = [(t, k) for t in tensors if (k := self.source(t)) is not None]
        mutable = [
            a
            for a, slot in zip(args, func._schema.arguments, strict=False)
            if isinstance(a, Tensor) and slot.alias_info is not None and slot.alias_info.is_write
        ]
        output = func(*args, **kwargs)
        results = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        if sources and results and func._schema.name.removeprefix("aten::") not in _SHAPES:
            self.kept += [args, kwargs, output]
            self.note(func, args, kwargs, sources, results)
            own = {_address(t) for t in tensors}
            for t in [*results, *mutable]:
                self.known[id(t)] = len(self.calls) - 1
                if any(t is m for m in mutable) or _address(t) not in own:
                    self.memory[_address(t)] = len(self.calls) - 1
        return output

    def source(self, tensor: Tensor) -> int | None:
        """Return the call that a tensor's numbers are from; None where they do not depend on the images."""
        call, wrote = self.known.get(id(tensor)), self.memory.get(_address(tensor))
        if wrote is None or (call is not None and wrote <= call):
            return call
        # Another tensor in the same memory was written to, or this one was made behind torch's back.
        given = self.images if wrote < 0 else self.calls[wrote].output
        whole = given.numel() == tensor.numel()
        before = (self.at(wrote),) if whole else (self.at(wrote), None if call is None else self.at(call))
        func = torch.ops.aten.view.default
        self.kept.append(tensor)
        self.calls.append(
            Call(
                op="view" if whole else "a write to a part of a tensor",
                func=func,
                args=(given, list(tensor.shape)),
                kwargs={},
                given=given,
                before=before,
                output=tensor,
            )
        )
        self.known[id(tensor)] = len(self.calls) - 1
        return len(self.calls) - 1

    def at(self, call: int) -> Call | None:
        return None if call < 0 else self.calls[call]

    def note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sources: list[tuple[Tensor, int]],
        results: list[Tensor],
    ) -> None:
        op = func._schema.name.removeprefix("aten::")
        self.calls.append(
            Call(
                op=op.removesuffix("_") if func._schema.is_mutable else op,
                func=func,
                args=args,
                kwargs=kwargs,
                given=sources[0][0],
                before=tuple(self.at(k) for _, k in sources),
                output=results[0],
            )
        )


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # sparse, say
        return id(tensor)


def trace(
    model: nn.Module, inputs: Tensor, *, params: Mapping[str, Tensor] | None = None, training: bool = False
) -> Trace:
    """Run a network once, without gradients, and note every operation on its images, in order.

    The operations are those that torch's dispatcher sees, so that ``nn.ReLU()``, ``F.relu``,
    ``x.clamp(min=0)`` and their in-place forms come to the same, also in compiled and scripted modules.

    Args:
        model: the network; it is not changed.
        inputs: normalised images ``(N, C, H, W)``, taken to the device and type of the parameters, or
            tokens int64 ``(N, T)``.
        params: parameters in place of the network's own.
        training: run in training mode, without writing batch-norm statistics.
    """
    model = unwrapped(model)
    inputs = placed(inputs, model).detach().clone()
    recorder = _Recorder(inputs)
    own = {name: p.detach() for name, p in model.named_parameters()}
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        in_mode(model, training=training),
        recorder,
    ):
        output = forward(model, dict(params or {}), None, inputs)
    last = recorder.source(output)
    return Trace(
        output=output,
        calls=recorder.calls,
        last=None if last is None else recorder.at(last),
        params={**own, **(params or {})},
    )


@dataclass(frozen=True, kw_only=True)
class LogitsLayer:
    """The layer that makes the logits; unpacks to its first three fields.

    Args:
        weight: the name of its weight, which is no parameter's where the weight is computed.
        bias: the name of its bias; None where it has none.
        how: what it is and what happens to its output on the way to the logits, in words.
        transposed: the weight is ``(inputs, classes)``, as in ``x @ weight``.
    """

    weight: str
    bias: str | None
    how: str
    transposed: bool = False

    def __iter__(self) -> Iterator[str | None]:
        return iter((self.weight, self.bias, self.how))


def logits_layer(model: nn.Module, image_shape: tuple[int, ...]) -> LogitsLayer:
    """Return which layer makes a network's logits: the weight's name, the bias's name or None, and how.

    It is the last product with a weight whose output becomes the logits by operations that treat all classes
    alike and keep their order: means and sums over places, reshaping, positive factors, constants,
    ``log_softmax``.

    Args:
        model: the network, in evaluation mode.
        image_shape: ``(C, H, W)``, or ``(T,)`` of token sequences.

    Raises:
        RecoveryError: there is no such layer; the message says what is in the way.
    """
    noise = torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(0))
    probe = noise if len(image_shape) > 1 else blank(image_shape)
    return _logits_layer(model, trace(model, probe))[0]


def logits_layer_inputs(
    model: nn.Module, inputs: Tensor, *, params: Mapping[str, Tensor] | None = None, training: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the logits and what enters the layer that makes them, ``(N, D)``, the mean over its places.

    A convolution's inputs are those that each place of its kernel multiplies, in the order of its weight.

    Args:
        model: the network.
        inputs: normalised images ``(N, C, H, W)``.
        params: parameters in place of the network's own.
        training: run in training mode, without writing batch-norm statistics.

    Raises:
        RecoveryError: as for `logits_layer`.
    """
    ran = trace(model, inputs, params=params, training=training)
    _, call = _logits_layer(model, ran)
    x = call.given
    if call.op == "convolution":
        weight, stride, padding, dilation = (call.args[k] for k in (1, 3, 4, 5))
        kernel = tuple(weight.shape[2:])
        if len(kernel) == 1:
            x, kernel = x[:, :, None], (1, *kernel)
            stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
        return ran.output, F.unfold(x, kernel, dilation, padding, stride).mean(-1)
    if call.op in ("mv", "addmv"):
        return ran.output, x[None]
    rows: Tensor = x if x is call.args[-2] else x.mT
    return ran.output, rows.reshape(len(inputs), -1, rows.shape[-1]).mean(1)


def _logits_layer(model: nn.Module, ran: Trace) -> tuple[LogitsLayer, Call]:
    """Walk back from the logits to the last product with a weight."""

    def no(why: str) -> RecoveryError:
        return RecoveryError(
            f"{type(model).__name__}: {why}; expected a fully connected layer or a convolution whose output "
            "becomes the logits by means over places, reshaping, positive factors or log_softmax"
        )

    if ran.output.ndim != 2:
        raise no(f"its output has shape {tuple(ran.output.shape)}, not (N, classes)")
    call, axis, bias = ran.last, 1, None
    after: list[str] = []
    while call is not None and call.op not in PRODUCTS | {"convolution"}:
        if len(call.before) > 1:
            raise no(f"the logits are made of two values by {call.op!r}")
        rest = call.constants()
        if call.op in MOVES:
            found = _axis_before(call, axis)
            if found is None:
                raise no(f"{call.op!r} changes the order of the classes or leaves some out")
            axis = found
        elif call.op in ("mean", "sum") and rest:
            dims = {dim % call.given.ndim for dim in rest[0]}
            kept = [k for k in range(call.given.ndim) if k not in dims]
            axis = axis if call.output.ndim == call.given.ndim else kept[axis]
            if axis in dims or 0 in dims:
                raise no(f"{call.op!r} runs over the classes or the images")
            after.append(f"{call.op} over places")
        elif "avg_pool" in call.op:
            if axis >= 2:
                raise no(f"{call.op!r} runs over the classes")
            after.append("mean over places")
        elif call.op == "_log_softmax" and call.args[1] % call.given.ndim == axis:
            after.append("log_softmax")
        elif call.op in ("mul", "div") and call.args[0] is call.given:
            factor = torch.as_tensor(rest[0])
            if factor.numel() != 1 or not float(factor) > 0:
                raise no("the logits are multiplied by what is not one positive number")
            after.append(f"{'times' if call.op == 'mul' else 'over'} {float(factor):g}")
        elif call.op in ("add", "sub"):
            added = next(iter(rest), None)
            name = ran.name_of(added)
            if call.op == "sub" and call.args[0] is not call.given:
                raise no("the logits are the negative of a layer's output")
            if name is not None and call.op == "add" and not call.kwargs and along(added, call, axis):
                bias = name
            else:
                after.append("plus a constant")
        elif call.op not in SAME:
            raise no(f"the logits come out of {call.op.strip('_')!r}")
        call = call.before[0]
    if call is None:
        raise no("its logits do not come from a layer in a way that can be followed")
    if len(call.before) > 1:
        raise no(f"the logits are the product ({call.op!r}) of two values that depend on the images")
    if call.op == "convolution":
        used, own, right = call.args[1], call.args[2], axis == 1 and not call.args[6]
        if call.args[8] != 1:
            raise no(f"the logits come out of a convolution with {call.args[8]} groups")
        kind = "×".join(str(side) for side in used.shape[2:]) + " convolution"
    else:
        left = call.args[-2] is not call.given
        used = call.args[-2] if left else call.args[-1].mT
        own = call.args[0] if call.op in ("addmm", "addmv", "baddbmm") else None
        rows = call.output.ndim - (2 if left and "v" not in call.op else 1)
        right, kind = axis == rows or call.op in ("mv", "addmv"), "fully connected layer"
    weight, own_bias = ran.name_of(used), ran.name_of(own)
    bias, transposed = own_bias or bias, False
    if not right:
        raise no(f"the outputs of its last {call.op!r} are not the classes")
    if weight is None:
        if bias is None:
            raise no(f"the weight of its last {call.op!r} is computed and no parameter, and there is no bias")
        weight = f"{bias.removesuffix('bias')}weight"
        after.append("with a computed weight")
    elif call.op != "convolution":
        transposed = used.squeeze().stride() != ran.params[weight].squeeze().stride()
    uses = sum(any(ran.name_of(a) == (bias or weight) for a in c.constants()) for c in ran.calls)
    if uses > 1:
        raise no(f"{bias or weight!r} is used {uses} times")
    how = f"{kind} {weight.removesuffix('weight').removesuffix('.') or type(model).__name__!r}"
    how = ", ".join([how, *reversed(after)])
    return LogitsLayer(weight=weight, bias=bias, how=how, transposed=transposed), call


def along(added: Any, call: Call, axis: int) -> bool:
    """Say whether what is added to the logits is one number for each class."""
    shape = [1] * (call.output.ndim - added.ndim) + list(added.shape)
    return shape == [side if k == axis else 1 for k, side in enumerate(call.output.shape)]


def _axis_before(call: Call, axis: int) -> int | None:
    """Return the dimension of the classes before numbers were moved, given the one after it."""
    order = call.on(torch.arange(call.given.numel(), device=call.given.device).view(call.given.shape))
    classes = order.shape[axis]
    shape = [-1 if k == axis else 1 for k in range(order.ndim)]
    wanted = torch.arange(classes, device=order.device).view(shape).expand(order.shape)
    below = 1
    found = []
    for k in reversed(range(call.given.ndim)):
        side = call.given.shape[k]
        if side == classes and torch.equal(order // below % side, wanted):
            found.append(k)
        below *= side
    return min(found, key=lambda k: (k == 0, abs(k - axis)), default=None)
