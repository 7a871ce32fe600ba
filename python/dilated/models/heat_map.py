"""Heat maps: numbers of tiles drawn where the tiles lie on their slide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated.errors import InvalidProblem, message

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(weights: Tensor, coords: Tensor, tile_size: int = 256) -> Tensor:
    """The numbers of a slide's tiles as a picture; NaN where no tile lies.

    Args:
        weights: (tiles,), for example one head's `dilated.attention_received` without the class
            token.
        coords: pixels (tiles, 2) of the tiles' corners: x, y, as of `SlideEncoder`.
        tile_size: side of a tile, in the unit of coordinates.

    Returns:
        float32 (rows, columns) on the CPU: row y // tile_size, column x // tile_size, counted from
        the first that hold a tile. Tiles at the same place add up.

    Raises:
        InvalidProblem: a shape does not fit, there is no tile, or tile_size is below 1.

    Example:
        >>> import torch
        >>> from dilated.models import heat_map
        >>> heat_map(torch.tensor([0.75, 0.25]), torch.tensor([[512, 0], [768, 256]]))
        tensor([[0.7500,    nan],
                [   nan, 0.2500]])
    """
    if tile_size < 1:
        raise InvalidProblem(message("tile_size", ">= 1", str(tile_size), op="heat_map"))
    if weights.dim() != 1 or weights.numel() == 0:
        got = f"shape {tuple(weights.shape)}"
        raise InvalidProblem(message("weights", "(tiles,), one or more", got, op="heat_map"))
    if coords.shape != (*weights.shape, 2):
        expected, got = f"shape {(*weights.shape, 2)}", f"shape {tuple(coords.shape)}"
        raise InvalidProblem(message("coords", expected, got, op="heat_map"))
    cells = torch.floor(coords.detach().cpu().double() / tile_size).long()
    cells = cells - cells.min(0).values
    columns, rows = (int(n) + 1 for n in cells.max(0).values)
    picture = torch.full((rows, columns), torch.nan)
    places = cells[:, 1], cells[:, 0]
    picture[places] = 0.0
    return picture.index_put(places, weights.detach().float().cpu(), accumulate=True)


def heat_map_figure(
    weights: Tensor, coords: Tensor, tile_size: int = 256, *, title: str = ""
) -> Figure:
    """`heat_map` drawn with a colour bar. Needs matplotlib (`pip install dilated[pictures]`).

    Args:
        weights: of `heat_map`, as coords and tile_size.
        coords: pixels (tiles, 2).
        tile_size: side of a tile, in the unit of coordinates.
        title: what stands above it.

    Returns:
        A figure that pyplot does not know; `savefig` writes it.

    Raises:
        InvalidProblem: as `heat_map`.

    Example:
        >>> import torch
        >>> from dilated.models import heat_map_figure
        >>> coords = 256 * torch.cartesian_prod(torch.arange(4), torch.arange(3))
        >>> figure = heat_map_figure(torch.rand(12), coords)
    """
    from matplotlib.figure import Figure

    picture = heat_map(weights, coords, tile_size)
    rows, columns = picture.shape
    longest = max(rows, columns)
    figure = Figure(
        figsize=(1.6 + 5.0 * columns / longest, 1.0 + 5.0 * rows / longest),
        layout="constrained", dpi=150,
    )  # fmt: skip
    axes = figure.subplots()
    image = axes.imshow(picture.numpy(), cmap="magma", vmin=0.0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure
