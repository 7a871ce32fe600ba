"""Slides are what lesions.py says: only the places of the lesions tell the labels apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesions import FAR, LESION_SHARE, REGIONS, SIDE, TILE_SIZE, Looks, Slides, draw_slides

LOOKS = Looks.draw(0)


def draw(tiles: int, seed: int, *labels: bool) -> Slides:
    return draw_slides(LOOKS, torch.tensor(labels), tiles, torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=15)
@given(
    tiles=st.sampled_from([100, 400, 2500]),
    seed=st.integers(0, 2**31),
    labels=st.lists(st.booleans(), min_size=1, max_size=3),
)
def test_slides(tiles: int, seed: int, labels: list[bool]) -> None:
    """Tiles are distinct, row by row; both labels have equally many lesion tiles."""
    slides = draw(tiles, seed, *labels)
    batch = len(labels)
    assert slides.features.shape == (batch, tiles, 1536)
    assert slides.label.tolist() == [float(label) for label in labels]
    assert slides.lesion.sum(1).tolist() == [round(LESION_SHARE * tiles)] * batch
    cells = slides.coords / TILE_SIZE
    assert torch.equal(cells, cells.floor())
    assert cells.min() >= 0
    assert cells.max() < SIDE
    order = cells[..., 1] * SIDE + cells[..., 0]
    assert (order.diff(dim=1) > 0).all()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), label=st.booleans())
def test_distance(seed: int, label: bool) -> None:
    """Distant lesions are two pieces; neighbours lie within a disc of about their area."""
    slide = draw(2500, seed, label)
    places = slide.coords[0][slide.lesion[0]] / TILE_SIZE
    away = torch.cdist(places, places)
    # Of an edge of 125: the radius of one lesion, of 100 of 2,500 tiles at 62 by 62, were it whole.
    radius = 2 * math.sqrt(LESION_SHARE / 2 * 2500 / math.pi)
    if label:
        assert away.max() >= FAR * SIDE
        assert (away > FAR * SIDE / 2).any(1).all()
    else:
        near = (away <= 4 * radius).float().mean(1)
        assert near.max() > 0.5


def test_lesions_look_alike() -> None:
    """The nearest look of a tile is the lesion's if and only if it is one."""
    slide = draw(400, 1, True)
    found = (slide.features[0] @ LOOKS.rows[:9].T).argmax(1)
    assert torch.equal(found == 8, slide.lesion[0])


def test_report_is_where_lesions_are() -> None:
    slide = draw(400, 2, True)
    region = (slide.coords[0] / TILE_SIZE * REGIONS / SIDE).long()
    counts = torch.zeros(REGIONS, REGIONS)
    for x, y in region[slide.lesion[0]].tolist():
        counts[y, x] += 1
    assert torch.allclose(slide.report[0], counts.flatten() / counts.sum())


@pytest.mark.parametrize("tiles", [400, 10_000])
def test_a_slide_repeats(tiles: int) -> None:
    for a, b in zip(draw(tiles, 5, True), draw(tiles, 5, True), strict=True):
        assert torch.equal(a, b)
