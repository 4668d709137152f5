"""What an attack is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from invlib.core.observation import Observation
from invlib.core.reconstruction import Reconstruction


class Attack(Protocol):
    """Anything that turns an observation into images, as every attack of invlib does."""

    def __call__(
        self, model: nn.Module, observation: Observation, *, generator: torch.Generator | None = None
    ) -> Reconstruction:
        """Attack an observation."""
        ...
