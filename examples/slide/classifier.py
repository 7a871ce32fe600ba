"""Classifiers of slides: a slide encoder with a linear head on its CLS token, and mean pooling."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dilated import dilated_attention
from lesions import FEATURES, TILE_SIZE

SEGMENTS, DILATIONS = (1024, 4096, 16384), (1, 2, 4)


class _Encoder(nn.Module):  # stand-in
    def __init__(self, d, depth, heads, segments, dilations):
        super().__init__()
        self.d, self.heads = d, heads
        self.segments, self.dilations = segments, dilations
        self.patch_embed = nn.Linear(FEATURES, d)
        self.cls_token = nn.Parameter(torch.randn(d) * 0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict(dict(
                n1=nn.LayerNorm(d), qkv=nn.Linear(d, 3 * d), n2=nn.LayerNorm(d), o=nn.Linear(d, d),
                n3=nn.LayerNorm(d), f1=nn.Linear(d, 4 * d), n4=nn.LayerNorm(4 * d), f2=nn.Linear(4 * d, d)))
            for _ in range(depth))
        self.norm = nn.LayerNorm(d)

    def pos(self, coords):
        q = self.d // 4
        w = 10000.0 ** -(torch.arange(q) / q)
        a = (coords / TILE_SIZE)[..., None] * w
        return torch.cat((a.sin(), a.cos()), -1).flatten(-2)

    def forward(self, x, coords):
        x = self.patch_embed(x) + self.pos(coords)
        x = torch.cat((self.cls_token.expand(x.shape[0], 1, -1), x), 1)
        for l in self.layers:
            q, k, v = l.qkv(l.n1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
            a = dilated_attention(q, k, v, segments=self.segments, dilations=self.dilations, preset="torchscale")
            x = x + l.o(l.n2(a.flatten(-2)))
            x = x + l.f2(l.n4(nn.functional.gelu(l.f1(l.n3(x)))))
        return self.norm(x[:, 0])


class SlideClassifier(nn.Module):
    def __init__(self, segments=SEGMENTS, dilations=DILATIONS, embed_dim=64, depth=2, heads=4):
        super().__init__()
        self.encoder = _Encoder(embed_dim, depth, heads, segments, dilations)
        self.head = nn.Linear(embed_dim, 1)

    def forward(self, features, coords):
        return self.head(self.encoder(features, coords))[:, 0]


class MeanPooling(nn.Module):
    """A multilayer perceptron on the mean feature of all tiles."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(FEATURES), nn.Linear(FEATURES, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )

    def forward(self, features: Tensor, coords: Tensor) -> Tensor:
        """(batch, tiles, 1536) -> logits (batch,); coordinates play no part."""
        return cast(Tensor, self.mlp(features.mean(1))[:, 0])
