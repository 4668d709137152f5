"""MLP and TwoLP: fully connected networks, whose input the first layer's gradient gives away."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import nn

from invlib.models.layers import activation_layer


class FullyConnected(nn.Sequential):
    """A flatten, then linear layers with an activation between them.

    Source: the MLP and TwoLP of "Inverting Gradients" (2020, arXiv 2003.14053).

    Args:
        hidden: Widths of the hidden layers.
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (1024, 1024, 1024),
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        activation: str = "relu",
    ) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        features = in_channels * image_size**2
        for index, width in enumerate(hidden):
            layers[f"linear{index}"] = nn.Linear(features, width)
            layers[f"act{index}"] = activation_layer(activation)
            features = width
        layers[f"linear{len(hidden)}"] = nn.Linear(features, num_classes)
        super().__init__(layers)


MODELS = {
    "MLP": partial(FullyConnected, hidden=(1024, 1024, 1024)),
    "TwoLP": partial(FullyConnected, hidden=(2048,)),
}
