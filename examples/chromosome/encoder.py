"""A LongNet-style encoder for one sequence of millions of positions, forward only.

Each layer is that of dilated.models.LongNetLM without the causal mask. Attention is one call over
the whole sequence, so every branch keeps its meaning; everything else acts on positions one by one
and runs in pieces. The residual stream, q, k, v and the attention's output are all that is ever
held: 5 * 4 * embed_dim bytes per position, whatever the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import dilated
from dilated.models import apply_xpos, xpos_tables
from fasta import UNKNOWN

WORD = 6  # bases per token: the one at its position, two before it, three after
_BEFORE = 2
_PIECE = 65536


def word_tokens(bases: Tensor) -> Tensor:
    """The number of the word of bases around each position.

    Args:
        bases: (n,) uint8, 0..3 or UNKNOWN.

    Returns:
        (n,) int64; 4**WORD where a base of the word is unknown or beyond an end.
    """
    around = functional.pad(bases.long(), (_BEFORE, WORD - 1 - _BEFORE), value=UNKNOWN)
    tokens = torch.zeros(bases.numel(), dtype=torch.int64)
    unknown = torch.zeros(bases.numel(), dtype=torch.bool)
    for place in range(WORD):
        letter = around[place : place + bases.numel()]
        tokens = 4 * tokens + letter
        unknown |= letter == UNKNOWN
    return tokens.masked_fill_(unknown, 4**WORD)


class EncoderLayer(nn.Module):
    """One layer: x + out_proj(norm(attention(norm(x)))), then x + ffn(norm(x))."""

    def __init__(
        self, embed_dim: int, num_heads: int, segments: tuple[int, ...], dilations: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.num_heads, self.segments, self.dilations = num_heads, segments, dilations
        # Heads are spread evenly over the residues, so that no base is far from one that sees far.
        self.offsets = [[h * r // num_heads for h in range(num_heads)] for r in dilations]
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim)
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.inner_attn_ln = nn.LayerNorm(embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.ffn = nn.Sequential(
            nn.LayerNorm(embed_dim),
            nn.Linear(embed_dim, 2 * embed_dim),
            nn.GELU(),
            nn.LayerNorm(2 * embed_dim),
            nn.Linear(2 * embed_dim, embed_dim),
        )

    def add_to(self, x: Tensor, progress: Callable[[str], object]) -> None:
        """Applies the layer to x, (n, embed_dim), in place."""
        n, head_dim = x.shape[0], x.shape[1] // self.num_heads
        query, key, value = (x.new_empty(1, n, self.num_heads, head_dim) for _ in range(3))
        for piece in pieces(n):
            projected = self.qkv_proj(self.self_attn_layer_norm(x[piece]))
            q, k, v = projected.unflatten(-1, (3, self.num_heads, head_dim)).unbind(-3)
            # An endless scale leaves xPos's rotation: both directions are alike.
            position = torch.arange(n)[piece]
            turn = xpos_tables(n, head_dim, position=position, scale_base=math.inf).query
            query[0, piece], key[0, piece] = apply_xpos(q, turn), apply_xpos(k, turn)
            value[0, piece] = v
            progress("projections")
        attended = dilated.dilated_attention(
            query, key, value,
            segments=self.segments, dilations=self.dilations, offsets=self.offsets,
        )[0].flatten(-2)  # fmt: skip
        del query, key, value
        progress("attention")
        for piece in pieces(n):
            x[piece] += self.out_proj(self.inner_attn_ln(attended[piece]))
            x[piece] += self.ffn(x[piece])
            progress("feed-forward")


class ChromosomeEncoder(nn.Module):
    """Bases in, one vector per base out, untrained: weights are what the seed gives.

    Args:
        embed_dim: width, a multiple of 2 * num_heads.
        num_layers: encoder layers.
        num_heads: attention heads.
        segments: segment length of every branch.
        dilations: dilation of every branch.
    """

    def __init__(
        self,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        segments: tuple[int, ...],
        dilations: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.embed_tokens = nn.Embedding(4**WORD + 1, embed_dim)
        self.layers = nn.ModuleList(
            EncoderLayer(embed_dim, num_heads, segments, dilations) for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(embed_dim)

    @torch.no_grad()
    def forward(self, bases: Tensor, progress: Callable[[str], object]) -> Tensor:
        """(n,) uint8 -> (n, embed_dim) float32. `progress` is told each of `num_steps(n)` steps."""
        tokens = word_tokens(bases)
        x = torch.empty(bases.numel(), self.embed_dim)
        for piece in pieces(bases.numel()):
            x[piece] = self.embed_tokens(tokens[piece])
        for layer in self.layers:
            cast(EncoderLayer, layer).add_to(x, progress)
        for piece in pieces(bases.numel()):
            x[piece] = self.layer_norm(x[piece])
        return x

    def num_steps(self, n: int) -> int:
        """How often `forward` reports progress."""
        return len(self.layers) * (2 * len(list(pieces(n))) + 1)


def forward_memory(n: int, embed_dim: int, num_heads: int) -> int:
    """Bytes of the tensors that a forward pass over n bases holds at once: five of the stream's
    size and the log-sum-exps.
    """
    return n * (5 * 4 * embed_dim + 4 * num_heads)


def pieces(n: int) -> Iterator[slice]:
    """[0, n) in pieces."""
    for begin in range(0, n, _PIECE):
        yield slice(begin, min(n, begin + _PIECE))
