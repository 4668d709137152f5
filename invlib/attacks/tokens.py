"""Words from an update: rows of the token table's gradient equal rows of the position table's."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.attacks.base import Settings, closed_form, with_labels
from invlib.attacks.chain import sent
from invlib.attacks.doubts import doubted
from invlib.attacks.spans import Spanned, span_check
from invlib.core.calls import trace
from invlib.core.network import blank, forward, in_mode, like
from invlib.core.observation import Observation
from invlib.core.reconstruction import Callback, Reconstruction
from invlib.errors import InvlibError, RecoveryError
from invlib.federated import FedSGD
from invlib.settings import Count

_EQUAL = 1e-3  # share of their length by which rows differ at most that are equal: Adam clients reach 4e-4
_FAR = 4.0  # times that, or standard deviations of chance, from which on rows are told apart
_SETS = 100_000  # rows that are added up in search of the places of tokens that occur several times


@dataclass(frozen=True, kw_only=True, eq=False)
class Sentence:
    """What the updates of a token table and a position table say of one sequence.

    Args:
        tokens: int64 ``(T,)``, the token at each place; -1 where none is known.
        used: int64 ``(K,)``, all tokens whose row moved, in ascending order.
        left: those of them for which no places were proven: each occurs several times.
        alike: how many places are guessed, by the token among these whose row is most like the place's.
        errors: float64 ``(T,)``: the share of a token's row that its places leave unexplained; NaN where no
            token is known, or it is guessed or found by elimination.
        length: how many places have left a trace: the others are padding, or not seen by the loss.
        certified: every place with a trace has a token, by rows that are equal and no others are.
    """

    tokens: Tensor
    used: Tensor
    left: Tensor
    alike: int
    errors: Tensor
    length: int
    certified: bool


def without_decay(update: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    r"""Take what weight decay did off a table's weight difference, and return it with decay's factor.

    A token that does not occur has no gradient, so that its row :math:`w` moves by decay alone, to
    :math:`(1 - c)\,w` after all local steps, with one :math:`c` for all rows: the median over all rows, most
    of which do not occur. Neither the learning rate nor the decay has to be known. It is exact for SGD with
    and without momentum and for AdamW, not for Adam, where decay is part of the gradient.

    Args:
        update: ``(V, D)``, a gradient or a weight difference.
        weight: ``(V, D)``, before the client's step.

    Returns:
        The update without decay, ``(V, D)``, and ``c``; 0 where most rows did not move.

    Source: this project's; AdamW is Loshchilov and Hutter 2019, arXiv 1711.05101.
    """
    lengths = weight.square().sum(1)
    still = float(update.norm(dim=1).median()) == 0
    known = lengths > 0
    if still or not known.any():
        return update, 0.0
    factor = float(-((update * weight).sum(1)[known] / lengths[known]).median())
    return update + factor * weight, factor


def order_of_tokens(
    token_update: Tensor,
    position_update: Tensor,
    *,
    token_noise: Tensor | float = 0.0,
    position_noise: Tensor | float = 0.0,
    padding: int | None = None,
) -> Sentence:
    r"""Read one sequence off the updates of its token table and its position table.

    At place :math:`t` the network receives :math:`E_{v_t} + P_t`, so that the signal :math:`\delta_t` that
    comes back is the same for both tables:

    .. math:: \frac{\partial L}{\partial P_t} = \delta_t, \qquad
        \frac{\partial L}{\partial E_v} = \sum_{t : v_t = v} \delta_t .

    A token that occurs once has the row of its place, whatever comes after the sum (layer norm, dropout,
    attention) and whatever function of the gradients, number by number, the client's optimiser is. A token
    that occurs several times has the sum of several rows, for gradients and SGD with and without momentum
    alone: which ones is one least squares over the places that are left, or else a search through small
    sets. The last token that is left has all the places that are.

    Args:
        token_update: ``(V, D)``, without weight decay (`without_decay`).
        position_update: ``(T, D)``, the row of each place.
        token_noise: the length of the rounding error of a row, for all or each ``(V,)``.
        position_noise: likewise ``(T,)``.
        padding: the token whose row gets no gradient (``padding_idx``), which takes the places left over.

    Raises:
        RecoveryError: no row moved, or the shapes do not fit.

    Source: Fowl et al. 2022 (Decepticons), arXiv 2201.12675, use positions for order; the equality of rows
    and its use for all optimisers are this project's.

    Taught in: chapter 6
    """
    if (
        token_update.ndim != 2
        or position_update.ndim != 2
        or token_update.shape[1] != position_update.shape[1]
    ):
        raise RecoveryError(
            f"the token table's update has shape {tuple(token_update.shape)} and the position table's "
            f"{tuple(position_update.shape)}; expected (V, D) and (T, D)"
        )
    rows, places = token_update.double(), position_update.double()
    noise = torch.as_tensor(token_noise).double().to(rows.device).expand(len(rows))
    noise_there = torch.as_tensor(position_noise).double().to(rows.device).expand(len(places))
    used, seen = _moved(rows, noise), _moved(places, noise_there)
    if not len(used) or not len(seen):
        raise RecoveryError("no row of the token table or of the position table moved; expected some")
    rows, places = rows[used], places[seen]
    limit = _EQUAL * rows.norm(dim=1) + noise[used] + float(noise_there.max())
    found = _Places(rows, places, limit)
    found.singles()
    found.sums()
    found.sets()
    if len(found.left()[0]) == 1:
        found.give(found.left()[0][0], found.left()[1])
    left = [k for k in range(len(rows)) if k not in found.of.values()]
    free = [t for t in range(len(places)) if t not in found.of]
    if len(left) == 1 and free and padding is None:
        found.of |= dict.fromkeys(free, left[0])
        left = []
    guessed = found.alike()
    tokens = torch.full((len(position_update),), -1, dtype=torch.int64, device=used.device)
    errors = torch.full((len(position_update),), math.nan, dtype=torch.float64)
    for t, k in found.of.items():
        tokens[seen[t]] = used[k]
        errors[seen[t]] = found.errors.get(k, math.nan)
    if padding is not None and not left:
        tokens[seen[free]] = padding
    return Sentence(
        tokens=tokens,
        used=used,
        left=used[left],
        alike=guessed,
        errors=errors,
        length=len(seen),
        certified=bool((tokens[seen] >= 0).all()) and not left and found.clear,
    )


def _moved(rows: Tensor, noise: Tensor) -> Tensor:
    """Return which rows moved: where most are zero those that are not, else those beyond rounding."""
    lengths = rows.norm(dim=1)
    still = float(lengths.median()) == 0
    moved: Tensor = lengths > (0 if still else _FAR * noise)
    return moved.nonzero().flatten()


class _Places:
    """Which places each token has: rows ``(K, D)`` of tokens, rows ``(T, D)`` of places.

    Attributes:
        of: place → token.
        errors: token → unexplained share of its row.
        clear: no other place or token would have done as well.
    """

    def __init__(self, rows: Tensor, places: Tensor, limit: Tensor) -> None:
        self.rows, self.places, self.limit = rows, places, limit
        self.of: dict[int, int] = {}
        self.errors: dict[int, float] = {}
        # A place whose own row is within the error of another's could be anyone's.
        self.clear = bool((places.norm(dim=1) > float(limit.min())).all())

    def left(self) -> tuple[list[int], list[int]]:
        """Return the tokens without a place, and the places without a token."""
        known = set(self.of.values())
        return (
            [k for k in range(len(self.rows)) if k not in known],
            [t for t in range(len(self.places)) if t not in self.of],
        )

    def give(self, token: int, places: list[int]) -> bool:
        """Give a token its places, if they explain its row."""
        miss = float((self.rows[token] - self.places[places].sum(0)).norm())
        if not places or miss > self.limit[token] or any(t in self.of for t in places):
            return False
        self.of |= dict.fromkeys(places, token)
        self.errors[token] = miss / float(self.rows[token].norm())
        return True

    def singles(self) -> None:
        """Give their place to tokens whose row is one place's."""
        far = _distances(self.rows, self.places)
        near = far <= self.limit[:, None]
        blurred = far <= _FAR * self.limit[:, None]
        for k, t in _nearest(far):
            if near[k, t] and self.give(k, [t]):
                self.clear &= int(blurred[k].sum()) == 1 and int(blurred[:, t].sum()) == 1

    def sums(self) -> None:
        """Give their places to tokens whose row is a sum: zeros and ones, by least squares."""
        tokens, places = self.left()
        if not tokens or len(places) > self.places.shape[1]:
            return
        shares = torch.linalg.lstsq(self.places[places].T, self.rows[tokens].T, driver="gelsd").solution
        for k, token in enumerate(tokens):
            self.give(token, [places[t] for t in (shares[:, k] > 0.5).nonzero().flatten().tolist()])

    def sets(self) -> None:
        """Give their places to tokens whose row is the sum of a small set, by trying all."""
        for size in itertools.count(2):
            tokens, places = self.left()
            work = math.comb(len(places), size) * size * len(tokens)
            # Each of these tokens has two places or more, and a last one has all that are left.
            if not 2 <= len(tokens) <= len(places) / 2 or not 0 < work <= _SETS:
                return
            chosen = torch.tensor(list(itertools.combinations(places, size)))
            sums = self.places[chosen].sum(1)
            far = _distances(self.rows[tokens], sums)
            for k, best in enumerate(far.argmin(1).tolist()):
                if self.give(tokens[k], chosen[best].tolist()):
                    self.clear &= int((far[k] <= _FAR * self.limit[tokens[k]]).sum()) == 1

    def alike(self) -> int:
        """Give places to the tokens whose rows are most like theirs, where it is no chance; return how many.

        Adam's row of a token that occurs several times is no sum, but mostly has the signs of one.
        """
        tokens, places = self.left()
        if len(tokens) < 2 or not places:
            return 0
        likeness = F.normalize(self.rows[tokens], dim=1) @ F.normalize(self.places[places], dim=1).T
        best = likeness.topk(2, 0)
        clear = (best.values[0] - best.values[1]) * math.sqrt(self.rows.shape[1]) > _FAR
        given = {places[t]: tokens[int(best.indices[0, t])] for t in clear.nonzero().flatten().tolist()}
        self.of |= given
        return len(given)


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return ``(K, T)`` distances of rows, without the cancellation of the product form."""
    far: Tensor = torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
    return far


def _nearest(far: Tensor) -> Iterator[tuple[int, int]]:
    """Yield pairs of a token and its nearest place, the nearest pair first."""
    least = far.min(1)
    for k in least.values.argsort().tolist():
        yield k, int(least.indices[k])


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """Where a network looks up tokens and places.

    Args:
        tokens: the name of the token table, ``(V, D)``.
        positions: the name of the table of learned positions; None where there is none whose gradient has
            the rows of the token table's.
        rows: int64 ``(T,)``: which of its rows each place has.
        tied: tokens that do not occur have a gradient too, as where the table is the last layer's weight.
        padding: the token whose row gets no gradient; None where each does.
    """

    tokens: str
    positions: str | None
    rows: Tensor
    tied: bool
    padding: int | None


def tables_of(
    model: nn.Module, length: int, *, tokens: str | None = None, positions: str | None = None
) -> Tables:
    """Find the token table and the position table of a network by running it on tokens of our own.

    The token table is what is looked up by the tokens themselves. The position table is the parameter whose
    gradient has, row by row, the rows of the token table's, whatever its name, shape and offset.

    Args:
        model: the network.
        length: T, tokens of a sequence.
        tokens: the name of the token table, if it is not to be found.
        positions: the name of the position table, likewise.

    Raises:
        RecoveryError: no parameter is looked up by the tokens, or there is none of a name.
    """
    params = dict(model.named_parameters())
    for name in (tokens, positions):
        if name is not None and name not in params:
            raise RecoveryError(
                f"{type(model).__name__} has no parameter {name!r}; expected one of {[*params]}"
            )
    table = tokens or _looked_up(model, length)
    size, width = params[table].shape[0], params[table].shape[-1]
    paddings = [
        m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is params[table]
    ]
    padding = next((p for p in paddings if p is not None), None)
    known = torch.tensor([v for v in range(size - 1, -1, -1) if v != padding])
    own = known[torch.arange(length) % len(known)][None].to(like(model).device)
    slopes = _slopes(model, own)
    rows = slopes[table].double()
    others = torch.ones(size, dtype=torch.bool)
    others[own[0].cpu()] = False
    others[[] if padding is None else [padding]] = False
    here = rows[own[0]]
    best, found = None, torch.arange(length)
    for name, slope in slopes.items():
        if name == table or slope.shape[-1:] != (width,) or slope.numel() < length * width:
            continue
        far = torch.cdist(
            here, slope.double().reshape(-1, width), compute_mode="donot_use_mm_for_euclid_dist"
        )
        near = far.min(1)
        equal = near.values <= _EQUAL * here.norm(dim=1)
        if name == positions or (
            positions is None and 2 * int(equal.sum()) > length and len(set(near.indices.tolist())) == length
        ):
            best, found = name, near.indices.cpu()
            break
    return Tables(
        tokens=table,
        positions=best,
        rows=found,
        tied=bool(rows[others.to(rows.device)].any()),
        padding=padding,
    )


def tokens_used(model: nn.Module, observation: Observation, tables: Tables | None = None) -> Tensor:
    """Return which tokens the client's sequences have, int64 ``(K,)``, ascending: the rows that moved.

    Args:
        model: the model that the client received.
        observation: what the server saw, of any number of sequences.
        tables: of the model; None finds them.

    Raises:
        RecoveryError: the token table's update was not sent, or every row of it moves.
    """
    tables = tables or tables_of(model, observation.image_shape[0])
    update, noise, _ = _table(model, observation, tables.tokens)
    used = _moved(update, noise)
    if tables.tied or 2 * len(used) > len(update):
        raise RecoveryError(
            f"{len(used)} of {len(update)} rows of {tables.tokens!r} moved, not those of the tokens alone; "
            "expected a table that is not tied to the last layer, and a client without weight decay in its "
            "gradient"
        )
    return used


def _table(model: nn.Module, observation: Observation, name: str) -> tuple[Tensor, Tensor, float]:
    """Return a table's update without decay ``(V, D)``, its rows' rounding errors, and decay's factor."""
    weight = dict(model.named_parameters())[name].detach()
    update = sent(observation, name).to(weight.device).double().reshape(-1, weight.shape[-1])
    old = weight.double().reshape(update.shape)
    if isinstance(observation.protocol, FedSGD):
        return update, update.new_zeros(len(update)), 0.0
    noise = torch.finfo(weight.dtype).eps * old.norm(dim=1)
    moved, factor = without_decay(update, old)
    return moved, noise, factor


