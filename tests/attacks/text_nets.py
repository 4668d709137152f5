"""Small text networks for the tests of attacks on text."""

import torch
import torch.nn.functional as F
from torch import nn

import invlib as iv


class Block(nn.Module):
    """Attention with packed query, key and value, then an MLP; layer norms before them or after."""

    def __init__(self, width, *, causal, after=False):
        super().__init__()
        self.causal, self.after = causal, after
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x):
        if self.after:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    """A transformer of two blocks over ``words`` words, in the spellings that differ from model to model."""

    def __init__(
        self,
        *,
        words=60,
        width=16,
        places=16,
        depth=2,
        causal=True,
        after=False,
        positions="embedding",
        tied=False,
        padding=None,
        types=False,
        pooled=False,
        dropout=0.0,
    ):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.wte = nn.Embedding(words, width, padding_idx=padding)
            self.wpe = nn.Embedding(places + 2, width) if positions == "embedding" else None
            self.pos = nn.Parameter(torch.randn(1, places, width)) if positions == "parameter" else None
            self.types = nn.Embedding(2, width) if types else None
            self.drop = nn.Dropout(dropout)
            self.blocks = nn.Sequential(*(Block(width, causal=causal, after=after) for _ in range(depth)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=not tied)
        self.pooled = pooled
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens):
        x, places = self.wte(tokens), torch.arange(tokens.shape[1])
        if self.wpe is not None:
            x = x + self.wpe(places + 2)
        elif self.pos is not None:
            x = x + self.pos[:, : tokens.shape[1]]
        else:
            x = x + torch.sin(places[:, None] * torch.arange(1, x.shape[2] + 1) * 0.37)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens))
        h = self.norm(self.blocks(self.drop(x)))
        return self.head(h.mean(1) if self.pooled else h[:, -1])


def distinct(count, words=60, seed=0):
    """One sequence of words that all differ, ``(1, count)``."""
    return torch.randperm(words, generator=torch.Generator().manual_seed(seed))[:count][None]


def drawn(*shape, words=60, seed=0):
    """Sequences of any words."""
    return torch.randint(words, shape, generator=torch.Generator().manual_seed(seed))


def seen_by(net, tokens, protocol=None, **more):
    labels = torch.arange(len(tokens)) + 7
    return iv.observe(net, tokens, labels, protocol or iv.FedSGD(), **more)


def found(result, tokens):
    """How many of the true sequences are among those that were found, whole."""
    return sum(any(torch.equal(one, other) for other in result.tokens) for one in tokens)
