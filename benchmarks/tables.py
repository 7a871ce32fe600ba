"""A result file as a Markdown table: `python benchmarks/run.py --markdown FILE` prints it."""

from __future__ import annotations

from typing import Any

from measure import measurement
from methods import DENSE_SEQLEN, OURS

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


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know: machine, command, what was not compiled or not repeated."""
    machine = result["machine"]
    lines = [
        f"{machine['processor']}, {result['threads']} threads, torch {machine['torch']}; "
        f"{result['started']}; median of {result['repeats']} interleaved runs ± half the "
        "interquartile range; useful FLOP only (4·d per pair forward, 2.5 times that backward); "
        f"command: {result['command']}"
    ]
    for row in result["rows"]:
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
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(result)]
    return "\n".join([*lines, "", *(f"* {note}" for note in notes(result))])
