"""torchscale restated for the tests: one function per formula, from its published equations."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from support import oracle
from torch import Tensor, nn


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return scaled * weights[name + ".weight"] + weights[name + ".bias"]


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return torch.einsum("...i,oi->...o", x, weights[name + ".weight"]) + weights[name + ".bias"]


def xpos(x: Tensor, downscale: bool) -> Tensor:
    """(n, D): pair i turns by p 10000^(-2i/D), scaled by zeta_i^((p - ceil(n/2)) / 512)."""
    n, dim = x.shape
    out = torch.empty_like(x)
    for p in range(n):
        for i in range(dim // 2):
            angle = p * 10000.0 ** (-2 * i / dim)
            zeta = (2 * i + 0.4 * dim) / (1.4 * dim)
            scale = zeta ** ((p - math.ceil(n / 2)) / 512)
            scale = 1 / scale if downscale else scale
            a, b = x[p, 2 * i], x[p, 2 * i + 1]
            out[p, 2 * i] = (a * math.cos(angle) - b * math.sin(angle)) * scale
            out[p, 2 * i + 1] = (b * math.cos(angle) + a * math.sin(angle)) * scale
    return out


def decoder_attention(q: Tensor, k: Tensor, v: Tensor, head: int, sizes: dict[str, Any]) -> Tensor:
    """One causal head: softmax over the keys of all branches, each key once per branch
    (semantics §5).
    """
    n, dim = q.shape
    counts = torch.zeros(n, n, dtype=q.dtype)
    for w, r in zip(sizes["segments"], sizes["dilations"], strict=True):
        for p in range(n):
            for j in range(p + 1):
                same = p // w == j // w
                kept = p % w % r == head % r == j % w % r
                counts[p, j] += float(same and kept)
    weights = counts * torch.exp(q @ k.T / math.sqrt(dim))
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0.0) @ v


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, head: int, sizes: dict[str, Any]) -> Tensor:
    """One head that sees all: zero rows fill each branch's last segment, their score is 0."""
    n, dim = q.shape
    counts = torch.zeros(n, n, dtype=q.dtype)
    zeros = torch.zeros(n, 1, dtype=q.dtype)
    for w, r in zip(sizes["segments"], sizes["dilations"], strict=True):
        segment = min(w, n)
        kept = head // math.ceil(sizes["num_heads"] / r)
        for p in range(n):
            if p % segment % r == kept:
                first = p // segment * segment
                keys = range(first + kept, min(n, first + segment), r)
                counts[p, list(keys)] += 1
                zeros[p] += math.ceil(segment / r) - len(keys)
    weights = counts * torch.exp(q @ k.T / math.sqrt(dim))
    total = weights.sum(-1, keepdim=True) + zeros
    return torch.where(total > 0, weights / total, 0.0) @ v


