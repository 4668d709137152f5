"""LeNetZhu: the small smooth network on which deep leakage from gradients was first shown."""

import torch
from torch import Tensor, nn

from invlib.models.layers import activation_layer


class LeNetZhu(nn.Module):
    r"""Three 5×5 convolutions of twelve channels with a sigmoid after each, then one linear layer.

    The strides are 2, 2, 1, so a 32-pixel image becomes 768 features. Weights and biases start uniform
    in :math:`[-\tfrac12, \tfrac12]`: the network is smooth and far from linear, which is what a
    second-order attack likes. Source: "Deep Leakage from Gradients" (2019, arXiv 1906.08935).

    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        activation: str = "sigmoid",
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 12, 5, stride=2, padding=2),
            activation_layer(activation),
            nn.Conv2d(12, 12, 5, stride=2, padding=2),
            activation_layer(activation),
            nn.Conv2d(12, 12, 5, stride=1, padding=2),
            activation_layer(activation),
        )
        quarter = (image_size + 3) // 4
        self.fc = nn.Linear(12 * quarter**2, num_classes)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to logits ``(N, K)``."""
        logits: Tensor = self.fc(torch.flatten(self.body(images), 1))
        return logits


MODELS = {"LeNetZhu": LeNetZhu}
