"""Every argument of a wrong type is refused by name: none is truncated, none ends in a TypeError of
somebody else; what is exact is accepted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dilated
from dilated import InvalidProblem

LISTS: dict[str, Any] = {"segments": [4, 8], "dilations": [1, 2]}
X = torch.randn(1, 9, 4, 8)
LEARNABLE = "a learnable scale goes into the query: query * scale, with scale=1.0"
LIST_HINT = "lists of options are read while the call is prepared: call .tolist()"
NAMES = {
    "offsets": "paper, torchscale, branch, zero",
    "preset": "longnet, torchscale, head_groups, fork, fkodom",
    "groups": "none, cumulative, literal",
    "merge": "lse, sum, mean",
    "tail": "mask, phantom",
    "gqa_offset": "kv, q",
    "layout": "bshd, bhsd, shd",
    "backend": "cuda, cpu, reference",
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"segments": [8.7, 16]}, "segments[0]: expected an integer, got 8.7"),
    ({"segments": [8, True]}, "segments[1]: expected an integer, got True"),
    ({"segments": [8, "16"]}, "segments[1]: expected an integer, got '16'"),
    ({"segments": [8, None]}, "segments[1]: expected an integer, got None"),
    ({"segments": [2**63, 8]},
     "segments[0]: expected an integer of 64 bits, got 9223372036854775808"),
    ({"segments": torch.tensor([4, 8])},
     f"segments: expected a sequence of integers, got a Tensor ({LIST_HINT})"),
    ({"segments": [torch.tensor(4), 8]}, "segments[0]: expected an integer, got a Tensor"),
    ({"segments": {4, 8}}, "segments: expected a sequence of integers, got {8, 4}"),
    ({"segments": None}, "segments: expected a sequence of integers, got None"),
    ({"dilations": [np.float64(1.0), 2]}, "dilations[0]: expected an integer, got np.float64(1.0)"),
    ({"dilations": [[1], [2]]}, "dilations[0]: expected an integer, got [1]"),
    ({"offsets": [[0.0] * 4] * 2}, "offsets[0][0]: expected an integer, got 0.0"),
    ({"offsets": [[False] * 4] * 2}, "offsets[0][0]: expected an integer, got False"),
    ({"offsets": torch.zeros(2, 4)}, "offsets[0][0]: expected an integer, got 0.0"),
    ({"offsets": [0, 0]}, "offsets: expected a builder's name or a table (branches, heads), "
     "got [0, 0]"),
    ({"offsets": [[2**70] * 4] * 2}, f"offsets[0][0]: expected an integer of 64 bits, got {2**70}"),
    *(({name: 3}, f"{name}: expected one of {names}, got 3")
      for name, names in NAMES.items() if name != "offsets"),
    *(({name: True}, f"{name}: expected one of {names}, got True")
      for name, names in NAMES.items() if name != "offsets"),
    *(({name: "LSE"}, f"{name}: expected one of {names}, got LSE")
      for name, names in NAMES.items()),
    ({"layout": None}, f"layout: expected one of {NAMES['layout']}, got None"),
    *(({name: value}, f"{name}: expected True or False, got {got}")
      for name in ("is_causal", "lse_grad", "row_shift", "return_lse")
      for value, got in ((1, "1"), ("yes", "'yes'"), (0.0, "0.0"), (torch.tensor(True), "a Tensor"),
                         (np.int64(1), "np.int64(1)"))),
    ({"scale": torch.tensor(0.3)}, f"scale: expected a number, got a Tensor ({LEARNABLE})"),
    ({"scale": torch.nn.Parameter(torch.tensor(0.3))},
     f"scale: expected a number, got a Parameter ({LEARNABLE})"),
    ({"scale": "0.3"}, f"scale: expected a number, got '0.3' ({LEARNABLE})"),
    ({"scale": True}, f"scale: expected a number, got True ({LEARNABLE})"),
    ({"scale": 1j}, f"scale: expected a number, got 1j ({LEARNABLE})"),
    ({"scale": 10**400}, f"scale: expected a number, got {10**400} ({LEARNABLE})"),
    ({"out_scale": [1.0]}, "out_scale: expected a number, got [1.0]"),
    ({"dropout_p": torch.tensor(0.5)}, "dropout_p: expected a number, got a Tensor"),
    ({"dropout_p": None}, "dropout_p: expected a number, got None"),
    ({"dropout_p": False}, "dropout_p: expected a number, got False"),
    *(({"dropout_p": 0.5, "dropout_seed": seed},
       f"dropout_seed: expected an int64 tensor (seed, offset), or an integer{got}")
      for seed, got in ((1.5, ", got 1.5"), (True, ", got True"), ("7", ", got '7'"),
                        (2**63, f" of 64 bits, got {2**63}"),
                        (np.float32(7.0), ", got np.float32(7.0)"),
                        (torch.tensor([1.0, 2.0]), ", got dtype torch.float32"),
                        (torch.tensor([True, True]), ", got dtype torch.bool"))),
    ({"dropout_seed": 1.5},
     "dropout_seed: expected an int64 tensor (seed, offset), or an integer, got 1.5"),
    ({"head_offset": 1.0}, "head_offset: expected an integer, got 1.0"),
    ({"head_offset": False}, "head_offset: expected an integer, got False"),
    ({"total_heads": 0}, "total_heads: expected >= 1, got 0"),
    ({"total_heads": -1}, "total_heads: expected >= 1, got -1"),
    ({"total_kv_heads": "8"}, "total_kv_heads: expected an integer, got '8'"),
    ({"head_offset": 5, "total_heads": 8},
     "head_offset: expected 0 <= head_offset <= total_heads - num_heads = 4, got 5 "
     "(the call's heads are [head_offset, head_offset + num_heads) of total_heads)"),
    ({"seqused": [8.5]}, "seqused[0]: expected an integer, got 8.5"),
    ({"seqused": 9}, "seqused: expected a sequence of integers, got 9"),
    ({"seqused": [2**64]}, f"seqused[0]: expected an integer of 64 bits, got {2**64}"),
    ({"seqused": torch.tensor([True])}, "seqused: expected integers, got dtype torch.bool"),
    ({"seqused": torch.tensor([9], dtype=torch.uint64)},
     "seqused: expected integers, got dtype torch.uint64 (cast to int64)"),
    ({"cu_seqlens": torch.tensor([0.0, 9.0]), "layout": "shd"},
     "cu_seqlens: expected integers, got dtype torch.float32"),
    ({"cu_seqlens": "9", "layout": "shd"}, "cu_seqlens: expected a sequence of integers, got '9'"),
    ({"key_mask": [[True] * 9]}, "key_mask: expected a tensor, got list"),
    ({"key_mask": np.ones((1, 9), dtype=bool)}, "key_mask: expected a tensor, got ndarray"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "text"), REFUSED, ids=lambda x: str(x)[:60])
def test_refused_by_name(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidProblem) as caught:
        dilated.dilated_attention(X, X, X, **{**LISTS, **options})
    assert str(caught.value) == f"dilated_attention: {text}"


@pytest.mark.parametrize("value", [None, [[0.0]], np.zeros((1, 9, 4, 8)), 3])
def test_other_things_than_tensors(value: Any) -> None:
    for name, inputs in (("query", (value, X, X)), ("value", (X, X, value))):
        with pytest.raises(InvalidProblem, match=f"{name}: expected a tensor, got "):
            dilated.dilated_attention(*inputs, **LISTS)


OF_CALLS = {"seqused", "cu_seqlens", "key_mask", "dropout_seed", "return_lse"}
SHARD = {"head_offset": 5, "total_heads": 8}  # of 3 heads at most
MODULES = [case for case in REFUSED if not case[0].keys() & OF_CALLS and case[0] != SHARD]
RULES: list[tuple[dict[str, Any], str]] = [
    ({"segments": [0, 8]}, "segments[0]: expected 1 <= segment <= 2^40"),
    ({"dilations": [1]}, "dilations: expected as many entries as segments, 2, got 1"),
    ({"dropout_p": 1.5}, "dropout_p: expected 0 <= dropout_p <= 1, got 1.5"),
    ({"scale": float("nan")}, "scale: expected a finite number, got nan"),
    ({"offsets": [[0] * 4, [2] * 4]}, "offsets[1][0]: expected < dilations[1] = 2, got 2"),
    ({"preset": "fork", "merge": "lse"}, "merge: expected no value together with preset"),
    ({"lse_grad": False, "merge": "mean"}, "lse_grad: expected true with merge = mean"),
    ({"row_shift": True}, "row_shift: expected False, or preset 'torchscale', got preset None"),
    ({"head_offset": 8, "total_heads": 8}, "head_offset: expected 0 <= head_offset"),
    ({"total_heads": 8, "total_kv_heads": 3}, "total_kv_heads: expected a divisor of total_heads"),
]


@pytest.mark.parametrize(("options", "text"), [*MODULES, *RULES], ids=lambda x: str(x)[:60])
def test_modules_check_their_options_when_built(options: dict[str, Any], text: str) -> None:
    """Before any weight is made, whatever the shapes will be."""
    with pytest.raises(InvalidProblem) as caught:
        dilated.DilatedAttention(**{**LISTS, **options})
    assert text in str(caught.value)


def test_legal_modules_are_built_before_heads_are_known() -> None:
    for options in (
        {"preset": "fork"},
        {"preset": "torchscale", "segments": [6, 8], "dilations": [4, 1], "row_shift": True},
        {"offsets": [[0] * 6, [1] * 6]},
        {"head_offset": 4, "total_heads": 8, "total_kv_heads": 2},
        {"backend": "reference"},
    ):
        dilated.DilatedAttention(**{**LISTS, **options})


ACCEPTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"segments": np.array([4, 8], dtype=np.uint8), "dilations": (np.int32(1), 2)}, {}),
    ({"segments": range(4, 9, 4)}, {}),
    ({"scale": np.float32(0.25)}, {"scale": 0.25}),
    ({"scale": 1}, {"scale": 1.0}),
    ({"is_causal": np.bool_(True)}, {"is_causal": True}),
    ({"offsets": torch.tensor([[0] * 4, [1] * 4])}, {"offsets": [[0] * 4, [1] * 4]}),
    ({"seqused": np.array([7], dtype=np.int16)}, {"seqused": [7]}),
    ({"seqused": torch.tensor([7], dtype=torch.int32)}, {"seqused": [7]}),
    ({"dropout_p": 0.5, "dropout_seed": np.uint32(7)}, {"dropout_p": 0.5, "dropout_seed": 7}),
    ({"dropout_p": 0.5, "dropout_seed": torch.tensor([7, 0], dtype=torch.int16)},
     {"dropout_p": 0.5, "dropout_seed": 7}),
    ({"dropout_p": 0, "dropout_seed": 7}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "plain"), ACCEPTED, ids=lambda x: str(x)[:60])
def test_exact_values_of_other_types(options: dict[str, Any], plain: dict[str, Any]) -> None:
    found = dilated.dilated_attention(X, X, X, **{**LISTS, **options})
    assert torch.equal(found, dilated.dilated_attention(X, X, X, **{**LISTS, **plain}))


def test_a_scale_that_learns_goes_into_the_query() -> None:
    """What the refusal of a tensor as scale advises."""
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = X.double()
    out = dilated.dilated_attention(x * scale, x, x, **LISTS, scale=1.0)
    torch.testing.assert_close(out, dilated.dilated_attention(x, x, x, **LISTS, scale=0.3))
    (gradient,) = torch.autograd.grad(out.square().sum(), scale)
    plus, minus = (
        dilated.dilated_attention(x, x, x, **LISTS, scale=0.3 + h).square().sum()
        for h in (1e-5, -1e-5)
    )
    torch.testing.assert_close(gradient, (plus - minus) / 2e-5)


def test_unknown_options_are_named() -> None:
    with pytest.raises(TypeError, match="dilated_attention: unexpected options is_casual, segment"):
        dilated.dilated_attention(X, X, X, **LISTS, is_casual=True, segment=3)
    with pytest.raises(TypeError, match="unexpected options window"):
        dilated.DilatedAttention(**LISTS, window=3)


def test_shards_of_heads_have_the_bits_of_the_whole() -> None:
    """Tensor parallelism: builders and dropout see global heads."""
    q, k, v = torch.randn(1, 30, 8, 16), torch.randn(1, 30, 4, 16), torch.randn(1, 30, 4, 16)
    call = {**LISTS, "dilations": [1, 4], "dropout_p": 0.2, "dropout_seed": 3}
    whole = dilated.dilated_attention(q, k, v, **call)
    for first in (0, 4):
        shard = (
            q[:, :, first : first + 4],
            *(x[:, :, first // 2 : first // 2 + 2] for x in (k, v)),
        )
        heads = {"head_offset": first, "total_heads": 8, "total_kv_heads": 4}
        out = dilated.dilated_attention(*shard, **call, **heads)
        assert torch.equal(out, whole[:, :, first : first + 4])
