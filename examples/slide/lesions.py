"""Synthetic slides: tiles of tissue with features and coordinates, and two lesions somewhere.

A slide is positive if its lesions lie far apart, negative if they are neighbours. Both kinds have
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
LESION_SHARE = 0.08  # of all tiles; both lesions
SIDE = 125  # tiles along the edge of the field that tissue fills in part
FAR = 0.45  # from centre to centre, as a share of the edge: at least, of distant lesions
_GAP = 0.02  # as a share of the edge: at most, between neighbours
_TEXTURES, _GRAINS = 8, 8192
_TEXTURE_SCALE, _GRAIN_SCALE = 0.4, 0.2


class Slides(NamedTuple):
    """A batch of slides of equal length, tiles row by row.

    features: (batch, tiles, 1536) float32.
    coords: (batch, tiles, 2) float32, pixels of each tile's corner.
    lesion: (batch, tiles) bool.
    report: (batch, 16) float32; how lesion tiles share out among 4 x 4 regions, row by row.
    label: (batch,) float32; 1 = distant lesions.
    """

    features: Tensor
    coords: Tensor
    lesion: Tensor
    report: Tensor
    label: Tensor


@dataclass(frozen=True)
class Looks:
    """What tiles look like: a tile's features are its kind's row and a random grain's.

    rows: (9 + 8192, 1536) float32: eight textures, the lesion, and grains to draw from.
    """

    rows: Tensor

    @classmethod
    def draw(cls, seed: int) -> Looks:
        """Independent normal numbers: the tile encoder that came before does its work."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(_TEXTURES + 1 + _GRAINS, FEATURES, generator=generator)
        rows[: _TEXTURES + 1] *= _TEXTURE_SCALE
        rows[_TEXTURES + 1 :] *= _GRAIN_SCALE
        return cls(rows)

    def features(self, kinds: Tensor, generator: torch.Generator) -> Tensor:
        """Kinds (batch, tiles) -> (batch, tiles, 1536): 0 to 7 are textures, 8 the lesion."""
        first = _TEXTURES + 1
        grains = torch.randint(first, first + _GRAINS, kinds.shape, generator=generator)
        pairs = torch.stack((kinds, grains), -1).flatten(0, 1)
        # Sums of two rows without copies of either: drawing must not cost more than training.
        sums = functional.embedding_bag(pairs, self.rows, mode="sum")
        return sums.view(*kinds.shape, FEATURES)


def draw_slides(looks: Looks, labels: Tensor, tiles: int, generator: torch.Generator) -> Slides:
    """Draws one slide for each label.

    Args:
        looks: shared by all slides.
        labels: (batch,) bool; True = distant lesions.
        tiles: of each slide; fewer tiles are the same slide seen coarser.
        generator: of the draw.
    """
    batch = labels.numel()
    side = max(4, round(SIDE * (tiles / 10_000) ** 0.5))
    # Tissue is where a smooth random field is high; textures follow other such fields.
    field = (_smooth(batch, 1, side, generator)[:, 0] - _dome(side)).flatten(1)
    tissue = field.topk(tiles).indices.sort().values
    places = torch.stack((tissue % side, tissue // side), -1).float()  # x, y; tiles row by row
    textures = _smooth(batch, _TEXTURES, side, generator).flatten(2)
    kinds = textures.gather(2, tissue[:, None].expand(-1, _TEXTURES, -1)).argmax(1)
    lesion = _lesions(places, labels, side, generator)
    kinds = kinds.masked_fill(lesion, _TEXTURES)
    # The grid is centred on its cells, so that coarser slides cover the same pixels.
    coords = ((places + 0.5) * (SIDE / side)).floor() * TILE_SIZE
    cell = (places * REGIONS / side).long()
    region = functional.one_hot(cell[..., 1] * REGIONS + cell[..., 0], REGIONS**2)
    report = (region * lesion[..., None]).sum(1) / lesion.sum(1, keepdim=True)
    return Slides(looks.features(kinds, generator), coords, lesion, report, labels.float())


def _lesions(places: Tensor, distant: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """(batch, tiles) bool: two patches of adjacent tiles around two centres, of equal area."""
    batch, tiles, _ = places.shape
    each = max(1, round(LESION_SHARE * tiles / 2))
    diameter = 2 * (each / torch.pi) ** 0.5
    rows = torch.arange(batch)
    first = torch.randint(tiles, (batch,), generator=generator)
    while True:
        away = (places - places[rows, first, None]).norm(dim=2)
        near = (away >= diameter) & (away <= diameter + max(1.0, _GAP * side))
        fits = torch.where(distant[:, None], away >= FAR * side, near)
        stuck = ~fits.any(1)  # nothing of this slide is that far from there
        if not stuck.any():
            break
        first = torch.where(stuck, torch.randint(tiles, (batch,), generator=generator), first)
    second = torch.rand(batch, tiles, generator=generator).masked_fill(~fits, -1).argmax(1)
    lesion = torch.zeros(batch, tiles, dtype=torch.bool)
    for centre in (first, second):
        away = (places - places[rows, centre, None]).norm(dim=2).masked_fill(lesion, torch.inf)
        lesion.scatter_(1, away.topk(each, largest=False).indices, True)
    return lesion


def _smooth(batch: int, count: int, side: int, generator: torch.Generator) -> Tensor:
    """(batch, count, side, side): random fields that vary over a seventh of the edge."""
    coarse = torch.randn(batch, count, 8, 8, generator=generator)
    return functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=True)


def _dome(side: int) -> Tensor:
    """(side, side): grows from the middle, so that tissue is one piece more often than not."""
    axis = torch.linspace(-1, 1, side)
    return 2.0 * (axis[:, None] ** 2 + axis**2)
