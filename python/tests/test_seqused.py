"""seqused is the length of the sequence (semantics §2): the oracle's word, forward and backward."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from support import error, golden_cases, oracle, oracle_offsets
from torch import Tensor

import dilated

CASES = [c for c in golden_cases() if not c["cfg"]["colsum"] and c["cfg"]["assign"] == "all_heads"]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_rows_beyond_do_not_exist(case: dict[str, Any], backend: str) -> None:
    config, n, heads = case["cfg"], case["n"], case["H"]
    bounds = case["cu_seqlens"] or [0, n]
    used = [(b - a) * 2 // 3 for a, b in itertools.pairwise(bounds)]
    dtype = torch.float64 if backend == "reference" else torch.float32
    shapes = ((heads, 1), (case["Hk"], 2), (case["Hk"], 3), (heads, 4))
    lists = [oracle.rand3(n, h, case["d"], seed) for h, seed in shapes]
    dlse = [[oracle.val(5, p * heads + h) for h in range(heads)] for p in range(n)]
    mask = case["key_mask"]
    want = oracle.backward(*lists, config, mask, case["cu_seqlens"], dlse, used)
    rows = torch.zeros(n, dtype=torch.bool)
    for start, length in zip(bounds, used, strict=False):
        rows[start : start + length] = True

    def tensor(x: Any) -> Tensor:
        return torch.tensor(x, dtype=dtype)

    inputs = []
    for x in lists[:3]:
        given = tensor(x)
        given[~rows] = math.nan  # never read
        inputs.append(given.requires_grad_())
    out, lse = dilated.dilated_attention(
        *inputs,
        segments=config["segments"],
        dilations=config["dilations"],
        offsets=oracle_offsets(
            heads, case["Hk"], config["dilations"], config["offset"],
            gqa_offset=config["gqa_offset"],
        ),
        merge=config["merge"],
        out_scale=config["out_scale"],
        lse_grad=None if config["lse_grad"] else False,
        tail=config["tail"],
        is_causal=config["causal"],
        scale=config["scale"],
        key_mask=None if mask is None else torch.tensor(mask, dtype=torch.bool),
        cu_seqlens=bounds,
        seqused=used,
        layout="shd",
        return_lse=True,
        backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad([out, lse], inputs, [tensor(lists[3]), tensor(dlse).T])
    expected = {
        "out": want["fw"]["o"],
        "dquery": want["dq"],
        "dkey": want["dk"],
        "dvalue": want["dv"],
    }
    for (name, exact), actual in zip(expected.items(), (out, *grads), strict=True):
        reference = torch.tensor(exact, dtype=torch.float64)
        scale = max(1.0, float(reference.abs().max()))
        bound = 1e-12 if backend == "reference" else 5e-6
        assert error(actual.detach(), reference) <= bound * scale, name
        assert not actual[~rows].any()
    exact_lse = torch.tensor(want["fw"]["lse"], dtype=torch.float64).T
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
    finite = exact_lse.isfinite()
    assert error(lse.detach()[finite], exact_lse[finite]) <= 1e-5
