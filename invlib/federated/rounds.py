"""Several rounds of one client, in which it used the same images, as one observation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.autodiff.gradients import PLAIN, GradientMode
from invlib.core.network import trainable_parameters
from invlib.core.observation import ClientStep, Loss, Observation, stackable, takes_mode
from invlib.errors import ConfigError, ObservationError


class Rounds(nn.Module):
    """The models of several rounds side by side; called on images it is the first.

    Args:
        models: what the client received in each round; copies are kept.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.rounds = nn.ModuleList(copy.deepcopy(model) for model in models)

    def forward(self, inputs: Tensor) -> Any:
        """Return what the first model makes of the inputs."""
        return self.rounds[0](inputs)


@dataclass(frozen=True, kw_only=True)
class LikelihoodOfRounds:
    """The likelihood of several rounds, the sum of each round's; of clients all of which have one.

    Args:
        each: the rounds' likelihoods.
        scales: factors of their updates.
    """

    each: tuple[Any, ...]
    scales: tuple[float, ...]

    @property
    def sigma(self) -> float:
        """The standard deviation of noise in the first round that has some; 0 where none has."""
        return next((float(known.sigma) for known in self.each if known.sigma), 0.0)

    @property
    def words(self) -> str:
        """What it is, in words."""
        return f"{' and '.join(dict.fromkeys(known.words for known in self.each))} in {len(self.each)} rounds"

    @property
    def doubts(self) -> tuple[str, ...]:
        """What it leaves out, a sentence each."""
        return tuple(dict.fromkeys(doubt for known in self.each for doubt in known.doubts))

    @property
    def directional(self) -> bool:
        """Whether all rounds compare directions alone."""
        return all(known.directional for known in self.each)

    def unit(self, target: Sequence[Tensor]) -> float:
        """Return what it makes of a cosine distance of 1, about."""
        return sum(
            float(known.unit(seen)) for known, seen in zip(self.each, self._parts(target), strict=True)
        )

    def __call__(
        self,
        candidate: Sequence[Tensor],
        target: Sequence[Tensor],
        weights: Sequence[float] | None = None,
    ) -> Tensor:
        """Return the objective of the updates of all rounds, one round's tensors after another's."""
        ways = zip(self.each, self._parts(candidate), self._parts(target), strict=True)
        factors = [1.0] * len(target) if weights is None else list(weights)
        count = len(target) // len(self.each)
        parts = [
            known(one, seen, factors[k * count : (k + 1) * count])
            for k, (known, one, seen) in enumerate(ways)
        ]
        return torch.stack(parts).sum()

    def _parts(self, update: Sequence[Tensor]) -> list[list[Tensor]]:
        count, left = divmod(len(update), len(self.each))
        if left:
            raise ConfigError(
                f"{self.words} is of {len(update)} tensors; expected those of all layers in each round"
            )
        return [
            [u / scale for u in update[k * count : (k + 1) * count]] for k, scale in enumerate(self.scales)
        ]


@dataclass(frozen=True, kw_only=True)
class EachRound:
    """One client's steps of several rounds on the same images, called like `invlib.FedSGD`.

    Args:
        clients: its step in each round.
        scales: factors of the updates, so that each round counts alike.
    """

    clients: tuple[ClientStep, ...]
    scales: tuple[float, ...]

    @property
    def stackable(self) -> bool:
        """Whether the client treats every restart of a stack by itself in all rounds."""
        return all(map(stackable, self.clients))

    @property
    def linear(self) -> bool:
        """Whether the updates are sums of gradients."""
        return all(getattr(client, "linear", True) for client in self.clients)

    @property
    def likelihood(self) -> LikelihoodOfRounds:
        """The likelihood of the clients' defences.

        Raises:
            AttributeError: a client has none.
        """
        each = tuple(client.likelihood for client in self.clients)  # type: ignore[attr-defined]
        return LikelihoodOfRounds(each=each, scales=self.scales)

    @property
    def noise(self) -> float:
        """The standard deviation of the noise in the first round's update, as it is scaled."""
        return float(getattr(self.clients[0], "noise", 0.0)) * self.scales[0]

    @property
    def mean_gradient(self) -> Callable[[Tensor, int], Tensor]:
        """Turn a tensor of the first round's update into its mean gradient.

        Raises:
            AttributeError: the client cannot in that round.
        """
        turn = self.clients[0].mean_gradient
        return lambda update, num_images: turn(update / self.scales[0], num_images)

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        loss: Loss = F.cross_entropy,
        on_step: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
        mode: GradientMode = PLAIN,
    ) -> dict[str, Tensor]:
        """Return the updates of all rounds by parameter name."""
        params = trainable_parameters(model) if params is None else params
        buffers = dict(model.named_buffers()) if buffers is None else buffers
        update = dict[str, Tensor]()
        for k, (client, scale) in enumerate(zip(self.clients, self.scales, strict=True)):
            first = f"rounds.{k}."
            own, moving = (_of_round(tensors, first) for tensors in (params, buffers))
            told: dict[str, Any] = {"mode": mode} if takes_mode(client) else {}
            net = model.get_submodule(first[:-1])
            sent = client(net, inputs, labels, params=own, buffers=moving, loss=loss, **told)
            update |= {first + name: value * scale for name, value in sent.items()}
        if on_step is not None:
            on_step(params, inputs)
        return update


