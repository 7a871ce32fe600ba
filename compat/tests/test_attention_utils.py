"""The plain functions: every one restated by loops or by its formula."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dilated
from dilated_attention_pytorch.utils import attention_utils as plain

compat = settings(settings.get_profile("compat"))


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Row by row, without -inf."""
    out = torch.zeros_like(q)
    for i in range(q.shape[1]):
        for h in range(q.shape[2]):
            keys = seen[i].nonzero()[:, 0]
            scores = torch.einsum("bd,bjd->bj", q[:, i, h], k[:, keys, h]) / math.sqrt(q.shape[3])
            out[:, i, h] = torch.einsum("bj,bjd->bd", scores.softmax(-1), v[:, keys, h])
    return out


@pytest.mark.parametrize("attend", [plain.standard_attention, plain.optimize_attention_computation])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_dense_attention(attend: Callable[..., Tensor], is_causal: bool, kind: str) -> None:
    """Masks act, alone and together with causality."""
    q, k, v = torch.randn(3, 2, 9, 3, 5, dtype=torch.float64).unbind()
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if is_causal else torch.ones(9, 9).bool()
    mask = None
    if kind != "none":
        mask = (torch.rand(9, 9) > 0.4) | torch.eye(9, dtype=torch.bool)
        seen = seen & mask
        if kind == "additive":
            mask = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    out = attend(q, k, v, is_causal, mask)
    torch.testing.assert_close(out, dense(q, k, v, seen), rtol=0, atol=1e-13)


@pytest.mark.parametrize("attend", [plain.standard_attention, plain.optimize_attention_computation])
def test_dropout_acts_in_every_grad_mode(attend: Callable[..., Tensor]) -> None:
    x = torch.randn(1, 9, 2, 4)
    with torch.no_grad():
        assert not torch.equal(attend(x, x, x, dropout_p=0.5), attend(x, x, x))


def test_scores_have_a_scale() -> None:
    q, k = torch.randn(2, 2, 6, 4)
    scores = plain.compute_attention_scores(q, k, scale=0.3, attention_mask=torch.ones(6, 6))
    torch.testing.assert_close(scores, 0.3 * torch.einsum("bid,bjd->bij", q, k) + 1)


@given(n=st.integers(0, 20), segment=st.integers(1, 12), dilation=st.integers(1, 5))
@compat
def test_dilated_mask(n: int, segment: int, dilation: int) -> None:
    expected = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        reach = segment // 2 * dilation
        for j in range(max(0, i - reach), min(n, i + reach + 1), dilation):
            expected[i, j] = True
    mask = plain.create_dilated_mask(n, segment, dilation, torch.device("cpu"))
    assert torch.equal(mask, expected)
    scores = torch.randn(2, n, n)
    masked = plain.apply_dilated_attention_pattern(scores, segment, dilation, 0, 2)
    assert torch.equal(masked, torch.where(expected, scores, -torch.inf))


def test_a_pattern_belongs_to_a_group() -> None:
    with pytest.raises(dilated.InvalidProblem, match="group_idx: expected 0 <= group_idx < 2"):
        plain.apply_dilated_attention_pattern(torch.zeros(4, 4), 2, 1, 2, 2)


@given(n=st.integers(0, 20), block=st.integers(1, 7), overlap=st.integers(0, 8))
@compat
def test_block_diagonal_mask(n: int, block: int, overlap: int) -> None:
    def reached(i: int, j: int) -> bool:
        start = i // block * block
        return start - overlap <= j < start + block + overlap

    expected = [[reached(i, j) or reached(j, i) for j in range(n)] for i in range(n)]
    mask = plain.create_block_diagonal_mask(n, block, torch.device("cpu"), overlap)
    assert mask.tolist() == expected


def test_alibi() -> None:
    """Slopes of the paper for 8 heads: 1/2, 1/4, ..., 1/256."""
    bias = plain.compute_alibi_bias(6, 8)
    for h in range(8):
        for i in range(6):
            for j in range(6):
                assert bias[h, i, j] == 0.5 ** (h + 1) * (j - i)


@given(n=st.integers(1, 9), pairs=st.integers(1, 4))
@compat
def test_rotary_embeddings(n: int, pairs: int) -> None:
    """Pair i turns by the angle p * 10000^(-i / pairs): a product of complex numbers."""
    q, k = torch.randn(2, 1, n, 3, 2 * pairs, dtype=torch.float64).unbind()
    cos, sin = plain.compute_rotary_embeddings(n, 2 * pairs, torch.device("cpu"), dtype=q.dtype)
    assert cos.shape == sin.shape == (n, 2 * pairs)
    for x, rotated in zip((q, k), plain.apply_rotary_embeddings(q, k, cos, sin)):
        for p in range(n):
            for i in range(pairs):
                turn = cmath.rect(1, p * 10000 ** (-i / pairs))
                pair = torch.complex(x[0, p, :, i], x[0, p, :, i + pairs]) * turn
                found = torch.complex(rotated[0, p, :, i], rotated[0, p, :, i + pairs])
                torch.testing.assert_close(found, pair, rtol=0, atol=1e-13)


def test_rotated_scores_depend_on_distance_only() -> None:
    cos, sin = plain.compute_rotary_embeddings(12, 8, dtype=torch.float64)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 12, 1, 8).unbind()
    q, k = plain.apply_rotary_embeddings(q, k, cos, sin)
    scores = q[0, :, 0] @ k[0, :, 0].T
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-13)


def test_odd_dimensions_raise_the_error_of_the_package() -> None:
    with pytest.raises(AssertionError, match="dim: expected an even number, got 63"):
        plain.compute_rotary_embeddings(8, 63)


def test_heads_are_split_and_merged() -> None:
    x = torch.randn(2, 5, 12)
    split = plain.split_attention_heads(x, 3)
    assert torch.equal(split[:, :, 1], x[:, :, 4:8])
    assert torch.equal(plain.merge_attention_heads(split, 3, 4), x)


def test_flags() -> None:
    assert plain.HAS_SDPA
    assert not plain.HAS_FLASH_ATTN