def _looked_up(model: nn.Module, length: int) -> str:
    ran = trace(model, blank((length,)))
    sizes = [c.args[0].shape[0] for c in ran.calls if c.op == "embedding"]
    if sizes:
        own = (min(sizes) - 1 - torch.arange(length) % min(sizes))[None]
        ran = trace(model, own)
        for call in ran.calls:
            name = ran.name_of(call.args[0]) if call.op == "embedding" else None
            if name is not None and call.args[1].flatten().tolist() == own[0].tolist():
                return name
    raise RecoveryError(
        f"no parameter of {type(model).__name__} is looked up by the tokens; expected a torch.nn.Embedding "
        "of them, or its weight's name as tokens=..."
    )


def _slopes(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a random sum of the outputs by parameter name."""
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with torch.enable_grad(), in_mode(model, training=False):
        output = forward(model, params, None, tokens)
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        parts = torch.autograd.grad(
            (output * noise).sum(), list(params.values()), allow_unused=True, materialize_grads=True
        )
    return {
        name: part.to_dense() if part.layout is not torch.strided else part
        for name, part in zip(params, parts, strict=True)
    }


def token_embedding(
    *,
    tokens: str | None = None,
    positions: str | None = None,
    method: Literal["auto", "rows", "spans"] = "auto",
    most: int = 16_384,
) -> TokenEmbedding:
    """Return the closed-form attack on text: which tokens the client's sequences have, and in which order.

    One sequence of a network with learned positions is read off the updates of its two tables
    (`invlib.attacks.tokens.order_of_tokens`): whole where no token occurs twice, for clients of SGD,
    momentum, Adam and AdamW alike and with any number of local steps; for gradients and SGD with repeated
    tokens, too.
    A batch, and networks without learned positions or with a tied table, is found by the span check
    (`invlib.attacks.spans.span_check`), from a gradient or one step of SGD of fewer tokens than the network
    is wide.

    Args:
        tokens: the name of the token table; None finds it.
        positions: the name of the position table; None finds it.
        method: ``"rows"`` reads the tables, ``"spans"`` checks spans; ``"auto"`` takes what applies.
        most: how many sequences the span check tries at a place.

    Returns:
        An attack; its result has ``tokens``, -1 where none is known, ``text`` where the observation has a
        vocabulary, and ``residuals`` and ``certified`` for each sequence.

    Source: this project's, for tables; Petrov et al. 2024 (DAGER), arXiv 2405.15586, for spans.

    Taught in: chapter 6
    """
    return TokenEmbedding(tokens=tokens, positions=positions, method=method, most=most)


@dataclass(frozen=True, kw_only=True, repr=False)
class TokenEmbedding(Settings):
    """The attack that `token_embedding` returns."""

    tokens: str | None = None
    positions: str | None = None
    method: Literal["auto", "rows", "spans"] = "auto"
    most: Count = 16_384

    @torch.inference_mode(mode=False)
    def __call__(
        self,
        model: nn.Module,
        observation: Observation,
        *,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Reconstruction:
        """Attack an observation. Nothing is drawn and there are no steps: the three options do nothing.

        Raises:
            ObservationError: the observation does not fit the model, or is of images.
            RecoveryError: neither way applies to this model or update.
        """
        began = time.perf_counter()
        model = observation.validate(model, text=True)
        found = self._found(model, observation)
        labels, notes = None, list(observation.notes)
        if observation.num_images == 1:
            try:
                told = with_labels(model, observation)
                labels, notes = told.labels, list(told.notes)
            except InvlibError as error:
                found = replace(found, note=f"{found.note}; the label is unknown: {error}")
        missing = observation.num_images - len(found.tokens)
        known = [
            torch.cat([part.cpu(), part.new_full((missing, *part.shape[1:]), value).cpu()])
            for part, value in ((found.tokens, -1), (found.residuals, math.nan), (found.certified, False))
        ]
        result = closed_form(
            torch.empty(0),
            labels,
            float(found.residuals.max()),
            objective="share of the worst place that is left unexplained",
            note=found.note,
            began=began,
            tokens=known[0],
            residuals=known[1],
            certified=known[2],
            text=observation.in_words(known[0]),
        )
        return doubted(result, notes)

    def _found(self, model: nn.Module, observation: Observation) -> Spanned:
        """Return what the tables say, or else the spans."""
        length = observation.image_shape[0]
        tables = tables_of(model, length, tokens=self.tokens, positions=self.positions)
        size = dict(model.named_parameters())[tables.tokens].shape[0]
        used, read, reasons = torch.arange(size), None, list[str]()
        try:
            used = tokens_used(model, observation, tables)
            if tables.padding is not None:
                used = torch.cat([used, used.new_tensor([tables.padding])])
            if self.method != "spans":
                read = _read(model, observation, tables)
        except RecoveryError as error:
            reasons.append(str(error))
        if self.method != "rows" and not (read is not None and read.certified.all()):
            try:
                spanned = span_check(model, observation, used, size, most=self.most)
                if read is None or spanned.certified.all():
                    return spanned
            except RecoveryError as error:
                reasons.append(str(error))
        if read is None and len(used) == size:
            raise RecoveryError("; ".join(reasons))
        if read is None:  # a set of tokens, without an order
            row = torch.full((observation.num_images, length), -1)
            if observation.num_images == 1 and len(used) <= length:
                row[0, : len(used)] = used.cpu()
            read = Spanned(
                tokens=row,
                residuals=torch.full((len(row),), math.nan, dtype=torch.float64),
                certified=torch.zeros(len(row), dtype=torch.bool),
                note=f"{len(used)} tokens are used, {_words(observation, used)}; their order is not told",
            )
        return replace(read, note="; ".join([read.note, *reasons]))


def _read(model: nn.Module, observation: Observation, tables: Tables) -> Spanned:
    """Read one sequence off the two tables.

    Raises:
        RecoveryError: there are several, or no learned positions.
    """
    if observation.num_images > 1:
        raise RecoveryError(f"the tables' rows are sums over {observation.num_images} sequences")
    if tables.positions is None:
        raise RecoveryError(
            f"{type(model).__name__} has no learned positions whose gradient has the rows of "
            f"{tables.tokens!r}"
        )
    rows, noise, factor = _table(model, observation, tables.tokens)
    weight = dict(model.named_parameters())[tables.positions].detach().double()
    places = sent(observation, tables.positions).to(rows).reshape(-1, rows.shape[1])
    old = weight.reshape(places.shape).to(rows)
    there = (noise.max() > 0) * torch.finfo(like(model).dtype).eps * old.norm(dim=1)
    # Some clients let the positions decay as the tokens do, some not at all: what fits counts.
    sentences = list[Sentence]()
    for c in dict.fromkeys((factor, 0.0)):
        if not (sentences and sentences[0].certified):
            moved = (places + c * old)[tables.rows]
            sentences.append(
                order_of_tokens(
                    rows,
                    moved,
                    token_noise=noise,
                    position_noise=there[tables.rows],
                    padding=tables.padding,
                )
            )
    best = max(sentences, key=lambda s: (s.certified, int((s.errors >= 0).sum())))
    unknown = int((best.tokens < 0).sum()) - (len(best.tokens) - best.length)
    note = (
        f"{len(best.used)} tokens are used, at {best.length} of {len(best.tokens)} places that left a trace"
    )
    if factor:
        note += f"; weight decay of {factor:.1e} subtracted"
    if best.alike:
        note += f"; {best.alike} places are guessed, by the rows that are most alike"
    if unknown > 0:
        note += f"; {unknown} places are unknown"
    if len(best.left):
        note += f"; several times occur {_words(observation, best.left)}"
    errors = best.errors[~best.errors.isnan()]
    return Spanned(
        tokens=best.tokens[None],
        residuals=errors.max()[None] if len(errors) else torch.tensor([math.nan]).double(),
        certified=torch.tensor([best.certified]),
        note=note,
    )


def _words(observation: Observation, tokens: Tensor) -> str:
    """Return tokens as words, or else as numbers, the first twenty."""
    words = observation.in_words(tokens[:20, None].cpu()) or tuple(str(v) for v in tokens[:20].tolist())
    return ", ".join(repr(w) if observation.vocabulary else w for w in words) + (
        ", …" if len(tokens) > 20 else ""
    )
