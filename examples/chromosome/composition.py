"""Window by window: what is known of a sequence, and what an embedding says."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_C, _G = 1, 2


class Composition(NamedTuple):
    """Shares per window, (windows,) each; NaN-free: a window without known bases counts as 0.

    gc: (G + C) / known bases.
    skew: (G - C) / (G + C); its sign turns where replication begins and ends.
    """

    gc: NDArray[np.float64]
    skew: NDArray[np.float64]


def composition(codes: NDArray[np.uint8], window: int) -> Composition:
    """GC content and skew of whole windows (a shorter sequence is one window)."""
    rows = _windows(torch.from_numpy(codes)[:, None], window)[..., 0]
    g, c, known = (
        rows.eq(_G).sum(1).double(),
        rows.eq(_C).sum(1).double(),
        rows.le(3).sum(1).double(),
    )
    return Composition(
        ((g + c) / known.clamp(min=1)).numpy(), ((g - c) / (g + c).clamp(min=1)).numpy()
    )


def window_means(embedding: Tensor, window: int) -> Tensor:
    """(n, d) -> (windows, d) float64, the mean of each whole window."""
    return torch.stack([rows.double().mean(0) for rows in _windows(embedding, window)])


def _windows(rows: Tensor, window: int) -> Tensor:
    window = min(window, rows.shape[0])
    whole = rows.shape[0] // window
    return cast(Tensor, rows[: whole * window].unflatten(0, (whole, window)))


def principal_components(points: Tensor, count: int) -> NDArray[np.float64]:
    """(m, d) -> (m, count): centred points along the directions of largest variance, of which each
    is turned so that its largest entry is positive.
    """
    centred = points - points.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    turned: NDArray[np.float64] = (centred @ (directions * largest.sign()).T).numpy()
    return turned
