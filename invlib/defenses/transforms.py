"""What a client may do to its update before it leaves: functions of one update, described for both sides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from invlib.errors import ConfigError
from invlib.federated import rules
from invlib.settings import Checked, NotNegative, Positive, Rule

Named = Mapping[str, Tensor]
Box = list[tuple[Tensor, Tensor]]
_NAMES = Rule(
    "the name of a layer or a parameter, or a tuple of names",
    lambda names: (
        bool(names) and all(isinstance(name, str) and name for name in names) and not isinstance(names, dict)
    ),
)


class Transform(Checked):
    """A function of one update, name → tensor: what leaves the client, and what a server may know of it.

    A subclass is a frozen dataclass that says what differs from doing nothing.
    """

    called: ClassVar[str]  # in words
    law: ClassVar[str] = ""  # of what is drawn: "gaussian" or "laplace"
    rescales: ClassVar[bool] = False  # whether it changes the length of an update by a factor

    @property
    def noise(self) -> float:
        """The standard deviation of what is drawn and added to each number."""
        return 0.0

    @property
    def coarse(self) -> bool:
        """Whether several updates become the same one, so that a number sent stands for an interval."""
        return False

    @property
    def words(self) -> str:
        """What it is, in a few words."""
        numbers = [getattr(self, f.name) for f in fields(self)]  # type: ignore[arg-type]
        return " ".join(
            [self.called, *(f"{n:g}" if isinstance(n, (int, float)) else str(n) for n in numbers)]
        )

    def __repr__(self) -> str:
        given = ", ".join(repr(getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({given})"

    def apply(self, update: Named, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the update that leaves; what is random comes from the generator, on the CPU."""
        return self.simulate(update)

    def simulate(self, update: Named) -> dict[str, Tensor]:
        """Return what a server can compute of it: differentiable, without what is drawn or rounded."""
        return dict(update)

    def before(self, box: Box) -> Box:
        """Return the intervals in which numbers were before, from those in which they are afterwards."""
        return box


@dataclass(frozen=True, repr=False)
class Clip(Transform):
    r"""Shorten an update to a norm, :math:`u \leftarrow u\, \min(1, C / (\|u\| + 10^{-6}))`.

    It is what `torch.nn.utils.clip_grad_norm_` does to all tensors of the update as one vector. By itself it
    hides nothing but the length.

    Args:
        norm: :math:`C`, the longest update.

    Raises:
        ConfigError: it is not positive.

    Taught in: chapter 7
    """

    norm: Positive
    called: ClassVar[str] = "clip"
    rescales: ClassVar[bool] = True

    def simulate(self, update: Named) -> dict[str, Tensor]:
        """Return the shortened update."""
        return rules.clipped(update, self.norm, stacked=False)


@dataclass(frozen=True, repr=False)
class GaussianNoise(Transform):
    """Add independent Gaussian noise to each number of an update.

    Args:
        sigma: the standard deviation of each number of what is sent, in the unit of the update. A noise
            multiplier of differential privacy is this over the clip's norm.

    Raises:
        ConfigError: it is negative.

    Taught in: chapter 7
    """

    sigma: NotNegative
    called: ClassVar[str] = "noise"
    law: ClassVar[str] = "gaussian"

    @property
    def noise(self) -> float:
        """The standard deviation of each number."""
        return self.sigma

    def apply(self, update: Named, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the update with noise."""
        return {n: u + self.sigma * self._drawn(u, generator).to(u) for n, u in update.items()}

    def _drawn(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, repr=False)
class LaplaceNoise(GaussianNoise):
    r"""Add independent Laplace noise to each number of an update.

    Args:
        sigma: the standard deviation of each number of what is sent, in the unit of the update; the scale of
            the distribution is :math:`\\sigma / \\sqrt 2`.

    Raises:
        ConfigError: it is negative.
    """

    called: ClassVar[str] = "Laplace noise"
    law: ClassVar[str] = "laplace"

    def _drawn(self, like: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(like.shape, generator=generator, dtype=torch.float64) - 0.5
        return -uniform.sign() * torch.log1p(-2 * uniform.abs()) / math.sqrt(2)


@dataclass(frozen=True, repr=False)
class MaskLayer(Transform):
    """Send zeros for some layers of the network, as a client that keeps those to itself.

    Args:
        names: of a parameter (``"fc.weight"``), or of a layer with all its parameters (``"fc"``), or several.

    Raises:
        ConfigError: when a client uses it, an update that has no such parameter.

    Taught in: chapter 7
    """

    names: Annotated[str | tuple[str, ...], _NAMES]
    called: ClassVar[str] = "without"

    @property
    def words(self) -> str:
        """What it is, in a few words."""
        return f"{self.called} {', '.join([self.names] if isinstance(self.names, str) else self.names)}"

    def simulate(self, update: Named) -> dict[str, Tensor]:
        """Return the update with zeros in the place of those layers."""
        hidden = self.hidden(update)
        return {name: torch.zeros_like(u) if name in hidden else u for name, u in update.items()}

    def hidden(self, update: Named) -> set[str]:
        """Return the names of the parameters that are not sent."""
        found = set[str]()
        for given in (self.names,) if isinstance(self.names, str) else self.names:
            named = {name for name in update if name == given or name.startswith(f"{given}.")}
            if not named:
                raise ConfigError(f"MaskLayer names has {given!r}; expected one of {', '.join(update)}")
            found |= named
        return found
