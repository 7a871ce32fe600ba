"""The operators as PyTorch sees them: opcheck, compile, export, fake tensors, autocast, memory
formats.

Rows 11 (dtype and device of the output), 17 (strided = contiguous, written once), 18 (validate
once).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Case, run
from torch._subclasses.fake_tensor import FakeTensorMode

import dilated
from dilated import _ops
from dilated._options import DTYPES, attention_options

SHAPE: dict[str, Any] = {"segments": [4, 6], "dilations": [1, 3]}


def _arguments(
    dtype: torch.dtype = torch.float32,
    optional: _ops.OptionalTensors | None = None,
    requires_grad: bool = True,
    shape: tuple[int, ...] | None = None,
    layout: str = "bshd",
    **options: Any,
) -> tuple[Any, ...]:
    shapes = {"bshd": (2, 9, 4, 5), "bhsd": (2, 4, 9, 5), "shd": (9, 4, 5)}
    size = shape or shapes[layout]
    tensors = [torch.randn(size, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]
    chosen = attention_options(**SHAPE, layout=layout, **options)
    return (*tensors, *(optional or _ops.OptionalTensors()), *chosen)


WINDOW = _ops.OptionalTensors(windows=torch.tensor([[20, 3, 12, 1, 10], [20, 0, 9, 2, 11]]))
OPERATOR_CALLS = {
    "plain": lambda: _arguments(),
    "causal float64": lambda: _arguments(torch.float64, is_causal=True),
    "bfloat16": lambda: _arguments(torch.bfloat16, requires_grad=False),
    "sum": lambda: _arguments(torch.float64, merge="sum"),
    "mean bhsd": lambda: _arguments(layout="bhsd", merge="mean"),
    "detached": lambda: _arguments(lse_grad=False, tail="phantom"),
    "key mask": lambda: _arguments(optional=_ops.OptionalTensors(key_mask=torch.rand(2, 9) > 0.3)),
    "seqused": lambda: _arguments(optional=_ops.OptionalTensors(seqused=torch.tensor([4, 9]))),
    "packed": lambda: _arguments(
        layout="shd",
        optional=_ops.OptionalTensors(cu_seqlens=torch.tensor([0, 3, 3, 9])),
        merge="mean",
    ),
    "dropout": lambda: _arguments(
        optional=_ops.OptionalTensors(dropout_seed=torch.tensor([3, 4])), dropout_p=0.5
    ),
    "groups": lambda: _arguments(preset="fork"),
    "no token": lambda: _arguments(shape=(2, 0, 4, 5)),
    "windows": lambda: _arguments(optional=WINDOW, is_causal=True),
}


@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_opcheck_forward(name: str) -> None:
    """All default checks: schema, autograd registration, fake tensors, AOT dispatch."""
    results = torch.library.opcheck(_ops.forward_op, OPERATOR_CALLS[name]())
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["plain", "sum", "packed", "bfloat16", "windows"])
def test_opcheck_backward(name: str) -> None:
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in OPERATOR_CALLS[name]()]
    assert set(torch.library.opcheck(_ops.forward_saving_op, arguments).values()) == {"SUCCESS"}
    saved = _ops.forward_saving_op(*arguments)
    gradients = (torch.randn_like(saved[0]), torch.randn_like(saved[1]))
    call = (*gradients, *arguments[:3], *saved, *arguments[3:])
    results = torch.library.opcheck(_ops.backward_op, call)
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_merge() -> None:
    """Parts of float32, merged in bfloat16."""
    outs = [torch.randn(2, 5, 3, 4, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(2, 3, 5, requires_grad=True) for _ in range(3)]
    call = (outs, lses, 0, DTYPES.index(torch.bfloat16))
    assert set(torch.library.opcheck(_ops.merge_op, call).values()) == {"SUCCESS"}
    parts = ([x.detach() for x in outs], [x.detach() for x in lses])
    dout, dlse = torch.randn(2, 5, 3, 4).bfloat16(), torch.randn(2, 3, 5)
    results = torch.library.opcheck(_ops.merge_backward_op, (dout, dlse, *parts, 0))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_fake_and_meta_tensors_have_the_true_shapes_and_strides(layout: str) -> None:
    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dilated.dilated_attention(x, x, x, **SHAPE, layout=layout, return_lse=True)

    real = call(torch.randn(2, 8, 4, 6, dtype=torch.float16).transpose(0, 1))
    with FakeTensorMode():
        fake = call(torch.empty(2, 8, 4, 6, dtype=torch.float16).transpose(0, 1))
    meta = call(torch.empty(2, 8, 4, 6, dtype=torch.float16, device="meta").transpose(0, 1))
    for other in (fake, meta):
        for a, b in zip(other, real, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_chooses_the_dtype_and_gradients_keep_theirs(dtype: torch.dtype) -> None:
    """R11: as for matrix products; float64 stays; outside of autocast nothing is cast."""
    inputs = [torch.randn(1, 12, 2, 8, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", dtype=dtype):
        out, lse = dilated.dilated_attention(*inputs, **SHAPE, return_lse=True)
        doubles = [x.detach().double() for x in inputs]
        assert dilated.dilated_attention(*doubles, **SHAPE).dtype == torch.float64
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    cast = [x.detach().to(dtype) for x in inputs]
    assert torch.equal(out, dilated.dilated_attention(*cast, **SHAPE))
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)
    assert dilated.dilated_attention(*inputs, **SHAPE).dtype == torch.float32


def _noncontiguous(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides."""
    if how == "bhsd memory":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "slice of a projection":
        wide = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        wide[..., 5 : 5 + x.shape[-1]] = x
        return wide[..., 5 : 5 + x.shape[-1]]
    if how == "every second token":
        wide = torch.full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), torch.nan, dtype=x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    return x.flip(0).contiguous().flip(0)


