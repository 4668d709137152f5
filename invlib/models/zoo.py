"""The networks of `invlib.models`, by name."""

import difflib
import inspect
import math
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import nn

from invlib.errors import ConfigError, UnknownNameError
from invlib.models import (
    convnet,
    decoder,
    densenet,
    efficientnet,
    imagenet,
    irevnet,
    lenet,
    mlp,
    mobile,
    resnet,
    vit,
)
from invlib.models.layers import at_least
from invlib.models.weights import card_settings, fit, is_file, locate, read
from invlib.settings import Seed, checked

_MODELS: dict[str, Callable[..., nn.Module]] = {
    **convnet.MODELS,
    **lenet.MODELS,
    **mlp.MODELS,
    **resnet.MODELS,
    **densenet.MODELS,
    **mobile.MODELS,
    **irevnet.MODELS,
    **vit.MODELS,
    **decoder.MODELS,
    **imagenet.MODELS,
    **efficientnet.MODELS,
}


# Up to here every network of the zoo is small; beyond, its size is counted before it is made.
_ORDINARY = {"num_classes": 1000, "in_channels": 3, "image_size": 224}
_MOST_NUMBERS = 1 << 31


def names() -> tuple[str, ...]:
    """Return the names that ``build`` knows, family by family.

    >>> names()[:5]
    ('ConvNet8', 'ConvNet16', 'ConvNet32', 'ConvNet64', 'LeNetZhu')
    """
    return tuple(_MODELS)


def parameter_count(model: nn.Module) -> int:
    """Return how many numbers a client sends for this network: the size of all its parameters.

    Taught in: chapter 2

    >>> parameter_count(build("ConvNet8"))
    48634
    """
    return sum(parameter.numel() for parameter in model.parameters())


def build(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    seed: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    activation: str | None = None,
    batch_norm: bool | None = None,
) -> nn.Module:
    r"""Build a network by name, in eval mode.

    It maps images ``(N, C, H, W)``, normalised, to logits ``(N, K)``; TextDecoder maps words, int64
    ``(N, T)``, to logits of the word that comes next, 2,000 words unless told otherwise. Eval mode is what
    most attacks assume; a client that trains in train mode says so in its observation. Every network can be
    run by ``torch.func.functional_call``, under ``vmap``, and differentiated twice.

    Settings left at ``None`` are what the weights' card says, or else the family's own: 10 classes, 3
    channels, 32 pixels, batch norm (where the family has it) and its own activation (sigmoid for LeNetZhu,
    ReLU6 for MobileNet, GELU for ViT and TextDecoder, ReLU otherwise); 1000 classes and 224 pixels for those
    of ImageNet.

    Args:
        name: One of ``names()``.
        num_classes: Length of the output; for TextDecoder how many words there are.
        in_channels: Channels of the images.
        image_size: Height and width of the images.
        seed: Makes the initial weights the same every time, whatever the default device. With ``None`` they
            are the numbers that torch's global generator would give next. It is left as it was either way, so
            that two networks in a row are alike unless the generator is moved or seeds are given.
        weights: Slug of the data set that shipped weights were trained on, for example ``"cifar10"``,
            ``"fashion-mnist"`` or ``"austen"``; the path of a ``.safetensors`` file, with its card beside it
            as ``.json`` if there is one, or of a state dict that torch wrote (``.pth``), the 2020 code's
            included; for torchvision's networks, torchvision's name, for example ``"IMAGENET1K_V1"``, which
            needs a network connection the first time; for efficientnet_lite0 ``"imagenet"``, which
            ``pip install invlib[imagenet]`` brings.
        activation: ``"relu"``, ``"relu6"``, ``"sigmoid"``, ``"softplus"``, ``"gelu"`` or ``"tanh"``.
        batch_norm: ``False`` leaves batch norm out of a ConvNet or ResNet.

    Returns:
        A new network in eval mode.

    Raises:
        UnknownNameError: There is no such network, or there are no such weights.
        ConfigError: A setting is out of range, does not apply to this network or contradicts the weights.
        DataError: The weights are missing, corrupt or not this network's.
        DependencyError: torchvision, or the package with efficientnet_lite0, is needed and not installed.

    Taught in: chapter 3

    >>> build("LeNetZhu", num_classes=100, seed=0)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    checked("build name", name, str)
    seed = checked("build seed", seed, Seed | None)
    checked("build weights", weights, str | os.PathLike | None)
    checked("build activation", activation, str | None)
    checked("build batch_norm", batch_norm, bool | None)
    device = torch.get_default_device()
    on_cpu = seed is not None and device.type != "meta"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if seed is not None:
            # Not torch.manual_seed, which would seed every GPU's generator too and leave it so.
            torch.default_generator.manual_seed(seed)
        with torch.device("cpu") if on_cpu else nullcontext():
            model = assemble(
                name,
                weights=weights,
                num_classes=num_classes,
                in_channels=in_channels,
                image_size=image_size,
                activation=activation,
                batch_norm=batch_norm,
            )
    return model.to(device) if on_cpu else model


def assemble(name: str, *, weights: str | os.PathLike[str] | None = None, **asked: Any) -> nn.Module:
    """Do what `build` does with no seed, but let torch's global generator move on, as the code of 2020 did.

    Arguments and errors as for `build`.
    """
    if name not in _MODELS:
        raise UnknownNameError(_unknown(name))
    make = _MODELS[name]
    accepted = inspect.signature(make).parameters
    settings = {key: value for key, value in asked.items() if value is not None}

    tensors = None
    if weights is not None:
        packaged = [family for family in (imagenet, efficientnet) if name in family.MODELS]
        if packaged and not is_file(weights):
            tensors = packaged[0].pretrained(name, str(weights))
        else:
            path = locate(name, weights)
            own_activation = accepted["activation"].default if "activation" in accepted else None
            settings = card_settings(name, path, settings, own_activation)
            tensors = read(path)

    sizes = {"num_classes", "in_channels", "image_size"} & settings.keys()
    for key in sizes:
        settings[key] = at_least(key, settings[key], 1, f"for {name}")
    if "activation" in settings and "activation" not in accepted:
        raise ConfigError(f"activation is {settings['activation']!r}; expected None, for {name} has its own")
    own = {key: settings[key] for key in settings if key in accepted}
    if any(settings[key] > _ORDINARY[key] for key in sizes):
        _check_size(name, make, own)
    model = make(**own)
    if settings.get("batch_norm") is False and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        raise ConfigError(f"batch_norm is False; expected True for {name}, which has no form without it")
    if tensors is not None:
        fit(model, tensors, f"the weights {str(weights)!r} of {name}")
    return model.eval()


def _check_size(name: str, make: Callable[..., nn.Module], settings: dict[str, Any]) -> None:
    """Refuse a network that no memory holds, before any is asked for."""
    faults = [f"{key} is {settings[key]}" for key in _ORDINARY if settings.get(key, 0) > _ORDINARY[key]]
    count: float = math.inf
    if all(settings.get(key, 0) <= 10**7 for key in _ORDINARY):
        with torch.device("meta"), suppress(RuntimeError, TypeError, OverflowError):  # no numbers
            count = sum(tensor.numel() for tensor in make(**settings).state_dict().values())
    if count > _MOST_NUMBERS:
        raise ConfigError(
            f"{name}: {' and '.join(faults)}; expected a network of at most {_MOST_NUMBERS:,} numbers"
        )


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), [known.lower() for known in _MODELS], n=3)
    meant = [known for known in _MODELS if known.lower() in close]
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    return f"no model {name!r}; {hint}There are: {', '.join(_MODELS)}"
