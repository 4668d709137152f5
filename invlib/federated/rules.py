"""What a client's optimiser makes of a gradient, as in `torch.optim`, in a form that can be differentiated.

Each rule maps parameters, their gradient and what was kept from earlier steps to parameters and what is kept;
it treats every number by itself, so that stacks of parameters go through it as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from invlib.autodiff.gradients import State

Named = Mapping[str, Tensor]


def sgd(
    params: Named,
    slopes: Named,
    state: State,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> tuple[dict[str, Tensor], State]:
    r"""Take a step of stochastic gradient descent; the first begins its momentum at the gradient.

    .. math:: g \leftarrow g + \lambda \theta, \quad b \leftarrow \mu b + (1 - \tau) g, \quad
        \theta \leftarrow \theta - \eta\, (b \text{ or, with Nesterov, } g + \mu b)

    Source: Sutskever et al. 2013, as `torch.optim.SGD` has it.
    """
    if weight_decay:
        slopes = {name: g + weight_decay * params[name] for name, g in slopes.items()}
    if momentum:
        kept = dict(slopes)
        if state:
            kept = {name: momentum * b + (1 - dampening) * slopes[name] for name, b in state[0].items()}
        slopes = {name: slopes[name] + momentum * b for name, b in kept.items()} if nesterov else kept
        state = (kept,)
    return {name: p - lr * slopes[name] for name, p in params.items()}, state


def adam(
    params: Named,
    slopes: Named,
    state: State,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[dict[str, Tensor], State]:
    r"""Take a step of Adam, or of AdamW, whose decay is ``decoupled``; ``step`` counts from 1.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \eta\, \frac{m / (1 - \beta_1^k)}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}

    Source: Kingma and Ba 2015, arXiv 1412.6980; Loshchilov and Hutter 2019, arXiv 1711.05101.
    """
    first, second = betas
    if weight_decay and decoupled:
        params = {name: p * (1 - lr * weight_decay) for name, p in params.items()}
    elif weight_decay:
        slopes = {name: g + weight_decay * params[name] for name, g in slopes.items()}
    if not state:
        state = tuple({name: torch.zeros_like(g) for name, g in slopes.items()} for _ in range(2))
    mean = {name: first * m + (1 - first) * slopes[name] for name, m in state[0].items()}
    square = {name: second * v + (1 - second) * slopes[name].square() for name, v in state[1].items()}
    size, unbiased = lr / (1 - first**step), math.sqrt(1 - second**step)
    now = {name: p - size * mean[name] / (_root(square[name]) / unbiased + eps) for name, p in params.items()}
    return now, (mean, square)


def _root(value: Tensor) -> Tensor:
    """Return the square root, whose slope at zero is taken as zero instead of infinity."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1).sqrt(), 0)


def clipped(slopes: Named, most: float, *, stacked: bool) -> dict[str, Tensor]:
    """Shorten a gradient to a norm, as `torch.nn.utils.clip_grad_norm_`; of stacks, each restart's."""
    rows = [g.reshape(len(g) if stacked else 1, -1).square().sum(1) for g in slopes.values()]
    total = torch.stack(rows).sum(0)
    norm = total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()  # no infinite slope at zero
    factor = (most / (norm + 1e-6)).clamp(max=1)
    return {
        name: g * (factor.view(-1, *[1] * (g.ndim - 1)) if stacked else factor[0])
        for name, g in slopes.items()
    }
