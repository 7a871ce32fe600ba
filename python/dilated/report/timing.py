"""Time and memory of this operator, of dense attention and of the best composition, in one run.

The measuring is `dilated.bench.length_sweep`; this file picks what is feasible and words the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dilated.bench import length_sweep

REPORT_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def measure(
    lengths: Sequence[int],
    *,
    segments: Sequence[int],
    dilations: Sequence[int],
    num_heads: int,
    head_dim: int,
) -> list[dict[str, Any]]:
    """Causal rows of `length_sweep`; a call that would take too long has None and a note that says
    so.
    """
    return length_sweep(
        lengths,
        num_heads=num_heads,
        head_dim=head_dim,
        segments=segments,
        dilations=dilations,
        is_causal=True,
        progress=lambda line: print(f"  {line}", flush=True),
    )


def measured(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with numbers."""
    return [row for row in rows if row["seconds_median"] is not None]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The row of a table under `HEADER`."""
    if row["seconds_median"] is None:
        numbers: tuple[str, ...] = ("-", "-", "-")
    else:
        low, high = row["seconds_quartiles"]
        extra = row["peak_extra_bytes"]
        numbers = (
            f"{row['seconds_median']:.4f}",
            f"{low:.4f} .. {high:.4f}",
            "-" if extra is None else f"{extra / 2**20:.1f}",
        )
    name = NAMES.get(row["method"], row["method"])
    kind = row["pass"].replace("_", " + ")
    return (f"{row['seqlen']:,}", kind, name, *numbers, row["note"])


HEADER = ("tokens", "pass", "method", "seconds (median)", "quartiles", "extra MiB", "note")
NAMES = {
    "dilated": "this operator",
    "dense_sdpa": "dense scaled_dot_product_attention",
    "composition": "best composition of torch's kernels",
}
