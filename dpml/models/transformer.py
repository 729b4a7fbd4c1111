"""A small transformer that classifies sequences of tokens, of layers with per-example gradients only."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from accounting.errors import UserError


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each behind a LayerNorm and beside a shortcut (pre-norm).

    All weights sit in `nn.Linear` and `nn.LayerNorm`: `nn.MultiheadAttention` uses its weights without
    calling a layer, so that nothing can attach to them.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """From [m, length, width] to the same shape."""
        x = x + self.mix(self.attention(self.projections(self.norm1(x))))
        out: Tensor = x + self.contract(functional.gelu(self.expand(self.norm2(x))))
        return out

    def attention(self, projected: Tensor) -> Tensor:
        """From queries, keys and values, [m, length, 3·width], to [m, length, width]."""
        m, length, width = projected.shape
        split = projected.view(m, length, 3, self.heads, width // 3 // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind()
        mixed: Tensor = functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(m, length, width // 3)


class TransformerClassifier(nn.Module):
    """Embedded tokens and positions, encoder layers, the mean over the sequence and a linear head.

    All tokens count in the mean, so sequences of one length are meant: shorter ones need a token for
    padding, which is learned like the others.

    Args:
        vocabulary: Number of tokens.
        length: The longest sequence.
        classes: Number of classes.
        layers: Number of encoder layers.
        width: Size of an embedding.
        heads: Attention heads, which share `width` equally.
        hidden: Hidden units of a feed-forward network.

    Raises:
        UserError: `heads` does not divide `width`.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        classes: int,
        *,
        layers: int = 2,
        width: int = 128,
        heads: int = 4,
        hidden: int = 512,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"The width must be a multiple of the number of heads. Got {width} and {heads}.")
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """From token ids, [m, length], to logits [m, classes].

        Positions are looked up for each example, not once for all: only then does each have a gradient
        of its own.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
        x = self.layers(self.tokens(tokens) + self.positions(places))
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits
