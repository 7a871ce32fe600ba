"""The oracle's golden cases (semantics §11): outputs and gradients in full, by both back ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import NAMES, assert_backend_runs, error, golden_cases, oracle, oracle_offsets
from torch import Tensor

import dilated

CASES = golden_cases()


def _arguments(case: dict[str, Any]) -> dict[str, Any]:
    config = case["cfg"]
    arguments = {
        "segments": config["segments"],
        "dilations": config["dilations"],
        "is_causal": config["causal"],
        "scale": config["scale"],
    }
    if config["colsum"]:
        return {**arguments, "preset": "fkodom"}
    heads, kv_heads = case["H"], case["Hk"]
    table = oracle_offsets(
        heads, kv_heads, config["dilations"], config["offset"], gqa_offset=config["gqa_offset"]
    )
    if config["assign"] != "all_heads":
        for row, members in zip(table, config["assign"], strict=True):
            row[:] = [o if h in members else -1 for h, o in enumerate(row)]
    return {
        **arguments,
        "offsets": table,
        "merge": config["merge"],
        "out_scale": config["out_scale"],
        "lse_grad": None if config["lse_grad"] else False,
        "tail": config["tail"],
        "key_mask": None if case["key_mask"] is None else torch.tensor(case["key_mask"])[None],
    }


def _inputs(case: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    rows = ((case["H"], 1), (case["Hk"], 2), (case["Hk"], 3), (case["H"], 4))
    lists = [oracle.rand3(case["n"], heads, case["d"], seed) for heads, seed in rows]
    return [torch.tensor(x, dtype=torch.float64).to(dtype)[None] for x in lists]


def _run(
    case: dict[str, Any], dtype: torch.dtype, backend: str, dlse: Tensor | None = None
) -> dict[str, Tensor]:
    q, k, v, dout = _inputs(case, dtype)
    arguments = {**_arguments(case), "backend": backend, "return_lse": True}
    if case["cu_seqlens"] is not None:
        q, k, v, dout = (x[0] for x in (q, k, v, dout))
        arguments |= {"cu_seqlens": case["cu_seqlens"], "layout": "shd"}
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dilated.dilated_attention(*inputs, **arguments)
    outputs, gradients = [out], [dout]
    if dlse is not None:
        outputs.append(lse)
        gradients.append(dlse.to(lse.dtype).reshape(lse.shape))
    grads = torch.autograd.grad(outputs, inputs, gradients)
    packed = [x if case["cu_seqlens"] is not None else x[0] for x in (out, lse, *grads)]
    packed[1] = packed[1].T  # the oracle's order: (position, head)
    return dict(zip(NAMES, (x.detach() for x in packed), strict=True))


def _golden(case: dict[str, Any]) -> dict[str, Tensor]:
    out = case["out"]
    lse = [[-math.inf if x is None else x for x in row] for row in out["lse"]]
    lists = (out["o"], lse, out["dq"], out["dk"], out["dv"])
    return dict(zip(NAMES, (torch.tensor(x, dtype=torch.float64) for x in lists), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_reference_back_end_reproduces_every_number(case: dict[str, Any]) -> None:
    """All five tensors at 1e-12 * max(1, |x|), and the oracle's digests of them."""
    actual, exact = _run(case, torch.float64, "reference"), _golden(case)
    digests = oracle.DIGESTS[case["name"]]
    for name, digest in zip(NAMES, digests, strict=True):
        a, b = actual[name], exact[name]
        difference = torch.where(a == b, 0.0, (a - b).abs())
        assert bool((difference <= 1e-12 * b.abs().clamp(min=1.0)).all()), name
        assert oracle.digest(a.tolist()) == pytest.approx(digest, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_cpu_back_end_float32_agrees(case: dict[str, Any]) -> None:
    """Column sums near zero amplify rounding; there the bound scales with the largest value."""
    assert_backend_runs("cpu", case["n"], case["H"], segments=[4], dilations=[1])
    actual, exact = _run(case, torch.float32, "cpu"), _golden(case)
    for name in NAMES:
        finite = exact[name][exact[name].isfinite()]
        scale = max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
        amplification = 100.0 if case["cfg"]["colsum"] else 1.0
        assert error(actual[name], exact[name]) <= 5e-6 * scale * amplification, name


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c["cfg"]["colsum"]], ids=lambda c: c["name"]
)
def test_gradient_of_lse_equals_the_oracles(case: dict[str, Any]) -> None:
    """dL has no golden: the oracle's backward(dlse=val(5, p H + h)), whatever the merge."""
    n, heads = case["n"], case["H"]
    dlse = [[oracle.val(5, p * heads + h) for h in range(heads)] for p in range(n)]
    config = {**case["cfg"]}
    lists = [x[0].tolist() for x in _inputs(case, torch.float64)]
    want = oracle.backward(*lists, config, case["key_mask"], case["cu_seqlens"], dlse)
    actual = _run(case, torch.float64, "reference", torch.tensor(dlse, dtype=torch.float64).T)
    for name, wanted in (("dquery", "dq"), ("dkey", "dk"), ("dvalue", "dv")):
        exact = torch.tensor(want[wanted], dtype=torch.float64)
        assert error(actual[name], exact) <= 1e-12 * max(1.0, float(exact.abs().max())), name
