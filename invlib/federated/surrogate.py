"""One gradient in the place of many local steps: a cheap reading of a weight update."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from invlib.core.network import in_mode, like, trainable_parameters
from invlib.core.observation import Observation
from invlib.errors import ConfigError, DoubtWarning, ObservationError
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
    evaluations costs one gradient where unrolling costs :math:`K` of them. With momentum, a schedule or a
    proximal term both sides are means with the weights that the gradients have in the update
    (`FedAvg.response`), and weight decay is taken off. Where the steps are long, `fitted_place` finds a
    better :math:`a` from images of a first result.

    Args:
        model: the model that the client received; a copy of it is moved.
        observation: what the server saw of a client that takes local steps on all of its images alike.
        at: :math:`a`, how far along the update the gradient is taken, in [0, 1]: 0 is where the client began.
            None takes the mean of the weights that it passed.

    Warns:
        DoubtWarning: the client runs Adam, of whose update no gradient can be read: a first step is about
            ``-lr`` times the gradient's sign.

    Returns:
        The copy, moved along the update, and an observation of one gradient there, by `FedSGD`.

    Raises:
        ConfigError: the client's protocol is not `FedAvg`, or ``at`` is out of range.
        ObservationError: the observation does not fit the model.

    Source: the idea is Zhu, Yao and Blaschko 2023, "Surrogate model extension (SME)", arXiv 2306.00127, who
    learn the place along the update; the place here follows from the expansion above.

    Taught in: chapter 4
    """
    model, protocol = _checked(model, observation)
    if at is not None and not 0 <= at <= 1:
        raise ConfigError(f"as_one_gradient at is {at}; expected a number in [0, 1]")
    count, params = observation.num_images, trainable_parameters(model)
    if protocol.linear:
        whole, place, decay = protocol.response(count)
    else:
        steps, decay = len(protocol.batches(count)), 0.0
        rates = protocol.lr[:steps] if isinstance(protocol.lr, tuple) else [protocol.lr] * steps
        whole, place = sum(rates), (steps - 1) / (2 * steps)
        warnings.warn(
            f"the update of {protocol} is no sum of gradients, more like one of their signs: what is read as "
            "a gradient has roughly its signs, and not its sizes",
            DoubtWarning,
            stacklevel=2,
        )
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in trainable_parameters(moved).items():
            p.add_(observation.update[name].to(p), alpha=place if at is None else at)
    update = observation.update
    if decay:
        update = {name: u + decay * params[name].detach().to(u) for name, u in update.items()}
    gradient = {name: u / -whole for name, u in update.items()}
    return moved, replace(observation, update=gradient, protocol=FedSGD())


def fitted_place(
    model: nn.Module, observation: Observation, images: Tensor, labels: Tensor | None = None
) -> float:
    r"""Return how far along a client's update the gradient of some images is nearest to its mean gradient.

    .. math:: \hat a = \arg\min_{a \in [0, 1]} \left\| \nabla L(\theta_0 + a \Delta; x) - \bar g \right\|

    with the mean gradient :math:`\bar g` that the update says; its direction alone where its length says
    nothing, as under clipping and Adam. An attack and this in turn, with the images that the attack found,
    fit images and place together.

    Args:
        model: the model that the client received; it is not changed.
        observation: what the server saw of a client that takes local steps on all of its images alike.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: of the images; None takes those of the observation.

    Returns:
        The place, for ``at`` of `as_one_gradient`.

    Raises:
        ConfigError: the client's protocol is not `FedAvg`.
        ObservationError: the observation does not fit the model, or nobody knows the labels.

    Source: Zhu, Yao and Blaschko 2023, "Surrogate model extension (SME)", arXiv 2306.00127.

    Taught in: chapter 4
    """
    model, protocol = _checked(model, observation)
    labels = observation.labels if labels is None else labels
    if labels is None:
        raise ObservationError("labels are hidden; expected those of the images")
    inputs = observation.normalization.encode(images.to(like(model)))
    labels = labels.to(inputs) if labels.is_floating_point() else labels.to(inputs.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoubtWarning)  # of directions alone
        target = as_one_gradient(model, observation, at=0)[1].update
    told = protocol.linear and protocol.clip_norm is None

    def distance(at: float) -> float:
        params = {n: p.detach() + at * observation.update[n].to(p) for n, p in start.items()}
        slopes = FedSGD()(model, inputs, labels, params=params, loss=observation.loss or F.cross_entropy)
        flat, wanted = (torch.cat([t[n].double().flatten() for n in start]) for t in (slopes, target))
        if not told:
            flat, wanted = flat / flat.norm().clamp_min(1e-300), wanted / wanted.norm()
        return float((flat - wanted).norm() / wanted.norm())

    start = trainable_parameters(model)
    with in_mode(model, training=observation.training_mode, seed=0):
        found = minimize_scalar(distance, bounds=(0, 1), method="bounded", options={"xatol": 1e-6})
        return float(min([found.x, 0.0, 1.0], key=distance))


def _checked(model: nn.Module, observation: Observation) -> tuple[nn.Module, FedAvg]:
    protocol = observation.protocol
    if not isinstance(protocol, FedAvg):
        raise ConfigError(f"got a client of {protocol}; expected FedAvg, whose steps one gradient stands for")
    return observation.validate(model), protocol
