"""What a captured update would have been with defences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from invlib.core.observation import Observation
from invlib.defenses.defended import Defended
from invlib.defenses.transforms import Transform


def defend(
    observation: Observation,
    transforms: Sequence[Transform],
    *,
    public: bool = True,
    generator: torch.Generator | None = None,
) -> Observation:
    """Return an observation as it would be had the client applied these transforms before it sent.

    They change the update alone, so that the private images are not needed: an audit tries defences on what
    it captured. The observation that is given stays as it is.

    Args:
        observation: of a client without defences.
        transforms: one after another, as `Defended` takes them.
        public: whether the server is told; if not, an attack is a naive one.
        generator: draws noise, on the CPU, and moves on; None draws the same noise at each call.

    Raises:
        ConfigError: a transform is none, or the client has defences already.

    Example:
        >>> import invlib as iv
        >>> model, image = iv.models.build("LeNetZhu", seed=0), torch.full((1, 3, 32, 32), 0.5)
        >>> seen = iv.observe(model, image, torch.tensor([3]), iv.FedSGD(), normalization=iv.CIFAR10)
        >>> defend(seen, [iv.defenses.Clip(1.0), iv.defenses.GaussianNoise(0.01)]).protocol
        Defended(FedSGD(), [Clip(1.0), GaussianNoise(0.01)])
    """
    client = Defended(observation.protocol, tuple(transforms), public=public)
    update = client.release(observation.update, generator or torch.Generator().manual_seed(0))
    if not public:
        return replace(observation, update=update)
    return replace(
        observation, update=update, protocol=client, sent={**observation.sent, **client.sent(update)}
    )