@pytest.mark.parametrize(
    "how", ["bhsd memory", "slice of a projection", "every second token", "reordered batch"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_strided_inputs_give_the_bits_of_contiguous_ones(dtype: torch.dtype, how: str) -> None:
    """R17: no layout is copied, none changes a bit, forward and backward."""
    data = Case(37, 3, 4, 2, 24).tensors(dtype)
    results = []
    for strided in (False, True):
        inputs = [data[name] for name in ("query", "key", "value")]
        if strided:
            inputs = [_noncontiguous(x, how) for x in inputs]
        inputs = [x.requires_grad_() for x in inputs]
        out = dilated.dilated_attention(*inputs, segments=[8, 16], dilations=[1, 4])
        results.append((out, *torch.autograd.grad(out, inputs, data["dout"])))
        assert out.is_contiguous()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("merge", ["lse", "sum"])
def test_bhsd_gives_the_bits_of_bshd(backend: str, merge: str) -> None:
    case = Case(21, 2, 4, 2, 16, [8, 16], [1, 4])
    data = case.tensors(torch.float32)
    results = []
    for layout in ("bshd", "bhsd"):
        order = (0, 1, 2, 3) if layout == "bshd" else (0, 2, 1, 3)
        names = ("query", "key", "value", "dout")
        *inputs, dout = (data[name].permute(order).contiguous() for name in names)
        inputs = [x.requires_grad_() for x in inputs]
        call = {"segments": [8, 16], "dilations": [1, 4], "merge": merge, "layout": layout}
        out, lse = dilated.dilated_attention(*inputs, **call, return_lse=True, backend=backend)
        assert out.shape == inputs[0].shape
        assert out.is_contiguous()
        gradients = torch.autograd.grad((out, lse), inputs, (dout, data["dlse"].float()))
        results.append([lse] + [x.permute(order) for x in (out, *gradients)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_expanded_inputs_are_read_in_place(backend: str) -> None:
    """Stride 0 over batch and heads: the bits of the materialised copy."""
    one = torch.randn(1, 15, 1, 8)
    expanded = one.expand(3, 15, 4, 8)
    call = {"segments": [4, 8], "dilations": [1, 2], "backend": backend}
    a = dilated.dilated_attention(expanded, expanded, expanded, **call)
    copied = expanded.contiguous()
    assert torch.equal(a, dilated.dilated_attention(copied, copied, copied, **call))


def test_inputs_are_not_changed() -> None:
    inputs = [torch.randn(2, 9, 4, 5) for _ in range(3)]
    copies = [x.clone() for x in inputs]
    dilated.dilated_attention(*inputs, **SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_uncovered_rows_are_written(backend: str, poisoned_memory: object) -> None:
    """T8, row 17: memory is full of NaN before; O = 0 and L = -inf where nothing covers."""
    case = Case(12, 1, 2, 2, 4, [6, 12], [3, 4])
    result = run(case, torch.float32, backend=backend)
    uncovered = result["lse"] == -torch.inf
    assert uncovered.any()
    assert not uncovered.all()
    assert not result["out"].transpose(1, 2)[uncovered].any()
    assert all(not tensor.isnan().any() for tensor in result.values())
