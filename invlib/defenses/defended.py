"""A client with defences: its step as the server can compute it, and what leaves the client."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invlib.autodiff.gradients import PLAIN, GradientMode
from invlib.core.observation import ClientStep, Loss, stackable, takes_mode
from invlib.defenses.coarse import TopK
from invlib.defenses.likelihood import Likelihood
from invlib.defenses.transforms import MaskLayer, Named, Transform
from invlib.errors import ConfigError
from invlib.settings import Checked, Rule

_CLIENT = Rule(
    "a client's step such as FedSGD(), an instance", lambda c: callable(c) and not isinstance(c, type)
)
_HANDED_ON = ("mean_gradient", "response", "linear", "weight_decay", "dropout")


@dataclass(frozen=True, repr=False)
class Defended(Checked):
    """A client that changes its update before it leaves: clipped, noised, the largest numbers alone.

    Called like the client, it gives what the server can compute of the update: all that is certain and can
    be differentiated, without noise and without rounding. `release` is what the client sends, and what
    `invlib.observe` shows. An attack whose objective is left at its default compares by `likelihood`.

    Args:
        client: the step of the client without them, `invlib.FedSGD` or any other.
        transforms: one after another, in that order.
        public: whether the server is told; if not, `invlib.observe` puts the client without them into the
            observation, and an attack is a naive one.

    Raises:
        ConfigError: the client is none, or has defences itself.

    Example:
        >>> import invlib as iv
        >>> iv.Defended(iv.FedSGD(), [iv.defenses.Clip(1.0), iv.defenses.GaussianNoise(0.01)])
        Defended(FedSGD(), [Clip(1.0), GaussianNoise(0.01)])

    Source: Balunović et al. 2022, arXiv 2111.04706, for an attacker who knows the defence.

    Taught in: chapter 7
    """

    client: Annotated[Any, _CLIENT]
    transforms: tuple[Transform, ...] = ()
    public: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.client, Defended):
            raise ConfigError(
                f"Defended client is {self.client!r}; expected a client without defences, and all "
                "transforms in one list"
            )

    def __repr__(self) -> str:
        hidden = "" if self.public else ", public=False"
        return f"Defended({self.client!r}, {list(self.transforms)!r}{hidden})"

    def __getattr__(self, name: str) -> Any:
        if name in _HANDED_ON:
            return getattr(self.client, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def stackable(self) -> bool:
        """Whether each restart of a stack is treated by itself, as the client does."""
        return stackable(self.client)

    @property
    def noise(self) -> float:
        """The standard deviation of the noise in each number, as the likelihood has it."""
        return self.likelihood.sigma

    @property
    def likelihood(self) -> Likelihood:
        """The objective of an attacker who knows the transforms."""
        return Likelihood(self.transforms)

    def loss(
        self, simulated: Sequence[Tensor], seen: Sequence[Tensor], weights: Sequence[float] | None = None
    ) -> Tensor:
        """Return the negative log-likelihood, up to constants, of what was seen; lists of tensors."""
        return self.likelihood(simulated, seen, weights)

    def drawn(self, num_images: int) -> Defended:
        """Return it with what the client draws, where that draws something."""
        if not hasattr(self.client, "drawn"):
            return self
        return replace(self, client=self.client.drawn(num_images))

    def release(self, update: Named, generator: torch.Generator) -> dict[str, Tensor]:
        """Return what leaves the client.

        Args:
            update: of the client without defences.
            generator: draws noise, on the CPU.
        """
        now = {name: value.detach() for name, value in update.items()}
        for transform in self.transforms:
            now = transform.apply(now, generator)
        return now

    def sent(self, released: Named) -> dict[str, Tensor]:
        """Return, for tensors of which numbers were left out, where one was sent; noise leaves none out."""
        masks = dict[str, Tensor]()
        last = max((k for k, t in enumerate(self.transforms, 1) if t.noise), default=0)
        for transform in self.transforms[last:]:
            if isinstance(transform, MaskLayer):
                masks |= {
                    name: torch.zeros_like(released[name]).bool() for name in transform.hidden(released)
                }
            elif isinstance(transform, TopK) and transform.coarse:
                masks |= {name: value != 0 for name, value in released.items()}
        return {name: mask for name, mask in masks.items() if not mask.all()}

    def averaged(self, rounds: int) -> Defended | None:
        """Return the client whose update is the mean over so many rounds on one model.

        None where the mean says less than they do: where noise is not Gaussian, or something follows it.
        """
        last = self.transforms[-1] if self.transforms else None
        if last is None or not last.noise or last.law != "gaussian" or self.likelihood.doubts:
            return None
        if any(t.noise for t in self.transforms[:-1]):
            return None
        mean = replace(last, sigma=last.noise / math.sqrt(rounds))  # type: ignore[type-var]
        return replace(self, transforms=(*self.transforms[:-1], mean))

    def __call__(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        *,
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        loss: Loss = F.cross_entropy,
        on_step: Callable[[Mapping[str, Tensor], Tensor], None] | None = None,
        mode: GradientMode = PLAIN,
    ) -> dict[str, Tensor]:
        """Return the update as the server can compute it, by parameter name."""
        client: ClientStep = self.client
        told: dict[str, Any] = {"mode": mode} if takes_mode(client) else {}
        update = client(
            model, inputs, labels, params=params, buffers=buffers, loss=loss, on_step=on_step, **told
        )
        simulate = self.likelihood.simulate
        if mode.kind in ("mapped", "stacked"):  # of a stack, each restart's update
            simulate = torch.func.vmap(simulate)
        return simulate(update)
