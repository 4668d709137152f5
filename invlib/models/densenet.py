"""Densely connected networks: DenseNet40 for small images and DenseNet121."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from invlib.errors import ConfigError
from invlib.models.layers import activation_layer, at_least


class DenseLayer(nn.Module):
    """A bottleneck of two convolutions whose output is appended to its input."""

    def __init__(self, inputs: int, growth: int, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.act = activation_layer(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(N, inputs, H, W)`` to ``(N, inputs + growth, H, W)``."""
        new = self.conv1(self.act(self.norm1(x)))
        new = self.conv2(self.act(self.norm2(new)))
        return torch.cat((x, new), 1)


class DenseNet(nn.Sequential):
    """Dense blocks with transitions that halve the channels and the image (DenseNet-BC).

    Convolutions start from He's initialisation (2015, arXiv 1502.01852). Source: "Densely Connected
    Convolutional Networks" (2016, arXiv 1608.06993).

    Args:
        growth: Channels that each layer adds.
        blocks: Layers in each dense block.
        stem: ``"cifar"``, a 3×3 convolution of twice ``growth`` channels, whose network ends in a 4×4 mean
            pool that leaves 2×2 places of a 32-pixel image to the linear layer; or ``"imagenet"``, a 7×7
            convolution of 64 channels and a pool, whose network ends in a global mean pool.
        image_size: Height and width of the images; at least 16 (``"cifar"``) or 29 (``"imagenet"``).

    Raises:
        ConfigError: The image is too small or a setting unknown.
    """

    def __init__(
        self,
        *,
        growth: int = 12,
        blocks: Sequence[int] = (6, 6, 6),
        stem: Literal["cifar", "imagenet"] = "cifar",
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        activation: str = "relu",
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        if stem == "cifar":
            at_least("image_size", image_size, 2 ** (len(blocks) + 1), "DenseNet halves it and pools it by 4")
            channels = 2 * growth
            places = (image_size // 2 ** (len(blocks) - 1) // 4) ** 2
            layers["conv0"] = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        elif stem == "imagenet":
            least = 2 ** (len(blocks) + 1) - 3
            at_least("image_size", image_size, least, "DenseNet halves it five times")
            channels, places = 64, 1
            layers["conv0"] = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
            layers["norm0"] = nn.BatchNorm2d(channels)
            layers["act0"] = activation_layer(activation)
            layers["pool0"] = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            raise ConfigError(f"stem is {stem!r}; expected 'cifar' or 'imagenet'")
        for index, depth in enumerate(blocks, start=1):
            layers[f"block{index}"] = nn.Sequential(
                *(DenseLayer(channels + i * growth, growth, activation) for i in range(depth))
            )
            channels += depth * growth
            if index < len(blocks):
                layers[f"transition{index}"] = _transition(channels, activation)
                channels //= 2
        layers["norm"] = nn.BatchNorm2d(channels)
        layers["act"] = activation_layer(activation)
        layers["pool"] = nn.AvgPool2d(4) if stem == "cifar" else nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(channels * places, num_classes)
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)


def _transition(channels: int, activation: str) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(channels),
        activation_layer(activation),
        nn.Conv2d(channels, channels // 2, 1, bias=False),
        nn.AvgPool2d(2),
    )


MODELS = {
    "DenseNet40": partial(DenseNet, growth=12),
    "DenseNet40-4": partial(DenseNet, growth=48),
    "DenseNet121": partial(DenseNet, growth=32, blocks=(6, 12, 24, 16), stem="imagenet"),
}
