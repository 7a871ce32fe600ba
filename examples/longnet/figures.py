"""The pictures of the report: loss, bits against context, time and memory against length.

Every function takes numbers and returns a matplotlib Figure; none touches pyplot or global
settings.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation import ContextCurve

NAMES = {
    "dilated": "this operator",
    "dense_sdpa": "dense attention (torch's SDPA)",
    "composition": "best composition of torch's kernels",
}
_COLOURS = {"dilated": "#0b6e99", "dense_sdpa": "#c44e52", "composition": "#8a8a8a"}


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def loss_figure(history: Sequence[dict[str, float]], held_out: float) -> Figure:
    """Bits per byte of every training step, its running mean, and the final held-out value."""
    figure = _figure(8, 3.6)
    axes = figure.add_subplot()
    steps = [record["step"] for record in history]
    bits = [record["loss"] / math.log(2) for record in history]
    axes.plot(steps, bits, color="#9cc9dc", linewidth=1, label="training, each step")
    smooth = [sum(bits[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(len(bits))]
    label = "training, mean of 10 steps"
    axes.plot(steps, smooth, color=_COLOURS["dilated"], linewidth=2, label=label)
    label = f"held out, at the end: {held_out:.3f}"
    axes.axhline(held_out, color=_COLOURS["dense_sdpa"], linestyle="--", linewidth=1.2, label=label)
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
    labels = [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths]
    axes.set_xticks(list(lengths), labels, minor=False)


def timing_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Seconds of each pass and extra memory of the last one against length, logarithmic axes."""
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
                    label=NAMES[method],
                    color=_COLOURS[method],
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


def svg(figure: Figure) -> str:
    """The figure as an inline <svg> element, without prolog or metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def png(figure: Figure) -> str:
    """The figure as the address of an image with its data inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
