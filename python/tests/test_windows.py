"""Windows and merge: parts of queries and keys give what the whole gives. The C++ tests hold the
mathematics for every option; here it is layouts, packing, starts per sequence, gradients, errors.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dilated
from dilated import InvalidProblem, Unsupported

LISTS: dict[str, Any] = {"segments": [4, 10], "dilations": [1, 3]}
ORDER = {"bshd": (0, 1, 2, 3), "bhsd": (0, 2, 1, 3)}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"is_causal": True, "scale": 0.7},
    {"tail": "phantom", "offsets": "torchscale"},
    {"preset": "longnet", "out_scale": None, "gqa_offset": "q"},
    {"dropout_p": 0.3, "dropout_seed": 11, "head_offset": 4, "total_heads": 8},
    {"groups": "cumulative", "offsets": "branch"},
]


def _inputs(n: int, dtype: torch.dtype, layout: str = "bshd") -> list[Tensor]:
    shapes = [(2, n, 4, 8), (2, n, 2, 8), (2, n, 2, 8)]
    drawn = [torch.randn(s, dtype=dtype).permute(ORDER[layout]).contiguous() for s in shapes]
    return [x.requires_grad_() for x in drawn]


def _rows(x: Tensor, a: int, b: int, layout: str) -> Tensor:
    return x.narrow(ORDER[layout].index(1), a, b - a)


@given(
    n=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    rows=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    options=st.sampled_from(OPTIONS),
    layout=st.sampled_from(["bshd", "bhsd"]),
    order=st.randoms(use_true_random=False),
)
def test_merged_windows_are_the_whole(
    n: int, cuts: list[int], rows: tuple[int, int], options: Any, layout: str, order: Any
) -> None:
    """Any partition of the keys, in any order; any query rows; gradients add up."""
    inputs = _inputs(n, torch.float64, layout)
    call = {**LISTS, **options, "layout": layout}
    a, b = sorted(min(x, n) for x in rows)
    whole, whole_lse = dilated.dilated_attention(*inputs, **call, return_lse=True)
    want = (_rows(whole, a, b, layout), whole_lse[..., a:b])
    bounds = [0, *sorted(min(x, n) for x in cuts), n]
    spans = list(itertools.pairwise(bounds))
    order.shuffle(spans)
    query, key, value = inputs
    parts = [
        dilated.window_attention(
            _rows(query, a, b, layout), _rows(key, c, d, layout), _rows(value, c, d, layout),
            **call, seqlen=n, query_start=a, key_start=c,
        )
        for c, d in spans
    ]  # fmt: skip
    found = dilated.merge(parts, layout=layout)
    weights = [torch.randn_like(x) for x in want]

    def gradients(results: Any) -> Any:
        out, lse = results
        finite = torch.where(lse == -torch.inf, 0.0, lse)
        return torch.autograd.grad((out * weights[0]).sum() + (finite * weights[1]).sum(), inputs)

    for x, y in zip((*found, *gradients(found)), (*want, *gradients(want)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_query_windows_have_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    """Results of windows are float32; rounded they are the operator's."""
    q, k, v = (x.detach() for x in _inputs(37, dtype))
    call = {**LISTS, "is_causal": True}
    whole, lse = dilated.dilated_attention(q, k, v, **call, return_lse=True)
    for a, b in ((0, 5), (5, 30), (30, 37), (9, 9)):
        out, part_lse = dilated.window_attention(q[:, a:b], k, v, **call, seqlen=37, query_start=a)
        assert out.dtype == part_lse.dtype == torch.float32
        assert torch.equal(out.to(dtype), whole[:, a:b])
        assert torch.equal(part_lse, lse[..., a:b])


def test_decoding_at_another_position_in_every_sequence() -> None:
    """One new token per sequence against a cache: starts and lengths per sequence."""
    q, k, v = (x.detach() for x in _inputs(24, torch.float32))
    at = torch.tensor([7, 22])
    step = torch.stack([q[s, p : p + 1] for s, p in enumerate(at.tolist())])
    out, lse = dilated.window_attention(
        step, k, v, **LISTS, is_causal=True, seqlen=24, query_start=at, seqused=at + 1
    )
    for s, p in enumerate(at.tolist()):
        one = (x[s : s + 1, : p + 1] for x in (q, k, v))
        want, want_lse = dilated.dilated_attention(*one, **LISTS, is_causal=True, return_lse=True)
        torch.testing.assert_close(out[s, 0], want[0, p])
        torch.testing.assert_close(lse[s, :, 0], want_lse[0, :, p])


def test_packed_windows() -> None:
    """Every sequence holds its own rows of queries and of keys."""
    lengths, starts, rows = [9, 0, 14], [2, 0, 6], [7, 0, 3]
    q, k, v = (torch.randn(sum(lengths), 4, 8, dtype=torch.float64) for _ in range(3))
    bounds = [0, 9, 9, 23]
    whole, lse = dilated.dilated_attention(
        q, k, v, **LISTS, layout="shd", cu_seqlens=bounds, return_lse=True
    )
    keep = torch.cat([torch.arange(b + s, b + s + r) for b, s, r in
                      zip(bounds[:-1], starts, rows, strict=True)])  # fmt: skip
    parts = []
    for key_starts, key_rows in (([0, 0, 0], [4, 0, 14]), ([4, 0, 0], [5, 0, 0])):
        held = torch.cat([torch.arange(b + s, b + s + r) for b, s, r in
                          zip(bounds[:-1], key_starts, key_rows, strict=True)])  # fmt: skip
        parts.append(
            dilated.window_attention(
                q[keep], k[held], v[held], **LISTS, layout="shd", seqlen=lengths,
                query_start=starts, query_rows=rows, key_start=key_starts, key_rows=key_rows,
            )
        )  # fmt: skip
    out, merged = dilated.merge(parts, layout="shd")
    torch.testing.assert_close(out, whole[keep])
    torch.testing.assert_close(merged, lse[:, keep])


