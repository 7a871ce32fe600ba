"""Every back end and dtype against the definition: fixed shapes, every length, random problems.

Requirement rows X1 (positions, not heads), X14 and 3 (any length), 7 (each back end), 8 (empty),
M1-M3.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from support import (
    Case,
    assert_backend_runs,
    assert_close,
    assert_tolerance_rule,
    definition,
    run,
)

HEAD_DIMS = [1, 3, 16, 24, 32, 48, 64, 96, 120, 128, 256]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"lse_grad": False, "tail": "phantom", "offsets": "torchscale"},
    {"merge": "sum", "groups": "literal", "offsets": "branch", "out_scale": 0.5},
    {"merge": "mean", "is_causal": True, "scale": 0.09},
    {"groups": "cumulative", "merge": "sum", "offsets": "zero", "gqa_offset": "q"},
]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cpu_obeys_the_tolerance_rule(dtype: torch.dtype, head_dim: int) -> None:
    """T16; X1: batch, n, heads, kv heads and head_dim differ pairwise where head_dim allows."""
    assert_backend_runs(
        "cpu", 37, 6, num_kv_heads=2, head_dim=head_dim, dtype=dtype, segments=[4], dilations=[1]
    )
    for seed, options in enumerate(OPTIONS):
        case = Case(37, 5, 6, 2, head_dim, [8, 13, 40], [1, 3, 5], options, seed=seed)
        assert_tolerance_rule(case, dtype, run(case, dtype, backend="cpu"))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_back_end_is_exact(options: dict[str, Any]) -> None:
    assert_backend_runs("reference", 37, 6, dtype=torch.float64, segments=[4], dilations=[1])
    case = Case(37, 3, 6, 2, 7, [8, 13, 40], [1, 3, 5], options, masked=True)
    exact = definition(case, torch.float64, torch.float64)
    assert_close(run(case, torch.float64, backend="reference"), exact, 1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_length_up_to_three_segments(backend: str, is_causal: bool) -> None:
    """X14: n in 0 .. 3 w_max, ragged, r not dividing w, r > heads, uncovered rows (T4-T9)."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    tolerance = 1e-12 if backend == "reference" else 1e-5
    for n in range(25):
        for tail in ("mask", "phantom"):
            options = {"is_causal": is_causal, "tail": tail}
            case = Case(n, 1, 3, 3, 4, [5, 8], [2, 4], options, seed=n)
            exact = definition(case, dtype, torch.float64)
            assert_close(run(case, dtype, backend=backend), exact, tolerance)


@st.composite
def problems(draw: st.DrawFn) -> Case:
    branches = draw(st.integers(1, 4))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    dilations = draw(st.lists(st.integers(1, 8), min_size=branches, max_size=branches))
    segments = draw(st.lists(st.integers(1, 50), min_size=branches, max_size=branches))
    merge = draw(st.sampled_from(["lse", "sum", "mean"]))
    options: dict[str, Any] = {
        "merge": merge,
        "is_causal": draw(st.booleans()),
        "tail": draw(st.sampled_from(["mask", "phantom"])),
        "scale": draw(st.sampled_from([None, 0.0, -0.2, 0.4])),
        "out_scale": draw(st.sampled_from([1.0, 0.25, -2.0])),
        "groups": draw(st.sampled_from(["none", "cumulative", "literal"])),
    }
    if merge == "lse":
        options["lse_grad"] = draw(st.booleans())
    if draw(st.booleans()):
        options["offsets"] = draw(st.sampled_from(["paper", "torchscale", "branch", "zero"]))
        options["gqa_offset"] = draw(st.sampled_from(["kv", "q"]))
    else:
        options["offsets"] = [
            draw(st.lists(st.integers(-1, r - 1), min_size=heads, max_size=heads))
            for r in dilations
        ]
    return Case(
        draw(st.integers(0, 40)), draw(st.integers(0, 3)),
        heads, kv_heads, draw(st.integers(1, 20)),
        segments, dilations, options, draw(st.booleans()), draw(st.integers(0, 10**6)),
    )  # fmt: skip


@settings(max_examples=100)
@given(problems())
def test_random_problems_by_the_reference_back_end(case: Case) -> None:
    note(f"{case}")
    exact = definition(case, torch.float64, torch.float64)
    assert_close(run(case, torch.float64, backend="reference"), exact, 1e-11)


@settings(max_examples=150)
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_random_problems_by_the_cpu_back_end(case: Case, dtype: torch.dtype) -> None:
    note(f"{case} {dtype}")
    assert_tolerance_rule(case, dtype, run(case, dtype, backend="cpu"))


def test_changing_a_token_changes_only_rows_that_see_it(backend: str) -> None:
    """Row X1: locality, against the pattern printed by the core."""
    import dilated

    shape = {"segments": [4, 12], "dilations": [1, 3], "offsets": "branch"}
    data = Case(23, 1, 2, 2, 5).tensors(torch.float32)
    query, key, value = (data[name] for name in ("query", "key", "value"))
    before = dilated.dilated_attention(query, key, value, backend=backend, **shape)
    for j in range(23):
        other_key, other_value = key.clone(), value.clone()
        other_key[:, j] += 1.0
        other_value[:, j] -= 1.0
        after = dilated.dilated_attention(query, other_key, other_value, backend=backend, **shape)
        changed = (after != before).any(dim=-1)[0]  # (n, heads)
        for head in range(2):
            pattern = dilated.plan(23, 2, **shape).pattern(head)
            assert torch.equal(changed[:, head], pattern[:, j] > 0)


@pytest.mark.parametrize(
    "options",
    [{}, {"tail": "phantom", "offsets": "torchscale", "lse_grad": False}, {"merge": "mean"},
     {"is_causal": True}],
    ids=str,
)  # fmt: skip
def test_seqused_is_the_definition_of_shorter_sequences(options: dict[str, Any]) -> None:
    """Rows beyond a length: out 0, lse -inf, no gradient, whatever they hold."""
    case = Case(29, 3, 4, 2, 8, [6, 16], [1, 3], options, masked=True)
    used = [29, 7, 0]
    exact = definition(case, torch.float64, torch.float64, seqused=used)
    assert_close(run(case, torch.float64, seqused=used), exact, 1e-12)
    assert bool((exact["lse"][1, :, 7:] == -torch.inf).all())
    assert not exact["out"][2].any()
