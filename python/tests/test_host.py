"""What a call costs before the first multiplication, and what it leaves behind."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import dilated
from dilated._fake import check
from dilated._options import attention_options

LISTS: dict[str, Any] = {"segments": [4, 8], "dilations": [1, 2]}
OPTIONS = attention_options(**LISTS, preset="torchscale", backend="cpu")


def _microseconds(call: Callable[[], Any], calls: int = 200) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


@pytest.mark.parametrize(("requires_grad", "most"), [(False, 4.5), (True, 9.0)])
def test_a_tiny_call_costs_a_few_of_torchs_own(requires_grad: bool, most: float) -> None:
    """15 us without gradient and 45 us recording where torch's own attention takes 5.6 and 6.8 us.

    Ratios of interleaved minima: other processes do not count.
    """
    x = torch.randn(1, 8, 1, 8, requires_grad=requires_grad)
    calls = (
        lambda: dilated.dilated_attention(x, x, x, **LISTS),
        lambda: scaled_dot_product_attention(x, x, x),
    )
    times = [[_microseconds(call) for call in calls] for _ in range(30)]
    ours, torchs = (min(column) for column in zip(*times, strict=True))
    assert ours <= most * torchs, f"{ours:.1f} us, torch {torchs:.1f} us"


def test_new_lengths_cost_what_known_ones_do() -> None:
    """p99 / p50 <= 2 over 1,000 lengths of one key each: nothing is built or kept per length."""
    inputs = [torch.randn(1, n, 1, 1) for n in torch.randperm(1000).add(1).tolist()]
    rounds = []
    for _ in range(7):
        rounds.append([])
        for x in inputs:
            start = time.perf_counter()
            dilated.dilated_attention(x, x, x, segments=[4096], dilations=[4096])
            rounds[-1].append(time.perf_counter() - start)
    best = sorted(min(times) for times in zip(*rounds, strict=True))
    assert best[990] <= 2.0 * best[500]


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _refused() -> None:
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(dilated.InvalidProblem):
        dilated.dilated_attention(x, x, x, segments=[4], dilations=[0])


QUERIES: dict[str, Callable[[], Any]] = {
    "backends": dilated.backends,
    "plan": lambda: str(dilated.plan(8, 2, preset="torchscale", **LISTS)),
    "explain": lambda: dilated.plan(8, 2, backend="cpu", **LISTS).explain(),
    "offsets": lambda: dilated.plan(8, 2, offsets="branch", **LISTS).offsets,
    "names": dilated._ops.ops.names,
    "check": lambda: check((torch.zeros(1, 4, 1, 8),) * 3 + (None,) * 6, OPTIONS),
    "error": _refused,
}


@pytest.mark.parametrize("name", QUERIES)
def test_texts_are_freed(name: str) -> None:
    """torch never frees strings that an operator returns: 120 to 400 bytes a call once leaked."""
    query, calls = QUERIES[name], 3000
    for _ in range(calls):
        query()
    gc.collect()
    before = _resident_bytes()
    for _ in range(calls):
        query()
    gc.collect()
    assert _resident_bytes() - before < 64 * calls


def test_kept_options_are_bounded() -> None:
    x = torch.zeros(1, 2, 1, 8)
    for i in range(600):
        dilated.dilated_attention(x, x, x, segments=[4 + i], dilations=[1], scale=0.1 * i)
        assert len(dilated._options._packed) <= dilated._options._MOST_PACKED


def test_equal_values_of_other_types_are_checked_anew() -> None:
    x = torch.zeros(1, 2, 1, 8)
    dilated.dilated_attention(x, x, x, **LISTS, is_causal=True)
    with pytest.raises(dilated.InvalidProblem, match="is_causal: expected True or False, got 1"):
        dilated.dilated_attention(x, x, x, **LISTS, is_causal=1)
    with pytest.raises(
        dilated.InvalidProblem, match=r"segments\[0\]: expected an integer, got 4.0"
    ):
        dilated.dilated_attention(x, x, x, segments=[4.0, 8], dilations=[1, 2])
