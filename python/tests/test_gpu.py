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
DEVICE = "cuda"
Results = dict[str, Tensor]
EXAMPLES = int(os.environ.get("DILATED_GPU_EXAMPLES", "300"))
LISTS: dict[str, Any] = {"segments": [8, 13, 40], "dilations": [1, 3, 5]}


def gpu(case: Case, dtype: torch.dtype, **call: Any) -> Results:
    found = run(case, dtype, device=DEVICE, backend="cuda", **call)
    assert all(x.is_cuda for x in found.values())
    return {name: x.cpu() for name, x in found.items()}


def assert_errors(actual: Results, exact: Results, yardstick: Any) -> None:
    """The tolerance rule. `yardstick(shift)` gives the exact and the plain results of other inputs
    of the same shapes, of these at 0: a small result may be exact for the plain implementation by
    luck, then its largest error counts.
    """
    found = {n: error(actual[n], exact[n]) for n in NAMES}
    bounds = dict.fromkeys(NAMES, 0.0)
    for shift in range(8):
        want, plain = yardstick(shift)
        bounds = {n: max(bounds[n], 2.0 * error(plain[n], want[n]) + 1e-5) for n in NAMES}
        finite = exact["lse"][exact["lse"].isfinite()]
        last_place = 2.0**-23 * float(finite.abs().max()) if finite.numel() else 0.0
        bounds["lse"] = max(1e-3, 16 * last_place)
        if all(found[n] <= bounds[n] for n in NAMES):
            return
    assert not {n: (found[n], bounds[n]) for n in NAMES if found[n] > bounds[n]}


def assert_rule(case: Case, dtype: torch.dtype, actual: Results, **more: Any) -> None:
    def yardstick(shift: int) -> tuple[Results, Results]:
        other = dataclasses.replace(case, seed=case.seed + shift)
        want = definition(other, dtype, torch.float64, **more)
        return want, definition(other, dtype, dtype, **more)

    assert_errors(actual, definition(case, dtype, torch.float64, **more), yardstick)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tolerance_rule(dtype: torch.dtype, head_dim: int) -> None:
    for seed, options in enumerate(OPTIONS):
        case = Case(37, 5, 6, 2, head_dim, *LISTS.values(), options, seed=seed)
        assert_rule(case, dtype, gpu(case, dtype))


@pytest.mark.parametrize("head_dim", [24, 48, 64, 96, 128, 256])
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


@st.composite
def hopper_problems(draw: st.DrawFn) -> Case:
    """What the kernels of Hopper take, over several of their tiles."""
    branches = draw(st.integers(1, 4))
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    numbers = {"min_size": branches, "max_size": branches}
    dilations = draw(st.lists(st.integers(1, 8), **numbers))
    segments = draw(st.lists(st.integers(1, 700), **numbers))
    options = {
        "is_causal": draw(st.booleans()),
        "merge": draw(st.sampled_from(["lse", "lse", "sum", "mean"])),
        "lse_grad": draw(st.booleans()),
        "offsets": draw(st.sampled_from(["paper", "torchscale", "zero"])),
    }
    if options["merge"] != "lse":
        options.pop("lse_grad")
    head_dim = draw(st.sampled_from([8, 24, 40, 48, 64, 72, 96, 120, 128]))
    n = draw(st.integers(1, 600))
    seed = draw(st.integers(0, 2**20))
    return Case(n, 1, heads, kv_heads, head_dim, segments, dilations, options, seed=seed)


