"""The picture: what is known of the sequence above, what the embedding says below."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from composition import Composition

_KNOWN, _EMBEDDED = "#c44e52", "#0b6e99"


def embedding_figure(
    name: str, window: int, known: Composition, components: NDArray[np.float64]
) -> Figure:
    """GC content and skew, then the principal components (windows, 2), along the sequence."""
    figure = Figure(figsize=(10, 7), layout="constrained", dpi=150)
    place = (np.arange(known.gc.size) + 0.5) * window / 1e6
    rows = [
        ("GC content", known.gc, _KNOWN),
        ("GC skew\n(G - C) / (G + C)", known.skew, _KNOWN),
        ("embedding,\n1st component", components[:, 0], _EMBEDDED),
        ("embedding,\n2nd component", components[:, 1], _EMBEDDED),
    ]
    grid = figure.subplots(len(rows), 1, sharex=True)
    for axes, (label, values, colour) in zip(grid, rows, strict=True):
        axes.plot(place, values, color=colour, linewidth=0.9)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.margins(x=0)
    grid[-1].set_xlabel("position (million bases)")
    figure.suptitle(
        f"{name}: means of {window:,} bases; encoder with random weights, not trained", fontsize=11
    )
    return figure
