"""Residual networks for small images: ResNet20 and its kin, and ResNet18 to 152 with a 3×3 stem."""

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from invlib.errors import ConfigError
from invlib.models.layers import activation_layer, norm_layer


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut (He 2015, arXiv 1512.03385, figure 5 left)."""

    expansion: ClassVar[int] = 1
    kernels: ClassVar[tuple[int, ...]] = (3, 3)
    strided: ClassVar[int] = 0  # which convolution has the stride
    norm_first: ClassVar[bool] = False  # whether a norm comes before its convolution or after it

    def __init__(self, inputs: int, width: int, stride: int, activation: str, batch_norm: bool) -> None:
        super().__init__()
        channels = [inputs, *(width for _ in self.kernels[1:]), width * self.expansion]
        for k, kernel in enumerate(self.kernels):
            # A convolution before batch norm needs no bias; without batch norm it does.
            conv = nn.Conv2d(
                channels[k],
                channels[k + 1],
                kernel,
                stride=stride if k == self.strided else 1,
                padding=kernel // 2,
                bias=not batch_norm,
            )
            self.add_module(f"conv{k + 1}", conv)
            self.add_module(f"bn{k + 1}", norm_layer(channels[k if self.norm_first else k + 1], batch_norm))
        self.downsample = _shortcut(inputs, channels[-1], stride, batch_norm and not self.norm_first)
        self.act = activation_layer(activation)

    @property
    def last_conv(self) -> nn.Conv2d:
        """The convolution that ends the residual branch."""
        conv = self.get_submodule(f"conv{len(self.kernels)}")
        assert isinstance(conv, nn.Conv2d)
        return conv

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(N, inputs, H, W)`` to ``(N, width · expansion, H / stride, W / stride)``."""
        branch = x
        for k in range(1, len(self.kernels) + 1):
            branch = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(branch))
            if k < len(self.kernels):
                branch = self.act(branch)
        result: Tensor = self.act(branch + self.downsample(x))
        return result


class Bottleneck(BasicBlock):
    """A 1×1, a 3×3 and a 1×1 convolution beside a shortcut (He 2015, arXiv 1512.03385, figure 5 right).

    The stride is in the 3×3 convolution, as in torchvision.
    """

    expansion = 4
    kernels = (1, 3, 1)
    strided = 1


