"""The picture: the true lesions of a slide, and what moved the classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from lesions import TILE_SIZE, Slides


def slide_figure(shown: Sequence[tuple[Slides, Tensor, float]]) -> Figure:
    """One row for each slide: its lesions, and the influence of its tiles.

    Args:
        shown: a slide (a batch of one), the influence (1, tiles) of each tile, and what the model
            says, the probability that the lesions are distant.
    """
    figure = Figure(figsize=(9, 4.3 * len(shown)), layout="constrained", dpi=130)
    grid = figure.subplots(len(shown), 2, squeeze=False)
    for (truth, heat), (slide, influence, says) in zip(grid, shown, strict=True):
        kind = "distant lesions" if slide.label.item() else "one place"
        _show(truth, slide, np.where(slide.lesion[0].numpy(), 1.0, 0.15), "magma", (0, 1.1))
        truth.set_title(f"truth: {kind}", fontsize=10)
        values = influence[0].numpy()
        _show(heat, slide, values, "magma", (0, float(np.quantile(values, 0.995))))
        heat.set_title(
            f"influence on the answer |gradient · features|; probability of distant: {says:.2f}",
            fontsize=10,
        )
    return figure


def _show(
    axes: Axes,
    slide: Slides,
    values: NDArray[np.float64],
    colours: str,
    limits: tuple[float, float],
) -> None:
    x, y = (slide.coords[0] / TILE_SIZE).round().int().numpy().T
    picture = np.full((y.max() + 1, x.max() + 1), np.nan)
    picture[y, x] = values
    axes.imshow(picture, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
