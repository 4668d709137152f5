"""The span check: a layer's gradient is made of its inputs, so that wrong tokens do not lie in its span."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from invlib.core.network import in_mode, like, num_classes
from invlib.core.observation import Observation
from invlib.errors import InvlibError, RecoveryError
from invlib.federated import FedAvg

_MARGIN = 30.0  # times what a simulated client's own inputs miss its span by, up to which a token passes
_EXACT = 1e3  # times the type's rounding: singular values up to which are no part of a sum
_MOST = 0.05  # the largest such limit
_CLEAR = 4.0  # times what a sequence misses its spans by, from which on others are told apart
_ROWS = 16_384  # inputs of a layer that are computed at a time


def basis(matrix: Tensor, most: int, eps: float) -> tuple[Tensor, float, bool]:
    """Return an orthonormal basis ``(d, r)`` of a sum of outer products, and how exact it is.

    Args:
        matrix: ``(d, n)``.
        most: how many products it is the sum of: further singular values are rounding, and so are others
            that are not four times as large.
        eps: of the type in which it was computed.

    Returns:
        The basis, the rounding as a share of the smallest singular value in it, and whether the matrix is
        such a sum: over several local steps, whose inputs move, it is one of many more.
    """
    columns, sizes, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    floor, largest = float(sizes[most]) if most < len(sizes) else 0.0, float(sizes[0])
    exact = floor <= _EXACT * eps * largest
    floor = max(floor, eps * largest) if exact else 16 * eps * largest
    kept = int((sizes > 4 * floor).sum())
    return columns[:, :kept], floor / float(sizes[kept - 1]) if kept else 1.0, exact


def outside_span(vectors: Tensor, span: Tensor) -> Tensor:
    r"""Return which share of each vector's length lies outside a span: :math:`\|(I - R R^\top) u\| / \|u\|`.

    Args:
        vectors: ``(..., d)``.
        span: an orthonormal basis ``(d, r)``.
    """
    vectors = vectors.double()
    rest = vectors - (vectors @ span) @ span.T
    lengths: Tensor = vectors.norm(dim=-1).clamp_min(1e-300)
    share: Tensor = rest.norm(dim=-1) / lengths
    return share


class _Done(Exception):
    """Raised to leave a network whose later layers nobody needs."""


class _Products(TorchDispatchMode):
    """Notes every product with a parameter: its name, the view of it that is multiplied, and the input."""

    def __init__(self, model: nn.Module, most: int | None = None) -> None:
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
        self.found: list[tuple[str, Tensor, Tensor]] = []
        self.most = most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::_addmm_activation"):
            given, weight = (args if func._schema.name == "aten::mm" else args[1:])[:2]
            name = self.names.get(weight.untyped_storage().data_ptr())
            if name is not None:
                self.found.append((name, weight, given))
                if self.most is not None and len(self.found) >= self.most:
                    raise _Done
        return func(*args, **(kwargs or {}))


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Run torch's transformer layers as they are written, not as one operation."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _inputs(model: nn.Module, tokens: Tensor, most: int | None = None) -> list[tuple[str, Tensor, Tensor]]:
    products = _Products(model, most)
    with torch.no_grad(), in_mode(model, training=False), _plain_attention(), suppress(_Done), products:
        model(tokens)
    return products.found


@dataclass(kw_only=True, eq=False)
class Layer:
    """One input of linear layers, and the span that their update confines it to.

    Args:
        names: the parameters that multiply it.
        first: which of the network's products has it, counted from 0.
        kind: whether the input at a place depends on the token there, on those up to there, or on all.
        places: at which places a simulated client's input lies in the span of its update.
        rounding: share outside of the span up to which an input passes for sure.
        limit: share outside of the span from which on none passes.
        span: orthonormal basis ``(d, r)`` of what the observed update says; None where it says nothing.
        rank: of the observed update.
        most: the rank that the update has for very many tokens, at most the layer's width: after a layer norm
            without a bias it is one less.
        exact: the client's update is that of one gradient.
        swapped: rows are by place first, ``(T, N)``, and not by sequence.
        passed: the largest share that passed.
        failed: the smallest that did not.
    """

    names: list[str]
    first: int
    kind: Literal["token", "prefix", "whole"]
    places: list[int]
    rounding: float
    limit: float
    span: Tensor | None
    rank: int
    most: int
    swapped: bool
    exact: bool
    passed: float = field(default=0.0)
    failed: float = field(default=math.inf)

    def misses(self, vectors: Tensor) -> Tensor:
        """Return which share of each vector ``(B, d)`` lies outside of the span."""
        assert self.span is not None
        return outside_span(vectors, self.span)

    def passes(self, miss: Tensor, count: int) -> Tensor:
        """Return which of the inputs at a place pass, of which at most so many are right.

        Where a gap tells them from the others, it is there; else at the limit.
        """
        level = miss.clamp_min(self.rounding).sort().values
        steps = level[1 : count + 1] / level[:-1][:count]
        bound = self.limit
        if len(steps) and steps.max() > _CLEAR:
            k = int(steps.argmax())
            bound = min(bound, float((level[k] * level[k + 1]).sqrt()))
        right = miss <= bound
        self.passed = max(self.passed, float(miss[right].max()) if right.any() else 0.0)
        self.failed = min(self.failed, float(miss[~right].min()) if not right.all() else math.inf)
        return right


def layers_of(model: nn.Module, observation: Observation, vocabulary: int) -> list[Layer]:
    """Return the inputs of a network's linear layers that depend on tokens, and what the update says of them.

    What an input depends on, and at which places the client's update shows it, is found by running the model
    and the client's step on tokens of our own.

    Args:
        model: the model that the client received.
        observation: what the server saw.
        vocabulary: how many tokens there are.
    """
    length = observation.image_shape[0]
    own = (vocabulary - 1 - torch.arange(length) % vocabulary)[None].to(like(model).device)
    first, last = own.clone(), own.clone()
    first[0, 0] = last[0, -1] = (int(own[0, 0]) + vocabulary // 2) % vocabulary
    runs = [_inputs(model, tokens) for tokens in (own, first, last)]
    width = max((given.shape[1] for _, _, given in runs[0]), default=0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(vocabulary, (2 * width // length + 2, length), generator=generator)
    several = torch.cat([own, noise.to(own.device)])
    many, full = _inputs(model, several), _simulated(model, observation, several)
    grouped: dict[tuple[int, torch.Size], list[int]] = {}
    for k, (_, _, given) in enumerate(runs[0]):
        grouped.setdefault((given.data_ptr(), given.shape), []).append(k)
    simulated = _simulated(model, observation, own)
    found = []
    for group in grouped.values():
        inputs = [run[group[0]][2] for run in runs]
        if len(inputs[0]) not in (1, length):
            continue
        moved = [((x - inputs[0]).norm(dim=1) > 1e-6 * inputs[0].norm(dim=1)) for x in inputs[1:]]
        pooled = len(inputs[0]) == 1 < length
        early = pooled or bool(moved[1][:-1].any())
        kind: Literal["token", "prefix", "whole"]
        kind = "whole" if early else "prefix" if bool(moved[0][1:].any()) else "token"
        weights = [(runs[0][k][0], runs[0][k][1]) for k in group]
        guess = _update_of(weights, simulated, model)
        seen = _update_of(weights, observation.update, model)
        if guess is None or seen is None or not guess.any():
            continue
        eps = torch.finfo(like(model).dtype).eps
        columns, _, exact = basis(guess, length, eps)
        miss = outside_span(inputs[0], columns)
        places = (miss < _MOST / _MARGIN).nonzero().flatten().tolist()
        if not places:
            continue
        span, floor, _ = basis(seen, observation.num_images * length, eps)
        every = _update_of(weights, full, model)
        most = 0 if every is None else basis(every, several.numel(), eps)[0].shape[1]
        rows = many[group[0]][2][:length]
        sure = min(max(_MARGIN * float(miss[places].max()), 256 * eps), _MOST)
        swapped = not pooled and not torch.allclose(rows, inputs[0], rtol=1e-3, atol=1e-5)
        found.append(
            Layer(
                names=[name for name, _ in weights],
                first=group[0],
                kind=kind,
                places=places,
                rounding=sure,
                limit=min(max(sure, _MARGIN * floor), _MOST),
                span=span if 0 < span.shape[1] < most else None,
                rank=span.shape[1],
                most=most,
                swapped=swapped,
                exact=exact,
            )
        )
    return found


def _update_of(
    weights: Sequence[tuple[str, Tensor]], update: Mapping[str, Tensor], model: nn.Module
) -> Tensor | None:
    """Return the update of several weights with one input, side by side ``(inputs, outputs)``."""
    params = dict(model.named_parameters())
    parts = []
    for name, weight in weights:
        if name in update:
            offset = weight.storage_offset() - params[name].storage_offset()
            part = update[name].to(params[name].device).contiguous()
            part = part.as_strided(weight.size(), weight.stride(), offset).double()
            parts.append(part / part.abs().max().clamp_min(1e-300))
    return torch.cat(parts, 1) if parts else None


def _simulated(model: nn.Module, observation: Observation, tokens: Tensor) -> dict[str, Tensor]:
    """Return the update of the client's step on tokens and a label of our own."""
    labels, loss, client = observation.labels, observation.loss or F.cross_entropy, observation.protocol
    if isinstance(client, FedAvg):  # of other numbers of sequences, too
        client = replace(client, batch_size=None, shuffle=False, orders=None)
    one = torch.ones(1, dtype=torch.int64) if labels is None else labels[:1]
    if labels is None and num_classes(model, observation.image_shape) < 2:
        one = one - 1
    one = one.to(tokens.device).expand(len(tokens), *one.shape[1:])
    try:
        with in_mode(model, training=observation.training_mode, seed=0):
            made = client(model, tokens, one, loss=loss)
    except (InvlibError, RuntimeError, ValueError, IndexError, TypeError) as error:
        raise RecoveryError(f"the client's step does not run on one sequence of our own: {error}") from error
    return {name: value.detach() for name, value in made.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Spanned:
    """What the span check found.

    Args:
        tokens: int64 ``(M, T)``; -1 after the end of a sequence, and where several tokens are possible.
        residuals: float64 ``(M,)``: the largest share outside of a span.
        certified: bool ``(M,)``.
        note: what there is to say.
    """

    tokens: Tensor
    residuals: Tensor
    certified: Tensor
    note: str


def span_check(
    model: nn.Module, observation: Observation, tokens: Tensor, vocabulary: int, *, most: int = 16_384
) -> Spanned:
    r"""Recover a batch of sequences from the spans of linear layers' gradients.

    A linear layer's gradient is :math:`\sum_t u_t \delta_t^\top` over all tokens of the batch, so that as
    long as they are fewer than the layer is wide its columns span the inputs :math:`u_t` and little else. In
    the first layers an input depends on one token and its place alone: each token is tried at each place. In
    a causal network the inputs of later layers depend on the tokens up to a place: sequences grow from the
    left, and only those stay whose inputs lie in the span. Other networks are tried with whole sequences.

    Args:
        model: the model that the client received.
        observation: what the server saw.
        tokens: which tokens are tried, int64 ``(K,)``.
        vocabulary: how many tokens the model knows.
        most: how many sequences are tried at a place.

    Raises:
        RecoveryError: no update of a layer confines its inputs; the message says why.

    Source: Petrov et al. 2024 (DAGER), arXiv 2405.15586; which layers and places can be used is found here by
    simulating the client.

    Taught in: chapter 6
    """
    length = observation.image_shape[0]
    total = observation.num_images * length
    layers = layers_of(model, observation, vocabulary)
    usable = [layer for layer in layers if layer.span is not None]
    # A tied table's update is no sum of products, and over several local steps none is.
    client = observation.protocol
    steps = len(client.batches(observation.num_images)) if isinstance(client, FedAvg) else 1
    single = steps == 1 and 2 * sum(layer.exact for layer in usable) > len(usable)
    usable = [layer for layer in usable if (layer.exact if single else len(layer.places) == length)]
    firsts = [layer for layer in usable if layer.kind == "token"]
    if all(layer.kind == "whole" for layer in usable):
        raise RecoveryError(_why_not(layers, observation))
    tried = tokens.to(like(model).device)
    count = observation.num_images
    allowed, miss = _test(model, tried[:, None].expand(-1, length), firsts, range(length), count)
    choices = [tried[allowed[:, t]] for t in range(length)]
    later = [layer for layer in usable if layer.kind == "prefix"]
    ends: list[tuple[Tensor, float]] = []
    prefixes = tried[:1].expand(1, length).clone()
    worst = torch.zeros(1, dtype=torch.float64, device=tried.device)
    for t in range(length):
        children = len(prefixes) * len(choices[t])
        if children > most:
            if not any(t in layer.places for layer in (*firsts, *later)):
                raise RecoveryError(_why_not(layers, observation))
            return _unordered(choices, observation, f"{children:,} sequences would have to be tried")
        if not children:
            ends += [(_cut(prefix, t), float(w)) for prefix, w in zip(prefixes, worst, strict=True) if t]
            prefixes = prefixes[:0]
            break
        grown = prefixes.repeat_interleave(len(choices[t]), 0)
        grown[:, t] = choices[t].repeat(len(prefixes))
        own = miss[allowed[:, t], t].repeat(len(prefixes))
        worse = torch.maximum(worst.repeat_interleave(len(choices[t])), own)
        right, far = _test(model, grown, [layer for layer in later if t in layer.places], [t], count)
        kept = right[:, 0]
        dead = ~kept.view(len(prefixes), -1).any(1)
        ends += [(_cut(p, t), float(w)) for p, w in zip(prefixes[dead], worst[dead], strict=True) if t]
        prefixes, worst = grown[kept], torch.maximum(worse, far[:, 0])[kept]
    whole = [layer for layer in usable if layer.kind == "whole"]
    if whole and len(prefixes):
        right, far = _test(model, prefixes, whole, range(length), count)
        kept = right.all(1)
        prefixes, worst = prefixes[kept], torch.maximum(worst, far.max(1).values)[kept]
    found = [*((prefix, float(w)) for prefix, w in zip(prefixes, worst, strict=True)), *ends]
    if not found:
        raise RecoveryError(
            f"no token lies in the span of the first layers' update at the first place, for {total} tokens "
            f"and inputs of {usable[0].most} dimensions; expected fewer tokens (rounding hides the last "
            "directions), and the model and the step of the client"
        )
    found.sort(key=lambda pair: pair[1])
    checked = bool(later or whole) or all(len(choice) == 1 for choice in choices)
    some = found[:count]
    checked &= single and all(_CLEAR * layer.passed < layer.failed for layer in usable)
    clear = [checked and _CLEAR * w < (found[count][1] if found[count:] else math.inf) for _, w in some]
    note = f"{len(found)} sequence(s) lie in the spans of {len(firsts)} layer(s) of one token"
    note += f" and {len(later) + len(whole)} of several; the batch has {count}"
    return Spanned(
        tokens=torch.stack([row for row, _ in some]),
        residuals=torch.tensor([w for _, w in some], dtype=torch.float64),
        certified=torch.tensor(clear),
        note=note,
    )


def _cut(prefix: Tensor, length: int) -> Tensor:
    row = prefix.clone()
    row[length:] = -1
    return row


def _test(
    model: nn.Module, sequences: Tensor, layers: Sequence[Layer], at: Sequence[int], count: int
) -> tuple[Tensor, Tensor]:
    """Return whether sequences ``(B, T)`` lie in layers' spans at some places, and by what they miss them.

    Both are ``(B, len(at))``; at most ``count`` inputs at a place are right.
    """
    shape = (max(len(layers), 1), len(sequences), len(at))
    far = torch.zeros(shape, dtype=torch.float64, device=sequences.device)
    most = max((layer.first for layer in layers), default=-1) + 1
    for part in torch.arange(len(sequences)).split(max(1, _ROWS // sequences.shape[1])) if layers else ():
        runs = _inputs(model, sequences[part], most)
        for k, layer in enumerate(layers):
            given = runs[layer.first][2]
            pooled = len(given) == len(part)
            sides = (-1, len(part)) if layer.swapped else (len(part), -1)
            vectors = given.view(*sides, given.shape[1])
            vectors = vectors.transpose(0, 1) if layer.swapped else vectors
            for j, t in enumerate(at):
                if t in layer.places or pooled:
                    far[k, part, j] = layer.misses(vectors[:, 0 if pooled else t])
    right = torch.ones(shape[1:], dtype=torch.bool, device=sequences.device)
    for k, layer in enumerate(layers):
        for j in range(len(at)):
            right[:, j] &= layer.passes(far[k, :, j], count)
    return right, far.max(0).values


def _unordered(choices: list[Tensor], observation: Observation, why: str) -> Spanned:
    row = torch.tensor([int(c[0]) if len(c) == 1 else -1 for c in choices])
    numbers = ", ".join(str(len(c)) for c in choices)
    return Spanned(
        tokens=row[None].expand(observation.num_images, -1).clone(),
        residuals=torch.full((observation.num_images,), math.nan, dtype=torch.float64),
        certified=torch.zeros(observation.num_images, dtype=torch.bool),
        note=f"tokens that are possible at each place: {numbers}; which go together is not told: {why}",
    )


def _why_not(layers: list[Layer], observation: Observation) -> str:
    total = observation.num_images * observation.image_shape[0]
    early = [layer for layer in layers if layer.kind != "whole"]
    places = max((len(layer.places) for layer in early), default=0)
    widest = [layer for layer in early if len(layer.places) == places]
    if full := [layer for layer in widest if layer.rank >= layer.most]:
        return (
            f"the update of {full[0].names[0]!r} has rank {full[0].rank}, all that it can have: the {total} "
            f"tokens of the batch confine nothing; expected fewer than {full[0].most}"
        )
    if widest:
        return (
            f"the update of {widest[0].names[0]!r} shows the inputs of {places} of "
            f"{observation.image_shape[0]} places, and no other shows more; expected a network of two blocks "
            "and more, or a loss of all places"
        )
    mode = " in training mode, with dropout," if observation.training_mode else ""
    return (
        f"no linear layer's update{mode} spans the inputs that one token gives it; expected a gradient, or a "
        "step of plain SGD, of a layer that follows the embedding"
    )
