"""Time and memory against length: ours, dense attention, the fastest composition; for reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from configurations import FORWARD_FLOPS_PER_PAIR_AND_DIM, PASSES, Configuration
from measure import CALLS, Call, make_inputs, peak_extra_bytes, seconds_of, summary
from methods import COMPOSITIONS, OURS, Method, dense, dense_pairs, methods

# Seconds; a single call predicted to take longer is not started.
_LONGEST_CALL = 5.0
# Compositions compete up to this length; longer ones take the last winner.
_LONGEST_CONTEST = 8192
# Seconds of repeats per length, pass and method.
_REPEAT_BUDGET = 1.5


def _fastest(config: Configuration, inputs: tuple[Any, ...], kind: str) -> Method:
    """The composition whose second call is fastest."""
    seconds = {}
    for method in COMPOSITIONS:
        call = CALLS[kind](method.make(config), inputs)
        call()
        seconds[method.name] = seconds_of(call)
    return min(COMPOSITIONS, key=lambda method: seconds[method.name])


def length_sweep(
    seqlens: Sequence[int] = (1024, 2048, 4096, 8192, 16384, 32768, 65536),
    num_heads: int = 4,
    head_dim: int = 32,
    segments: Sequence[int] = (1024, 4096, 16384),
    dilations: Sequence[int] = (1, 2, 4),
    is_causal: bool = True,
    repeats: int = 3,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Measures every method at every length, forward and forward + backward, interleaved.

    Args:
        seqlens: Lengths in tokens.
        num_heads: Heads.
        head_dim: Dimension of a head.
        segments: Segment length per branch, preset longnet.
        dilations: Dilation per branch.
        is_causal: Keys after the query are not seen.
        repeats: Timed calls at most; long calls get fewer, at least one.
        progress: Receives a line before every measurement.

    Returns:
        Dicts with method ("dilated", "dense_sdpa", "composition"), seqlen, pass ("forward",
        "forward_backward"), seconds, seconds_median, seconds_iqr, peak_extra_bytes, flops and note.
        A call that would take too long has None for its numbers, and the note says why.
    """
    rows: list[dict[str, Any]] = []
    winners: dict[str, tuple[int, Method]] = {}
    dense_seconds: dict[str, tuple[int, float]] = {}
    for seqlen in sorted(seqlens):
        config = Configuration(
            seqlen, num_heads, head_dim, tuple(segments), tuple(dilations), is_causal
        )
        inputs = make_inputs(seqlen, num_heads, head_dim)
        dense_flops = (
            FORWARD_FLOPS_PER_PAIR_AND_DIM * head_dim * num_heads * dense_pairs(seqlen, is_causal)
        )
        ours_flops = config.forward_flops()
        for kind, factor in PASSES.items():
            if progress:
                progress(f"{seqlen} tokens, {kind}")
            if kind not in winners or seqlen <= _LONGEST_CONTEST:
                winners[kind] = (seqlen, _fastest(config, inputs, kind))
            contest, composition = winners[kind]
            attentions = {
                OURS: methods(False)[0].make(config),
                "composition": composition.make(config),
            }
            notes = {"composition": f"{composition.name}, fastest of 3 at {contest} tokens"}
            predicted = 0.0
            if kind in dense_seconds:
                length, seconds = dense_seconds[kind]
                predicted = seconds * (seqlen / length) ** 2
            if predicted <= _LONGEST_CALL:
                attentions["dense_sdpa"] = dense(is_causal)
            else:
                notes["dense_sdpa"] = (
                    f"not run: about {predicted:.0f} s per call, "
                    f"from {dense_seconds[kind][0]} tokens"
                )
            calls = {
                label: CALLS[kind](attention, inputs) for label, attention in attentions.items()
            }
            measured = _interleaved(calls, repeats)
            if "dense_sdpa" in measured:
                dense_seconds[kind] = (seqlen, measured["dense_sdpa"]["seconds_median"])
            nothing = {"seconds_median": None, "seconds_iqr": None, "peak_extra_bytes": None}
            for label in (OURS, "dense_sdpa", "composition"):
                flops = dense_flops if label == "dense_sdpa" else ours_flops
                rows.append(
                    {
                        "method": label,
                        "seqlen": seqlen,
                        "pass": kind,
                        **measured.get(label, {"seconds": [], **nothing}),
                        "flops": round(flops * factor),
                        "note": notes.get(label, ""),
                    }
                )
    return rows


def _interleaved(calls: dict[str, Call], repeats: int) -> dict[str, dict[str, Any]]:
    """`summary` and peak extra bytes by method; memory has a call of its own."""
    extras: dict[str, int | None] = {}
    counts: dict[str, int] = {}
    for label, call in calls.items():
        if not extras:
            call()  # the very first also pays for threads and imports
        results, extras[label], seconds = peak_extra_bytes(call)
        del results
        counts[label] = max(1, min(repeats, int(_REPEAT_BUDGET / max(seconds, 1e-9))))
    samples: dict[str, list[float]] = {label: [] for label in calls}
    for repeat in range(repeats):
        for label, call in calls.items():
            if repeat < counts[label]:
                samples[label].append(seconds_of(call))
    return {
        label: {**summary(seconds), "peak_extra_bytes": extras[label]}
        for label, seconds in samples.items()
    }
