"""What every family of the zoo shares: activations by name, optional batch norm, checks of sizes.

All networks map images ``(N, C, H, W)`` to logits ``(N, K)`` and take ``num_classes`` (K), ``in_channels``,
``image_size`` (height and width, where the network depends on it), ``activation`` (a name of `ACTIVATIONS`)
and some ``batch_norm``, all as for `invlib.models.build`. They raise `ConfigError` where one does not fit.
"""

from typing import Annotated

from torch import nn

from invlib.errors import ConfigError
from invlib.settings import checked, whole

# None of them works in place: gradient matching differentiates a network twice, and vmap runs it on
# many guesses at once; both need every activation kept as it was.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


def activation_layer(name: str) -> nn.Module:
    """Return a new activation layer of that name, or raise ``ConfigError`` with the names there are."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def norm_layer(channels: int, batch_norm: bool) -> nn.Module:
    """Return batch norm over that many channels, or the identity where batch norm is switched off."""
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


def check_colour(name: str, in_channels: int, image_size: int) -> None:
    """Raise ``ConfigError`` unless the images suit a network of ImageNet: colours, and 32 pixels or more."""
    at_least("image_size", image_size, 32, f"{name} halves it five times")
    if in_channels != 3:
        raise ConfigError(f"in_channels is {in_channels}; expected 3, for {name} takes colour images")


def at_least(setting: str, value: int, least: int, why: str) -> int:
    """Return the value, or raise ``ConfigError`` unless it is a whole number that is large enough."""
    rule = whole(f"a whole number of at least {least} ({why})", lambda n: n >= least)
    return int(checked(setting, value, Annotated[int, rule]))
