"""MobileNet (version 2) and MNASNet: networks of inverted residuals, made for telephones."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from invlib.models.layers import activation_layer


class InvertedResidual(nn.Module):
    """A 1×1 expansion, a depthwise convolution and a 1×1 projection, beside a shortcut where it fits."""

    def __init__(
        self, inputs: int, outputs: int, *, expansion: int, kernel: int, stride: int, activation: str
    ) -> None:
        super().__init__()
        inner = inputs * expansion
        expand = _conv(inputs, inner, 1, activation=activation) if expansion > 1 else []
        depthwise = _conv(inner, inner, kernel, stride=stride, groups=inner, activation=activation)
        self.branch = nn.Sequential(*expand, *depthwise, *_conv(inner, outputs, 1))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(N, inputs, H, W)`` to ``(N, outputs, H / stride, W / stride)``."""
        change: Tensor = self.branch(x)
        return x + change if self.shortcut else change


class MobileNetwork(nn.Module):
    """A 3×3 stem of 32 channels, stages of inverted residuals, 1280 features, a mean pool, a linear layer.

    There is no dropout before the linear layer: a client's step must give the same update twice. Sources:
    "MobileNetV2" (2018, arXiv 1801.04381) and "MnasNet" (2018, arXiv 1807.11626).

    Args:
        stages: For each stage ``(expansion, channels, blocks, stride, kernel)``.
        stem_stride: Stride of the stem.
    """

    def __init__(
        self,
        *,
        stages: Sequence[tuple[int, int, int, int, int]],
        stem_stride: int,
        num_classes: int = 10,
        in_channels: int = 3,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        layers = _conv(in_channels, 32, 3, stride=stem_stride, activation=activation)
        channels = 32
        for expansion, outputs, depth, stride, kernel in stages:
            for position in range(depth):
                layers.append(
                    InvertedResidual(
                        channels,
                        outputs,
                        expansion=expansion,
                        kernel=kernel,
                        stride=stride if position == 0 else 1,
                        activation=activation,
                    )
                )
                channels = outputs
        layers += _conv(channels, 1280, 1, activation=activation)
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to logits ``(N, K)``."""
        logits: Tensor = self.fc(self.features(images).mean((2, 3)))
        return logits


def _conv(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, activation: str | None = None
) -> list[nn.Module]:
    """A convolution and its batch norm, and the activation where one is named."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    after = [] if activation is None else [activation_layer(activation)]
    return [conv, nn.BatchNorm2d(outputs), *after]


# MobileNet's stem and second stage keep the size of the image (the paper's, for 224 pixels, halve it), so
# that a 32-pixel image still has 4×4 places at the end.
_MOBILENET_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 1, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)
_MNASNET_STAGES = (
    (1, 16, 1, 1, 3),
    (3, 24, 3, 2, 3),
    (3, 40, 3, 2, 5),
    (6, 80, 3, 2, 5),
    (6, 96, 2, 1, 3),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)

MODELS = {
    "MobileNet": partial(MobileNetwork, stages=_MOBILENET_STAGES, stem_stride=1, activation="relu6"),
    "MNASNet": partial(MobileNetwork, stages=_MNASNET_STAGES, stem_stride=2),
}
