"""Metamorphic tests M1-M9, M12, M14, M16, M18 of semantics §11, and one row per option (row X3).

Rows X7 (V = 1 gives out_scale), 5 (dropout), 10 (masks act), 14 (w up to 2^40, strides past 2^31),
22.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support import Case, error, oracle_offsets
from torch import Tensor

import dilated
from dilated.parity import merge_by_lse

PAPER: dict[str, Any] = {"segments": [4, 8, 16], "dilations": [1, 2, 4]}


def _data(dtype: torch.dtype = torch.float32, **shape: Any) -> tuple[Tensor, Tensor, Tensor]:
    data = Case(**{"n": 21, "heads": 4, "kv_heads": 2, **shape}).tensors(dtype)
    return data["query"], data["key"], data["value"]


def _attend(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return dilated.dilated_attention(*inputs, **{**PAPER, **options}, return_lse=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_m1_one_dense_branch_is_softmax_attention(backend: str, is_causal: bool) -> None:
    inputs = [x.transpose(1, 2) for x in _data()]
    dense = torch.nn.functional.scaled_dot_product_attention(
        *inputs, is_causal=is_causal, enable_gqa=True
    )
    call = {"segments": [2**40], "dilations": [1], "layout": "bhsd", "is_causal": is_causal}
    out = dilated.dilated_attention(*(x.contiguous() for x in inputs), **call, backend=backend)
    torch.testing.assert_close(out, dense)


def test_m2_branches_given_twice_change_only_lse(backend: str) -> None:
    """T10: keys are a multiset."""
    inputs = [x.double().requires_grad_() for x in _data()]
    if backend == "cpu":
        inputs = [x.detach().float().requires_grad_() for x in inputs]
    twice = {"segments": [4, 8, 16] * 2, "dilations": [1, 2, 4] * 2}
    once, again = (_attend(*inputs, backend=backend, **o) for o in ({}, twice))
    torch.testing.assert_close(again[0], once[0])
    torch.testing.assert_close(again[1], once[1] + math.log(2.0))
    weight = torch.randn_like(once[0])
    for a, b in zip(
        *(torch.autograd.grad(o, inputs, weight) for o, _ in (once, again)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_m3_order_of_branches_does_not_matter(backend: str) -> None:
    inputs = _data()
    a = _attend(*inputs, backend=backend)
    b = _attend(*inputs, backend=backend, segments=[16, 4, 8], dilations=[4, 1, 2])
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("is_causal", [False, True])
def test_m4_chunks_of_the_longest_segment_are_independent(backend: str, is_causal: bool) -> None:
    """T14."""
    inputs = _data(n=48)
    whole, _ = _attend(*inputs, backend=backend, is_causal=is_causal)
    for begin in (0, 16, 32):
        chunk = (x[:, begin : begin + 16] for x in inputs)
        part, _ = _attend(*chunk, backend=backend, is_causal=is_causal)
        torch.testing.assert_close(part, whole[:, begin : begin + 16])


def test_m5_phantom_equals_zero_padding(backend: str) -> None:
    """T1."""
    inputs = _data(n=21)
    phantom = _attend(*inputs, backend=backend, tail="phantom")
    padded = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 11)) for x in inputs)
    masked = _attend(*padded, backend=backend)
    torch.testing.assert_close(phantom[0], masked[0][:, :21])
    torch.testing.assert_close(phantom[1], masked[1][:, :, :21])


def test_m7_grouped_queries_equal_repeated_keys(backend: str) -> None:
    query, key, value = _data()
    table = dilated.plan(1, 4, num_kv_heads=2, **PAPER).offsets
    assert table == oracle_offsets(4, 2, PAPER["dilations"])
    repeated = (x.repeat_interleave(2, dim=2) for x in (key, value))
    a = _attend(query, key, value, backend=backend)
    b = _attend(query, *repeated, offsets=table, backend=backend)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


@pytest.mark.parametrize(
    "options", [{}, {"tail": "phantom", "lse_grad": False}, {"merge": "mean"}], ids=str
)
def test_m8_packed_equals_a_loop_over_sequences(backend: str, options: dict[str, Any]) -> None:
    """With key_mask and seqused, an empty and a length-1 sequence; forward and backward."""
    bounds = [0, 7, 7, 8, 21]
    packed = [x[0].clone().requires_grad_() for x in _data()]
    mask = torch.rand(21) > 0.2
    used = [5, 0, 1, 9]
    call = {"backend": backend, **options}
    out, lse = _attend(
        *packed, cu_seqlens=torch.tensor(bounds), key_mask=mask, seqused=used, layout="shd", **call
    )
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad(out, packed, weight)
    for s, (a, b) in enumerate(itertools.pairwise(bounds)):
        alone = [x.detach()[None, a:b].requires_grad_() for x in packed]
        one, one_lse = _attend(*alone, key_mask=mask[None, a:b], seqused=used[s : s + 1], **call)
        torch.testing.assert_close(one[0], out[a:b])
        torch.testing.assert_close(one_lse[0], lse[:, a:b])
        for x, y in zip(torch.autograd.grad(one, alone, weight[None, a:b]), gradients, strict=True):
            torch.testing.assert_close(x[0], y[a:b])


def test_m9_masked_keys_have_no_effect_at_all(backend: str) -> None:
    """R10, X4, T2: changing masked keys and values, even to NaN, changes no bit; gradients stay
    finite.
    """
    query, key, value = _data(n=16)
    mask = torch.rand(2, 16) > 0.4
    mask[0, :8] = False  # whole segments without a key
    mask[1] = False  # a sequence without a key
    results = []
    for junk in (0.0, 1e30, math.nan, math.inf):
        inputs = [x.clone() for x in (query, key, value)]
        for x in inputs[1:]:
            x[~mask] = junk
        inputs = [x.requires_grad_() for x in inputs]
        out, lse = _attend(*inputs, key_mask=mask, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out.sum(), inputs)))
        assert not results[-1][3][~mask].any()
        assert not results[-1][4][~mask].any()
    assert not results[0][0][1].any()
    assert bool((results[0][1][1] == -math.inf).all())
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)


def test_seqused_is_the_length_of_the_sequence(backend: str) -> None:
    """A batch of unequal lengths gives every sequence the bits it has alone; later rows: absent."""
    inputs = _data()
    used = [13, 2]
    out, lse = _attend(*inputs, seqused=used, backend=backend, tail="phantom")
    for b, n in enumerate(used):
        alone = [x[b : b + 1, :n] for x in inputs]
        expected, expected_lse = _attend(*alone, backend=backend, tail="phantom")
        assert torch.equal(out[b : b + 1, :n], expected)
        assert torch.equal(lse[b : b + 1, :, :n], expected_lse)
        assert not out[b, n:].any()
        assert bool((lse[b, :, n:] == -math.inf).all())


def test_m12_branches_one_by_one_merge_to_one_call(backend: str) -> None:
    """X7: the theorem of §5; partial results merge in any order."""
    inputs = _data()
    table = dilated.plan(1, 4, num_kv_heads=2, **PAPER).offsets
    parts = [
        _attend(*inputs, segments=[w], dilations=[r], offsets=[row], backend=backend)
        for w, r, row in zip(*PAPER.values(), table, strict=True)
    ]
    whole = _attend(*inputs, backend=backend)
    for order in ((0, 1, 2), (2, 0, 1)):
        outs, lses = ([parts[b][i] for b in order] for i in (0, 1))
        out, lse = merge_by_lse(outs, lses, weights_have_gradient=True)
        torch.testing.assert_close(out, whole[0])
        torch.testing.assert_close(lse, whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_of_one_give_out_scale(dtype: torch.dtype) -> None:
    """X7: rows are convex combinations; phantom keys take their share."""
    query, key, value = _data(dtype)
    ones = torch.ones_like(value)
    out, _ = _attend(query, key, ones, out_scale=0.5)
    torch.testing.assert_close(out, torch.full_like(out, 0.5))
    less, _ = _attend(query, key, ones, tail="phantom")
    assert bool((less <= 1.0).all())
    assert bool((less[:, -1] < 0.999).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_m14_logits_to_ten_thousand(dtype: torch.dtype) -> None:
    """R22, T3: no overflow; the result is the definition's on the same rounded inputs."""
    data = Case(21, 2, 4, 4, 8).tensors(torch.float64)
    query, key, value = ((60.0 * data[x]).to(dtype) for x in ("query", "key", "value"))
    options = {"offsets": dilated.plan(1, 4, **PAPER).offsets, **PAPER}
    out, lse = _attend(query, key, value)
    exact, plain = (
        dilated.reference.dilated_attention(*(x.to(t) for x in (query, key, value)), **options)
        for t in (torch.float64, dtype)
    )
    assert float(exact[1].abs().max()) > 5e3
    assert error(lse, exact[1]) <= 1e-6 * float(exact[1].abs().max())
    # A weight moves with the rounding of a logit of 1e4, in the plain computation too.
    rounding = 1e4 * torch.finfo(torch.float32).eps * float(value.abs().max())
    assert error(out, exact[0]) <= 2.0 * error(plain[0], exact[0]) + 2.0 * rounding
    assert bool(out.isfinite().all())


