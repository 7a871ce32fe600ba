"""Runs rows: every method once for memory and agreement, then the contenders interleaved for time.

First call of every method: peak extra bytes, and its results compared with ours (a column that
computes something else stops the run). Compositions much slower than the fastest one are
not repeated; their first call stands in the result, marked. The rest, ours, torch.mm and dense
attention take turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import measure
import measure_cuda
from configurations import PASSES, Configuration
from measure import CALLS, Call, CompileBudgetExceeded, make_inputs, summary, time_limit
from methods import OURS, Method, matrix_product, methods, yardsticks

Progress = Callable[[str], None]

_CONTENDER = {"cpu": 1.25, "cuda": 2.0}
# Of results as wholes, relative: different summation orders, and roundings to the dtype. Rows of a
# wrong key set differ by 1: one in a million (float32) or in a thousand (bfloat16) would show.
_AGREEMENT = {"float32": 1e-3, "bfloat16": 3e-2}
_BACKWARD_SHARE = 2.5 / 3.5  # of the FLOP of a step


def _rated(seconds: list[float], flops: float) -> dict[str, Any]:
    measured = summary(seconds)
    return {**measured, "gflops_per_second": flops / measured["seconds_median"] / 1e9}


def _difference(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    norm = torch.linalg.vector_norm
    pairs = zip(results, expected, strict=True)
    ratios = [norm(a - b, dtype=torch.float32) / norm(b, dtype=torch.float32) for a, b in pairs]
    return max(float(ratio) for ratio in ratios)


def _inputs(config: Configuration, device: str) -> tuple[Tensor, ...]:
    return make_inputs(
        config.seqlen,
        config.num_heads,
        config.head_dim,
        num_kv_heads=config.num_kv_heads,
        dtype=getattr(torch, config.dtype),
        device=device,
    )


def _warm_up(method: Method, config: Configuration, device: str) -> None:
    """Threads, BLAS kernels and lazy imports on a small problem: no method pays for them."""
    if method.compiled:
        return
    small = dataclasses.replace(config, seqlen=64, segments=(16, 64), dilations=(1, 2))
    inputs = _inputs(small, device)
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
    device: str = "cpu",
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
        device: "cpu" or "cuda".

    Raises:
        RuntimeError: two methods disagree.
    """
    watch = measure_cuda.Watch() if device == "cuda" else measure.Watch()
    inputs = _inputs(config, device)
    forward_flops = config.forward_flops()
    chosen = list(methods(compiled, device) if columns is None else columns)
    results: dict[str, Any] = {
        "row": name,
        "configuration": vars(config),
        "forward_flops": forward_flops,
        "passes": {},
        "not_compiled": {},
        "not_run": {},
    }
    calls: dict[str, dict[str, Call]] = {}
    for method in chosen:
        progress(f"{name}: preparing {method.label}")
        _warm_up(method, config, device)
        attention = method.make(config)
        made = {kind: make_call(attention, inputs, watch.lap) for kind, make_call in CALLS.items()}
        note = _compile(made, compile_budget) if method.compiled else None
        if note is None:
            calls[method.label] = made
        else:
            results["not_compiled"][method.label] = note
    dense_columns = yardsticks(config, device)
    product, product_flops = matrix_product(device)
    for column in dense_columns:
        if column.attention is None:
            results["not_run"][column.label] = "not installed"
    for kind, factor in PASSES.items():
        others = {"torch.mm": product}
        flops = {"torch.mm": float(product_flops)}
        for column in dense_columns:
            if column.attention is not None:
                others[column.label] = CALLS[kind](column.attention, column.inputs, watch.lap)
                flops[column.label] = column.forward_flops * factor
        results["passes"][kind] = _run_pass(
            watch,
            {label: made[kind] for label, made in calls.items()},
            others,
            flops=flops,
            method_flops=forward_flops * factor,
            repeats=repeats,
            limit=_AGREEMENT[config.dtype],
            contender=_CONTENDER[device],
            not_run=results["not_run"],
            progress=lambda text, kind=kind: progress(f"{name}, {kind}: {text}"),  # type: ignore[misc]
        )
    return results


def _run_pass(
    watch: measure.Watch | measure_cuda.Watch,
    calls: dict[str, Call],
    others: dict[str, Call],
    *,
    flops: dict[str, float],
    method_flops: float,
    repeats: int,
    limit: float,
    contender: float,
    not_run: dict[str, str],
    progress: Progress,
) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    expected: tuple[Tensor, ...] | None = None
    for label, call in calls.items():
        progress(f"{label}, first call and memory")
        try:
            outcome, extra, seconds = watch.peak_extra_bytes(call)
        except torch.OutOfMemoryError:
            not_run[label] = "out of memory"
            continue
        except NotImplementedError as error:
            not_run[label] = str(error)
            continue
        expected = outcome if expected is None else expected
        difference = _difference(outcome, expected)
        if not difference <= limit:
            raise RuntimeError(
                f"bench: {label}: expected the results of {next(iter(calls))}, got a difference of "
                f"{difference:.3g} (limit {limit})"
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
    repeated = [label for label in first if label == OURS or first[label] <= contender * fastest]
    turns: dict[str, Call] = {label: calls[label] for label in repeated} | others
    for call in others.values():
        call()
    seconds_by: dict[str, list[float]] = {label: [] for label in turns}
    backward_by: dict[str, list[float]] = {label: [] for label in turns}
    for repeat in range(repeats):
        labels = list(turns)
        start = repeat % len(labels)  # nobody always runs after the same neighbour
        for label in labels[start:] + labels[:start]:
            progress(f"repeat {repeat + 1} of {repeats}, {label}")
            seconds_by[label].append(watch.seconds_of(turns[label]))
            if watch.after_lap is not None:
                backward_by[label].append(watch.after_lap)
    for label, column in columns.items():
        column["repeated"] = label in turns
        column |= _rated(seconds_by.get(label) or [column["first_call_seconds"]], method_flops)
        if backward := backward_by.get(label):
            column["backward"] = _rated(backward, method_flops * _BACKWARD_SHARE)
    best = min(
        (label for label in columns if label != OURS and columns[label]["repeated"]),
        key=lambda label: float(columns[label]["seconds_median"]),
        default=None,
    )
    result: dict[str, Any] = {
        "methods": columns,
        "yardsticks": {},
        "best_composition": best,
    }
    for label in others:
        result["yardsticks"][label] = _rated(seconds_by[label], flops[label])
        if backward := backward_by[label]:
            rated = _rated(backward, flops[label] * _BACKWARD_SHARE)
            result["yardsticks"][label]["backward"] = rated
    if best is not None and OURS in columns:
        ours, other = columns[OURS], columns[best]
        result["speed_ratio"] = other["seconds_median"] / ours["seconds_median"]
        if ours["peak_extra_bytes"] is not None and other["peak_extra_bytes"]:
            result["memory_ratio"] = ours["peak_extra_bytes"] / other["peak_extra_bytes"]
    return result
