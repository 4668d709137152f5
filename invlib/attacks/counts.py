"""How many images of each class a batch has: whole counts near a gradient of the logits, and how probable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from invlib.attacks.losses import balanced, batch_scale, class_slopes
from invlib.core.observation import Loss, Observation, words_of
from invlib.federated import FedAvg

_ROUNDING = 0.1  # share of the sum over the classes that is left to rounding, with room for noise
_UNEXPLAINED = 0.3  # share of a gradient that counts leave, from which on other factors than 1 are tried
_DRAWS = 200  # batches of predictions that are drawn for each class
_NUMBERS = 4_000_000  # in one array of draws
_EVEN = 6.0  # images of each class that the client is thought to have had before: classes are drawn evenly


@dataclass(frozen=True, kw_only=True)
class Alike:
    """How alike predictions for the client's images and for others are thought to be.

    Args:
        heat: how much surer the network is of the client's.
        unsure: standard deviation of the logarithm of that.
        offset: of random offsets of classes, as a share of the logits' spread.
        width: of the kernel, as a multiple of Silverman's.
    """

    heat: float
    unsure: float
    offset: float
    width: float


FRESH = Alike(heat=1.0, unsure=0.1, offset=0.1, width=1.5)
TRAINED = Alike(heat=1.5, unsure=0.7, offset=1.0, width=4.0)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How probable counts of classes are.

    Args:
        probabilities: float64 ``(classes, N + 1)``, of each count of each class.
        labels: int64 ``(k, N)``, the most probable multisets, each ascending.
        weights: float64 ``(k,)``, their probabilities relative to each other, adding up to 1.
    """

    probabilities: Tensor
    labels: Tensor
    weights: Tensor


def countable(classes: int, count: int) -> bool:
    """Say whether the probabilities of all counts are small enough a table."""
    return classes * count**2 <= _NUMBERS


