"""ConvNet8 to ConvNet64: the plain convolutional network of the 2020 paper, as wide as its name says."""

from collections import OrderedDict
from functools import partial

from torch import nn

from invlib.models.layers import activation_layer, at_least, norm_layer

# The 2020 code built all four 64 wide; these are the widths that the names promise.
WIDTHS = (8, 16, 32, 64)


class ConvNet(nn.Sequential):
    """Eight 3×3 convolutions with batch norm, two 3×3 max pools and one linear layer.

    The convolutions are ``width`` times 1, 2, 2, 4, 4, 4, (pool) 4, 4, (pool) channels wide. Source: the
    ConvNet of "Inverting Gradients" (2020, arXiv 2003.14053).

    Args:
        width: Channels of the first convolution.
        image_size: Height and width of the images; at least 9, for the two pools.
        batch_norm: Whether each convolution is followed by batch norm. Without it the convolutions
            start from He's initialisation (2015, arXiv 1502.01852), which keeps the signal's size.

    Raises:
        ConfigError: The image is too small or the activation unknown.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        activation: str = "relu",
        batch_norm: bool = True,
    ) -> None:
        at_least("image_size", image_size, 9, "ConvNet pools twice by 3")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for index, factor in enumerate((1, 2, 2, 4, 4, 4, 4, 4)):
            conv = nn.Conv2d(channels, factor * width, 3, padding=1)
            if not batch_norm:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            channels = factor * width
            layers[f"conv{index}"] = conv
            layers[f"bn{index}"] = norm_layer(channels, batch_norm)
            layers[f"act{index}"] = activation_layer(activation)
            if index in (5, 7):
                layers[f"pool{index}"] = nn.MaxPool2d(3)
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(channels * (image_size // 3 // 3) ** 2, num_classes)
        super().__init__(layers)


MODELS = {f"ConvNet{width}": partial(ConvNet, width=width) for width in WIDTHS}
