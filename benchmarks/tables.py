"""A result file as a Markdown table: `python benchmarks/run.py --markdown FILE` prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measure import measurement
from methods import DENSE_SEQLEN, OURS

GPU_HEADER = (
    "row",
    "dilated: forward / backward / step",
    "best composition: forward / step",
    f"dense cuDNN, n = {DENSE_SEQLEN}",
    f"dense flash, n = {DENSE_SEQLEN}",
    f"FlashAttention-4, n = {DENSE_SEQLEN}",
    "torch.mm",
    "extra memory, forward / step: dilated",
    "composition",
)

_PASS_NAMES = {"forward": "forward", "forward_backward": "forward + backward"}
HEADER = (
    "row",
    "pass",
    "dilated",
    "best composition",
    "ratio",
    "extra memory: dilated",
    "composition",
    f"dense SDPA n={DENSE_SEQLEN}",
    "torch.mm",
)


def _rate(column: dict[str, Any]) -> str:
    median, iqr = column["seconds_median"], measurement(column["seconds"]).iqr
    spread = 50 * iqr / median
    return f"{column['gflops_per_second']:.0f} GFLOP/s ({_seconds(median)} ± {spread:.0f} %)"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def _mebibytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 2**20:.0f} MiB"


def cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Text cells under HEADER, one row per configuration and pass."""
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        for kind, measured in row["passes"].items():
            ours = measured["methods"].get(OURS)
            best = measured["best_composition"]
            other = measured["methods"].get(best)
            yardsticks = measured["yardsticks"]
            dense = yardsticks[f"dense SDPA n={DENSE_SEQLEN}"]
            rows.append(
                (
                    row["row"],
                    _PASS_NAMES[kind],
                    _rate(ours) if ours else "-",
                    f"{best}: {_rate(other)}" if other else "-",
                    f"{measured['speed_ratio']:.2f}x" if "speed_ratio" in measured else "-",
                    _mebibytes(ours["peak_extra_bytes"]) if ours else "-",
                    _mebibytes(other["peak_extra_bytes"]) if other else "-",
                    f"{dense['gflops_per_second']:.0f} GFLOP/s",
                    f"{yardsticks['torch.mm']['gflops_per_second']:.0f} GFLOP/s",
                )
            )
    return rows


def _on_gpu(result: dict[str, Any]) -> bool:
    return "device" in result["machine"]


def _tera(column: dict[str, Any] | None) -> str:
    return "-" if column is None else f"{column['gflops_per_second'] / 1e3:.0f}"


def _gigabytes(column: dict[str, Any] | None) -> str:
    return "-" if column is None else f"{column['peak_extra_bytes'] / 1e9:.2f} GB"


def _forward_backward(passes: dict[str, Any], label: str) -> str:
    columns = [passes[kind]["yardsticks"].get(label) for kind in ("forward", "forward_backward")]
    if columns[0] is None:
        return "not installed"
    return f"{_tera(columns[0])} / {_tera(columns[1]['backward'])}"


def gpu_cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Text cells under GPU_HEADER, TFLOP/s."""
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        passes = row["passes"]
        one, step = passes["forward"], passes["forward_backward"]
        ours = [kind["methods"][OURS] for kind in (one, step)]
        best = [kind["methods"].get(kind["best_composition"]) for kind in (one, step)]
        rows.append(
            (
                row["row"],
                f"{_tera(ours[0])} / {_tera(ours[1]['backward'])} / {_tera(ours[1])}",
                f"{one['best_composition']}: {_tera(best[0])} / "
                f"{step['best_composition']}: {_tera(best[1])}",
                *(
                    _forward_backward(passes, f"{kernel} n={DENSE_SEQLEN}")
                    for kernel in ("dense cuDNN", "dense flash", "FlashAttention-4")
                ),
                _tera(one["yardsticks"]["torch.mm"]),
                " / ".join(map(_gigabytes, ours)),
                " / ".join(map(_gigabytes, best)),
            )
        )
    return rows


def picture(result: dict[str, Any], path: Path) -> None:
    """Bars of a GPU's result: rates of forward and step, by row."""
    from matplotlib.figure import Figure

    kinds = {"forward": "forward", "forward_backward": "forward + backward"}
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    names = [row["row"] for row in result["rows"]]
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), kinds.items(), strict=True):
        bars: dict[str, list[float]] = {}
        for row in result["rows"]:
            measured = row["passes"][kind]
            columns = {
                "dilated": measured["methods"][OURS],
                "best composition": measured["methods"].get(measured["best_composition"]),
                f"dense cuDNN, n = {DENSE_SEQLEN}": measured["yardsticks"][
                    f"dense cuDNN n={DENSE_SEQLEN}"
                ],
            }
            for label, column in columns.items():
                rate = column["gflops_per_second"] / 1e3 if column else 0.0
                bars.setdefault(label, []).append(rate)
        for number, (label, heights) in enumerate(bars.items()):
            at = [i + 0.27 * (number - 1) for i in range(len(names))]
            axes.bar(
                at, heights, 0.27, label=label, color=("#1b6ca8", "#c9c9c9", "#e0a458")[number]
            )
        axes.set_title(title)
        axes.set_xticks(range(len(names)), names, rotation=30)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("useful TFLOP/s")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{result['machine']['device']}, bfloat16")
    figure.savefig(path, dpi=150)


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know: machine, command, what was not compiled or not repeated."""
    machine = result["machine"]
    where = f"{machine['processor']}, {result['threads']} threads"
    if _on_gpu(result):
        where = (
            f"{machine['device']}, driver {machine['driver']}, CUDA {machine['CUDA']}, "
            f"commit {result['commit']}; TFLOP/s"
        )
    lines = [
        f"{where}, torch {machine['torch']}; "
        f"{result['started']}; median of {result['repeats']} interleaved runs ± half the "
        "interquartile range; useful FLOP only (4·d per pair forward, 2.5 times that backward); "
        f"command: {result['command']}"
    ]
    for row in result["rows"]:
        lines += [f"{row['row']}: {label}: {why}" for label, why in row.get("not_run", {}).items()]
        lines += [f"{row['row']}: {label}: {why}" for label, why in row["not_compiled"].items()]
        for kind, measured in row["passes"].items():
            slow = [
                f"{label} {_seconds(column['seconds_median'])}"
                for label, column in measured["methods"].items()
                if not column["repeated"]
            ]
            if slow:
                lines.append(
                    f"{row['row']}, {_PASS_NAMES[kind]}: slower in one run, not repeated: "
                    + ", ".join(slow)
                )
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table and its notes as Markdown."""
    header, rows = HEADER, cells
    if _on_gpu(result):
        header, rows = GPU_HEADER, gpu_cells
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(result)]
    return "\n".join([*lines, "", *(f"* {note}" for note in notes(result))])
