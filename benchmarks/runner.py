"""Runs rows: every method once for memory and agreement, then the contenders interleaved for time.

First call of every method: peak extra bytes, and its results compared with ours (a column that
computes something else stops the run). Compositions slower than _CONTENDER times the fastest one
are not repeated; their first call stands in the result, marked. The rest, ours, torch.mm and dense
attention take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from configurations import FORWARD_FLOPS_PER_PAIR_AND_DIM, PASSES, Configuration
from measure import (
    CALLS,
    Call,
    CompileBudgetExceeded,
    make_inputs,
    peak_extra_bytes,
    seconds_of,
    summary,
    time_limit,
)
from methods import DENSE_SEQLEN, OURS, Method, dense, dense_pairs, matrix_product, methods

Progress = Callable[[str], None]

_CONTENDER = 1.25
_AGREEMENT = 1e-3  # float32, different summation orders; a wrong key set differs by 0.1 and more


def _rated(seconds: list[float], flops: float) -> dict[str, Any]:
    measured = summary(seconds)
    return {**measured, "gflops_per_second": flops / measured["seconds_median"] / 1e9}


def _difference(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(results, expected, strict=True))


def _warm_up(method: Method, config: Configuration) -> None:
    """Threads, BLAS kernels and lazy imports on a small problem: no method pays for them."""
    if method.compiled:
        return
    small = Configuration(
        64, config.num_heads, config.head_dim, (16, 64), (1, 2), config.is_causal, config.preset
    )
    inputs = make_inputs(small.seqlen, small.num_heads, small.head_dim)
    for make_call in CALLS.values():
        make_call(method.make(small), inputs)()


def _compile(calls: dict[str, Call], budget: float) -> str | None:
    """Compiles both passes by calling them; a sentence if that is too slow or fails."""
    torch.compiler.reset()
    try:
        with time_limit(budget):
            for call in calls.values():
                call()
    except CompileBudgetExceeded:
        torch.compiler.reset()
        return f"compiling took more than {budget:.0f} s, eager stands"
    except (
        Exception
    ) as error:  # whatever inductor raises: the column is optional, the reason is printed
        torch.compiler.reset()
        reason = str(error).strip().splitlines()
        return f"torch.compile failed: {type(error).__name__}: {reason[0] if reason else ''}"
    return None


def run_row(
    name: str,
    config: Configuration,
    *,
    repeats: int = 5,
    compiled: bool = True,
    compile_budget: float = 300.0,
    progress: Progress = lambda text: None,
    columns: Sequence[Method] | None = None,
) -> dict[str, Any]:
    """One row of the yardstick, as JSON-ready values.

    Args:
        name: Printed and stored.
        config: What every method computes.
        repeats: Interleaved timings per contender and pass.
        compiled: Also measure compositions under torch.compile.
        compile_budget: Seconds that compiling one composition may take.
        progress: Receives a line about what runs next.
        columns: Methods to run, ours first; default all.

    Raises:
        RuntimeError: two methods disagree.
    """
    inputs = make_inputs(config.seqlen, config.num_heads, config.head_dim)
    forward_flops = config.forward_flops()
    chosen = list(methods(compiled) if columns is None else columns)
    results: dict[str, Any] = {
        "row": name,
        "configuration": vars(config),
        "forward_flops": forward_flops,
        "passes": {},
        "not_compiled": {},
    }
    calls: dict[str, dict[str, Call]] = {}
    for method in chosen:
        progress(f"{name}: preparing {method.label}")
        _warm_up(method, config)
        attention = method.make(config)
        made = {kind: make_call(attention, inputs) for kind, make_call in CALLS.items()}
        note = _compile(made, compile_budget) if method.compiled else None
        if note is None:
            calls[method.label] = made
        else:
            results["not_compiled"][method.label] = note
    dense_inputs = make_inputs(DENSE_SEQLEN, config.num_heads, config.head_dim)
    dense_flops = (
        FORWARD_FLOPS_PER_PAIR_AND_DIM
        * config.head_dim
        * config.num_heads
        * dense_pairs(DENSE_SEQLEN, config.is_causal)
    )
    product, product_flops = matrix_product()
    for kind, factor in PASSES.items():
        dense_call = CALLS[kind](dense(config.is_causal), dense_inputs)
        yardsticks = {"torch.mm": product, f"dense SDPA n={DENSE_SEQLEN}": dense_call}
        results["passes"][kind] = _run_pass(
            {label: made[kind] for label, made in calls.items()},
            yardsticks,
            flops={
                "torch.mm": product_flops,
                f"dense SDPA n={DENSE_SEQLEN}": dense_flops * factor,
            },
            method_flops=forward_flops * factor,
            repeats=repeats,
            progress=lambda text, kind=kind: progress(f"{name}, {kind}: {text}"),  # type: ignore[misc]
        )
    return results


def _run_pass(
    calls: dict[str, Call],
    yardsticks: dict[str, Call],
    *,
    flops: dict[str, float],
    method_flops: float,
    repeats: int,
    progress: Progress,
) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    expected: tuple[Tensor, ...] | None = None
    for label, call in calls.items():
        progress(f"{label}, first call and memory")
        outcome, extra, seconds = peak_extra_bytes(call)
        expected = outcome if expected is None else expected
        difference = _difference(outcome, expected)
        if not difference <= _AGREEMENT:
            raise RuntimeError(
                f"bench: {label}: expected the results of {next(iter(calls))}, got a difference of "
                f"{difference:.3g} (limit {_AGREEMENT})"
            )
        columns[label] = {
            "peak_extra_bytes": extra,
            "first_call_seconds": seconds,
            "difference": difference,
        }
        del outcome
    del expected
    first = {label: column["first_call_seconds"] for label, column in columns.items()}
    fastest = min((first[label] for label in first if label != OURS), default=0.0)
    repeated = [label for label in first if label == OURS or first[label] <= _CONTENDER * fastest]
    turns: dict[str, Call] = {label: calls[label] for label in repeated} | yardsticks
    for call in yardsticks.values():
        call()
    seconds_by: dict[str, list[float]] = {label: [] for label in turns}
    for repeat in range(repeats):
        labels = list(turns)
        start = repeat % len(labels)  # nobody always runs after the same neighbour
        for label in labels[start:] + labels[:start]:
            progress(f"repeat {repeat + 1} of {repeats}, {label}")
            seconds_by[label].append(seconds_of(turns[label]))
    for label, column in columns.items():
        column["repeated"] = label in turns
        column |= _rated(seconds_by.get(label) or [column["first_call_seconds"]], method_flops)
    best = min(
        (label for label in columns if label != OURS and columns[label]["repeated"]),
        key=lambda label: float(columns[label]["seconds_median"]),
        default=None,
    )
    result: dict[str, Any] = {
        "methods": columns,
        "yardsticks": {label: _rated(seconds_by[label], flops[label]) for label in yardsticks},
        "best_composition": best,
    }
    if best is not None and OURS in columns:
        ours, other = columns[OURS], columns[best]
        result["speed_ratio"] = other["seconds_median"] / ours["seconds_median"]
        if ours["peak_extra_bytes"] is not None and other["peak_extra_bytes"]:
            result["memory_ratio"] = ours["peak_extra_bytes"] / other["peak_extra_bytes"]
    return result