def likelihoods(
    total: Tensor,
    logits: Tensor,
    sizes: Tensor,
    low: Tensor,
    count: int,
    *,
    alike: Alike,
    generator: torch.Generator,
) -> Tensor:
    r"""Return the logarithms ``(classes, N + 1)`` of how likely an entry of the gradient is for each count.

    The entry of class :math:`c`, times :math:`N`, is what images of other classes add, :math:`\sum p_{ic}`,
    less what is missing in those of its own, :math:`\sum (1 - p_{ic})`. Both are drawn from predictions for
    other images, of which one belongs to class :math:`c` with the probability that the network gives it,
    with random temperature and offsets, since the network is surer of its clients' images, by an unknown
    amount. A kernel estimate over the draws gives the likelihood.

    Args:
        total: :math:`N` times the gradient with respect to the logits, ``(classes,)``, float64.
        logits: for other images, ``(J, classes)``, float64.
        sizes: ``(J,)``, by how much the entry of each image is larger than its factor.
        low: int64 ``(classes,)``, counts that are certain.
        count: :math:`N`.
        alike: how alike these predictions and those for the client's images are.
        generator: draws.
    """
    images, classes = logits.shape
    draws = max(16, min(_DRAWS, _NUMBERS // (images * classes), _NUMBERS // (count * classes)))
    heat = alike.heat * torch.exp(
        alike.unsure * torch.randn(draws, 1, 1, generator=generator, dtype=logits.dtype)
    )
    offset = (
        alike.offset
        * logits.std(0).mean()
        * torch.randn(draws, 1, classes, generator=generator, dtype=logits.dtype)
    )
    chances = (heat * (logits + offset)).softmax(-1)  # (draws, J, classes)
    cumulative = chances.mT.clamp_min(1e-12).cumsum(-1)
    rows = torch.searchsorted(
        cumulative / cumulative[..., -1:],
        torch.rand(draws, classes, count, generator=generator, dtype=logits.dtype),
    ).clamp_max(images - 1)
    each, of = torch.arange(draws)[:, None, None], torch.arange(classes)[None, :, None]
    own = (1 - chances[each, rows, of]) * sizes[rows]
    other = torch.randint(max(1, classes - 1), (draws, classes, count), generator=generator)
    other = (other + (other >= of)) % classes
    found = rows[each, other, torch.randint(count, (draws, classes, count), generator=generator)]
    more = chances[each, found, of] * sizes[found]
    none = torch.zeros(draws, classes, 1, dtype=logits.dtype)
    missing, added = (torch.cat([none, part.cumsum(-1)], -1) for part in (own, more))
    drawn = torch.asinh((added.flip(-1) - missing) / 1e-3)
    width = 1.06 * alike.width * drawn.std(0) * draws**-0.2 + 0.02
    far = (torch.asinh(total / 1e-3)[:, None] - drawn) / width
    likely = torch.exp(-0.5 * far**2).mean(0) / width + 1e-4
    numbers = torch.arange(count + 1)
    if int(low.sum()) <= count:
        likely = torch.where(numbers >= low[:, None], likely, 0.0)
    logs: Tensor = likely.log()
    return logs


def weighed(logs: Tensor, most: int) -> Counts:
    """Return the counts that have the right sum, by the likelihoods ``(classes, N + 1)`` of each class.

    Args:
        logs: their logarithms.
        most: how many multisets to return.
    """
    classes, count = len(logs), logs.shape[1] - 1
    numbers = torch.arange(count + 1, dtype=logs.dtype)
    logs = logs + torch.lgamma(numbers + _EVEN) - torch.lgamma(numbers + 1)
    rest = torch.arange(count + 1)[:, None] - torch.arange(count + 1)
    nothing = torch.full((count + 1,), -torch.inf, dtype=logs.dtype)
    nothing[0] = 0

    def joined(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rest >= 0, a[rest.clamp_min(0)] + b, -torch.inf).logsumexp(1)

    before, after = [nothing], [nothing]
    for row in logs:
        before.append(joined(before[-1], row))
    for row in logs.flip(0):
        after.append(joined(after[-1], row))
    tables = [
        row + joined(a, b).flip(0) for row, a, b in zip(logs, before, reversed(after[:-1]), strict=False)
    ]
    probabilities = torch.stack(tables).softmax(1)

    best, choices = nothing[:, None], list[tuple[Tensor, Tensor]]()
    for row in logs:
        scores = torch.where(rest[..., None] >= 0, best[rest.clamp_min(0)] + row[:, None], -torch.inf)
        flat = scores.flatten(1)
        best, place = flat.topk(min(most, flat.shape[1]), dim=1)
        choices.append((place // scores.shape[2], place % scores.shape[2]))
    kept = best[count] > -torch.inf
    weights, rank = best[count][kept].softmax(0), torch.arange(best.shape[1])[kept]
    left, counts = torch.full_like(rank, count), []
    for number, source in reversed(choices):
        counts.append(number[left, rank])
        left, rank = left - counts[-1], source[left, rank]
    chosen = torch.stack(counts[::-1], 1)
    labels = torch.stack([torch.repeat_interleave(torch.arange(classes), row) for row in chosen])
    return Counts(probabilities=probabilities, labels=labels, weights=weights)


def likeliest(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels of which most are right on average, ascending, and the probability of each.

    It is the probability that the batch has this class at least as often as it stands here up to there.
    """
    count = probabilities.shape[1] - 1
    tails = probabilities.flip(1).cumsum(1).flip(1)[:, 1:].clamp(0, 1)
    place = tails.flatten().sort(descending=True, stable=True).indices[:count].sort().values
    return place // count, tails.flatten()[place]


def impossible(loss: Loss, per_class: Tensor, rest: float, count: int, *, scaled: bool) -> str:
    """Return what about the gradient of the logits no labels can make; ``scaled``: by an unknown factor."""
    if rest > _ROUNDING:
        return f"{rest:.0%} of it are left when it is added up over the classes, and 0 by {words_of(loss)}"
    if loss is not F.cross_entropy:
        return ""
    if (low := int((per_class < -_ROUNDING * per_class.abs().max()).sum())) > count:
        return f"{low} of its entries are negative, as those of classes in the batch are"
    if not scaled and (total := float(per_class.clamp_min(0).sum())) > 1.1:
        return f"its positive entries add up to {total:.3g}, as no predictions do"
    return ""


def fit_of(loss: Loss, per_class: Tensor, logits: Tensor, observation: Observation) -> tuple[Fit, float]:
    """Return the counts by a loss of which only its gradients are known, and what they cannot explain."""
    count, classes = observation.num_images, len(per_class)
    normalised = bool(logits.logsumexp(1).abs().max() < 1e-3)  # the model ends with log_softmax
    inner: Loss = (lambda z, t: loss(F.log_softmax(z, -1), t)) if normalised else loss
    rows, flat = class_slopes(inner, logits), class_slopes(inner, logits.new_zeros(1, classes))
    # With predictions as far from even as can be, what other labels leave of an entry is least.
    sure = class_slopes(inner, 40 * F.one_hot(torch.tensor([0, 1]), classes).to(logits))
    others = float((sure + torch.diag(torch.full((classes,), torch.inf))).min())
    protocol = observation.protocol
    whole: list[slice | list[int]] = [slice(None)]
    batches = protocol.batches(count) if isinstance(protocol, FedAvg) else whole
    # Columns of the system add up to what no counts change, where gradients add up to zero over classes.
    mean = float(rows.abs().mean())
    sides = torch.stack([torch.full_like(per_class, mean * count), per_class], 1)
    constant, along = torch.linalg.lstsq(rows.T + mean, sides, driver="gelsd").solution.unbind(1)

    def scale_of(counts: Tensor) -> float:
        labels = torch.repeat_interleave(torch.arange(classes), counts)
        mixed = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        return batch_scale(inner, labels[mixed], batches, logits, flat)

    # The scale depends on the counts, where classes have weights: both are found in turn, from two starts.
    even = torch.bincount(torch.arange(count) % classes, minlength=classes)
    plain = nearest(
        torch.full_like(per_class, count / classes), -count * per_class, per_class < 0, count
    ).counts
    found = dict[tuple[int, ...], tuple[float, Fit]]()
    for counts in (even, plain):
        for _ in range(6):
            scale = scale_of(counts)
            fit = nearest(constant, along / scale, per_class < scale * count * min(0.0, others), count, rows)
            counts, key = fit.counts, tuple(fit.counts.tolist())
            if key in found:
                break
            made = scale_of(counts) * counts.double() @ rows
            found[key] = float((made / fit.factor - per_class).norm()), fit
    fit = min(found.values(), key=lambda one: one[0])[1]
    rest = float(per_class.sum().abs() / per_class.abs().sum())
    return fit, rest if balanced(inner, logits.new_zeros(1, classes)) else 0.0


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whole counts ``(classes,)`` near expected ones, the factor, how far they are, and the doubt."""

    counts: Tensor
    factor: float
    residual: float
    doubt: float


def nearest(constant: Tensor, slope: Tensor, present: Tensor, total: int, rows: Tensor | None = None) -> Fit:
    """Return whole counts ``n`` near ``constant + factor * slope``, and the factor, 1 where that explains it.

    Distances are those of ``n @ rows``; None takes the counts themselves.
    """

    def seen(counts: Tensor) -> Tensor:
        return counts if rows is None else counts @ rows

    def rounded(factors: Tensor) -> Tensor:
        return whole_counts(constant + factors[:, None] * slope, present=present, total=total)

    along = seen(slope)
    factor, others = torch.ones(1, dtype=slope.dtype), 0.0
    counts = rounded(factor)
    share = (seen(counts - constant) - along).norm() / along.norm()
    if share > _UNEXPLAINED:
        factors = 2.0 ** torch.linspace(-16, 16, 129, dtype=slope.dtype)
        for _ in range(3):
            tried = rounded(factors)
            made = seen(tried - constant)
            fitted = made.square().sum(1) / (made @ along)
            factors = torch.where((fitted > 0) & fitted.isfinite(), fitted, factors)
        shares = (made / factors[:, None] - along).norm(dim=1) / along.norm()
        least, best = float(shares.min()), shares.argmin()
        rivals = shares[(tried != tried[best]).any(1)]
        rival = least / max(float(rivals.min()), 1e-300) if len(rivals) else 0.0
        # Predictions that are not typical are a little like a factor; they leave less of it.
        none = float(share) > 1.5 or float((constant + slope).max()) > 1.5 * total + 0.5
        if (none and least < 0.7) or (least < min(0.1, float(share) / 5) and rival < 0.4):
            factor, counts, others = factors[best][None], tried[best][None], rival
    chosen = counts[0]
    low = present.long() if int(present.sum()) <= total else torch.zeros_like(chosen)
    gap = chosen - constant - factor * slope
    products = None if rows is None else rows @ rows.T
    change, away, to = _best_exchange(chosen, gap, low, products)
    for _ in range(4 * len(chosen) if rows is not None else 0):
        if change >= 0:
            break
        for row, by in ((away, -1), (to, 1)):
            chosen[row] += by
            gap[row] += by
        change, away, to = _best_exchange(chosen, gap, low, products)
    square = float(seen(gap).square().sum())
    rival = square + max(change, 0.0)
    doubt = (square / rival) ** 0.5 if rival > 0 else 0.0
    return Fit(counts=chosen, factor=float(factor), residual=square**0.5, doubt=max(doubt, others))


def _best_exchange(
    counts: Tensor, gap: Tensor, low: Tensor, products: Tensor | None
) -> tuple[float, int, int]:
    """Return how the squared distance changes, at best, by one image of another class, and which classes."""
    can_give = counts > low
    if products is None:
        away = int(gap.masked_fill(~can_give, -torch.inf).argmax())
        rest = gap.clone()
        rest[away] = torch.inf
        to = int(rest.argmin())
        return (float(2 * (gap[to] - gap[away]) + 2) if can_give.any() else torch.inf), away, to
    along, own = products @ gap, products.diagonal()
    change = 2 * (along[None] - along[:, None]) + own[None] + own[:, None] - 2 * products
    change[~can_give] = torch.inf
    change.fill_diagonal_(torch.inf)
    best = int(change.argmin())
    away, to = divmod(best, len(counts))
    return float(change[away, to]), away, to


def whole_counts(expected: Tensor, *, present: Tensor, total: int) -> Tensor:
    """Round expected counts ``(..., classes)`` to the nearest whole numbers with the given total.

    There is at least one where a class is present, unless more classes are present than the total.
    """
    expected = expected.double()
    low = present.long() if int(present.sum()) <= total else torch.zeros_like(present, dtype=torch.int64)

    def at(shift: Tensor) -> Tensor:
        return torch.maximum((expected + shift).floor().long(), low)

    # All are raised by the same amount: the largest that does not exceed the total, and a hair more.
    edge = expected.abs().amax(-1, keepdim=True) + total + 1
    below, above = -edge, edge
    for _ in range(80):
        middle = (below + above) / 2
        fits = at(middle).sum(-1, keepdim=True) <= total
        below, above = torch.where(fits, middle, below), torch.where(fits, above, middle)
    counts = at(below)
    short = total - counts.sum(-1, keepdim=True)
    gap = torch.where(at(above) > counts, expected - counts, -torch.inf)
    place = gap.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return counts + (place < short).long()
