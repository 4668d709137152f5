"""What an update tells without any search."""

from __future__ import annotations

from torch import nn

from invlib.auditing.words import Finding
from invlib.core.observation import Observation


def leaks(model: nn.Module, observation: Observation) -> list[Finding]:
    """Return what the update tells by itself."""
    return []
