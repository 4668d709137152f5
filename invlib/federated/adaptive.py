"""What Adam's update says of a client's gradients, without the jumps of their signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.autodiff.gradients import PLAIN, GradientMode, State, gradient
from invlib.core.network import in_mode, like
from invlib.core.observation import Loss, Observation
from invlib.errors import ConfigError
from invlib.federated.dropout import Masks
from invlib.federated.protocols import FedAvg, loss_by_parameters

_Named = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Mismatch:
    """A client's step whose result is zero where its images explain a client of Adam.

    Args:
        client: the client.
        path: its weights before each local step.
        update: what it sent.
        scale: by what the mismatch is divided.
    """

    client: FedAvg
    path: tuple[_Named, ...]
    update: _Named
    scale: float

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        loss: Loss = F.cross_entropy,
        mode: GradientMode = PLAIN,
    ) -> dict[str, Tensor]:
        """Return the mismatch by parameter name, on the path whatever ``params`` are."""
        state, masks = State(), Masks(model, self.client.dropout)
        made, first = dict[str, Tensor](), dict[str, Tensor]()
        for k, rows in enumerate(self.client.batches(len(inputs))):
            here = {name: p.detach().requires_grad_() for name, p in self.path[k].items()}
            loss_of = masks.of(loss_by_parameters(model, buffers, loss))
            slopes = gradient(loss_of, here, inputs[rows], labels[rows], mode, fixed=True)
            first = first or slopes
            then, state = self.client._rule(here, slopes, state, start=self.path[0], step=k)
            made = {name: made.get(name, 0) + then[name] - p for name, p in here.items()}
        return {
            name: (step - self.update[name]) * first[name].abs() / self.scale for name, step in made.items()
        }


def without_jumps(model: nn.Module, observation: Observation, images: Tensor, labels: Tensor) -> Observation:
    r"""Return an observation to go on with from images near those of a client of Adam; its update is zero.

    A first step of Adam is :math:`-\eta\, g / |g|`, number by number: as a function of the images it is
    constant but for jumps, which the gradient of an attack's objective does not see. Two things are known
    that take them away. Images that are roughly right say nearly where the client was,
    :math:`\theta_k = \theta_k(\hat x) + \tfrac kK (\Delta - \Delta(\hat x))`, so that all gradients are taken
    there. And what is missing of the update is weighed by the gradient,

    .. math:: r_i(x) = \frac{|g_i(x)|}{\|g(\hat x)\|}\, \frac{\Delta_i(x) - \Delta_i}{\eta K},

    with the gradient :math:`g` of the first step: it passes through zero where :math:`\Delta_i(x)` jumps, and
    at the client's images all of it is zero. An attack on what is returned minimises :math:`\sum r_i^2`,
    which is `invlib.objectives.l2`.

    Args:
        model: the model that the client received; it is not changed.
        observation: what the server saw of a client of Adam or AdamW.
        images: ``(N, C, H, W)`` in [0, 1], as a first search found them.
        labels: of the images.

    Raises:
        ConfigError: the client runs no Adam.

    Source: this project's.
    """
    client, loss = observation.protocol, observation.loss or F.cross_entropy
    if not isinstance(client, FedAvg) or client.linear:
        raise ConfigError(f"got a client of {client}; expected FedAvg with Adam or AdamW")
    inputs, path = observation.normalization.encode(images.to(like(model))), list[_Named]()
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}

    def passed(params: _Named, _: Tensor) -> None:
        path.append({name: p.detach().clone() for name, p in params.items()})

    with in_mode(model, training=observation.training_mode, seed=0):
        sent = client(model, inputs, labels, buffers=buffers, loss=loss, on_step=passed)
        rows, loss_of = client.batches(len(inputs))[0], loss_by_parameters(model, buffers, loss)
        first = gradient(loss_of, path[0], inputs[rows], labels[rows])
    update = {name: observation.update[name].to(u) for name, u in sent.items()}
    rates = client.lr[: len(path)] if isinstance(client.lr, tuple) else [client.lr] * len(path)
    step = Mismatch(
        client=client,
        path=tuple(
            {name: p + k / len(path) * (update[name] - sent[name].detach()) for name, p in here.items()}
            for k, here in enumerate(path)
        ),
        update=update,
        scale=sum(rates) * max(1e-30, float(torch.cat([g.flatten() for g in first.values()]).norm())),
    )
    nothing = {name: torch.zeros_like(u) for name, u in update.items()}
    return replace(observation, update=nothing, protocol=step, labels=labels)  # type: ignore[arg-type] # no mean gradient
