"""Soteria: a client withholds the part of one layer's gradient that its images shape most directly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from invlib.autodiff.gradients import PLAIN, GradientMode
from invlib.core.network import forward, trainable_parameters
from invlib.core.observation import ClientStep, stackable
from invlib.defenses.around import ONE_GRADIENT, Around, Inner
from invlib.errors import ConfigError
from invlib.optim.objectives import Masked, cosine
from invlib.settings import Factor

_COMPARED = Masked(cosine)


@dataclass(frozen=True, kw_only=True)
class Soteria(Around):
    r"""A client sets columns of one fully connected layer's weight gradient to zero before it sends it.

    The layer's input r, the representation, is read off this gradient. Entry i is withheld, in all rows,
    where

    .. math:: s_i = \sum_n \frac{|r_{ni}|}{\|\partial r_{ni} / \partial x_n\|}

    is largest: there a change of the entry means the largest change of the image. The published code has the
    inverse of the quotient and adds 0.1 to its denominator, by which entries that are zero go first, whose
    columns are zero without any defence.

    Which entries these are depends on the images, and nothing else of the update does not: all other
    layers' gradients are sent as they are. So the attacker who knows the defence compares what was sent:
    ``loss`` is `invlib.objectives.Masked` of the cosine distance, to which withheld columns do not count. To
    leave the whole layer out, as Balunović et al. do, costs the rest of it. In an attack the client's step
    is that without the defence. For the attacker who does not know of it, replace the observation's
    ``protocol`` by ``client``.

    Args:
        layer: the name of the fully connected layer; None takes the last one.
        share: the part of the representation's entries that is withheld.
        client: the step that is defended.

    Raises:
        ConfigError: a setting is out of range; when it is called, there is no such layer, its weight is not
            trained, or it is not given one vector of each image.

    Source: Sun et al. 2021, arXiv 2012.06043; the attacker who knows it, Balunović et al. 2022,
    arXiv 2111.04706. It bounds nothing.
    """

    layer: str | None = None
    share: Factor = 0.5
    client: Inner = ONE_GRADIENT

    @property
    def stackable(self) -> bool:
        """Whether every restart of a stack is treated by itself."""
        return type(self) is Soteria and stackable(self.client)

    def drawn(self, num_images: int) -> Callable[..., dict[str, Tensor]]:
        """Return the step that the client takes, which withholds."""
        draw = getattr(self.client, "drawn", None)
        return partial(self._withholding, self.client if draw is None else draw(num_images))

    def __call__(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, *, mode: GradientMode = PLAIN, **settings: Any
    ) -> dict[str, Tensor]:
        """Return the update before anything is withheld; arguments as for `invlib.FedAvg`."""
        update: dict[str, Tensor] = self.client(model, inputs, labels, mode=mode, **settings)
        return update

    def loss(self, simulated: Any, seen: Any, weights: Any = None) -> Tensor:
        """Return the distance of two updates, lists of tensors, in the numbers that were sent."""
        return _COMPARED(simulated, seen, weights)

    def _withholding(
        self, client: ClientStep, model: nn.Module, inputs: Tensor, labels: Tensor, **settings: Any
    ) -> dict[str, Tensor]:
        layer = self.layer or next((n for n, m in reversed([*model.named_modules()]) if _linear(m)), "")
        name, module = f"{layer}.weight".removeprefix("."), dict(model.named_modules()).get(layer)
        update = client(model, inputs, labels, **settings)
        if not isinstance(module, nn.Linear) or name not in update:
            raise ConfigError(
                f"Soteria layer is {self.layer!r}, in the network {type(module).__name__}; expected a fully "
                "connected layer whose weight is trained"
            )
        params, buffers = settings.get("params"), settings.get("buffers")
        scores = shaped(model, module, inputs, params=params, buffers=buffers)
        withheld = scores.topk(max(1, round(self.share * len(scores)))).indices
        return update | {name: update[name].index_fill(1, withheld, 0)}


def shaped(
    model: nn.Module,
    layer: nn.Module,
    inputs: Tensor,
    *,
    params: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> Tensor:
    r"""Return how far images have to change for entries of a layer's input to change: :math:`s` of `Soteria`.

    Args:
        model: the network.
        layer: one of its layers, which is given ``(N, d)``.
        inputs: normalised images ``(N, C, H, W)``.
        params: in the place of the network's own.
        buffers: in the place of the network's own.

    Returns:
        ``(d,)``; an entry that is zero counts 0, one that no image can change more than any other.

    Raises:
        ConfigError: the layer is given something else.
    """
    given: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    try:
        with torch.enable_grad():
            images = inputs.detach().requires_grad_()
            forward(model, trainable_parameters(model) if params is None else params, buffers, images)
    finally:
        handle.remove()
    if len(given) != 1 or given[0].ndim != 2:
        raise ConfigError(
            f"Soteria's layer is given {[tuple(r.shape) for r in given]}; expected (N, d), once"
        )
    [entries] = given
    size = torch.zeros_like(entries)
    for i in range(entries.shape[1]):
        [slope] = torch.autograd.grad(entries[:, i].sum(), images, retain_graph=True, materialize_grads=True)
        size[:, i] = slope.flatten(1).norm(dim=1)
    return (entries.abs() / size.clamp_min(torch.finfo(size.dtype).tiny)).sum(0).detach()


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
