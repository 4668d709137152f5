"""The block that ViT and TextDecoder are made of: attention and a small MLP, each after a layer norm."""

import torch.nn.functional as F
from torch import Tensor, nn

from invlib.models.layers import activation_layer


class Attention(nn.Module):
    r"""Multi-head self-attention, :math:`\mathrm{softmax}(Q K^\top / \sqrt{d})\, V` for each head.

    Query, key and value are layers of their own: the gradient of each is read by itself.

    Source: "Attention Is All You Need" (2017, arXiv 1706.03762), section 3.2.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, T, width)`` to the same shape; where causal, a token sees no later one."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """Attention, then an MLP, both beside a shortcut and after a layer norm.

    Source of the order: "On Layer Normalization in the Transformer Architecture" (2020, arXiv 2002.04745).
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, dropout: float, activation: str, causal: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), activation_layer(activation), nn.Linear(hidden, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, T, width)`` to the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        result: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return result


def initialise(model: nn.Module) -> None:
    """Draw embeddings and class token with standard deviation 0.02, and linear layers by Xavier's rule."""
    for name, parameter in model.named_parameters():
        if "embedding" in name or name == "class_token":
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name != "patch_embedding.weight":
                nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
