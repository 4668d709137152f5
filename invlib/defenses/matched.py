"""The attacker who meets the bound: he knows all candidates, clip and noise, and picks the likeliest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invlib.core.normalization import Normalization
from invlib.errors import ConfigError
from invlib.federated import FedSGD, observe
from invlib.metrics import Identified
from invlib.settings import Count, Positive, checks, shown


def candidate_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    normalization: Normalization | None = None,
    loss: Any = F.cross_entropy,
) -> Tensor:
    """Return the gradient of each image by itself, as rows ``(n, parameters)``.

    Args:
        model: any model that `invlib.observe` takes.
        images: the candidates ``(n, C, H, W)`` in [0, 1].
        labels: int64 ``(n,)``.
        normalization: how the client encodes its images.
        loss: the client's loss ``(logits, labels) -> scalar``.

    Raises:
        ObservationError: as `invlib.observe`.

    Taught in: chapter 8
    """
    rows = []
    for k in range(len(images)):
        one = slice(k, k + 1)
        seen = observe(model, images[one], labels[one], FedSGD(), normalization=normalization, loss=loss)
        rows.append(torch.cat([part.flatten() for part in seen.update.values()]))
    return torch.stack(rows)


@checks
def matched_attack(
    gradients: Tensor,
    *,
    clip: Positive,
    noise_multiplier: Positive,
    rounds: Count = 1,
    trials: Count = 1000,
    generator: torch.Generator | None = None,
) -> Identified:
    r"""Play the guessing game of the bound and return how often the attacker names the right candidate.

    In each trial the client takes one of n candidates, clips its gradient to a norm and sends it T times with
    fresh Gaussian noise. The attacker knows all of that but the candidate and the noise, and takes

    .. math:: \arg\max_i \sum_t \Big( \langle c_i, y_t \rangle - \tfrac12 \lVert c_i \rVert^2 \Big),

    the likeliest of the clipped gradients :math:`c_i`; nobody does better. He is right no more often than
    `invlib.defenses.reconstruction_bound` says of kappa = 1/n: just as often where there are two opposite
    gradients, and at least 0.86 times as often where all are orthogonal and none is shorter than the clip.

    Only the products of gradients enter, so that a trial costs the same for networks of every size.

    Args:
        gradients: of each candidate ``(n, parameters)``; or, where the network changes from one to the next,
            of each in several rounds ``(rounds, n, parameters)``.
        clip: the norm to which each is clipped.
        noise_multiplier: the standard deviation of the noise, over the clip.
        rounds: how often the gradients are sent.
        trials: how many games are played.
        generator: draws the candidates and the noise; None takes seed 0.

    Raises:
        ConfigError: a setting is out of range, there are fewer than two candidates, or a gradient is not
            finite.

    Source: Hayes, Mahloujifar and Balle 2023, arXiv 2302.07225, section 4.

    Taught in: chapter 8
    """
    if gradients.ndim not in (2, 3) or gradients.shape[-2] < 2 or not torch.isfinite(gradients).all():
        raise ConfigError(
            f"gradients is {shown(gradients)}; expected finite numbers (n, parameters) or "
            "(rounds, n, parameters) of at least 2 candidates"
        )
    generator = generator or torch.Generator().manual_seed(0)
    rows = gradients.detach().cpu().double()
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    rows = rows * (clip / norms.clamp_min(clip)) / clip
    gram = rounds * (rows @ rows.mT).view(-1, *[rows.shape[-2]] * 2).sum(0)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(0).sqrt()  # what white noise becomes in the products with it
    taken = torch.randint(len(gram), (trials,), generator=generator)
    noise = torch.randn(trials, len(gram), generator=generator, dtype=gram.dtype) @ root.T
    scores = gram[taken] + noise_multiplier * noise - gram.diagonal() / 2
    own = scores.gather(1, taken[:, None])
    return Identified(ranks=tuple((scores >= own).sum(1).tolist()), candidates=len(gram))