def test_no_sequences_and_no_rows() -> None:
    for batch, m, k in ((0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)):
        query = torch.randn(batch, m, 4, 8, requires_grad=True)
        key, value = (torch.randn(batch, k, 2, 8, requires_grad=True) for _ in range(2))
        out, lse = dilated.window_attention(query, key, value, **LISTS, seqlen=9, query_start=1)
        assert out.shape == query.shape
        assert lse.shape == (batch, 4, m)
        if k == 0:
            assert not out.any()
            assert bool((lse == -torch.inf).all())
        for x in torch.autograd.grad(out.sum(), (query, key, value)):
            assert bool(x.isfinite().all())


def test_merge_in_bfloat16_rounds_once() -> None:
    parts = [(torch.randn(2, 5, 3, 4), torch.randn(2, 3, 5)) for _ in range(4)]
    parts[1][1].fill_(-torch.inf)
    parts[1][0].fill_(torch.nan)  # absent rows are not read
    out, lse = dilated.merge(parts, dtype=torch.bfloat16)
    lses = torch.stack([l for _, l in parts]).double()
    weights = (lses - lses.logsumexp(0)).exp().transpose(-1, -2).unsqueeze(-1)
    exact = (weights * torch.stack([o.double().nan_to_num() for o, _ in parts])).sum(0)
    assert torch.equal(out, exact.bfloat16())
    torch.testing.assert_close(lse, lses.logsumexp(0).float())
    torch.testing.assert_close(dilated.merge(parts[::-1])[0], exact.float())


X = torch.zeros(2, 6, 4, 8)
WINDOW: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query_start": 5}, InvalidProblem, "begin <= end <= sequence length 9, got [5, 11)"),
    ({"key_start": -1}, InvalidProblem, "begin <= end <= sequence length 9, got [-1, 5)"),
    ({"query_start": [1, 2, 3]}, InvalidProblem,
     "query_start: expected one integer, or one per sequence, 2, got 3"),
    ({"query_start": 1.5}, InvalidProblem, "query_start: expected an integer, got 1.5"),
    ({"seqlen": torch.tensor([9.0, 9.0])}, InvalidProblem, "seqlen: expected integers"),
    ({"seqlen": [9, 8]}, InvalidProblem,
     "seqlen: expected one length for all sequences, unless packed, got 9 and 8 "
     "(seqused says how much of each is used)"),
    ({"query_rows": [6, 6], "key_rows": [6, 6]}, InvalidProblem,
     "query_rows: expected one number per sequence with layout 'shd', none with others"),
    ({"merge": "sum"}, Unsupported, "merge: expected lse with windows, got sum"),
    ({"preset": "fkodom"}, Unsupported, "preset: expected no column sums with windows"),
    ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, Unsupported,
     "key_mask: expected bool of shape (2, 6), got bool of shape (2, 9)"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "text"), WINDOW, ids=lambda x: str(x)[:40])
def test_refused_windows(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        dilated.window_attention(X, X, X, **{**LISTS, "seqlen": 9, **options})
    assert text in str(caught.value)


def test_detached_weights_need_all_keys_for_a_gradient() -> None:
    x = torch.randn(1, 9, 4, 8, requires_grad=True)
    call = {**LISTS, "seqlen": 9, "lse_grad": False}
    out, _ = dilated.window_attention(x[:, 2:4], x, x, query_start=2, **call)
    out.sum().backward()
    out, _ = dilated.window_attention(x, x[:, :5], x[:, :5], **call)
    with pytest.raises(Unsupported, match="lse_grad: expected true for gradients of windows"):
        out.sum().backward()


PART = (torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2))
MERGES: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "merge: parts: expected at least one partial result, got none"),
    ([PART[:1]], {}, "merge: parts[0]: expected (out, lse), got 1 entries"),
    ([PART, (PART[0][:, :1], PART[1])], {}, "merge: parts[1].out: expected shape (1, 2, 3, 4)"),
    ([PART, (PART[0].double(), PART[1])], {}, "merge: parts[1].out: expected dtype float32"),
    ([PART], {"dtype": torch.int64}, "merge: dtype: expected one of torch.float32"),
    ([PART], {"layout": "shd"}, "merge: parts[0]: expected out of 3 and lse of 2 dimensions"),
    ([PART], {"layout": "sbhd"}, "layout: expected one of bshd, bhsd, shd, got sbhd"),
]


@pytest.mark.parametrize(("parts", "options", "text"), MERGES, ids=lambda x: str(x)[:40])
def test_refused_merges(parts: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidProblem) as caught:
        dilated.merge(parts, **options)
    assert text in str(caught.value)
