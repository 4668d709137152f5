"""What a client's step that is made around another one hands on from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from torch import Tensor, nn

from invlib.autodiff.gradients import PLAIN, GradientMode
from invlib.core.observation import ClientStep, stackable, takes_mode
from invlib.federated import FedSGD
from invlib.settings import Checked, Rule

ONE_GRADIENT = FedSGD()
Inner = Annotated[
    Any,
    Rule(
        "a client's step that takes an argument mode, as FedSGD(), without defences, which go outside",
        lambda c: callable(c) and not isinstance(c, type) and takes_mode(c) and not hasattr(c, "release"),
    ),
]


class Around(Checked):
    """Settings of a client's step that calls another, ``client``, and says of updates what that one says.

    Args:
        client: the other step.
    """

    client: ClientStep

    @property
    def stackable(self) -> bool:
        """Whether every restart of a stack is treated by itself, as by the other step."""
        return stackable(self.client)

    def __call__(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, *, mode: GradientMode = PLAIN, **settings: Any
    ) -> dict[str, Tensor]:
        """Return the update as a server can compute it; arguments and result as of `invlib.FedAvg`."""
        update: dict[str, Tensor] = self.client(model, inputs, labels, mode=mode, **settings)
        return update

    def inside(self, num_images: int) -> ClientStep:
        """Return the other step with what it draws, from torch's global generator."""
        draw = getattr(self.client, "drawn", None)
        client: ClientStep = self.client if draw is None else draw(num_images)
        return client

    def images(self, num_images: int) -> int:
        """Return how many of the images one call of the other step is given."""
        return num_images

    @property
    def mean_gradient(self) -> Callable[[Tensor, int], Tensor]:
        """Turn a tensor of the update and the number of images into the mean gradient.

        Raises:
            AttributeError: the other step cannot.
        """
        turn = self.client.mean_gradient
        return lambda update, num_images: turn(update, self.images(num_images))

    @property
    def response(self) -> Callable[[int], Any]:
        """What `invlib.FedAvg.response` says, where the other step says it."""
        own: Callable[[int], Any] = self.client.response  # type: ignore[attr-defined]
        return lambda num_images: own(self.images(num_images))

    @property
    def linear(self) -> bool:
        """Whether the update is a sum of gradients."""
        return bool(getattr(self.client, "linear", True))

    @property
    def weight_decay(self) -> float:
        """The other step's weight decay."""
        return float(getattr(self.client, "weight_decay", 0.0))

    @property
    def dropout(self) -> Any:
        """What dropout draws."""
        return getattr(self.client, "dropout", "drawn")