@settings(max_examples=max(1, EXAMPLES // 10))
@given(hopper_problems(), st.sampled_from(DTYPES[1:]))
def test_random_problems_of_several_tiles(case: Case, dtype: torch.dtype) -> None:
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
LENGTHS = [61, 0, 17, 45]
QUERY_STARTS, KEY_STARTS, WINDOW = [3, 0, 19, 7], [10, 25, 0, 2], 36


class Layouted:
    """How tensors of four sequences of at most 61 tokens are given: `given` and `returned` map
    (sequences, tokens, heads, head_dim) to the call's tensors, `rows` (sequences, heads, tokens)
    to its log-sum-exp. The definition sees all sequences padded, with their true lengths and masks.
    """

    def __init__(self, layout: str, options: dict[str, Any]) -> None:
        self.layout = layout
        self.is_window = layout == "window"
        self.has_lengths = layout in ("packed", "seqused")
        self.options = dict(options)
        if self.is_window:  # what windows do not have, or what a padded sequence cannot say
            for name in ("merge", "lse_grad", "tail"):
                self.options.pop(name, None)
        generator = torch.Generator().manual_seed(5)
        self.mask = torch.rand(4, 61, generator=generator) > 0.2

    def _cut(self, x: Tensor, starts: list[int], axis: int) -> Tensor:
        parts = [y.narrow(axis, a, WINDOW) for y, a in zip(x, starts, strict=True)]
        return torch.stack(parts)

    def given(self, x: Tensor, starts: list[int]) -> Tensor:
        if self.layout == "bhsd":
            return x.transpose(1, 2)
        if self.layout == "packed":
            return torch.cat([y[:n] for y, n in zip(x, LENGTHS, strict=True)])
        return self._cut(x, starts, 0) if self.is_window else x

    def rows(self, x: Tensor) -> Tensor:
        if self.layout == "packed":
            return torch.cat([y[:, :n] for y, n in zip(x, LENGTHS, strict=True)], dim=1)
        return self._cut(x, QUERY_STARTS, 1) if self.is_window else x

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The operator."""
        more = {**LISTS, **self.options}
        mask = self.mask.to(q.device)
        if self.is_window:
            more |= {"seqlen": 61, "query_start": QUERY_STARTS, "key_start": KEY_STARTS}
        elif self.layout == "packed":
            ends = torch.tensor(LENGTHS).cumsum(0).tolist()
            more |= {"layout": "shd", "cu_seqlens": [0, *ends]}
            mask = self.given(mask, KEY_STARTS)
        elif self.layout == "seqused":
            more["seqused"] = LENGTHS
        elif self.layout == "bhsd":
            more["layout"] = "bhsd"
        given = self.given(q, QUERY_STARTS), self.given(k, KEY_STARTS), self.given(v, KEY_STARTS)
        if self.is_window:
            return dilated.window_attention(*given, **more)
        return dilated.dilated_attention(*given, **more, key_mask=mask, return_lse=True)

    def define(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The definition, which knows no layout: masks, and dropout read back from the CPU."""
        more = dict(self.options)
        names = ("offsets", "gqa_offset")
        table = dilated.plan(
            61, 4, num_kv_heads=2, **LISTS, **{n: more.pop(n) for n in names if n in more}
        ).offsets
        more["key_mask"] = self.mask
        if self.is_window:
            position = torch.arange(61)
            start = torch.tensor(KEY_STARTS)[:, None]
            more["key_mask"] = (position >= start) & (position < start + WINDOW)
        if self.has_lengths:
            more["seqused"] = LENGTHS
        if (seed := more.pop("dropout_seed", None)) is not None:
            more["dropout_masks"] = self._kept(table, more["dropout_p"], seed)
        out, lse = dilated.reference.dilated_attention(q, k, v, **LISTS, offsets=table, **more)
        return self.given(out, QUERY_STARTS), self.rows(lse)

    def _kept(self, table: list[list[int]], p: float, seed: int) -> Tensor:
        """Masks of dropout: weights are equal, values the identity."""
        value = torch.eye(61, dtype=torch.float64)[None, :, None, :].expand(4, 61, 4, 61)
        query = torch.zeros(4, 61, 4, 61, dtype=torch.float64)
        masks = []
        for branch in range(len(table)):
            only = [row if b == branch else [-1] * 4 for b, row in enumerate(table)]
            out = dilated.dilated_attention(
                query, query, value, **LISTS, offsets=only, dropout_p=p, dropout_seed=seed,
                seqused=LENGTHS if self.has_lengths else None,
            )  # fmt: skip
            masks.append(out.transpose(1, 2) != 0)
        return torch.stack(masks)


def _results(function: Any, inputs: list[Tensor], seed: int) -> dict[str, Tensor]:
    """Outputs, and gradients from random ones, in the inputs' dtype and on their device."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16() for x in outputs
    ]
    found = torch.autograd.grad(
        [x.masked_fill(x == -torch.inf, 0.0) for x in outputs],
        inputs,
        [g.to(x.device, x.dtype) for g, x in zip(grads, outputs, strict=True)],
    )
    return dict(zip(NAMES, (x.detach().cpu() for x in (*outputs, *found)), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "packed", "seqused", "window"])
def test_layouts_and_lengths(layout: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """The tolerance rule; dropout too: one mask for all back ends."""
    problem = Layouted(layout, options)

    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((4, 61, heads, 20) for heads in (4, 2, 2))
        return [torch.randn(s, generator=generator).to(dtype) for s in shapes]

    def at(seed: int, precision: torch.dtype) -> dict[str, Tensor]:
        return _results(problem.define, [x.to(precision) for x in inputs(seed)], seed)

    found = _results(problem.call, [x.to(DEVICE) for x in inputs(0)], 0)
    assert_errors(found, at(0, torch.float64), lambda s: (at(s, torch.float64), at(s, dtype)))


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
    """O = V and dV = dO at any finite score. dS = dO.V - dO.O is 0 up to the rounding of two sums
    of head_dim products, each at most a unit in the last place of the sum of magnitudes per
    product.
    """
    q, k, v = (
        (amplitude * torch.randn(2, 50, 2, 64, device=DEVICE)).to(dtype).requires_grad_()
        for _ in range(3)
    )
    dout = torch.randn(2, 50, 2, 64, device=DEVICE).to(dtype)
    out = dilated.dilated_attention(q, k, v, segments=[1], dilations=[1])
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert torch.equal(out, v)
    assert torch.equal(dv, dout)
    magnitude = (dout.double() * v.double()).abs().sum(-1, keepdim=True)
    bound = 2 * 64 * torch.finfo(torch.float32).eps * magnitude / 64**0.5
    # dS, and then the gradient, are rounded to the dtype.
    numbers = torch.finfo(dtype)
    for gradient, factor in ((dq, k), (dk, q)):
        largest = (1.0 + numbers.eps) ** 2 * bound * factor.double().abs() + numbers.tiny
        assert bool((gradient.double().abs() <= largest).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    case = Case(90, 2, 2, 2, 32, [16, 90], [1, 2], {"scale": 200.0})
    assert_rule(case, dtype, gpu(case, dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "shd"])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_merge(count: int, layout: str, dtype: torch.dtype) -> None:
    """As on the CPU: sums in float64, rounded once; absent rows may hold anything."""
    shape, rows = {
        "bshd": ((2, 9, 3, 40), (2, 3, 9)),
        "bhsd": ((2, 3, 9, 40), (2, 3, 9)),
        "shd": ((9, 3, 40), (3, 9)),
    }[layout]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    generator = torch.Generator().manual_seed(count)
    drawn = []
    for i in range(count):
        out = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        lse = 3 * torch.randn(rows, generator=generator, dtype=torch.float64).to(wide)
        lse[..., 2 * i % 9] = -torch.inf
        at = (..., 2 * i % 9, slice(None)) if layout == "bhsd" else (..., 2 * i % 9, slice(None), 0)
        out[at] = torch.nan
        drawn += [out, lse]
    grads = [torch.randn(s, generator=generator) for s in (shape, rows)]
    for device in (DEVICE, "cpu"):
        inputs = [x.to(device).requires_grad_() for x in drawn]
        parts = list(zip(inputs[::2], inputs[1::2], strict=True))
        out, lse = dilated.merge(parts, layout=layout)
        dlse = grads[1].to(device, wide).masked_fill(lse == -torch.inf, 0.0)
        found = torch.autograd.grad([out, lse], inputs, [grads[0].to(device, dtype), dlse])
        results.append([x.detach().cpu() for x in (out, lse, *found)])
    for a, b in zip(*results, strict=True):
        # Both round sums that differ in the last places of float64.
        rounding = torch.finfo(a.dtype).eps if a.dtype != torch.float64 else 1e-13
        torch.testing.assert_close(a, b, rtol=rounding, atol=1e-13)


def test_merge_of_too_many_parts() -> None:
    part = torch.ones(1, 2, 1, 4, device=DEVICE), torch.zeros(1, 1, 2, device=DEVICE)
    with pytest.raises(dilated.Unsupported, match="at most 100 on a CUDA device, got 101"):
        dilated.merge([part] * 101)
    with pytest.raises(dilated.InvalidProblem, match="the device of parts"):
        dilated.merge([part, (part[0].cpu(), part[1].cpu())])


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


def test_plan_says_which_kernel_runs() -> None:
    """Tests of head dims 8 to 128, multiples of 8, run the kernel of Hopper on a Hopper card."""
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    for more, reason in (({}, ""), ({"head_dim": 136}, "head_dim 136"),
                         ({"has_key_mask": True}, "key mask"), ({"dropout_p": 0.1}, "dropout"),
                         ({"dtype": torch.float32}, "dtype float32")):  # fmt: skip
        call = {"device": DEVICE, "dtype": torch.bfloat16, "head_dim": 64, **more}
        text = str(dilated.plan(500, 4, segments=[64, 500], dilations=[1, 3], **call))
        kernel = "sm_80 (compute capability"
        if is_hopper:
            kernel = f"sm_80 ({reason})" if reason else "sm_90a, tiles 192 x 128"
        assert f"forward       {kernel}" in text


def test_explain_names_the_back_end() -> None:
    plan = dilated.plan(37, 6, **LISTS, device="cuda", dtype=torch.bfloat16)
    assert "cuda      runs this" in plan.explain()
