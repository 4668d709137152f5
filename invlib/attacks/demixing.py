"""Labels of a batch from the last layer alone: the features of each image are fitted to its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_RANK = 1e-6  # singular values of the gradient below this share of the first are rounding
_EXACT = 1e-5  # misfit, as a share of the gradient's norm, that true labels alone reach
_PRIOR = 0.1  # weight of what the features of natural images are like
_FIRST = 16  # starts that are tried before the others
_LARGEST = 12  # images: above it the fit is too slow to be worth its share of right labels


@dataclass(frozen=True, kw_only=True)
class Demixed:
    """Label multisets that were fitted.

    Args:
        labels: int64 ``(k, N)``, each row ascending and different, the best first.
        misfit: float64 ``(k,)``, share of the gradient's norm that is left.
        certified: whether the first row is the only one that can be: it fits to rounding, with more
            equations than unknowns.
    """

    labels: Tensor
    misfit: Tensor
    certified: bool


def demix(
    weight: Tensor,
    bias: Tensor,
    gradient: Tensor,
    features: Tensor,
    guesses: Tensor,
    *,
    rounds: int = 5,
    smoothing: float = 0.0,
    generator: torch.Generator,
) -> Demixed | None:
    r"""Fit the features and the label of every image to the gradient of the last layer.

    The layer's gradient is :math:`\frac1N \sum_i (\mathrm{softmax}(W h_i + b) - e_{y_i})\, (h_i, 1)^\top`,
    and of :math:`N` images fewer than classes its rows span all features :math:`h_i`. In that span they have
    :math:`N^2` coordinates, for which there are :math:`(C - 1)(N + 1)` equations: the labels too are
    determined, however well the network has learnt them, as long as rounding leaves the rank.
    Levenberg-Marquardt steps run from many starts; the best are kept, and a label exchanged in each.

    Args:
        weight: of the last layer, ``(C, D)``, float64 as all that follows.
        bias: ``(C,)``.
        gradient: the mean gradient of both, ``(C, D + 1)``, the bias last.
        features: inputs of the layer for other images, ``(J, D)``.
        guesses: int64 ``(K, N)``, label multisets to begin with, each of which has a start.
        rounds: how often labels are exchanged.
        smoothing: of the labels, by the client's loss.
        generator: draws starts and exchanges.

    Returns:
        What was found; None where the images are not fewer than the classes, too many, or the gradient has
        another rank than a batch leaves.
    """
    count, classes = guesses.shape[1], len(weight)
    if not 2 <= count <= min(classes - 1, _LARGEST):
        return None
    _, values, rows = torch.linalg.svd(gradient[:, :-1], full_matrices=False)
    rank = int((values > _RANK * values[0]).sum())
    if rank > count:
        return None
    span = rows[:rank].T
    natural = features @ span
    spread = natural.T.cov().view(rank, rank)
    spread = spread + (0.1 * spread.diagonal().mean() + 1e-12) * torch.eye(rank, dtype=spread.dtype)
    root = torch.linalg.cholesky(spread)
    layer = _Layer(
        weight=weight @ span @ root,
        bias=bias,
        center=torch.linalg.solve_triangular(root, natural.mean(0)[:, None], upper=False)[:, 0],
        target=torch.cat(
            [
                torch.linalg.solve_triangular(root, span.T @ gradient[:, :-1].T, upper=False).T,
                gradient[:, -1:],
            ],
            1,
        ),
        smoothing=smoothing,
        generator=generator,
    )
    exact = min(_EXACT, float(values[rank - 1] / values[0]) / 30) if rank == count else 0.0
    labels, points = guesses[:0], torch.zeros(0, count, rank, dtype=span.dtype)
    more, begun = guesses[:_FIRST], layer.starts(guesses[:_FIRST])
    for turn in range(rounds + 2):
        levels = (3e-2, 1e-3) if turn < 2 else (1e-2, 1e-3)
        more, begun = layer.fitted(more, begun, levels, 30 if turn < 2 else 15)
        labels, points = torch.cat([labels, more]), torch.cat([points, begun])
        cost, misfit = layer.cost(points, labels, 1e-3)
        kept = _first_of_each(labels, cost)[: max(4, len(guesses) // 4)]
        labels, points, misfit = labels[kept], points[kept], misfit[kept]
        _, close = layer.fitted(labels[:4], points[:4], (1e-4, 1e-7), 12)
        misfit[:4] = layer.cost(close, labels[:4], 1e-7)[1]
        if certified := bool(misfit[:4].min() < exact):
            break
        if turn == 0 and len(guesses) > _FIRST:
            more, begun = guesses[_FIRST:], layer.starts(guesses[_FIRST:])
            continue
        others = torch.arange(max(1, len(guesses) - len(kept))) % len(kept)
        more, begun = labels[others], points[others]
        slot = torch.randint(count, (len(others), 1), generator=generator)
        more = more.scatter(1, slot, torch.randint(classes, (len(others), 1), generator=generator))
        place = slot[..., None].expand(-1, -1, rank)
        begun = begun.scatter(1, place, layer.starts(more).gather(1, place))
    order = misfit.argsort()
    return Demixed(
        labels=labels[order].sort(1).values,
        misfit=misfit[order],
        certified=certified,
    )


def _first_of_each(labels: Tensor, cost: Tensor) -> Tensor:
    """Return rows in the order of their cost, the first of each multiset."""
    order, seen, kept = cost.argsort(), set(), []
    for row in order.tolist():
        if (key := tuple(sorted(labels[row].tolist()))) not in seen:
            seen.add(key)
            kept.append(row)
    return torch.tensor(kept)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """The last layer in coordinates in which features of natural images are white.

    Args:
        weight: ``(C, r)``; bias: ``(C,)``; center: ``(r,)``, of natural images.
        target: the gradient, ``(C, r + 1)``.
        smoothing: of the labels.
        generator: draws starts.
    """

    weight: Tensor
    bias: Tensor
    center: Tensor
    target: Tensor
    smoothing: float
    generator: torch.Generator

    def starts(self, labels: Tensor) -> Tensor:
        """Return random features ``(K, N, r)``, from unsure of the label up to sure."""
        shape = (*labels.shape, len(self.center))
        noise = torch.randn(shape, generator=self.generator, dtype=self.weight.dtype)
        gain = 10 * torch.rand(*labels.shape, 1, generator=self.generator, dtype=self.weight.dtype)
        toward = self.weight - self.weight.mean(0)
        toward = toward / toward.square().sum(1, keepdim=True).clamp_min(1e-12)
        return self.center + noise + gain * toward[labels]

    def parts(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log-probabilities, errors, features with a one, and the misfit ``(K, C, r + 1)``."""
        logs = (self.bias + points @ self.weight.T).log_softmax(-1)
        classes, s = len(self.bias), self.smoothing
        errors = logs.exp() - (1 - s) * F.one_hot(labels, classes) - s / classes
        inputs = torch.cat([points, torch.ones_like(points[..., :1])], -1)
        made = errors.mT @ inputs / labels.shape[1]
        return logs, errors, inputs, (made - self.target) / self.target.norm()

    def cost(self, points: Tensor, labels: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """Return the cost at a level of noise, and the norm of the misfit."""
        logs, _, _, misfit = self.parts(points, labels)
        square = misfit.square().sum((1, 2))
        natural = 0.5 * (points - self.center).square().sum((1, 2))
        unsure = -logs.gather(2, labels[..., None]).sum((1, 2))
        return square / (2 * noise**2) + _PRIOR * (natural + unsure), square.sqrt()

    def fitted(
        self, labels: Tensor, points: Tensor, noise: tuple[float, float], steps: int
    ) -> tuple[Tensor, Tensor]:
        """Take Levenberg-Marquardt steps while the noise falls, exchanging labels where that fits."""
        damping = torch.full((len(labels),), 1e-2, dtype=points.dtype)
        for step in range(steps):
            level = noise[0] * (noise[1] / noise[0]) ** min(1.0, step / (0.7 * steps))
            before = self.cost(points, labels, level)[0]
            normal, slope = self.normal(points, labels, level)
            for _ in range(3):
                damped = normal + torch.diag_embed(damping[:, None] * normal.diagonal(dim1=1, dim2=2))
                moved, failed = torch.linalg.solve_ex(damped, slope)
                new = points - moved.view_as(points)
                after = self.cost(new, labels, level)[0]
                better = (after < before) & (failed == 0)
                points = torch.where(better[:, None, None], new, points)
                before = torch.where(better, after, before)
                damping = torch.where(better, damping * 0.3, damping * 4).clamp(1e-9, 1e6)
                if better.double().mean() > 0.7:
                    break
            if step < steps - 8:
                labels = self.exchanged(points, labels, level)
        return labels, points

    def normal(self, points: Tensor, labels: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """Return the Gauss-Newton matrix ``(K, N r, N r)`` and the slope ``(K, N r)``."""
        logs, errors, inputs, misfit = self.parts(points, labels)
        (many, count, rank), classes = points.shape, len(self.bias)
        turn = logs.exp()[..., None] * (self.weight - (logs.exp() @ self.weight)[..., None, :])
        jacobian = turn[..., None] * inputs[:, :, None, None, :]  # (K, N, C, r, r + 1)
        each = torch.arange(rank)
        jacobian[:, :, :, each, each] += errors[..., None]
        scale = 1 / (count * float(self.target.norm()) * noise)
        jacobian = scale * jacobian.permute(0, 2, 4, 1, 3).reshape(many, classes * (rank + 1), count * rank)
        normal = jacobian.mT @ jacobian
        slope = (jacobian.mT @ (misfit / noise).reshape(many, -1, 1))[..., 0]
        curved = torch.einsum("incd,ce->inde", turn, self.weight)
        own = _PRIOR * (curved + torch.eye(rank, dtype=points.dtype))
        images = torch.arange(count)
        normal.view(many, count, rank, count, rank)[:, images, :, images, :] += own.transpose(0, 1)
        wrong = logs.exp() - F.one_hot(labels, classes)
        return normal, slope + _PRIOR * (points - self.center + wrong @ self.weight).reshape(many, -1)

    def exchanged(self, points: Tensor, labels: Tensor, noise: float) -> Tensor:
        """Give one image another label where that lowers the cost, features kept."""
        logs, _, inputs, misfit = self.parts(points, labels)
        scale = labels.shape[1] * float(self.target.norm())
        scale = scale / (1 - self.smoothing)
        along = 2 * inputs @ misfit.mT / scale
        own = labels[..., None]
        change = along.gather(2, own) - along + 2 * inputs.square().sum(-1, keepdim=True) / scale**2
        change = change / (2 * noise**2) + _PRIOR * (logs.gather(2, own) - logs)
        least, place = change.scatter(2, own, 0.0).flatten(1).min(1)
        slot, label = place // len(self.bias), place % len(self.bias)
        some = (least < 0).nonzero()[:, 0]
        labels = labels.clone()
        labels[some, slot[some]] = label[some]
        return labels
