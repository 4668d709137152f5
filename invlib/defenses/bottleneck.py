"""PRECODE: a stochastic layer in front of the last ones, whose noise an attacker does not know."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.core.network import unwrapped
from invlib.errors import ConfigError
from invlib.optim.objectives import Layers
from invlib.settings import Count, Seed, checks

_NARROW = 5.0  # taken off before the softplus, so that a fresh layer draws little


class Bottleneck(nn.Module):
    r"""A variational bottleneck: a mean and a spread of each input, a draw, and the way back.

    .. math:: (m, s) = E r, \quad b = m + \mathrm{softplus}(s - 5)\, \epsilon, \quad \hat r = D b

    The noise :math:`\epsilon` is drawn anew at each call from torch's global generator, in training and in
    evaluation mode; `invlib.observe` begins it by its generator's seed, and `invlib.FedAvg` by its argument
    ``dropout``, where both sides know it.

    Args:
        features: numbers of a representation :math:`r`.
        width: numbers of :math:`b`.

    Source: Scheliga et al. 2022, arXiv 2108.04725. The published loss adds the divergence of b from white
    noise with a small factor; here the client's loss is what it is.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(features, 2 * width), nn.Linear(width, features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return a draw ``(N, features)`` for representations ``(N, features)``."""
        mean, spread = self.encoder(inputs).chunk(2, -1)
        out: Tensor = self.decoder(mean + F.softplus(spread - _NARROW) * torch.randn_like(mean))
        return out


@checks
def with_bottleneck(model: nn.Module, layer: str, *, width: Count = 256, seed: Seed = 0) -> nn.Module:
    """Return a copy of a network with a `Bottleneck` in front of one of its fully connected layers.

    The server sends this network and knows it, but for the noise. That the naive attack matches all layers
    is its mistake: gradients behind the draw depend on the noise most, and `in_front` leaves them out. Where
    the noise is known, it is a network like any other.

    Args:
        model: the network; it is not changed.
        layer: the name of the fully connected layer.
        width: of the bottleneck.
        seed: of the bottleneck's weights.

    Raises:
        ConfigError: there is no such layer, or a setting is out of range.

    Source: Scheliga et al. 2022, arXiv 2108.04725; that the stochastic layers may be left out, Balunović et
    al. 2022, arXiv 2111.04706, and Scheliga et al. 2022, arXiv 2208.04767. It bounds nothing.
    """
    model = copy.deepcopy(unwrapped(model))
    own = dict(model.named_modules()).get(layer)
    if not isinstance(own, nn.Linear) or not layer:
        raise ConfigError(
            f"with_bottleneck layer is {layer!r}, in this network {type(own).__name__}; expected the name of "
            "a fully connected layer inside it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inserted = Bottleneck(own.in_features, width).to(own.weight)
    parent, _, name = layer.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Sequential(inserted, own))
    return model


def in_front(model: nn.Module) -> Layers:
    """Return the choice of the tensors in front of a network's `Bottleneck`, for `invlib.GradientMatching`.

    Args:
        model: with a bottleneck, and parameters in the order in which images pass them.

    Raises:
        ConfigError: there is no bottleneck, or nothing in front of it is trained.
    """
    first = next((f"{name}." for name, m in model.named_modules() if isinstance(m, Bottleneck)), None)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    count = next((k for k, name in enumerate(names) if first and name.startswith(first)), 0)
    if not count:
        raise ConfigError(
            f"{type(model).__name__} has {'no' if first is None else 'a'} bottleneck, with 0 trained tensors "
            "in front of it; expected some"
        )
    return Layers(which="first", count=count)