def after_attention(x: Tensor, out: Tensor, weights: dict[str, Tensor], layer: str) -> Tensor:
    """The rest of a layer: inner norm, projection, feed-forward with its norms, residuals."""
    inner = layer_norm(out, weights, layer + "self_attn.inner_attn_ln")
    x = x + linear(inner, weights, layer + "self_attn.out_proj")
    normed = layer_norm(x, weights, layer + "final_layer_norm")
    hidden = linear(normed, weights, layer + "ffn.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    hidden = layer_norm(hidden, weights, layer + "ffn.ffn_layernorm")
    return x + linear(hidden, weights, layer + "ffn.fc2")


def torchscale_decoder(
    weights: dict[str, Tensor], tokens: Tensor, sizes: dict[str, Any], embed_scale: float
) -> Tensor:
    """Logits (n, vocab) of one sequence: pre-norm decoder with sub-LayerNorm and xPos."""
    x = embed_scale * weights["embed_tokens.weight"][tokens]
    heads = sizes["num_heads"]
    repeats = heads // sizes.get("num_kv_heads", heads)
    for number in range(sizes["num_layers"]):
        layer = f"layers.{number}."
        normed = layer_norm(x, weights, layer + "self_attn_layer_norm")
        q, k, v = (linear(normed, weights, layer + f"self_attn.{c}_proj") for c in "qkv")
        dim = q.shape[-1] // heads
        outs = []
        for h in range(heads):
            kv = slice(h // repeats * dim, (h // repeats + 1) * dim)
            query = xpos(q[:, h * dim : (h + 1) * dim], downscale=False)
            key = xpos(k[:, kv], downscale=True)
            outs.append(decoder_attention(query, key, v[:, kv], h // repeats, sizes))
        x = after_attention(x, torch.cat(outs, -1), weights, layer)
    return layer_norm(x, weights, "layer_norm") @ weights["output_projection.weight"].T


def position_rows(cells: Tensor, dim: int) -> Tensor:
    """Rows (m, dim) of GigaPath's table for cells (m, 2): float64 sines and cosines of float32
    cells, rounded to float32; the second coordinate comes first.
    """
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=float) / (dim / 4.0))
    halves = []
    for place in (cells[:, 1], cells[:, 0]):
        angle = np.einsum("m,d->md", place.numpy().astype(np.float32), omega)
        halves += [np.sin(angle), np.cos(angle)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()


def gigapath_slide_encoder(
    weights: dict[str, Tensor], tiles: Tensor, coords: Tensor, sizes: dict[str, Any]
) -> tuple[list[Tensor], Tensor]:
    """Hidden states of one slide, (1 + tiles, dim) each, and the last one normed by the encoder."""
    x = linear(tiles, weights, "patch_embed.proj")
    x = x + position_rows(coords // sizes["tile_size"], x.shape[-1])
    x = torch.cat([weights["cls_token"][0], x])
    states = [x]
    for number in range(sizes["depth"]):
        layer = f"encoder.layers.{number}."
        normed = layer_norm(x, weights, layer + "self_attn_layer_norm")
        heads = [
            linear(normed, weights, layer + f"self_attn.{c}_proj").chunk(sizes["num_heads"], -1)
            for c in "qkv"
        ]
        outs = [
            encoder_attention(*qkv, head, sizes)
            for head, qkv in enumerate(zip(*heads, strict=True))
        ]
        x = after_attention(x, torch.cat(outs, -1), weights, layer)
        states.append(x)
    return states, layer_norm(x, weights, "encoder.layer_norm")


def arguments(**changes: Any) -> SimpleNamespace:
    """The eight attributes that upstream reads."""
    return SimpleNamespace(
        **{
            "flash_attention": True,
            "segment_length": [4, 8],
            "dilated_ratio": [1, 2],
            "seq_parallel": False,
            "multiway": False,
            "layernorm_eps": 1e-5,
            "xpos_rel_pos": False,
            "xpos_scale_base": 512,
            **changes,
        }
    )


class Xpos(nn.Module):
    """torchscale's module: (rows, length, D), for positions offset, ..., offset + length - 1."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(head_dim // 2))

    def forward(self, x: Tensor, offset: int = 0, downscale: bool = False) -> Tensor:
        before = x.new_zeros(offset, x.shape[2])
        return torch.stack([xpos(torch.cat([before, row]), downscale)[offset:] for row in x])


class DilatedAttention(nn.Module):
    """torchscale's class: its attributes and, slowly, its numbers; float64 only."""

    def __init__(
        self,
        args: Any,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        self_attention: bool = False,
        encoder_decoder_attention: bool = False,
        subln: bool = False,
    ) -> None:
        super().__init__()
        self.args, self.embed_dim, self.num_heads = args, embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.inner_attn_ln = nn.LayerNorm(embed_dim, eps=args.layernorm_eps) if subln else None
        self.xpos = Xpos(self.head_dim) if args.xpos_rel_pos else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **_: Any
    ) -> tuple[Tensor, None]:
        heads = (self.num_heads, self.head_dim)
        q = self.q_proj(query).unflatten(-1, heads)
        k = self.k_proj(key).unflatten(-1, heads)
        v = self.v_proj(value).unflatten(-1, heads)
        outs = []
        for sequence in zip(q, k, v, strict=True):
            rows = list(sequence)
            if self.xpos is not None:
                rows[:2] = (
                    self.xpos(x.transpose(0, 1), downscale=down).transpose(0, 1)
                    for x, down in ((rows[0], False), (rows[1], True))
                )
            out = oracle.torchscale_literal(
                *(x.tolist() for x in rows),
                [int(w) for w in self.args.segment_length],
                [int(r) for r in self.args.dilated_ratio],
                is_causal,
                lse_zero_hack=False,
            )
            outs.append(torch.tensor(out, dtype=query.dtype).flatten(1))
        out = torch.stack(outs)
        if self.inner_attn_ln is not None:
            out = self.inner_attn_ln(out)
        return self.out_proj(out), None
