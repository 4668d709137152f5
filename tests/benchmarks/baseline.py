"""The algorithm of 2020 as it is usually written: what the engines are measured against.

One restart after another; the network's gradient with a graph, the cost's by ``backward()``, which fills the
parameters' ``.grad`` too; the sign taken of the image's; a projection; and the host asked three times a step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import invlib as iv


def attack(
    model: nn.Module, seen: iv.Observation, starts: Tensor, steps: int, tv: float = 0.1
) -> tuple[Tensor, float]:
    """Return the best images of all restarts in [0, 1], and their cost.

    Args:
        model: what the client received; its ``.grad`` is used.
        seen: what the server saw, labels included.
        starts: ``(restarts, N, C, H, W)``, normalised.
        steps: of each restart.
        tv: the weight of total variation.
    """
    best, best_cost = starts[0], float("inf")
    for start in starts:
        images, cost = _restart(model, seen, start, steps, tv)
        if cost < best_cost:
            best, best_cost = images, cost
    for p in model.parameters():
        p.grad = None
    return seen.normalization.decode(best).clamp(0, 1), best_cost


def _restart(
    model: nn.Module, seen: iv.Observation, start: Tensor, steps: int, tv: float
) -> tuple[Tensor, float]:
    x = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    decay = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [int(steps * a) for a in (3 / 8, 5 / 8, 7 / 8)], 0.1
    )
    low, high = seen.normalization.box(dtype=x.dtype, device=x.device)
    names, params = zip(*model.named_parameters(), strict=True)
    target = [seen.update[name] for name in names]
    best, best_cost = x.detach().clone(), float("inf")
    for _ in range(steps):
        optimizer.zero_grad()
        model.zero_grad()
        cost = _distance(_update(model, params, seen, x), target) + tv * _variation(x)
        cost.backward()
        x.grad.sign_()
        measured = x.detach().clone()
        optimizer.step()
        decay.step()
        with torch.no_grad():
            x.copy_(torch.max(torch.min(x, high), low))
            if cost.item() < best_cost:
                best, best_cost = measured, cost.item()
            if not torch.isfinite(cost):
                break
    return best, best_cost


def _update(model: nn.Module, params: tuple[Tensor, ...], seen: iv.Observation, x: Tensor) -> list[Tensor]:
    if isinstance(seen.protocol, iv.FedSGD):
        loss = nn.functional.cross_entropy(model(x), seen.labels)
        return list(torch.autograd.grad(loss, params, create_graph=True))
    now = dict(model.named_parameters())
    for rows in seen.protocol.batches(len(x)):
        loss = nn.functional.cross_entropy(
            torch.func.functional_call(model, now, (x[rows],)), seen.labels[rows]
        )
        slopes = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        now = {name: p - seen.protocol.lr * g for (name, p), g in zip(now.items(), slopes, strict=True)}
    return [new - old for new, old in zip(now.values(), params, strict=True)]


def _distance(candidate: list[Tensor], target: list[Tensor]) -> Tensor:
    dot, ours, theirs = 0, 0, 0
    for c, t in zip(candidate, target, strict=True):
        dot = dot + (c * t).sum()
        ours = ours + c.pow(2).sum()
        theirs = theirs + t.pow(2).sum()
    return 1 - dot / ours.sqrt() / theirs.sqrt()


def _variation(x: Tensor) -> Tensor:
    across = (x[..., 1:] - x[..., :-1]).abs().mean()
    return across + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
