"""TextDecoder: a causal transformer that predicts the next word, as a phone's keyboard does."""

import torch
from torch import Tensor, nn

from invlib.errors import ConfigError
from invlib.models.transformer import Block, initialise


class TextDecoder(nn.Module):
    r"""A causal transformer: word :math:`w` at place :math:`t` enters as :math:`E_w + \pi_t`.

    The classes are the words: the label of a text is the word that follows it. Embeddings and head are not
    tied, and no word is left out of the embedding's gradient (no ``padding_idx``). Dropout follows the
    embedding, each attention and each MLP. With the sizes given here it has 718,000 numbers.

    Source: GPT's decoder, "Improving Language Understanding by Generative Pre-Training" (2018), section 3.1,
    with the layer norms first.

    Args:
        num_classes: Words of the vocabulary.
        context: The longest text, in words.
        width: Length of a word's vector.
        depth: Blocks.
        heads: Parts that attention splits a vector into.
        hidden: Width of a block's MLP.
        dropout: Share of numbers that training sets to zero.
    """

    def __init__(
        self,
        *,
        num_classes: int = 2000,
        context: int = 32,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        hidden: int = 128,
        dropout: float = 0.1,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(num_classes, width)
        self.position_embedding = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                Block(width, heads, hidden, dropout=dropout, activation=activation, causal=True)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map words, int64 ``(N, T)``, to logits ``(N, K)`` of the word after the last one."""
        logits: Tensor = self.head(self.features(tokens)[:, -1])
        return logits

    def features(self, tokens: Tensor) -> Tensor:
        """Map words, int64 ``(N, T)``, to what the head reads after each of them, ``(N, T, width)``."""
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ConfigError(
                f"TextDecoder was given {tokens.dtype} {tuple(tokens.shape)}; expected words, int64 (N, T)"
            )
        if not 1 <= tokens.shape[1] <= self.position_embedding.num_embeddings:
            raise ConfigError(
                f"the text has {tokens.shape[1]} words; "
                f"expected 1 to {self.position_embedding.num_embeddings}, as many as TextDecoder has places"
            )
        places = self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        result: Tensor = self.norm(self.blocks(self.dropout(self.token_embedding(tokens) + places)))
        return result


MODELS = {"TextDecoder": TextDecoder}