def test_m14_scores_far_below_and_exactly_zero(backend: str) -> None:
    """T3: all scores of a row at -3e8 still give weights; T4: a branch with lse == 0.0 counts."""
    one = torch.ones(1, 6, 1, 1)
    values = torch.arange(6.0).view(1, 6, 1, 1)
    out, lse = _attend(
        one, -3e8 * one, values, scale=1.0, backend=backend, segments=[6], dilations=[1]
    )
    torch.testing.assert_close(out, torch.full_like(out, 2.5))
    torch.testing.assert_close(lse, torch.full_like(lse, -3e8))
    zero = torch.zeros(1, 6, 1, 1)
    call = {"segments": [1, 6], "dilations": [1, 1], "backend": backend}
    out, lse = _attend(zero, zero, values, **call)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(7.0)))
    torch.testing.assert_close(out, (values + 15.0) / 7.0)


def test_infinite_values_stay_in_rows_that_see_them(backend: str) -> None:
    """R22: inf and NaN in V reach exactly the rows that attend to them (not causal)."""
    query, key, value = _data(kv_heads=4, batch=1)
    for bad in (math.inf, math.nan):
        spoiled = value.clone()
        spoiled[:, 5] = bad
        out, _ = _attend(query, key, spoiled, backend=backend)
        for head in range(4):
            sees = dilated.plan(21, 4, **PAPER).pattern(head)[:, 5] > 0
            assert torch.equal(~out[0, :, head].isfinite().all(dim=-1), sees)


