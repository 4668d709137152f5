"""Soteria: a client withholds the part of one layer's gradient that its images shape most directly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from invlib.core.network import forward, trainable_parameters
from invlib.core.observation import ClientStep
from invlib.defenses.around import ONE_GRADIENT, Around, Inner
from invlib.errors import ConfigError
from invlib.settings import Factor


@dataclass(frozen=True)
class Soteria(Around):
    r"""A client sets columns of one fully connected layer's weight gradient to zero before it sends it.

    The layer's input r, the representation, is read off this gradient. Entry i is withheld, in all rows,
    where

    .. math:: s_i = \sum_n \frac{|r_{ni}|}{\|\partial r_{ni} / \partial x_n\|}

    is largest: there a change of the entry means the largest change of the image. The published code has the
    inverse of the quotient and adds 0.1 to its denominator, by which entries that are zero go first, whose
    columns are zero without any defence.

    All else of the update is sent as it is. So the attacker who knows the defence compares what was sent:
    the columns are marked in `invlib.Observation.sent`, and no attack reads them. Balunović et al. leave out
    the whole layer, which costs the rest of it.

    Args:
        layer: the name of the fully connected layer.
        share: the part of the representation's entries that is withheld.
        client: the step that is defended.
        public: whether the server is told; if not, an attack takes the zeros for gradients.

    Raises:
        ConfigError: a setting is out of range; when it is called, there is no such layer, its weight is not
            trained, or it is not given one vector of each image.

    Source: Sun et al. 2021, arXiv 2012.06043; the attacker who knows it, Balunović et al. 2022,
    arXiv 2111.04706. It bounds nothing.

    Taught in: chapter 7
    """

    layer: str
    share: Factor = 0.5
    client: Inner = ONE_GRADIENT
    public: bool = True

    def drawn(self, num_images: int) -> Callable[..., dict[str, Tensor]]:
        """Return the step that the client takes, which withholds."""
        return partial(self._withholding, self.inside(num_images))

    def sent(self, released: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which numbers of the layer's weight were sent, by its name."""
        value = released[f"{self.layer}.weight"]
        return {f"{self.layer}.weight": value.any(0).expand_as(value)}

    def _withholding(
        self, client: ClientStep, model: nn.Module, inputs: Tensor, labels: Tensor, **settings: Any
    ) -> dict[str, Tensor]:
        name, module = f"{self.layer}.weight", dict(model.named_modules()).get(self.layer)
        update = client(model, inputs, labels, **settings)
        if not isinstance(module, nn.Linear) or name not in update:
            raise ConfigError(
                f"Soteria layer is {self.layer!r}, in this network {type(module).__name__}; expected a fully "
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
