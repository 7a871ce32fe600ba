"""The picture: the true lesions of slides, and where the class token looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dilated.models import heat_map
from lesions import TILE_SIZE

_BLOCK = 4  # tiles along the edge of a heat map's cell: a far segment shows one tile in four


class Shown(NamedTuple):
    """One slide of the picture.

    coords: (tiles, 2); lesion: (tiles,) bool; attention: (tiles,), sums to 1.
    distant: the truth.
    probability: what the model says.
    """

    coords: Tensor
    lesion: Tensor
    attention: Tensor
    distant: bool
    probability: float


def slide_figure(slides: Sequence[Shown]) -> Figure:
    """One row for each slide: its lesions, and the attention that its tiles receive."""
    figure = Figure(figsize=(9, 4.2 * len(slides)), layout="constrained", dpi=130)
    grid = figure.subplots(len(slides), 2, squeeze=False)
    for (truth, heat), slide in zip(grid, slides, strict=True):
        share = slide.attention[slide.lesion].sum().item()
        _show(truth, heat_map(slide.lesion.float(), slide.coords, TILE_SIZE))
        truth.set_title(
            f"lesions, {'distant' if slide.distant else 'neighbours'}: "
            f"{slide.lesion.float().mean().item():.0%} of the tiles",
            fontsize=10,
        )
        _show(heat, heat_map(slide.attention, slide.coords, _BLOCK * TILE_SIZE))
        heat.set_title(
            f"attention of the class token: {share:.0%} on lesions\n"
            f"the model says: distant with probability {slide.probability:.2f}",
            fontsize=10,
        )
    return figure


def _show(axes: Axes, picture: Tensor) -> None:
    axes.set_facecolor("#dddddd")  # no tissue
    axes.imshow(np.asarray(picture), cmap="magma", vmin=0.0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
