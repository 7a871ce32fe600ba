"""Synthetic slides: tiles of tissue with features and coordinates, and two lesions somewhere.

A slide is positive if its lesions lie far apart, negative if they touch or are one. Both kinds have
as many lesion tiles of the same look, so neither a tile nor the mean of all tiles tells them apart:
a model must relate two places. Shapes are those of a real slide, 10,000 tiles of 1536 features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

TILE_SIZE = 256  # pixels
FEATURES = 1536
REGIONS = 4  # along each edge, of the report
_SIDE = 125  # tiles along the edge of the field that tissue fills in part
_TEXTURES = 8
_LESION_SHARE = 0.08  # of all tiles; both lesions
_FAR, _NEAR = 0.45, 0.02  # distances as shares of the edge: at least this far, at most this gap


class Slides(NamedTuple):
    """A batch of slides of equal length, tiles row by row.

    features: (batch, tiles, 1536) float32.
    coords: (batch, tiles, 2) float32, pixels of each tile's corner.
    lesion: (batch, tiles) bool.
    report: (batch, 16) float32; the share of lesion tiles in each of 4 x 4 regions.
    label: (batch,) float32; 1 = two distant lesions.
    """

    features: Tensor
    coords: Tensor
    lesion: Tensor
    report: Tensor
    label: Tensor


@dataclass(frozen=True)
class Looks:
    """What tiles look like: prototypes of textures, of the lesion, and of what varies.

    textures: (8, 1536); lesion: (1536,); grain: (8192, 1536), rows to draw from.
    """

    textures: Tensor
    lesion: Tensor
    grain: Tensor

    @classmethod
    def draw(cls, seed: int) -> Looks:
        """Independent normal prototypes: the tile encoder that came before does its work."""
        generator = torch.Generator().manual_seed(seed)
        textures, lesion, grain = (
            torch.randn(rows, FEATURES, generator=generator) for rows in (_TEXTURES, 1, 8192)
        )
        return cls(textures, lesion[0], grain)


def draw_slides(
    looks: Looks, batch: int, tiles: int, generator: torch.Generator, *, label: float | None = None
) -> Slides:
    """Draws slides, each label as likely as the other.

    Args:
        looks: shared by all slides.
        batch: how many.
        tiles: of each slide; fewer tiles are the same slide seen coarser.
        generator: of the draw.
        label: of all of them; None draws it.
    """
    drawn = [_draw(looks, tiles, generator, label) for _ in range(batch)]
    return Slides(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


def _draw(
    looks: Looks, tiles: int, generator: torch.Generator, label: float | None
) -> tuple[Tensor, ...]:
    side = max(2, round(_SIDE * (tiles / 10_000) ** 0.5))
    # Tissue is where a smooth random field is high; textures follow other such fields.
    field = _smooth(1, side, generator)[0] - _dome(side)
    tissue = field.flatten().topk(tiles).indices.sort().values
    places = torch.stack((tissue % side, tissue // side), 1).float()  # x, y: rows of tiles in order
    texture = _smooth(_TEXTURES, side, generator).flatten(1)[:, tissue].argmax(0)
    chance = float(torch.rand((), generator=generator))
    positive = chance > 0.5 if label is None else label > 0
    lesion = _lesions(places, side, positive, generator)
    features = looks.textures[texture]
    features[lesion] = looks.lesion
    features += looks.grain[torch.randint(looks.grain.shape[0], (tiles,), generator=generator)]
    # The grid is centred on its cells, so that coarser slides cover the same pixels.
    coords = ((places + 0.5) * (_SIDE / side)).floor() * TILE_SIZE
    cell = (places[lesion] * REGIONS / side).long()
    report = torch.bincount(cell[:, 1] * REGIONS + cell[:, 0], minlength=REGIONS**2)
    report = report / report.sum()
    return features, coords, lesion, report, torch.tensor(float(positive))


def _lesions(places: Tensor, side: int, distant: bool, generator: torch.Generator) -> Tensor:
    """(tiles,) bool: two patches of adjacent tiles around two centres, of equal area."""
    tiles = places.shape[0]
    each = max(1, round(_LESION_SHARE * tiles / 2))
    diameter = 2 * (each / torch.pi) ** 0.5
    while True:
        first = torch.randint(tiles, (), generator=generator)
        distance = (places - places[first]).norm(dim=1)
        if distant:
            fits = distance > _FAR * side
        else:  # from one patch of twice the area to two with a narrow gap
            fits = distance < diameter + _NEAR * side
        candidates = fits.nonzero()[:, 0]
        if candidates.numel():
            break
    second = candidates[torch.randint(candidates.numel(), (), generator=generator)]
    lesion = torch.zeros(tiles, dtype=torch.bool)
    for centre in (first, second):
        away = (places - places[centre]).norm(dim=1).masked_fill(lesion, torch.inf)
        lesion[away.topk(each, largest=False).indices] = True
    return lesion


def _smooth(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, side, side): random fields that vary over a sixth of the edge."""
    coarse = torch.randn(1, count, 8, 8, generator=generator)
    return functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)[0]


def _dome(side: int) -> Tensor:
    """(side, side): grows from the middle, so that tissue is one piece more often than not."""
    axis = torch.linspace(-1, 1, side)
    return 2.0 * (axis[:, None] ** 2 + axis**2)
