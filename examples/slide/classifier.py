"""Classifiers of slides: a slide encoder with heads on its class token, and mean pooling."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

import dilated
from dilated.models import SlideEncoder
from lesions import FEATURES, REGIONS, SIDE, TILE_SIZE, Slides

LOCAL_SEGMENT = 1024
# The far branch holds every slide. The class token, position 0, is in residue class 0: with offsets
# "zero" all of its heads see the whole slide, one tile in four, and a lesion is wider than that.
DILATED = {"segments": (LOCAL_SEGMENT, 16384), "dilations": (1, 4), "offsets": "zero"}
LOCAL = {"segments": (LOCAL_SEGMENT,), "dilations": (1,)}
_OUTPUTS = 1 + REGIONS**2


class SlideClassifier(nn.Module):
    """GigaPath's encoder, small, with a head for the label and one for the report.

    Args:
        branches: segments, dilations and offsets.
    """

    def __init__(self, branches: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = SlideEncoder(
            FEATURES, 64, 2, 4, ffn_dim=128, dropout=0.0, drop_path_rate=0.0, **branches
        )
        self.label = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 1))
        self.report = nn.Linear(64, REGIONS**2)

    def forward(self, features: Tensor, coords: Tensor) -> Tensor:
        """(batch, tiles, 1536), (batch, tiles, 2) -> (batch, 17): logits of label and report."""
        (embedding,) = self.encoder(features, coords)
        return torch.cat([self.label(embedding), self.report(embedding)], 1)


class MeanPooling(nn.Module):
    """A multilayer perceptron on the mean feature and the mean place of all tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FEATURES + 2, 256), nn.GELU(), nn.Linear(256, _OUTPUTS))

    def forward(self, features: Tensor, coords: Tensor) -> Tensor:
        """(batch, tiles, 1536), (batch, tiles, 2) -> (batch, 17): logits of label and report."""
        place = coords.mean(1) / (SIDE * TILE_SIZE)
        return cast(Tensor, self.mlp(torch.cat([features.mean(1), place], 1)))


@torch.no_grad()
def class_attention(model: SlideClassifier, slides: Slides) -> tuple[Tensor, Tensor]:
    """What each tile receives of the class token's attention in the last layer, and the logits.

    Returns:
        (batch, tiles), the mean of all heads, what the class token gives itself left out; the
        rest sums to 1. (batch, 17), as the model's.
    """
    with dilated.attention_received(model, queries=[0]) as received:
        logits = model(slides.features, slides.coords)
    tiles = received[-1].mean(1)[:, 1:]
    return tiles / tiles.sum(1, keepdim=True), logits
