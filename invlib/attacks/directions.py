"""A fully connected layer's gradient taken apart: sparse directions of its column space are the images'."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from invlib.errors import RecoveryError

_STARTS = 128  # of each round
_SWEEPS, _FINISHING = 60, 12
_EXTRA = 40  # singular values beyond those that are expected, by which the noise is seen
_LAST = 4  # directions that are missing, from which on they are looked for by what is left
_FEW, _DRAWN = 16, 4096  # images, up to which rows are drawn, and how many sets of them
_ROWS = 512  # at least, of the rows that a cone is made of
_KEPT = 8  # directions for each that there is
_ZERO, _LOOSEST_ZERO = 1e-7, 0.05  # of the largest number of a direction
_BYTES = 2**28  # of one product of weights and columns


@dataclass(frozen=True, kw_only=True)
class Span:
    r"""The column space of a layer's weight gradient :math:`G = U C`.

    Args:
        columns: :math:`U`, ``(m, r)``, orthonormal, float64.
        core: :math:`C`, ``(r, d)``.
        values: singular values of the gradient, descending, some of them noise.
        gap: by which factor they fall behind the last that counts.
        noise: ``(r,)``, how far each column may be off by rounding and noise, as a share of its length.
    """

    columns: Tensor
    core: Tensor
    values: Tensor
    gap: float
    noise: Tensor

    @property
    def rank(self) -> int:
        """How many directions there are, one for each image whose signal differs."""
        return self.columns.shape[1]

    def floor(self, q: Tensor) -> Tensor:
        """Return how small a number of ``U q`` is a zero, for each direction ``(S, r)``, as ``(S, 1)``."""
        off = (q * self.noise).norm(dim=1, keepdim=True) / math.sqrt(len(self.columns))
        largest = (q @ self.columns.T).abs().amax(1, keepdim=True)
        floor: Tensor = (3 * off / largest).clamp(_ZERO, _LOOSEST_ZERO)
        return floor

    def silent(self, q: Tensor) -> Tensor:
        """Return the share of zeros of each direction ``(S, r)``."""
        y = (q @ self.columns.T).abs()
        return (y <= self.floor(q) * y.amax(1, keepdim=True)).double().mean(1)


def span_of(weight_gradient: Tensor, *, expected: int = 32) -> Span:
    """Return the column space of a layer's weight gradient ``(m, d)`` and its rank, where its values fall.

    Args:
        weight_gradient: ``(m, d)``.
        expected: about how many images there are; more are found all the same.

    Raises:
        RecoveryError: it is zero or not finite, or its singular values do not fall anywhere, as those of more
            images than the layer has inputs or outputs.
    """
    matrix = weight_gradient.detach().double()
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    if not 0 < scale < math.inf:
        raise RecoveryError(
            f"the weight gradient's largest number is {scale}; expected a positive finite one"
        )
    matrix, most = matrix / scale, min(matrix.shape)
    generator = torch.Generator().manual_seed(0)
    width = min(most, 2 * expected + _EXTRA)
    while True:
        view = torch.randn(matrix.shape[1], width, dtype=torch.float64, generator=generator).to(matrix.device)
        basis = torch.linalg.qr(matrix @ view)[0]
        basis = torch.linalg.qr(matrix @ (matrix.T @ basis))[0]
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        rank = _rank(values, expected)
        if width == most or rank <= width - _EXTRA // 2:
            break
        width = min(most, 2 * width)
    if rank == (most := min(most, int(matrix.any(1).sum()))) > 1:
        raise RecoveryError(
            f"the weight gradient {tuple(matrix.shape)} has rank {most}, as high as can be; expected fewer "
            "images than the layer has inputs and outputs, and no noise"
        )
    after = float(values[rank]) if rank < len(values) else 0.0
    return Span(
        columns=basis @ left[:, :rank],
        core=values[:rank, None] * right[:rank] * scale,
        values=values * scale,
        gap=float(values[rank - 1]) / max(after, 1e-16 * float(values[0])),
        noise=after / values[:rank],
    )


def decay_of(weight_gradient: Tensor, weight: Tensor, *, expected: int = 32) -> float:
    r"""Return what multiple of a layer's weight is in its gradient, which weight decay puts there; 0 if none.

    :math:`G = D X + c W` where the client's steps are linear in gradient and weight, as those of SGD with
    decay and momentum. Then c is the eigenvalue that all but r of those of :math:`G W^{+}` share, of some
    rows, and exactly the share of W in the part of G that is beside the columns of :math:`G - cW`.

    Args:
        weight_gradient: ``(m, d)``.
        weight: ``(m, d)``, what the server sent.
        expected: about how many images there are.
    """
    g, w = weight_gradient.detach().double(), weight.detach().to(weight_gradient.device).double()
    generator = torch.Generator().manual_seed(0)
    count = min(2 * expected + _EXTRA, *g.shape)
    rows, columns = (torch.randperm(n, generator=generator).to(g.device) for n in g.shape)
    some = (rows[:count, None], columns[: 2 * count])
    shared = torch.linalg.lstsq(w[some].T, g[some].T).solution
    if not shared.isfinite().all():
        return 0.0
    try:
        decay = torch.linalg.eigvals(shared.cpu()).real.median().to(g.device)
    except torch.linalg.LinAlgError:  # of a weight whose rows are all parallel, say
        return 0.0
    if decay.abs() * w.norm() <= 1e-13 * g.norm():
        return 0.0
    view = torch.randn(g.shape[1], min(count, len(g) // 2), dtype=torch.float64, generator=generator).to(
        g.device
    )
    for _ in range(2):
        basis = torch.linalg.qr((g - decay * w) @ view)[0]
        beside, own = g - basis @ (basis.T @ g), w - basis @ (basis.T @ w)
        decay = (beside * own).sum() / own.square().sum()
    none = (beside - decay * own).norm() > 0.1 * beside.norm()
    return 0.0 if none or not decay.isfinite() else float(decay)


def _rank(values: Tensor, expected: int) -> int:
    """Return how many singular values lie above the noise: where they fall by two for the last time."""
    falls = values[:-1] / values[1:].clamp_min(1e-16 * values[0])
    if expected <= len(falls) and falls[expected - 1] > 1e4:
        return expected
    end = len(falls) - len(falls) // 10  # the last of all are smaller in any noise
    steps = (falls[:end] > 2).nonzero().flatten()
    if not len(steps):
        return len(values)
    rank = int(steps[-1]) + 1
    # Images far weaker than the others, down in the noise, would take the others with them.
    weak = (falls[: rank - 1] > 30) & (values[1:rank] < 1e3 * values[rank])
    return int(weak.nonzero()[0]) + 1 if weak.any() else rank


def directions(
    span: Span, signals: Tensor | None, generator: torch.Generator, *, until: float
) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Look for directions of a column space with many zeros, round by round.

    An image whose unit is silent has a zero in its column of D, and D's columns lie in the span. Each round
    minimises the absolute sum of :math:`U q` over directions q of length one from random starts (a fixed
    point of FastICA with a smoothed absolute value that sharpens). Where the signals before the activation
    are known, it also minimises randomly weighted sums over the cone of directions that have their signs: the
    columns of one class have nearly one sign in each row, and their differences, which are as sparse, do not.
    Of few images, null vectors of r - 1 rows drawn take their turn where both bring nothing more: an image
    that is silent in all of these rows is one. By themselves they find the same directions more slowly (of 16
    images at m = 200, 13 or 14 in 8 to 20 seconds, where the others found all 16 in less than one).
    All end in least squares on the rows that vanish.

    Args:
        span: of the weight gradient.
        signals: ``(S, m)``, what the network sends back to the layer before its activation for some images
            and labels; None where it is not known.
        generator: draws the starts.
        until: stop at this time of `time.perf_counter`, after one round at least.

    Yields:
        The sparsest directions that are independent, ``(k, r)`` coordinates of length one, k <= r, sparsest
        first, and the share of zeros of each ``(k,)``.

    Source: fixed point: Hyvärinen 1999 (FastICA); sparse columns of a gradient: Dimitrov et al. 2024
    (SPEAR), arXiv 2403.03945; the cone and the smoothed absolute value are this project's.
    """
    u = span.columns
    m, r = u.shape
    chance = min(0.9, 1.5 * (r - 1) / m + 0.02)
    found, basis, zeros, changed = u.new_zeros(0, r), u.new_zeros(0, r), u.new_zeros(0), False
    # What a round costs, about, in products of the columns, and what the last ones of its kind have brought.
    some = min(m, max(_ROWS, 8 * r))
    price = {"sphere": 8.0 * m, "cone": 1.0 * some * r}
    worth = {"sphere": math.inf} | ({} if signals is None else {"cone": 0.5 * r})
    if 1 < r <= _FEW:
        price["rows"], worth["rows"] = 4 * price["sphere"], 0.5 * r
    while True:
        kind = max(worth, key=lambda name: worth[name] / price[name])
        if kind == "cone" and signals is not None:
            own = signals[torch.randperm(len(signals), generator=generator)[: _STARTS // 2].to(u.device)]
            rows = torch.randperm(m, generator=generator)[:some].to(u.device)
            weights = torch.rand(len(own), some, dtype=u.dtype, generator=generator).to(u.device)
            typical = own.abs().median(1, keepdim=True).values.clamp_min(1e-300)
            signs = own.sign() * (own.abs() / typical).clamp_max(1)
            new = flattest(u[rows], (own @ u), weights.square() + 0.02, signs[:, rows])
        elif kind == "rows":
            new = null_vectors(u, generator)
        else:
            draws = torch.randn(_STARTS, r, dtype=u.dtype, generator=generator).to(u.device)
            if 0 < len(basis) < r:  # half of them begin where nothing was found yet
                own = torch.linalg.qr(basis.T)[0]
                draws[::2] -= (draws[::2] @ own) @ own.T
            new = sphere(u, draws)
            if 0 < r - len(basis) <= _LAST:
                # What has a part beside those that were found is a new one.
                last = draws[: 2 * _LAST : 2]
                even = torch.ones_like(last @ u.T)
                new = torch.cat([new, flattest(u, last, even, torch.zeros_like(even))])
        if changed:
            new = torch.cat([new, differences(u, basis)])
        new = distinct(new, 0.99)
        new = new[((new @ basis.T).abs() < 0.99).all(1)]
        if len(new):
            new = finished(span, new)
            new = new[span.silent(new) > chance]
            found = distinct(torch.cat([basis, new, found]), 0.9999)
            found = found[span.silent(found).argsort(descending=True, stable=True)[: _KEPT * r]]
        before, total = len(basis), float(zeros.sum())
        basis, zeros = sparsest(span, found)
        changed = float(zeros.sum()) > total + 1e-9
        worth[kind] = 0.5 * min(worth[kind], r) + max(len(basis) - before, 0)
        # What was not tried gains as much as this round cost, so that dry kinds take turns by their prices.
        worth = {k: w + (0 if k == kind else 0.2 * price[kind] / price["sphere"]) for k, w in worth.items()}
        yield basis, zeros
        if time.perf_counter() >= until:
            return


def sphere(u: Tensor, starts: Tensor) -> Tensor:
    """Return where the absolute sum of ``u q`` over q of length one is least, near each start ``(S, r)``."""
    z = u * math.sqrt(len(u))
    q = F.normalize(starts)
    for k in range(_SWEEPS):
        width = 0.3 * (0.02 / 0.3) ** (k / (_SWEEPS - 1))
        y = q @ z.T
        root = (y.square() + width**2).rsqrt()
        bend = (width**2 * root**3).mean(1, keepdim=True)
        q = (y * root) @ z / len(z) - bend * q
        q = F.normalize(q)
    return q


def null_vectors(u: Tensor, generator: torch.Generator) -> Tensor:
    """Return directions q, ``u q`` zero in r - 1 rows that are drawn, that are zero in the most others."""
    m, r = u.shape
    rows = torch.randint(m, (_DRAWN, r - 1), generator=generator).to(u.device)
    q: Tensor = torch.linalg.qr(u[rows].mT, mode="complete")[0][:, :, -1]
    y = (q @ u[:: max(1, m // _ROWS)].T).abs()
    zeros = (y < 1e-6 * y.amax(1, keepdim=True)).sum(1)
    return distinct(q[zeros.topk(_DRAWN // 4).indices], 0.9999)[: _STARTS // 2]


def flattest(u: Tensor, along: Tensor, weights: Tensor, signs: Tensor) -> Tensor:
    """Return directions q with ``q @ along`` one and the least weighted absolute sum of ``u q``.

    Args:
        u: ``(m, r)``.
        along: ``(S, r)``.
        weights: ``(S, m)``.
        signs: ``(S, m)`` in [-1, 1]: numbers of ``u q`` with another sign cost up to 30 times as much.
    """
    q = along / along.square().sum(1, keepdim=True)
    for k in range(_SWEEPS // 2):
        y = q @ u.T
        width = y.abs().amax(1, keepdim=True) * 10 ** (-1 - 6 * k / _SWEEPS)
        w = weights * (1 + 30 * signs.abs() * (y * signs < 0)) * (y.square() + width.square()).rsqrt()
        q = _solve(u, w, along)
        q = q / (q * along).sum(1, keepdim=True)
    return F.normalize(q)


def differences(u: Tensor, q: Tensor) -> Tensor:
    """Return what is left of each direction ``(k, r)`` without a multiple of another that it agrees with.

    Where one is the difference of two images' columns, its quotient by the column of one of them is the same
    number in all rows where the other is silent.
    """
    y = q @ u[:: max(1, len(u) // _ROWS)].T
    large = y.abs().amax(1, keepdim=True)
    y, q, count = y / large, q / large, max(4, min(len(u), _ROWS) // 16)
    out = [u.new_zeros(0, u.shape[1])]
    for k in range(len(q)):
        counts = (y.abs() > 1e-3) & (y[k].abs() > 1e-3)
        ratios = torch.where(counts, y[k] / y, torch.nan).sort(1).values
        spread = (ratios[:, count:] - ratios[:, :-count]) / ratios[:, count:].abs()
        least = spread.nan_to_num(torch.inf).min(1)
        near = (least.values < 1e-3).nonzero().flatten()
        near = near[near != k]
        out.append(q[k] - ratios[near, least.indices[near] + count // 2, None] * q[near])
    return F.normalize(torch.cat(out))


def finished(span: Span, q: Tensor) -> Tensor:
    """Return directions ``(S, r)`` with the rows that nearly vanish made to vanish, by reweighted squares."""
    # Zeros of a part of the rows, some times as many as there are unknowns, give the direction.
    u, step = span.columns, max(1, len(span.columns) // (16 * span.rank))
    for k in range(_FINISHING):
        rows = u[::step] if k < _FINISHING - 2 else u
        y = q @ rows.T
        width = y.abs().amax(1, keepdim=True) * (0.1 * span.floor(q)).clamp_min(1e-2 * 10 ** (-0.75 * k))
        q = F.normalize(_solve(rows, (y.square() + width.square()).reciprocal(), q))
    return q


def _solve(u: Tensor, weights: Tensor, right: Tensor) -> Tensor:
    """Return the solutions q of ``(u.T diag(w) u) q = right`` for weights ``(S, m)`` and right ``(S, r)``."""
    m, r = u.shape
    ridge = 1e-13 * torch.eye(r, dtype=u.dtype, device=u.device)
    out = []
    for w, b in zip(*(t.split(max(1, _BYTES // (8 * m * r))) for t in (weights, right)), strict=True):
        w = w / w.mean(1, keepdim=True)
        square = (w[:, :, None] * u).mT @ u
        square = square + square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * ridge
        out.append(torch.linalg.solve(square, b[:, :, None])[:, :, 0])
    return torch.cat(out)


def distinct(q: Tensor, alike: float) -> Tensor:
    """Return directions without those that are nearly parallel to an earlier one."""
    near, keep = ((q @ q.T).abs() > alike).cpu(), torch.ones(len(q), dtype=torch.bool)
    for k in range(len(q)):
        if keep[k]:
            keep[k + 1 :] &= ~near[k, k + 1 :]
    return q[keep.to(q.device)]


def sparsest(span: Span, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return independent directions, the sparsest first, and their shares of zeros."""
    zeros, own = span.silent(q), q.cpu()  # one by one, which a GPU would wait for
    basis, chosen = own.new_zeros(span.rank, 0), []
    for k in zeros.argsort(descending=True, stable=True).tolist():
        left = own[k] - basis @ (basis.T @ own[k])
        left = left - basis @ (basis.T @ left)
        if (length := left.norm()) > 1e-6:
            chosen.append(k)
            basis = torch.cat([basis, (left / length)[:, None]], 1)
        if len(chosen) == span.rank:
            break
    return q[chosen], zeros[chosen]


def separated(span: Span, q: Tensor, bias_gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Return the layer's inputs and the columns of D that a full set of directions gives.

    With A the directions, :math:`D = U A\,\mathrm{diag}(s)` and :math:`X = \mathrm{diag}(1/s) A^{-1} C`; the
    bias gradient, :math:`D 1`, gives the scales s, without which they are one.

    Args:
        span: of the weight gradient, of rank r.
        q: ``(r, r)``, one direction a row.
        bias_gradient: ``(m,)``, or None.

    Returns:
        Inputs ``(r, d)`` and signals ``(m, r)``.
    """
    # Of directions that are not independent it is nonsense, and raises nothing; what proves inputs sees it.
    inputs = torch.linalg.solve_ex(q.T, span.core).result
    signals = span.columns @ q.T
    if bias_gradient is None:
        return inputs, signals
    scales = torch.linalg.solve_ex(q.T, span.columns.T @ bias_gradient.double()).result
    scales = torch.where(scales.abs() > 1e-12 * scales.abs().max(), scales, torch.ones_like(scales))
    return inputs / scales[:, None], signals * scales


@dataclass(frozen=True, kw_only=True)
class BatchInputs:
    """What the gradients of one fully connected layer say of all its inputs.

    Args:
        inputs: ``(M, d)`` float64, in no order; empty where directions are missing, without which none of the
            others can be told.
        signals: ``(m, M)``, the gradient at the layer's output for each input, as a share of the batch's.
        rank: how many inputs there are, where none is the multiple of another.
        gap: by which factor the singular values fall behind the last that counts.
        silent: ``(M,)`` share of units that are silent for each input.
        found: how many of the directions were found.
        decay: what multiple of the weight was in its gradient, and was taken out.
    """

    inputs: Tensor
    signals: Tensor
    rank: int
    gap: float
    silent: Tensor
    found: int
    decay: float = 0.0


def batch_inputs(
    weight_gradient: Tensor,
    bias_gradient: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    seconds: float = 60.0,
    generator: torch.Generator | None = None,
) -> BatchInputs:
    r"""Recover all inputs of a fully connected layer whose activation has exact zeros, from its gradients.

    For a batch, :math:`\partial L/\partial W = D X` with the inputs as rows of X and one column of D for
    each, which is zero where the unit is silent. A product of few columns has low rank, its column space is
    D's, and in it the columns of D are the directions with the most zeros; with all of them
    :math:`X = D^{+} G`. Nothing of the network is needed, and nothing is proved: `invlib.exact_batch`
    asks the network.

    Args:
        weight_gradient: ``(m, d)``, up to a factor.
        bias_gradient: ``(m,)``, with the same factor; None leaves the inputs' scales and signs open.
        weight: ``(m, d)``, the layer's own, whose multiple in the gradient, by weight decay, is taken out.
        bias: ``(m,)``, the layer's own, which is decayed alike; None where it is not.
        seconds: how long to look for sparser directions at most; it ends before where four rounds bring none.
        generator: draws the starts; None makes one with seed 0.

    Raises:
        RecoveryError: shapes do not fit, or the gradient's singular values do not show a rank.

    Source: the rank and sparsity of D: Dimitrov et al. 2024 (SPEAR), arXiv 2403.03945; see `directions`.
    """
    if weight_gradient.ndim != 2 or (
        bias_gradient is not None and bias_gradient.shape != weight_gradient.shape[:1]
    ):
        shape = None if bias_gradient is None else tuple(bias_gradient.shape)
        raise RecoveryError(
            f"the weight gradient has shape {tuple(weight_gradient.shape)} and the bias gradient {shape}; "
            "expected (out, in) and (out,)"
        )
    decay = 0.0
    if weight is not None:
        if weight.shape != weight_gradient.shape:
            raise RecoveryError(
                f"the weight has shape {tuple(weight.shape)}; expected its gradient's, "
                f"{tuple(weight_gradient.shape)}"
            )
        decay = decay_of(weight_gradient, weight)
        weight_gradient = weight_gradient.double() - decay * weight.detach().double()
        if bias_gradient is not None and bias is not None:
            bias_gradient = bias_gradient.double() - decay * bias.detach().double()
    span = span_of(weight_gradient)
    until, generator = time.perf_counter() + seconds, generator or torch.Generator().manual_seed(0)
    best, dry = -1.0, 0
    for q, zeros in directions(span, None, generator, until=until):
        total = float(zeros.sum())
        dry = 0 if total > best + 1e-9 else dry + 1
        best = max(total, best)
        if len(q) == span.rank and dry >= 4:
            break
    whole = len(q) == span.rank
    inputs, signals = separated(span, q, bias_gradient) if whole else (span.core[:0], span.columns @ q.T)
    return BatchInputs(
        inputs=inputs,
        signals=signals,
        rank=span.rank,
        gap=span.gap,
        silent=zeros,
        found=len(q),
        decay=decay,
    )
