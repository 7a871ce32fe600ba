"""The pictures: loss, bits against context, time and memory against length, the attention pattern.

Every function takes numbers and returns a matplotlib Figure; none touches pyplot or global
settings. The pattern is asked of the core (`dilated.plan`), never drawn from formulas
here.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import dilated
from dilated.report.errors import need_matplotlib
from dilated.training.errors import TrainingError, reason

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dilated.training import ContextCurve

_COLOURS = {"dilated": "#0b6e99", "dense_sdpa": "#c44e52", "composition": "#8a8a8a"}
_LARGEST_PATTERN = 4096  # of Plan.pattern
_PIXELS = 512
_CORNER = 48
_COUNTS = ["#ffffff", "#7fb8d1", "#0b6e99", "#083d55", "#e09f3e", "#9e2a2b", "#540b0e"]


def _figure(width: float, height: float) -> Figure:
    need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def loss_figure(history: Sequence[dict[str, float]], held_out: float | None) -> Figure:
    """Bits per byte of every training step, its running mean, and the final held-out value."""
    figure = _figure(8, 3.6)
    axes = figure.add_subplot()
    steps = [record["step"] for record in history]
    bits = [record["loss"] / math.log(2) for record in history]
    axes.plot(steps, bits, color="#9cc9dc", linewidth=1, label="training, each step")
    smooth = [sum(bits[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(len(bits))]
    axes.plot(
        steps, smooth, color=_COLOURS["dilated"], linewidth=2, label="training, mean of 10 steps"
    )
    if held_out is not None:
        axes.axhline(held_out, color=_COLOURS["dense_sdpa"], linestyle="--", linewidth=1.2)
        axes.plot(
            [],
            [],
            color=_COLOURS["dense_sdpa"],
            linestyle="--",
            label=f"held out, at the end: {held_out:.3f}",
        )
    axes.set(xlabel="optimiser step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def context_figure(curve: ContextCurve) -> Figure:
    """Held-out bits per byte against context; bars are the paired standard error of the gain."""
    figure = _figure(8, 3.6)
    axes = figure.add_subplot()
    axes.errorbar(
        curve.contexts,
        curve.bits_per_byte,
        yerr=curve.gain_standard_error,
        color=_COLOURS["dilated"],
        marker="o",
        capsize=3,
        label="held-out files (bars: standard error of the gain over the shortest)",
    )
    low, high = min(curve.bits_per_byte), max(curve.bits_per_byte)
    middle, half = (low + high) / 2, max(0.6 * (high - low), 0.02)
    axes.set_ylim(middle - half, middle + 1.4 * half)
    _length_axis(axes, curve.contexts)
    points = zip(curve.contexts, curve.bits_per_byte, curve.gain_standard_error, strict=True)
    for context, bits, error in points:
        axes.annotate(
            f"{bits:.3f}",
            (context, bits + error),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set(xlabel="context the model may read (bytes)", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        list(lengths), [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths], minor=False
    )


def timing_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Seconds of each pass and extra memory of the last one against length, logarithmic axes."""
    from dilated.report.timing import NAMES

    figure = _figure(11, 3.9)
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    panels = [(name, "seconds_median", "seconds", 1) for name in passes]
    panels.append((passes[-1], "peak_extra_bytes", "extra memory (MiB)", 2**20))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lengths = sorted({row["seqlen"] for row in rows})
    grid = figure.subplots(1, len(panels))
    for axes, (name, key, unit, divisor) in zip(grid, panels, strict=True):
        for method in methods:
            points = [
                (row["seqlen"], row[key] / divisor)
                for row in rows
                if row["method"] == method and row["pass"] == name and row[key]
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=4,
                    label=NAMES.get(method, method),
                    color=_COLOURS.get(method),
                )
        _length_axis(axes, lengths)
        axes.set_yscale("log")
        title = name.replace("_", " + ")
        axes.set(xlabel="sequence length (tokens)", ylabel=unit)
        axes.set_title(title if divisor == 1 else f"memory, {title}", fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.tick_params(labelsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def pattern_figure(seqlen: int, *, heads: Sequence[int], **configuration: Any) -> Figure:
    """What each query sees: the whole pattern as a density, and a corner pair by pair.

    The corner lies around the end of the shortest segment, where a branch stops and the others go
    on. With a causal mask the first 4,096 rows are the same at every length, so longer sequences
    are shown by their beginning.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm

    shown = min(seqlen, _LARGEST_PATTERN)
    most = len(configuration["segments"])
    middle = min(min(configuration["segments"]), shown - min(shown, _CORNER) // 2)
    low = max(0, middle - _CORNER // 2)
    corner = slice(low, min(shown, low + _CORNER))
    whole = shown <= _CORNER
    figure = _figure(4.4 * len(heads) + 1.2, 4.0 * (1 if whole else 2))
    grid = figure.subplots(1 if whole else 2, len(heads), squeeze=False)
    block = max(1, shown // _PIXELS)
    spare = ["#000000"] * max(0, most + 1 - len(_COUNTS))
    colours = ListedColormap([*_COUNTS, *spare][: most + 1])
    counts = BoundaryNorm([v - 0.5 for v in range(most + 2)], colours.N)
    image = density = None
    for column, head in enumerate(heads):
        table = dilated.plan(shown, **configuration).pattern(head)
        if not whole:
            mean = torch.nn.functional.avg_pool2d(table[None].float(), block, ceil_mode=True)[0]
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


def _draw(axes: Axes, table: torch.Tensor, span: slice, style: dict[str, Any]) -> Any:
    image = axes.imshow(
        table.numpy(),
        extent=(span.start, span.stop, span.stop, span.start),
        interpolation="nearest",
        **style,
    )
    axes.set(xlabel="key position", ylabel="query position")
    axes.tick_params(labelsize=8)
    return image


def pattern_picture(seqlen: int, path: Path, *, head: int = 0, **configuration: Any) -> None:
    """Writes the pattern of one head as .png or .svg.

    Raises:
        TrainingError: another suffix, or the file cannot be written.
        MissingPackage: matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise TrainingError(f"--out: expected a name ending in .png or .svg, got {path}")
    if seqlen > _LARGEST_PATTERN and not configuration.get("is_causal"):
        raise TrainingError(
            f"--seqlen: expected <= {_LARGEST_PATTERN} for a picture without --causal, got {seqlen}"
        )
    figure = pattern_figure(seqlen, heads=[head], **configuration)
    try:
        figure.savefig(path)
    except OSError as error:
        raise TrainingError(f"--out: expected to write {path}, got: {reason(error)}") from None


def svg(figure: Figure) -> str:
    """The figure as an inline <svg> element, without prolog or metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def png(figure: Figure) -> str:
    """The figure as an <img> element with its data inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'
