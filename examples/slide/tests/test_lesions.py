"""Slides are what lesions.py says: only the places of the lesions tell the labels apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesions import TILE_SIZE, Looks, Slides, draw_slides

LOOKS = Looks.draw(0)


def draw(tiles: int, seed: int, label: float | None = None, batch: int = 1) -> Slides:
    return draw_slides(LOOKS, batch, tiles, torch.Generator().manual_seed(seed), label=label)


@settings(deadline=None, max_examples=15)
@given(
    tiles=st.sampled_from([400, 2500]), seed=st.integers(0, 2**31), label=st.sampled_from([0, 1])
)
def test_slides(tiles: int, seed: int, label: int) -> None:
    """Tiles are distinct, row by row, with equally many lesion tiles, far apart or not."""
    slide = draw(tiles, seed, label)
    assert slide.features.shape == (1, tiles, 1536)
    assert slide.label.tolist() == [label]
    assert int(slide.lesion.sum()) == 2 * round(0.01 * tiles)
    cells = slide.coords[0] / TILE_SIZE
    order = (cells[:, 1] * 1000 + cells[:, 0]).tolist()
    assert order == sorted(set(order))
    assert cells.min() >= 0
    assert cells.max() < 125
    places = cells[slide.lesion[0]]
    extent = float(torch.cdist(places, places).max()) / 125
    # Two discs of 1 % of the tiles, each about a tenth of the edge wide where tissue fills it.
    assert extent > 0.45 if label else extent < 0.45


def test_lesions_look_alike() -> None:
    """Lesion tiles have the lesion's prototype in place of a texture's."""
    slide = draw(400, 1)
    nearest = torch.cat([LOOKS.textures, LOOKS.lesion[None]])
    found = (slide.features[0] @ nearest.T).argmax(1)
    assert torch.equal(found == 8, slide.lesion[0])


def test_both_labels_are_drawn() -> None:
    labels = draw(400, 0, batch=40).label
    assert 5 < int(labels.sum()) < 35


@pytest.mark.parametrize("tiles", [400, 10_000])
def test_a_slide_repeats(tiles: int) -> None:
    for a, b in zip(draw(tiles, 5), draw(tiles, 5), strict=True):
        assert torch.equal(a, b)
