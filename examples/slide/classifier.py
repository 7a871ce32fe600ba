"""Classifiers of slides: a slide encoder with a linear head on its class token, and mean pooling."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dilated.models import SlideEncoder
from lesions import FEATURES, REGIONS, Slides

LOCAL_SEGMENT = 1024
# The longest segment holds every slide, with its class token.
DILATED = {"segments": (LOCAL_SEGMENT, 4096, 16384), "dilations": (1, 2, 4)}
LOCAL = {"segments": (LOCAL_SEGMENT,), "dilations": (1,)}


class SlideClassifier(nn.Module):
    """GigaPath's encoder, small, and a linear head.

    Args:
        branches: segments and dilations.
    """

    def __init__(self, branches: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.encoder = SlideEncoder(
            FEATURES, 64, 2, 4, ffn_dim=128, dropout=0.0, drop_path_rate=0.0, **branches
        )
        self.label = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
        self.report = nn.Linear(64, REGIONS**2)

    def forward(self, features: Tensor, coords: Tensor) -> Tensor:
        """(batch, tiles, 1536), (batch, tiles, 2) -> (batch, 17): logit of the label, report."""
        (embedding,) = self.encoder(features, coords)
        return torch.cat([self.label(embedding), self.report(embedding)], 1)


class MeanPooling(nn.Module):
    """A multilayer perceptron on the mean feature of all tiles."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(FEATURES), nn.Linear(FEATURES, hidden), nn.GELU(), nn.Linear(hidden, 1 + REGIONS**2)
        )

    def forward(self, features: Tensor, coords: Tensor) -> Tensor:
        """(batch, tiles, 1536) -> (batch, 17): logit of the label, report; coordinates play no part."""
        return cast(Tensor, self.mlp(features.mean(1)))


def influence(model: nn.Module, slides: Slides) -> Tensor:
    """(batch, tiles): how much each tile's features move its slide's logit, |gradient . features|."""
    features = slides.features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(features, slides.coords)[:, 0].sum(), features)
    return (gradient * features).sum(-1).detach().abs()
