"""What all checks for why attacks failed look at: an update, what was read off it, and what was tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from invlib.auditing.facts import Foreign, Numbers, distorted, noise_of
from invlib.auditing.words import Finding
from invlib.core.observation import Observation
from invlib.core.reconstruction import Reconstruction


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """What all checks look at."""

    model: nn.Module
    observation: Observation
    numbers: Numbers
    foreign: list[Foreign]
    eps: float
    tried: Sequence[Reconstruction]
    truth: tuple[Tensor, Tensor] | None

    @property
    def best_estimate(self) -> Foreign | None:
        """The most exact estimate of noise, where there is more than rounding, and it can be noise."""
        if self.numbers.sparse or self.numbers.quantised:
            return None
        return noise_of(self.foreign)

    def proves(self, finding: Finding) -> bool:
        """Say whether what a finding rests on is the client's, and not noise, rounding or what is missing."""
        if distorted(self.observation):
            return finding.name == "Local steps"
        rounded = self.numbers.sparse or self.numbers.quantised or self.best_estimate is not None
        return not rounded or finding.name not in ("Batch size", "Mode")

    @property
    def noise_share(self) -> float:
        """The share of the update's squared length that is noise, if each number has the same."""
        found, norm = self.best_estimate, self.numbers.norm
        return min(1.0, self.numbers.count * (found.sigma / norm) ** 2) if found and norm else 0.0
