"""Presets and builders against the oracle; fkodom's column sums and torchscale's row shift
(semantics §7).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import Case, assert_close, definition, error, oracle, oracle_offsets, run

import dilated

LISTS: dict[str, list[int]] = {"segments": [4, 8, 16], "dilations": [1, 2, 4]}
EQUIVALENT: dict[str, dict[str, Any]] = {
    "longnet": {"offsets": "paper"},
    "torchscale": {"offsets": "torchscale", "tail": "phantom", "lse_grad": False},
    "head_groups": {"offsets": "branch", "groups": "cumulative", "merge": "sum"},
    "fork": {"offsets": "branch", "groups": "cumulative", "merge": "sum", "out_scale": 1 / 3},
}


def test_presets_are_listed() -> None:
    assert dilated.presets() == ["longnet", "torchscale", "head_groups", "fork", "fkodom"]


@pytest.mark.parametrize("preset", EQUIVALENT)
@pytest.mark.parametrize("is_causal", [False, True])
def test_preset_equals_its_row_of_the_table(backend: str, preset: str, is_causal: bool) -> None:
    dtype = torch.float64 if backend == "reference" else torch.float32
    spelled = Case(21, 2, 5, 5, 4, *LISTS.values(), {"is_causal": is_causal, **EQUIVALENT[preset]})
    named = Case(21, 2, 5, 5, 4, *LISTS.values(), {"is_causal": is_causal, "preset": preset})
    got = run(named, dtype, backend=backend)
    for name, tensor in run(spelled, dtype, backend=backend).items():
        assert torch.equal(tensor, got[name]), name
    exact = definition(spelled, dtype, torch.float64)
    assert_close(got, exact, 1e-12 if backend == "reference" else 1e-5)


@pytest.mark.parametrize(
    "override", [{"offsets": "zero"}, {"tail": "mask"}, {"lse_grad": True}], ids=str
)
def test_options_given_with_a_preset_override_it(override: dict[str, Any]) -> None:
    options = {**EQUIVALENT["torchscale"], **override}
    x = torch.randn(1, 21, 4, 8)
    a = dilated.dilated_attention(x, x, x, **LISTS, preset="torchscale", **override)
    assert torch.equal(a, dilated.dilated_attention(x, x, x, **LISTS, **options))
    assert error(a, dilated.dilated_attention(x, x, x, **LISTS, preset="torchscale")) > 0 or (
        "lse_grad" in override
    )


@pytest.mark.parametrize("rule", ["paper", "torchscale", "branch", "zero"])
@pytest.mark.parametrize("groups", ["none", "cumulative", "literal"])
@pytest.mark.parametrize("gqa_offset", ["kv", "q"])
def test_builders_by_brute_force(rule: str, groups: str, gqa_offset: str) -> None:
    """T6, T7: heads not a multiple of r, r > heads, every group rule."""
    for dilations in ([1], [1, 2, 4], [3, 8, 5, 12]):
        for kv_heads in (1, 2, 3, 5):
            for repeats in (1, 2, 4):
                heads = kv_heads * repeats
                table = dilated.plan(
                    1, heads, num_kv_heads=kv_heads, segments=[7] * len(dilations),
                    dilations=dilations, offsets=rule, groups=groups, gqa_offset=gqa_offset,
                ).offsets  # fmt: skip
                want = oracle_offsets(heads, kv_heads, dilations, rule, groups, gqa_offset)
                assert table == want


def test_tables_and_integers_of_every_kind() -> None:
    """T17: tuples, numpy integers and arrays, tensors."""
    x = torch.randn(1, 20, 4, 8)
    table = [[0, 0, 0, 0], [1, 0, -1, 1], [3, 2, 1, 0]]
    base = dilated.dilated_attention(x, x, x, **LISTS, offsets=table)
    for kind in (np.array(table), torch.tensor(table), tuple(map(tuple, table))):
        other = dilated.dilated_attention(
            x, x, x, segments=np.array([4, 8, 16]), dilations=(np.int32(1), 2, 4), offsets=kind
        )
        assert torch.equal(other, base)


def test_patterns_and_counts_come_from_the_core() -> None:
    """Row X8, §10: the pattern equals the definition's masks, its sum the number of pairs."""
    for is_causal in (False, True):
        options = {**LISTS, "offsets": "branch", "is_causal": is_causal}
        table = dilated.plan(1, 3, **LISTS, offsets="branch").offsets
        plan = dilated.plan(21, 3, **options)
        total = 0
        for head in range(3):
            pattern = plan.pattern(head)
            want = sum(
                dilated.reference.branch_mask(21, w, r, row[head], is_causal)[1].int()
                for w, r, row in zip(*LISTS.values(), table, strict=True)
            )
            assert torch.equal(pattern, want)
            total += int(pattern.sum())
        counts = plan.pair_counts
        assert sum(counts) == total
        config = oracle.make(
            **{k: tuple(v) for k, v in LISTS.items()}, offset="branch", causal=is_causal
        )
        assert counts == oracle.pairs(21, 3, config)


