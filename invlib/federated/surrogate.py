"""One gradient in the place of many local steps: a cheap reading of a weight update."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from invlib.core.network import trainable_parameters
from invlib.core.observation import Observation
from invlib.errors import ConfigError
from invlib.federated.protocols import FedAvg, FedSGD


def as_one_gradient(
    model: nn.Module, observation: Observation, *, at: float | None = None
) -> tuple[nn.Module, Observation]:
    r"""Return a model and an observation of a single gradient that stand for a client's local steps.

    A client of :math:`K` local steps sends the sum of gradients at the weights that it passed,
    :math:`\Delta = -\eta \sum_{k=0}^{K-1} \nabla L(\theta_k)`. If it moved in a straight line, it was at
    :math:`\theta_k = \theta_0 + \tfrac{k}{K} \Delta`, and the mean of those gradients is, up to the square of
    the learning rate, the gradient at the mean of those weights:

    .. math:: -\frac{\Delta}{\eta K} \approx \nabla L(\theta_0 + a \Delta), \qquad a = \frac{K - 1}{2 K} .

    The server knows everything in this. Any attack can be run on what is returned, and each of its
    evaluations costs one gradient where unrolling costs :math:`K` of them.

    Args:
        model: the model that the client received; a copy of it is moved.
        observation: what the server saw of a client that takes local steps on all of its images alike.
        at: :math:`a`, how far along the update the gradient is taken, in [0, 1]: 0 is where the client began.
            None takes the mean of the weights that it passed.

    Returns:
        The copy, moved along the update, and an observation of one gradient there, by `FedSGD`.

    Raises:
        ConfigError: the client's protocol is not `FedAvg`, or ``at`` is out of range.
        ObservationError: the observation does not fit the model.

    Source: the idea is Zhu, Yao and Blaschko 2023, "Surrogate model extension (SME)", arXiv 2306.00127, who
    learn the place along the update; the place here follows from the expansion above.

    Taught in: chapter 4
    """
    protocol = observation.protocol
    if not isinstance(protocol, FedAvg):
        raise ConfigError(
            f"as_one_gradient got a client of {protocol}; expected FedAvg, whose steps it stands for"
        )
    if at is not None and not 0 <= at <= 1:
        raise ConfigError(f"as_one_gradient at is {at}; expected a number in [0, 1]")
    model = observation.validate(model)
    steps = len(protocol.batches(observation.num_images))
    place = (steps - 1) / (2 * steps) if at is None else at
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in trainable_parameters(moved).items():
            p.add_(observation.update[name].to(p), alpha=place)
    gradient = {
        name: protocol.mean_gradient(u, observation.num_images) for name, u in observation.update.items()
    }
    return moved, replace(observation, update=gradient, protocol=FedSGD())
