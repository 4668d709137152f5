"""Why attacks failed."""

from __future__ import annotations

from torch import Tensor, nn

from invlib.auditing.tried import Tried
from invlib.auditing.words import Finding
from invlib.core.observation import Observation


def why(
    model: nn.Module, observation: Observation, tried: list[Tried], truth: Tensor | None
) -> list[Finding]:
    """Return the reasons that can be told."""
    return []
