"""Secure aggregation: the server is given the mean of several clients' updates, and none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from invlib.autodiff.gradients import PLAIN, GradientMode
from invlib.core.observation import ClientStep
from invlib.defenses.around import ONE_GRADIENT, Around, Inner
from invlib.defenses.perexample import images_apart
from invlib.errors import ConfigError
from invlib.settings import Count


@dataclass(frozen=True)
class SecureAggregation(Around):
    r"""Several clients with as many images each, of whose updates the server sees the mean alone.

    .. math:: u = \frac1K \sum_{k=1}^K u_k(x^{(k)}, y^{(k)})

    It is a client's step on the images of all clients, those of the first client first, and stands wherever
    one does. Of clients that send one gradient it is `invlib.FedSGD` with K times the images, exactly; of
    clients that train it is the mean of K trainings, each from the same weights.

    It hides which client a number came from, and nothing else: the mean is a function of all images, and
    what recovers a batch recovers those of all clients (`invlib.exact_batch`). It helps as more images help.
    A server that sends each client another model, or models that make all but one client silent, undoes it;
    that is no honest-but-curious server.

    Args:
        clients: :math:`K`.
        client: the step of each.

    Raises:
        ConfigError: a setting is of another kind; when it is called, the images cannot be shared out evenly,
            or the network has batch norm that takes its statistics from the batch.

    Source: Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning";
    what undoes it, Pasquini et al. 2022, arXiv 2111.07380.
    """

    clients: Count
    client: Inner = ONE_GRADIENT

    def images(self, num_images: int) -> int:
        """Return how many images each client has."""
        if num_images % self.clients:
            raise ConfigError(
                f"{self} is given {num_images} images; expected as many for each of {self.clients} clients"
            )
        return num_images // self.clients

    def drawn(self, num_images: int) -> Callable[..., dict[str, Tensor]]:
        """Return the step in which each client has drawn what it draws, from torch's global generator."""
        each = self.images(num_images)
        return partial(self._mean, [self.inside(each) for _ in range(self.clients)])

    def __call__(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, *, mode: GradientMode = PLAIN, **settings: Any
    ) -> dict[str, Tensor]:
        """Return the mean update by parameter name; arguments as for `invlib.FedAvg`."""
        return self._mean([self.client] * self.clients, model, inputs, labels, mode=mode, **settings)

    def _mean(
        self, clients: Sequence[ClientStep], model: nn.Module, inputs: Tensor, labels: Tensor, **settings: Any
    ) -> dict[str, Tensor]:
        images_apart(model, self)
        parts = zip(*(t.split(self.images(len(inputs))) for t in (inputs, labels)), strict=True)
        updates = [client(model, *part, **settings) for client, part in zip(clients, parts, strict=True)]
        return {name: torch.stack([u[name] for u in updates]).mean(0) for name in updates[0]}
