"""What type checkers see: mypy checks this file too (pyproject.toml), unused ignores included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type

import dilated
from dilated import AttentionOptions, DilatedAttention, Plan

X = torch.zeros(1, 8, 2, 4)


def test_results_follow_return_lse() -> None:
    out = dilated.dilated_attention(X, X, X, segments=[4], dilations=[1])
    assert_type(out, Tensor)
    both = dilated.dilated_attention(X, X, X, segments=[4], dilations=[1], return_lse=True)
    assert_type(both, tuple[Tensor, Tensor])
    for flag in (False, True):
        either = dilated.dilated_attention(X, X, X, segments=[4], dilations=[1], return_lse=flag)
        assert_type(either, Tensor | tuple[Tensor, Tensor])
        assert isinstance(either, tuple) == flag


def test_numpy_and_other_integers() -> None:
    lists = {"ints": [4, 8], "numpy": [np.int64(4), np.int64(8)]}
    for segments in lists.values():
        dilated.dilated_attention(X, X, X, segments=segments, dilations=np.array([1, 2]))
    table = np.zeros((2, 2), dtype=np.int64)
    dilated.dilated_attention(
        X, X, X, segments=(4, 8), dilations=range(1, 3), offsets=table, seqused=np.array([7]),
        dropout_p=np.float32(0.5), dropout_seed=np.uint32(3), scale=np.float64(0.5),
    )  # fmt: skip


def test_options_are_checked_by_name() -> None:
    options: AttentionOptions = {"is_causal": True, "merge": "lse", "head_offset": 0}
    dilated.dilated_attention(X, X, X, segments=[4], dilations=[1], **options)
    module = DilatedAttention([4], [1], **options)
    assert_type(dilated.plan(8, 2, segments=[4], dilations=[1], **options), Plan)
    with pytest.raises(TypeError, match="unexpected options is_casual"):
        dilated.dilated_attention(X, X, X, segments=[4], dilations=[1], is_casual=True)  # type: ignore[call-overload]  # fmt: skip
    with pytest.raises(TypeError, match="unexpected options window"):
        DilatedAttention([4], [1], window=3)  # type: ignore[call-arg]
    assert module.is_causal


def test_windows_and_merge() -> None:
    part = dilated.window_attention(X, X, X, segments=[4], dilations=[1], seqlen=8, key_start=0)
    assert_type(part, tuple[Tensor, Tensor])
    assert_type(dilated.merge([part, part]), tuple[Tensor, Tensor])
