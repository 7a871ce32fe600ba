"""A picture of who sees whom, asked of the core (`dilated.plan`), never drawn from formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from ._plan import plan
from .errors import InvalidProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGEST = 4096  # of Plan.pattern
_PIXELS = 512
_CORNER = 48
_COUNTS = ["#ffffff", "#7fb8d1", "#0b6e99", "#083d55", "#e09f3e", "#9e2a2b", "#540b0e"]


def pattern_figure(seqlen: int, *, heads: Sequence[int], **configuration: Any) -> Figure:
    """What each query sees: the whole pattern as a density, and a corner pair by pair.

    The corner lies around the end of the shortest segment, where a branch stops and the others go
    on. With a causal mask the first 4,096 rows are the same at every length, so longer sequences
    are shown by their beginning. Needs matplotlib.

    Args:
        seqlen: length of the sequence.
        heads: the heads to draw, side by side.
        **configuration: as in `dilated.plan`.

    Returns:
        A figure that pyplot does not know; `savefig` writes it.

    Raises:
        InvalidProblem: nothing to draw, a sequence above 4,096 that is not causal, or a
            configuration that breaks a rule.

    Example:
        >>> from dilated.pattern import pattern_figure
        >>> figure = pattern_figure(64, heads=[0], segments=[16, 64], dilations=[1, 4])
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
    from matplotlib.figure import Figure

    largest = seqlen if configuration.get("is_causal") else _LARGEST
    if not 1 <= seqlen <= largest:
        expected = "1 or more" if seqlen < 1 else f"at most {_LARGEST} unless causal"
        raise InvalidProblem(f"pattern_figure: seqlen: expected {expected}, got {seqlen}")
    shown = min(seqlen, _LARGEST)
    most = len(configuration["segments"])
    middle = min(min(configuration["segments"]), shown - min(shown, _CORNER) // 2)
    low = max(0, middle - _CORNER // 2)
    corner = slice(low, min(shown, low + _CORNER))
    whole = shown <= _CORNER
    size = (4.4 * len(heads) + 1.2, 4.0 * (1 if whole else 2))
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    grid = figure.subplots(1 if whole else 2, len(heads), squeeze=False)
    block = max(1, shown // _PIXELS)
    spare = ["#000000"] * max(0, most + 1 - len(_COUNTS))
    colours = ListedColormap([*_COUNTS, *spare][: most + 1])
    counts = BoundaryNorm([v - 0.5 for v in range(most + 2)], colours.N)
    image = density = None
    for column, head in enumerate(heads):
        table = plan(shown, **configuration).pattern(head)
        if not whole:
            mean = functional.avg_pool2d(table[None].float(), block, ceil_mode=True)[0]
            style = {"cmap": "viridis_r", "norm": LogNorm(1e-2, most)}
            density = _draw(grid[0][column], mean, slice(0, shown), style)
            grid[0][column].set_title(f"head {head}", fontsize=10)
        style = {"cmap": colours, "norm": counts}
        image = _draw(grid[-1][column], table[corner, corner], corner, style)
        grid[-1][column].set_title(f"head {head}, pair by pair", fontsize=10)
    if density is not None:
        bar = figure.colorbar(density, ax=grid[0], shrink=0.8)
        bar.set_label("branches that see a pair, mean")
    if image is not None:
        bar = figure.colorbar(image, ax=grid[-1], shrink=0.8, ticks=range(most + 1))
        bar.set_label("branches that see the pair")
    return figure


def _draw(axes: Axes, table: Tensor, span: slice, style: dict[str, Any]) -> Any:
    image = axes.imshow(
        table.numpy(),
        extent=(span.start, span.stop, span.stop, span.start),
        interpolation="nearest",
        **style,
    )
    axes.set(xlabel="key position", ylabel="query position")
    axes.tick_params(labelsize=8)
    return image
