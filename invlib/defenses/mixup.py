"""Mixup: a client computes its update on mixtures of its images, and these are what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta

from invlib.core.network import num_classes
from invlib.core.observation import ClientStep
from invlib.defenses.around import ONE_GRADIENT, Around, Inner
from invlib.settings import Positive


@dataclass(frozen=True)
class Mixup(Around):
    r"""A client mixes its images and labels in pairs that it draws, and takes its step on the mixtures.

    .. math:: \tilde x_n = \lambda x_n + (1 - \lambda) x_{\pi(n)}, \quad
        \tilde y_n = \lambda e_{y_n} + (1 - \lambda) e_{y_{\pi(n)}}, \quad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    with a permutation :math:`\pi` and one :math:`\lambda` of the whole batch. The update is that of these
    images and labels, so that an attack gives the mixtures; in an attack the client's step is that on the
    mixtures. Their labels are soft and differ from those that the client has: observe with
    ``reveal_labels=False``, and attack with ``labels="optimize"``, or give the soft ones. To take mixtures
    apart is another problem, which Carlini et al. solved for a published variant.

    Args:
        alpha: :math:`\alpha`; small numbers mix little, 1 draws all shares alike.
        client: the step on the mixtures; its loss has to take probabilities, as cross-entropy does.

    Raises:
        ConfigError: a setting is out of range.

    Source: Zhang et al. 2018, arXiv 1710.09412; Carlini et al. 2021, arXiv 2011.05315. It was made for
    accuracy and is a defence against nobody who takes a mixture for a leak.
    """

    alpha: Positive = 1.0
    client: Inner = ONE_GRADIENT

    def drawn(self, num_images: int) -> Callable[..., dict[str, Tensor]]:
        """Return the step that the client takes, in a draw of torch's global generator."""
        pairs, share = torch.randperm(num_images), float(Beta(self.alpha, self.alpha).sample())
        return partial(_mixed, self.inside(num_images), pairs, share)


def mixtures(values: Tensor, pairs: Tensor, share: float) -> Tensor:
    """Return each of some images or probabilities ``(N, ...)``, mixed with the one of its pair.

    Args:
        values: floating point.
        pairs: int64 ``(N,)``, with which each is mixed.
        share: of the first of a pair, in [0, 1].
    """
    return share * values + (1 - share) * values[pairs.to(values.device)]


def _mixed(
    client: ClientStep,
    pairs: Tensor,
    share: float,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    **settings: Any,
) -> dict[str, Tensor]:
    if not labels.is_floating_point():
        labels = F.one_hot(labels, num_classes(model, tuple(inputs.shape[1:]))).to(inputs)
    return client(model, mixtures(inputs, pairs, share), mixtures(labels, pairs, share), **settings)
