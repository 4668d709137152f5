"""iRevNet: a network that loses nothing of its image until its last mean pool."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from invlib.errors import ConfigError
from invlib.models.layers import activation_layer


class ReversibleBlock(nn.Module):
    r"""Maps two halves :math:`(a, b)` to :math:`(b', F(b) + a')`, which can be undone.

    :math:`a'` and :math:`b'` are the halves themselves or, with stride 2, the halves with every 2×2
    square of places turned into four channels.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, first: bool, activation: str) -> None:
        super().__init__()
        self.stride = stride
        inner = outputs // 4
        before = [] if first else [nn.BatchNorm2d(inputs), activation_layer(activation)]
        self.branch = nn.Sequential(
            *before,
            nn.Conv2d(inputs, inner, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            activation_layer(activation),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            activation_layer(activation),
            nn.Conv2d(inner, outputs, 3, padding=1, bias=False),
        )

    def forward(self, halves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Map two halves ``(N, inputs, H, W)`` to two halves ``(N, outputs, H / stride, W / stride)``."""
        a, b = halves
        change = self.branch(b)
        if self.stride > 1:
            a, b = (functional.pixel_unshuffle(half, self.stride) for half in (a, b))
        return b, change + a

    def inverse(self, halves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Undo ``forward``."""
        b, mixed = halves
        if self.stride > 1:
            b = functional.pixel_shuffle(b, self.stride)
        a = mixed - self.branch(b)
        if self.stride > 1:
            a = functional.pixel_shuffle(a, self.stride)
        return a, b


class IRevNet(nn.Module):
    """Reversible blocks on an image that is padded with empty channels, then a mean pool and a linear layer.

    There is no dropout: a client's step must give the same update twice. Source: "i-RevNet: Deep
    Invertible Networks" (2018, arXiv 1802.07088), the injective variant.

    Args:
        blocks: Blocks in each stage.
        channels: Channels of each half in each stage; four times as many in each new stage, for a half
            that gives up 2×2 places must find them again as channels.
        in_channels: Channels of the images; at most twice the first of ``channels``.
        image_size: Height and width of the images; divisible by 2 for every stage after the first.

    Raises:
        ConfigError: The images do not fit or the activation is unknown.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int] = (18, 18, 18),
        channels: Sequence[int] = (16, 64, 256),
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if in_channels > 2 * channels[0]:
            raise ConfigError(f"in_channels is {in_channels}; expected at most {2 * channels[0]} for iRevNet")
        step = 2 ** (len(channels) - 1)
        if image_size % step:
            raise ConfigError(f"image_size is {image_size}; expected a multiple of {step} for iRevNet")
        self.in_channels = in_channels
        self.padding = 2 * channels[0] - in_channels
        stack: list[ReversibleBlock] = []
        width = channels[0]
        for stage, (depth, outputs) in enumerate(zip(blocks, channels, strict=True)):
            for position in range(depth):
                stride = 2 if stage > 0 and position == 0 else 1
                stack.append(ReversibleBlock(width, outputs, stride, first=not stack, activation=activation))
                width = outputs
        self.blocks = nn.Sequential(*stack)
        self.bn = nn.BatchNorm2d(2 * width)
        self.act = activation_layer(activation)
        self.fc = nn.Linear(2 * width, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to the features before the pool, ``(N, 512, H / 4, W / 4)``."""
        padded = functional.pad(images, (0, 0, 0, 0, 0, self.padding))
        return torch.cat(self.blocks(padded.chunk(2, 1)), 1)

    def inverse(self, features: Tensor) -> Tensor:
        """Return the images ``(N, C, H, W)`` that have these features (in eval mode)."""
        a, b = features.chunk(2, 1)
        for block in reversed(list(self.blocks)):
            assert isinstance(block, ReversibleBlock)
            a, b = block.inverse((a, b))
        return torch.cat((a, b), 1)[:, : self.in_channels]

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to logits ``(N, K)``."""
        logits: Tensor = self.fc(self.act(self.bn(self.features(images))).mean((2, 3)))
        return logits


MODELS = {"iRevNet": IRevNet}
