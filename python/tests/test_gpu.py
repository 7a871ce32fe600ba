"""The back end "cuda" on CUDA tensors against the float64 definition, option by option (semantics
§11). `pytest -m gpu` runs it; without a device and a library with kernels it fails.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from support import NAMES, Case, assert_close, definition, error, run
from test_golden import CASES, _arguments, _golden, _inputs
from test_parity import HEAD_DIMS, OPTIONS, problems
from torch import Tensor

import dilated

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = int(os.environ.get("DILATED_GPU_EXAMPLES", "300"))
LISTS: dict[str, Any] = {"segments": [8, 13, 40], "dilations": [1, 3, 5]}


def gpu(case: Case, dtype: torch.dtype, **call: Any) -> dict[str, Tensor]:
    found = run(case, dtype, device="cuda", backend="cuda", **call)
    assert all(x.is_cuda for x in found.values())
    return {name: x.cpu() for name, x in found.items()}


def assert_rule(case: Case, dtype: torch.dtype, actual: dict[str, Tensor], **more: Any) -> None:
    """The tolerance rule. A small result may be exact for the plain implementation by luck: then
    its largest error over other inputs of the same shapes counts.
    """
    exact = definition(case, dtype, torch.float64, **more)
    bounds = dict.fromkeys(NAMES, 0.0)
    for shift in range(8):
        other = dataclasses.replace(case, seed=case.seed + shift)
        want = definition(other, dtype, torch.float64, **more)
        plain = definition(other, dtype, dtype, **more)
        bounds = {n: max(bounds[n], 2.0 * error(plain[n], want[n]) + 1e-5) for n in NAMES}
        bounds["lse"] = 1e-3
        found = {n: error(actual[n], exact[n]) for n in NAMES}
        if all(found[n] <= bounds[n] for n in NAMES):
            return
    assert not {n: (found[n], bounds[n]) for n in NAMES if found[n] > bounds[n]}, f"{case}"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tolerance_rule(dtype: torch.dtype, head_dim: int) -> None:
    for seed, options in enumerate(OPTIONS):
        case = Case(37, 5, 6, 2, head_dim, *LISTS.values(), options, seed=seed)
        assert_rule(case, dtype, gpu(case, dtype))


@pytest.mark.parametrize("head_dim", [24, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_many_tiles(dtype: torch.dtype, head_dim: int, is_causal: bool) -> None:
    """Segments of several tiles, ragged ends, masked keys."""
    options = {"is_causal": is_causal, "offsets": "torchscale"}
    case = Case(421, 1, 2, 1, head_dim, [150, 400], [1, 3], options, masked=True, seed=head_dim)
    assert_rule(case, dtype, gpu(case, dtype))


@pytest.mark.parametrize("is_causal", [False, True])
def test_every_length_up_to_three_segments(is_causal: bool) -> None:
    for n in range(25):
        for tail in ("mask", "phantom"):
            options = {"is_causal": is_causal, "tail": tail}
            case = Case(n, 1, 3, 3, 4, [5, 8], [2, 4], options, seed=n)
            exact = definition(case, torch.float32, torch.float64)
            assert_close(gpu(case, torch.float32), exact, 1e-5)


@settings(max_examples=EXAMPLES)
@given(problems(), st.sampled_from(DTYPES))
def test_random_problems(case: Case, dtype: torch.dtype) -> None:
    note(f"{case} {dtype}")
    assert_rule(case, dtype, gpu(case, dtype))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_golden(case: dict[str, Any]) -> None:
    q, k, v, dout = (x.cuda() for x in _inputs(case, torch.float32))
    arguments = {**_arguments(case), "backend": "cuda", "return_lse": True}
    if arguments.get("key_mask") is not None:
        arguments["key_mask"] = arguments["key_mask"].cuda()
    packed = case["cu_seqlens"] is not None
    if packed:
        q, k, v, dout = (x[0] for x in (q, k, v, dout))
        arguments |= {"cu_seqlens": case["cu_seqlens"], "layout": "shd"}
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dilated.dilated_attention(*inputs, **arguments)
    found = [x if packed else x[0] for x in (out, lse, *torch.autograd.grad(out, inputs, dout))]
    found[1] = found[1].T
    exact = _golden(case)
    for name, actual in zip(NAMES, found, strict=True):
        finite = exact[name][exact[name].isfinite()]
        scale = max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
        amplification = 100.0 if case["cfg"]["colsum"] else 1.0
        assert error(actual.cpu(), exact[name]) <= 5e-6 * scale * amplification, name


CALLS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"dropout_p": 0.4, "dropout_seed": 7},
    {"dropout_p": 0.4, "dropout_seed": 7, "merge": "mean", "is_causal": True},
    {"tail": "phantom", "lse_grad": False, "offsets": "torchscale"},
    {"merge": "sum", "out_scale": 0.3, "scale": -0.2},
    {"gqa_offset": "q"},
]


def _both(function: Any, tensors: list[Tensor]) -> None:
    """`function(*tensors)` and its gradients on the GPU and on the CPU, in float32."""
    results = []
    for device in ("cuda", "cpu"):
        inputs = [x.to(device).requires_grad_() for x in tensors]
        outputs = function(*inputs)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=generator).to(device) for x in outputs]
        finite = [x.nan_to_num(neginf=0.0) for x in outputs]
        found = torch.autograd.grad(finite, inputs, grads)
        results.append([x.detach().cpu() for x in (*outputs, *found)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "packed", "seqused", "window"])
def test_layouts_and_lengths_equal_the_cpu(options: dict[str, Any], layout: str) -> None:
    """Dropout too: one mask for all back ends."""
    if layout == "window" and options.get("merge", "lse") != "lse":
        options = {**options, "merge": "lse"}
    if layout == "window" and "lse_grad" in options:
        options = {**options, "lse_grad": True}
    more = {**LISTS, **options, "return_lse": True}
    q, k, v = (torch.randn(3, 61, h, 20) for h in (4, 2, 2))
    mask = torch.rand(3, 61) > 0.2
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        more["layout"] = "bhsd"
    elif layout == "packed":
        q, k, v, mask = (x.flatten(0, 1) for x in (q, k, v, mask))
        more |= {"layout": "shd", "cu_seqlens": [0, 5, 5, 100, 183]}
    elif layout == "seqused":
        more["seqused"] = [61, 0, 17]
    elif layout == "window":
        del more["return_lse"]
        more |= {"seqlen": 80, "query_start": [3, 0, 19], "key_start": [10, 19, 0]}
        _both(lambda *x: dilated.window_attention(*x, **more), [q, k, v])
        return
    _both(
        lambda *x: dilated.dilated_attention(*x, key_mask=mask.to(x[0].device), **more), [q, k, v]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_mask_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    n = 70
    query = torch.zeros(1, n, 2, n, dtype=dtype)
    value = torch.eye(n, dtype=dtype)[None, :, None, :].expand(1, n, 2, n).contiguous()
    call = {"segments": [64, 70], "dilations": [1, 2], "dropout_p": 0.5, "dropout_seed": 3}
    a = dilated.dilated_attention(query.cuda(), query.cuda(), value.cuda(), **call)
    b = dilated.dilated_attention(query, query, value, **call)
    assert torch.equal(a.cpu() != 0, b != 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_causal_rows_keep_their_bits(dtype: torch.dtype, bad: float) -> None:
    """Numbers that a row does not see change no bit of it, nor of its gradients."""
    n, cut, call = 200, 77, {"segments": [128, 200], "dilations": [1, 2], "is_causal": True}
    clean = [torch.randn(1, n, 2, 64, device="cuda").to(dtype) for _ in range(4)]
    results = []
    for poison in (False, True):
        q, k, v, dout = (x.clone() for x in clean)
        if poison:
            for x in (q, k, v, dout):
                x[:, cut:, :, 5] = bad
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out, lse = dilated.dilated_attention(*inputs, **call, return_lse=True)
        (dq,) = torch.autograd.grad(out, inputs[:1], dout)
        results.append((out.detach()[:, :cut], lse.detach()[..., :cut], dq[:, :cut]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert bool(a.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_gradients_come_from_rows_that_see_the_key(dtype: torch.dtype) -> None:
    """NaN in an earlier query and its dO reaches no later key."""
    n, cut, call = 200, 77, {"segments": [128, 200], "dilations": [1, 2], "is_causal": True}
    q, k, v, dout = (torch.randn(1, n, 2, 64, device="cuda").to(dtype) for _ in range(4))
    q[:, :cut] = torch.nan
    dout[:, :cut] = torch.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = dilated.dilated_attention(*inputs, **call)
    for gradient in torch.autograd.grad(out, inputs, dout):
        assert bool(gradient[:, cut:].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits(dtype: torch.dtype) -> None:
    """Two runs, query windows, packed sequences and shorter batches have the bits of the whole."""
    n, call = 333, {"segments": [64, 300], "dilations": [1, 3], "is_causal": True}
    inputs = [torch.randn(2, n, 4, 64, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
    dout = torch.randn(2, n, 4, 64, device="cuda").to(dtype)
    out, lse = dilated.dilated_attention(*inputs, **call, return_lse=True)
    grads = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    for _ in range(3):
        again = dilated.dilated_attention(*inputs, **call)
        assert torch.equal(again, out)
        for a, b in zip(grads, torch.autograd.grad(again, inputs, dout), strict=True):
            assert torch.equal(a, b)
    q, k, v = (x.detach() for x in inputs)
    window, window_lse = dilated.window_attention(
        q[:, 100:250], k, v, seqlen=n, query_start=100, **call
    )
    assert torch.equal(window.to(dtype), out[:, 100:250])
    assert torch.equal(window_lse, lse[..., 100:250])
    packed = dilated.dilated_attention(
        *(x.flatten(0, 1) for x in (q, k, v)), layout="shd", cu_seqlens=[0, n, 2 * n], **call
    )
    assert torch.equal(packed.unflatten(0, (2, n)), out)
    longer = (torch.cat([x, torch.full_like(x[:, :50], torch.nan)], 1) for x in (q, k, v))
    used = dilated.dilated_attention(*longer, seqused=[n, n], **call)
    assert torch.equal(used[:, :n], out)
    assert not used[:, n:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amplitude", [1.0, 100.0])
def test_rows_of_one_key(dtype: torch.dtype, amplitude: float) -> None:
    """dV = dO at any finite score."""
    q, k, v = (
        (amplitude * torch.randn(2, 50, 2, 64, device="cuda")).to(dtype).requires_grad_()
        for _ in range(3)
    )
    dout = torch.randn(2, 50, 2, 64, device="cuda").to(dtype)
    out = dilated.dilated_attention(q, k, v, segments=[1], dilations=[1])
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert torch.equal(out, v)
    assert torch.equal(dv, dout)
    assert float(dq.abs().max()) <= 1e-4 * amplitude**2
    assert float(dk.abs().max()) <= 1e-4 * amplitude**2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    case = Case(90, 2, 2, 2, 32, [16, 90], [1, 2], {"scale": 200.0})
    assert_rule(case, dtype, gpu(case, dtype))


def test_memory_is_written(poisoned_memory: object) -> None:
    for options in CALLS:
        options = {k: x for k, x in options.items() if not k.startswith("dropout")}
        case = Case(37, 2, 4, 2, 24, [4, 16], [2, 3], options, masked=True)
        exact = definition(case, torch.float32, torch.float64)
        assert_close(gpu(case, torch.float32), exact, 1e-5)


def test_streams_graphs_and_compile() -> None:
    call = {"segments": [64, 300], "dilations": [1, 3]}
    q, k, v = (torch.randn(1, 333, 4, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    want = dilated.dilated_attention(q, k, v, **call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        delayed = q.clone().zero_()
        torch.cuda._sleep(50_000_000)
        delayed.copy_(q)
        out = dilated.dilated_attention(delayed, k, v, **call)
    side.synchronize()
    assert torch.equal(out, want)

    static = [x.clone().requires_grad_() for x in (q, k, v)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dilated.dilated_attention(*static, **call)
        gradient = torch.autograd.grad(captured.sum(), static)
    with torch.no_grad():
        static[0].copy_(k)
    graph.replay()
    torch.cuda.synchronize()
    fresh = [x.clone().requires_grad_() for x in (k, k, v)]
    eager = dilated.dilated_attention(*fresh, **call)
    assert torch.equal(captured, eager)
    for a, b in zip(gradient, torch.autograd.grad(eager.sum(), fresh), strict=True):
        assert torch.equal(a, b)

    compiled = torch.compile(
        lambda q, k, v: 2 * dilated.dilated_attention(q, k, v, **call), mode="reduce-overhead"
    )
    for _ in range(3):
        assert torch.equal(compiled(q, k, v), 2 * want)


def test_explain_names_the_back_end() -> None:
    plan = dilated.plan(37, 6, **LISTS, device="cuda", dtype=torch.bfloat16)
    assert "cuda      runs this" in plan.explain()
