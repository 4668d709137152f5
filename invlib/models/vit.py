"""ViT: a small vision transformer, whose position gradient gives its image away."""

import torch
from torch import Tensor, nn

from invlib.errors import ConfigError
from invlib.models.layers import at_least
from invlib.models.transformer import Block, initialise


class ViT(nn.Module):
    r"""A vision transformer: square patches, each a linear map away from a token, a class token, positions.

    With patches :math:`x_p`, embedding :math:`E, b` and positions :math:`\pi_p`, token :math:`p` is
    :math:`z_p = E x_p + b + \pi_p`; the logits are read off the class token, token 0. Dropout follows the
    embedding, each attention and each MLP. With the sizes given here it has 720,000 numbers for ten classes.

    Source: "An Image is Worth 16x16 Words" (2020, arXiv 2010.11929), section 3.1.

    Args:
        patch_size: Height and width of a patch; ``image_size`` is a multiple of it.
        width: Length of a token.
        depth: Blocks.
        heads: Parts that attention splits a token into.
        hidden: Width of a block's MLP; narrow, for weights that fit 1.5 MB.
        dropout: Share of numbers that training sets to zero.

    Raises:
        ConfigError: A size does not fit.
    """

    def __init__(
        self,
        *,
        patch_size: int = 4,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        hidden: int = 64,
        dropout: float = 0.1,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        at_least("image_size", image_size, patch_size, "ViT has a patch or more")
        if image_size % patch_size:
            raise ConfigError(f"image_size is {image_size}; expected a multiple of ViT's patch, {patch_size}")
        self.patch_embedding = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(Block(width, heads, hidden, dropout=dropout, activation=activation) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to logits ``(N, K)``."""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1)
        tokens = self.blocks(self.dropout(tokens + self.position_embedding))
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


MODELS = {"ViT": ViT}