def several_rounds(
    models: Sequence[nn.Module], observations: Sequence[Observation]
) -> tuple[nn.Module, Observation]:
    r"""Return one model and one observation of a client that used the same images in several rounds.

    Any attack can be run on them, and matches all updates at once, each scaled to length 1. With the squared
    distance that is :math:`\sum_t \| u_t(x) - u_t^\ast \|^2 / \| u_t^\ast \|^2`; with the cosine it is nearly
    the mean of the rounds' cosines. Labels and closed forms are read off the first round. Of clients whose
    defences are known the likelihoods are added; where one model got updates that differ by Gaussian noise
    alone, their mean is one round's update, with the noise over the root of their number.

    Args:
        models: the model that the client received in each round.
        observations: what the server saw in each round.

    Returns:
        The models side by side, and the observation of all rounds.

    Raises:
        ObservationError: there is none, one does not fit its model or is all zero, or the rounds differ in
            what one client's images have in common.

    Example:
        >>> import invlib as iv
        >>> models = [iv.models.build("LeNetZhu", num_classes=10, seed=seed) for seed in range(2)]
        >>> images, labels = iv.data.samples("photos32", indices=[0])
        >>> seen = [
        ...     iv.observe(m, images, labels, iv.FedSGD(), normalization=iv.CIFAR10) for m in models
        ... ]
        >>> model, both = iv.several_rounds(models, seen)
        >>> len(both.update) == 2 * len(seen[0].update)
        True

    Source: the sum over rounds is that of multiple updates in Geng et al. 2021, arXiv 2110.09074.

    Taught in: chapter 4
    """
    if not observations or len(models) != len(observations):
        raise ObservationError(
            f"there are {len(models)} models and {len(observations)} observations; expected as many"
        )
    checked = [seen.validate(net, text=None) for net, seen in zip(models, observations, strict=True)]
    first = observations[0]
    for name in ("num_images", "image_shape", "normalization", "training_mode", "loss", "vocabulary"):
        for k, other in enumerate(observations):
            if getattr(other, name) != getattr(first, name):
                raise ObservationError(
                    f"round {k} has {name} {getattr(other, name)}; expected {getattr(first, name)}, as round "
                    "0 has"
                )
    told = [seen.labels for seen in observations if seen.labels is not None]
    if any(not torch.equal(told[0], labels) for labels in told):
        raise ObservationError("the rounds have other labels; expected the same images in the same order")
    lengths = [math.hypot(*(float(u.double().norm()) for u in seen.update.values())) for seen in observations]
    if 0 in lengths:
        raise ObservationError(
            f"the update of round {lengths.index(0)} is all zero; expected one that is not"
        )
    if (mean := _mean(checked, observations)) is not None:
        checked, observations = checked[:1], [mean]
        lengths = lengths[:1]
    scales = tuple(1 / length for length in lengths)
    protocol = EachRound(clients=tuple(seen.protocol for seen in observations), scales=scales)
    whole = replace(
        first,
        update=_joined(
            {n: u * s for n, u in o.update.items()} for o, s in zip(observations, scales, strict=True)
        ),
        protocol=protocol,
        labels=told[0] if told else None,
        buffers=_joined(seen.buffers for seen in observations),
        sent=_joined(seen.sent for seen in observations),
        notes=tuple(dict.fromkeys(note for seen in observations for note in seen.notes)),
    )
    return Rounds(checked).train(checked[0].training), whole


def _mean(models: Sequence[nn.Module], observations: Sequence[Observation]) -> Observation | None:
    """Return the mean of the rounds as one, where one model got the same update with noise of its own."""
    first, count = observations[0], len(observations)
    mean = first.protocol.averaged(count) if hasattr(first.protocol, "averaged") else None
    alike = all(seen.protocol == first.protocol for seen in observations) and all(
        torch.equal(value, other)
        for model in models
        for value, other in zip(models[0].state_dict().values(), model.state_dict().values(), strict=True)
    )
    if mean is None or not alike:
        return None
    update = {
        name: torch.stack([seen.update[name] for seen in observations]).mean(0) for name in first.update
    }
    return replace(first, update=update, protocol=mean)


def _joined(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"rounds.{k}.{name}": value for k, part in enumerate(parts) for name, value in part.items()}


def _of_round(tensors: Mapping[str, Tensor], first: str) -> dict[str, Tensor]:
    return {n.removeprefix(first): value for n, value in tensors.items() if n.startswith(first)}
