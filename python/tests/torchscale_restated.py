"""torchscale restated for the tests: one function per formula, from its published equations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