@pytest.mark.parametrize("heads", [6, 7])
def test_fkodom_with_key_mask_and_both_layouts(heads: int) -> None:
    """The golden cases cover the numbers; here layouts, masks, and lse against the oracle."""
    n, d = 16, 3
    lists = [oracle.rand3(n, heads, d, s) for s in (1, 2, 3)]
    mask = [p not in (2, 9, 10) for p in range(n)]
    config = oracle.fkodom_config(*LISTS.values(), False, heads)
    want = oracle.forward(*lists, config, key_mask=mask)
    q, k, v = (torch.tensor(x, dtype=torch.float64)[None] for x in lists)
    call = {**LISTS, "preset": "fkodom", "key_mask": torch.tensor(mask)[None], "return_lse": True}
    out, lse = dilated.dilated_attention(q, k, v, **call)
    flipped, _ = dilated.dilated_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), **call, layout="bhsd"
    )
    exact = torch.tensor(want["o"], dtype=torch.float64)
    assert error(out[0], exact) < 1e-10 * max(1.0, float(exact.abs().max()))
    assert torch.equal(flipped.transpose(1, 2), out)
    assert error(lse[0].T, torch.tensor(want["lse"], dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "lists",
    [((10, 20), (4, 1)), ((5, 7, 13), (1, 2, 5)), ((6, 50), (4, 3)), ((4, 8), (1, 2))],
    ids=str,
)
def test_row_shift_equals_literal_torchscale(lists: Any, is_causal: bool) -> None:
    """Rows shifted where r does not divide w; without the shift nothing changes."""
    segments, dilations = lists
    rows = [oracle.rand3(23, 4, 4, s) for s in (1, 2, 3)]
    literal = oracle.torchscale_literal(*rows, segments, dilations, is_causal, lse_zero_hack=False)
    inputs = [torch.tensor(x, dtype=torch.float64)[None] for x in rows]
    call = {
        "segments": segments,
        "dilations": dilations,
        "preset": "torchscale",
        "is_causal": is_causal,
    }
    out = dilated.dilated_attention(*inputs, **call, row_shift=True)
    assert error(out[0], torch.tensor(literal, dtype=torch.float64)) < 1e-12
    flipped = dilated.dilated_attention(
        *(x.transpose(1, 2) for x in inputs), **call, row_shift=True, layout="bhsd"
    )
    assert torch.equal(flipped.transpose(1, 2), out)
    if all(w % r == 0 or w >= 23 for w, r in zip(segments, dilations, strict=True)):
        torch.testing.assert_close(out, dilated.dilated_attention(*inputs, **call))
    else:
        with pytest.raises(dilated.Unsupported, match="row_shift=True"):
            dilated.dilated_attention(*inputs, **call)


def test_row_shift_gradients_are_the_detached_ones() -> None:
    """Where nothing shifts, the composite and the operator agree on gradients too, dL included."""
    data = Case(13, 1, 4, 4, 4).tensors(torch.float64)
    results = []
    for row_shift in (True, False):
        inputs = [data[x].clone().requires_grad_() for x in ("query", "key", "value")]
        out, lse = dilated.dilated_attention(
            *inputs, **LISTS, preset="torchscale", row_shift=row_shift, return_lse=True
        )
        results.append(torch.autograd.grad((out, lse), inputs, (data["dout"], data["dlse"])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
def test_row_shift_gives_sequences_of_a_batch_what_they_have_alone(is_causal: bool) -> None:
    """seqused is the length, phantom keys included; rows beyond it are never read."""
    lengths = [23, 5, 0, 9, 6]
    inputs = [torch.tensor(oracle.rand3(23, 4, 4, s), dtype=torch.float64) for s in (1, 2, 3)]
    beyond = torch.arange(23) >= torch.tensor(lengths)[:, None]
    batch = [
        x.expand(5, -1, -1, -1).masked_fill(beyond[..., None, None], torch.nan) for x in inputs
    ]
    call: dict[str, Any] = {
        "segments": (5, 9), "dilations": (2, 4), "preset": "torchscale", "row_shift": True,
        "is_causal": is_causal, "return_lse": True,
    }  # fmt: skip
    out, lse = dilated.dilated_attention(*batch, **call, seqused=lengths)
    for i, n in enumerate(lengths):
        alone, alone_lse = dilated.dilated_attention(*(x[None, :n] for x in inputs), **call)
        torch.testing.assert_close(out[i, :n], alone[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(lse[i, :, :n], alone_lse[0], rtol=1e-13, atol=1e-13)
        assert (out[i, n:] == 0).all()
        assert (lse[i, :, n:] == -torch.inf).all()