class PreActivationBlock(BasicBlock):
    """Norm and activation before each of two 3×3 convolutions (He 2016, arXiv 1603.05027, figure 1 right).

    A shortcut that changes shape is a 1×1 convolution of the first activation.
    """

    norm_first = True

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(N, inputs, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        first: Tensor = self.act(self.get_submodule("bn1")(x))
        shortcut: Tensor = x if isinstance(self.downsample, nn.Identity) else self.downsample(first)
        for name in ("conv1", "bn2", "act", "conv2"):
            first = self.get_submodule(name)(first)
        return first + shortcut


class ResNet(nn.Module):
    r"""A residual network with a 3×3 stem, no pooling before the end, and stages that double in width.

    Convolutions start from He's initialisation over the fan out (2015, arXiv 1502.01852). With batch norm
    switched off each of the :math:`L` residual branches is scaled by :math:`1/\sqrt{L}` at the start, so
    that the signal stays of the same size through the depth (2020, arXiv 2010.12859). Source of the
    network: "Deep Residual Learning" (2015, arXiv 1512.03385), section 4.2, with 1×1 convolutions where a
    shortcut changes shape (option B).

    Args:
        block: ``"basic"``, ``"bottleneck"`` or ``"pre-activation"``.
        layers: Blocks in each stage.
        width: Channels of the stem and of the first stage's blocks.
        strides: Stride of each stage; by default 1 and then 2.
        pool: What becomes of the last feature maps: their ``"mean"`` or their ``"max"``.
        batch_norm: Whether each convolution is followed by batch norm.

    Raises:
        ConfigError: A setting is unknown.
    """

    def __init__(
        self,
        *,
        block: Literal["basic", "bottleneck", "pre-activation"] = "basic",
        layers: Sequence[int] = (3, 3, 3),
        width: int = 16,
        strides: Sequence[int] | None = None,
        pool: Literal["mean", "max"] = "mean",
        num_classes: int = 10,
        in_channels: int = 3,
        activation: str = "relu",
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if pool not in ("mean", "max"):
            raise ConfigError(f"pool is {pool!r}; expected 'mean' or 'max'")
        if block not in _BLOCKS:
            raise ConfigError(f"block is {block!r}; expected one of {', '.join(_BLOCKS)}")
        self.pool = pool
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=not batch_norm)
        norm_first = _BLOCKS[block].norm_first
        self.bn1 = norm_layer(width, batch_norm and not norm_first)
        self.act = activation_layer(activation)
        strides = strides or (1, *(2 for _ in layers[1:]))
        stages = []
        channels = width
        for index, (depth, stride) in enumerate(zip(layers, strides, strict=True)):
            stage = []
            for position in range(depth):
                new = _BLOCKS[block](
                    channels, width * 2**index, stride if position == 0 else 1, activation, batch_norm
                )
                channels = width * 2**index * new.expansion
                stage.append(new)
            stages.append(nn.Sequential(*stage))
        self.layers = nn.ModuleList(stages)
        self.last = nn.Sequential(norm_layer(channels, batch_norm), self.act) if norm_first else nn.Identity()
        self.fc = nn.Linear(channels, num_classes)
        self._initialise(sum(layers), batch_norm)

    def _initialise(self, depth: int, batch_norm: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if not batch_norm:
            with torch.no_grad():
                for module in self.modules():
                    if isinstance(module, BasicBlock):
                        module.last_conv.weight.div_(math.sqrt(depth))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to logits ``(N, K)``."""
        x = self.conv1(images)
        if isinstance(self.last, nn.Identity):
            x = self.act(self.bn1(x))
        for stage in self.layers:
            x = stage(x)
        x = self.last(x)
        logits: Tensor = self.fc(x.mean((2, 3)) if self.pool == "mean" else x.amax((2, 3)))
        return logits


def _shortcut(inputs: int, outputs: int, stride: int, batch_norm: bool) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=not batch_norm)
    return nn.Sequential(conv, norm_layer(outputs, batch_norm))


_BLOCKS: dict[str, type[BasicBlock]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
    "pre-activation": PreActivationBlock,
}

# The 2020 code's names: the suffix multiplies the width, and "unpooled" takes the maximum over the last
# feature maps where the others take their mean.
MODELS = {
    "ResNet20": partial(ResNet, layers=(3, 3, 3)),
    "ResNet20-preactivation": partial(ResNet, block="pre-activation", layers=(3, 3, 3)),
    "ResNet20-nostride": partial(ResNet, layers=(3, 3, 3), strides=(1, 1, 1)),
    "ResNet20-4": partial(ResNet, layers=(3, 3, 3), width=64),
    "ResNet20-4-unpooled": partial(ResNet, layers=(3, 3, 3), width=64, pool="max"),
    "ResNet20-10": partial(ResNet, layers=(3, 3, 3), width=160),
    "ResNet28-10": partial(ResNet, layers=(4, 4, 4), width=160),
    "ResNet32": partial(ResNet, layers=(5, 5, 5)),
    "ResNet32-10": partial(ResNet, layers=(5, 5, 5), width=160),
    "ResNet44": partial(ResNet, layers=(7, 7, 7)),
    "ResNet56": partial(ResNet, layers=(9, 9, 9)),
    "ResNet110": partial(ResNet, layers=(18, 18, 18)),
    "ResNet18": partial(ResNet, layers=(2, 2, 2, 2), width=64),
    "ResNet34": partial(ResNet, layers=(3, 4, 6, 3), width=64),
    "ResNet50": partial(ResNet, block="bottleneck", layers=(3, 4, 6, 3), width=64),
    "ResNet50-2": partial(ResNet, block="bottleneck", layers=(3, 4, 6, 3), width=128),
    "ResNet101": partial(ResNet, block="bottleneck", layers=(3, 4, 23, 3), width=64),
    "ResNet152": partial(ResNet, block="bottleneck", layers=(3, 8, 36, 3), width=64),
}