def test_denormals_and_zeros(backend: str) -> None:
    query, key, value = (1e-40 * x for x in _data())
    out, lse = _attend(query, key, value, backend=backend)
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())
    torch.testing.assert_close(lse, _attend(0 * query, key, value, backend=backend)[1])


def test_segments_up_to_two_to_the_forty(backend: str) -> None:
    """R14: w = 2^40 is one segment."""
    inputs = _data()
    a = _attend(*inputs, segments=[2**40], dilations=[3], backend=backend)
    b = _attend(*inputs, segments=[21], dilations=[3], backend=backend)
    assert torch.equal(a[0], b[0])


def test_m18_strides_past_two_to_the_thirty_one(backend: str) -> None:
    """Rows lie 2^30 elements apart: 64-bit offsets. Memory is reserved, a few pages are touched."""
    step = 2**30 + 8
    storage = torch.empty(
        2 * step + 64, dtype=torch.float32 if backend == "reference" else torch.bfloat16
    )
    far = storage.as_strided((1, 3, 2, 16), (0, step, 16, 1))
    near = torch.randn(1, 3, 2, 16).to(storage.dtype)
    far.copy_(near)
    call = {"segments": [2, 3], "dilations": [1, 2], "backend": backend}
    a, b = (_attend(x, x, x, **call) for x in (far, near))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "is_causal": ({}, {"is_causal": True}),
    "scale": ({}, {"scale": 1.0}),
    "offsets": ({}, {"offsets": "zero"}),
    "offset table": ({}, {"offsets": [[0] * 4, [1] * 4, [2] * 4]}),
    "groups": ({}, {"groups": "cumulative"}),
    "groups literal": ({"groups": "cumulative"}, {"groups": "literal"}),
    "merge sum": ({}, {"merge": "sum"}),
    "merge mean": ({"merge": "sum"}, {"merge": "mean"}),
    "out_scale": ({}, {"out_scale": 2.0}),
    "tail": ({}, {"tail": "phantom"}),
    "dropout_p": ({}, {"dropout_p": 0.5}),
    "dropout_seed": ({"dropout_p": 0.5, "dropout_seed": 1}, {"dropout_p": 0.5, "dropout_seed": 2}),
    "gqa_offset": ({}, {"gqa_offset": "q"}),
    "preset": ({}, {"preset": "fork"}),
    "segments": ({}, {"segments": [4, 8, 15]}),
    "dilations": ({}, {"dilations": [1, 2, 3]}),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_option_has_an_effect(name: str, backend: str) -> None:
    """Row X3."""
    inputs = _data()
    a, b = (_attend(*inputs, backend=backend, **options)[0] for options in EFFECTS[name])
    assert not torch.equal(a, b)
