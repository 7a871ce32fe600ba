"""Captured graphs: torch.compile, torch.export, make_fx, torch.jit.trace, and gradients of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import dilated

SHAPE: dict[str, Any] = {"segments": [4, 6], "dilations": [1, 3]}
COMPILED: list[dict[str, Any]] = [
    {"is_causal": True},
    {"merge": "sum"},
    {"lse_grad": False, "tail": "phantom"},
    {"preset": "fork"},
    {"dropout_p": 0.5, "dropout_seed": 3},
]


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compile_once_for_all_lengths(options: dict[str, Any]) -> None:
    """fullgraph, dynamic: one graph whatever the length, same bits as eager."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dilated.dilated_attention(*inputs, **SHAPE, **options, return_lse=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    graphs = set()
    for n in (7, 16, 33, 50, 2):
        inputs = [torch.randn(2, n, 4, 8, requires_grad=True) for _ in range(3)]
        results = []
        for function in (compiled, call):
            out, lse = function(*inputs)
            finite = lse.masked_fill(lse == -torch.inf, 0.0)
            results.append((out, lse, *torch.autograd.grad((out.sum() + finite.sum()), inputs)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1, "a new length compiled again"


def test_compile_with_inductor_and_a_module() -> None:
    torch._dynamo.reset()
    module = dilated.MultiheadDilatedAttention(32, 4, [8, 32], [1, 4], is_causal=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for n in (11, 40):
        x = torch.randn(2, n, 32)
        torch.testing.assert_close(compiled(x)[0], module(x)[0])


def test_error_while_compiling_contains_the_cores_line() -> None:
    torch._dynamo.reset()
    x = torch.randn(1, 4, 2, 8)
    compiled = torch.compile(
        lambda x: dilated.dilated_attention(x, x, x, segments=[4], dilations=[0]), backend="eager"
    )
    with pytest.raises(Exception, match="1 <= dilation <= 2\\^40, got 0"):
        compiled(x)


def test_compile_with_a_length_that_depends_on_data() -> None:
    """The length is not known even as an example; rules are then checked by the call alone."""
    torch._dynamo.reset()

    def call(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        kept = x[keep]
        return dilated.dilated_attention(kept, kept, kept, **SHAPE, merge="sum", layout="shd")

    x, keep = torch.randn(30, 2, 8, requires_grad=True), torch.rand(30) > 0.4
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.equal(compiled(x, keep), call(x, keep))
        gradients = [torch.autograd.grad(f(x, ~keep).sum(), x)[0] for f in (compiled, call)]
    assert torch.equal(*gradients)


def test_export_with_dynamic_batch_and_length() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return dilated.dilated_attention(q, k, v, **SHAPE, merge="mean", is_causal=True)

    n, b = torch.export.Dim("n", min=2, max=1000), torch.export.Dim("b", min=1, max=64)
    example = tuple(torch.randn(2, 9, 4, 8) for _ in range(3))
    program = torch.export.export(Model(), example, dynamic_shapes=({0: b, 1: n},) * 3)
    inputs = [torch.randn(3, 40, 4, 8) for _ in range(3)]
    assert torch.equal(program.module()(*inputs), Model()(*inputs))


COMPILED_ANYHOW: dict[str, dict[str, Any]] = {
    **{preset: {"segments": [4, 9], "preset": preset} for preset in dilated.presets()},
    "row_shift": {"preset": "torchscale", "row_shift": True},
    "table": {"offsets": [[0] * 4, [0, 1, 2, -1]]},
    "table of numpy": {"offsets": np.array([[0] * 4, [0, 1, 2, -1]])},
    "table as a tensor": {"offsets": torch.tensor([[0] * 4, [0, 1, 2, -1]])},
    "numpy integers": {"segments": [np.int64(4), np.int32(6)], "dilations": np.array([1, 3])},
    "numpy scale": {"scale": np.float32(0.3)},
    "seqused as a list": {"seqused": [9, 4]},
    "seqused of numpy": {"seqused": np.array([9, 4])},
    "seed of numpy": {"dropout_p": 0.5, "dropout_seed": np.int64(7)},
    "shard of heads": {"head_offset": 4, "total_heads": 12},
    "mean": {"merge": "mean", "layout": "bhsd"},
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", COMPILED_ANYHOW)
def test_every_kind_of_option_compiles_whole(name: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()

    def call(x: torch.Tensor) -> torch.Tensor:
        return dilated.dilated_attention(x, x, x, **{**SHAPE, **COMPILED_ANYHOW[name]})

    shape = (2, 4, 9, 8) if name == "mean" else (2, 9, 4, 8)
    x = torch.randn(shape, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    a, b = (torch.autograd.grad(function(x).sum(), x)[0] for function in (compiled, call))
    assert torch.equal(a, b)
    assert torch.equal(compiled(x), call(x))


def test_windows_and_merge_compile_whole() -> None:
    torch._dynamo.reset()

    def call(x: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        whole = {**SHAPE, "seqlen": x.shape[1], "is_causal": True, "query_start": start}
        query = x[:, start : start + 3]
        parts = [
            dilated.window_attention(query, x[:, a:b], x[:, a:b], key_start=a, **whole)
            for a, b in ((0, 5), (5, x.shape[1]))
        ]
        return dilated.merge(parts)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for n in (12, 20, 31):
        for start in (2, 5, 7):
            x = torch.randn(2, n, 2, 8, requires_grad=True)
            results = []
            for function in (compiled, call):
                out, lse = function(x, start)
                results.append((out, lse, torch.autograd.grad(out.sum() + lse.sum(), x)[0]))
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
    assert counter.frame_count <= 2, "a new length or start compiled again"


SWEEPS: dict[str, tuple[list[Any], Callable[[Any], dict[str, Any]]]] = {
    "scale": ([0.1 + 0.01 * i for i in range(20)], lambda v: {"scale": v}),
    "seqused": ([[9 - i % 9, i % 9] for i in range(20)], lambda v: {"seqused": v}),
    "seed": (list(range(20)), lambda v: {"dropout_p": 0.5, "dropout_seed": v}),
    "segments": ([[4 + i, 8 + i] for i in range(20)], lambda v: {"segments": v}),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_values_that_change_do_not_compile_again(name: str) -> None:
    """A second graph, for values that vary; the limit of torch is 8."""
    torch._dynamo.reset()
    values, options = SWEEPS[name]

    def call(x: torch.Tensor, value: Any) -> torch.Tensor:
        return dilated.dilated_attention(x, x, x, **{**SHAPE, **options(value)})

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    x = torch.randn(2, 9, 4, 8)
    for value in values:
        assert torch.equal(compiled(x, value), call(x, value))
    assert counter.frame_count <= 2


def test_packed_lengths_that_change_do_not_compile_again() -> None:
    torch._dynamo.reset()

    def call(x: torch.Tensor, bounds: list[int]) -> torch.Tensor:
        return dilated.dilated_attention(x, x, x, **SHAPE, layout="shd", cu_seqlens=bounds)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    x = torch.randn(20, 2, 8)
    for i in range(1, 19):
        assert torch.equal(compiled(x, [0, i, 20]), call(x, [0, i, 20]))
    assert counter.frame_count <= 2


class Attend(torch.nn.Module):
    """One call, as exporters want it."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dilated.dilated_attention(x, x, x, **{**SHAPE, **self.options})


def _compiled_without_gradient(model: torch.nn.Module, x: torch.Tensor) -> Any:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
    return compiled


CAPTURES: dict[str, Callable[[torch.nn.Module, torch.Tensor], Any]] = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "make_fx": lambda model, x: make_fx(model)(x),
    "symbolic make_fx": lambda model, x: make_fx(model, tracing_mode="symbolic")(x),
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,)),
    "compile under no_grad": _compiled_without_gradient,
}

DIFFERENTIATED: dict[str, dict[str, Any]] = {
    "lse": {},
    "sum": {"merge": "sum"},
    "mean": {"merge": "mean"},
    "detached": {"lse_grad": False},
    **{preset: {"segments": [4, 9], "preset": preset} for preset in dilated.presets()},
    "row_shift": {"preset": "torchscale", "row_shift": True},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_a_graph_captured_without_gradient_has_one(name: str, capture: str) -> None:
    """Whether forward saves for backward is decided when a graph runs, not when it is captured."""
    model = Attend(DIFFERENTIATED[name])
    x = torch.randn(2, 9, 4, 8)
    captured = CAPTURES[capture](model, x)
    y = torch.randn(2, 9, 4, 8, requires_grad=True)
    assert torch.equal(captured(y), model(y))
    weights = torch.randn(2, 9, 4, 8)
    found, want = (torch.autograd.grad((f(y) * weights).sum(), y)[0] for f in (captured, model))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
