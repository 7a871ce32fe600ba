"""torch.func, forward-mode AD, and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vjp, vmap

import dilated
from dilated import Unsupported

LISTS: dict[str, Any] = {"segments": [4, 6], "dilations": [1, 3]}
CALLS: dict[str, dict[str, Any]] = {
    "lse": {},
    "causal bhsd": {"is_causal": True, "layout": "bhsd"},
    "sum": {"merge": "sum"},
    "detached": {"lse_grad": False},
    "fkodom": {"preset": "fkodom"},
    "row_shift": {"preset": "torchscale", "row_shift": True},
}


def _call(name: str) -> Any:
    def call(x: Tensor) -> Tensor:
        return dilated.dilated_attention(x, 2 * x, x - 1, **LISTS, **CALLS[name]).square()

    return call


@pytest.mark.parametrize("name", CALLS)
def test_reverse_mode_transforms(name: str) -> None:
    """grad, vjp, vmap, vmap of grad, jacrev: what loops over torch.autograd.grad give."""
    call = _call(name)
    x = torch.randn(3, 2, 7, 3, 4, dtype=torch.float64)
    want = []
    for sample in x:
        leaf = sample.clone().requires_grad_()
        want.append(torch.autograd.grad(call(leaf).sum(), leaf)[0])
    torch.testing.assert_close(grad(lambda y: call(y).sum())(x[0]), want[0])
    torch.testing.assert_close(vjp(call, x[1])[1](torch.ones_like(x[1]))[0], want[1])
    torch.testing.assert_close(vmap(call)(x), torch.stack([call(sample) for sample in x]))
    torch.testing.assert_close(vmap(grad(lambda y: call(y).sum()))(x), torch.stack(want))
    rows = jacrev(call)(x[2, :1])
    torch.testing.assert_close(rows.sum(dim=(0, 1, 2, 3)), grad(lambda y: call(y).sum())(x[2, :1]))


def test_vmap_over_other_dimensions_and_masks() -> None:
    x, mask = torch.randn(2, 9, 4, 5, 8), torch.rand(2, 9) > 0.3
    used = torch.tensor([[9, 4], [7, 8], [1, 0], [9, 9], [2, 5]])

    def call(y: Tensor, length: Tensor) -> Tensor:
        return dilated.dilated_attention(y, y, y, **LISTS, key_mask=mask, seqused=length)

    found = vmap(call, in_dims=(3, 0), out_dims=1)(x, used)
    for i in range(5):
        assert torch.equal(found[:, i], call(x[..., i, :], used[i]))


def test_vmap_of_windows_and_merge() -> None:
    x = torch.randn(3, 2, 9, 4, 8)

    def call(y: Tensor) -> Tensor:
        halves = [
            dilated.window_attention(y, y[:, a:b], y[:, a:b], **LISTS, seqlen=9, key_start=a)
            for a, b in ((0, 4), (4, 9))
        ]
        return dilated.merge(halves)[0]

    assert torch.equal(vmap(call)(x), torch.stack([call(y) for y in x]))
    slopes = vmap(grad(lambda y: call(y).square().sum()))(x)
    want = [grad(lambda y: call(y).square().sum())(y) for y in x]
    torch.testing.assert_close(slopes, torch.stack(want))


def test_vmap_of_packed_parts() -> None:
    outs, lses = torch.randn(2, 5, 6, 3, 4), torch.randn(2, 3, 5, 6)

    def call(out: Tensor, lse: Tensor) -> Tensor:
        parts = list(zip(out.unbind(), lse.unbind(), strict=True))
        return dilated.merge(parts, layout="shd")[0]

    found = vmap(call, in_dims=(1, 2))(outs, lses)
    want = [call(outs[:, i], lses[:, :, i]) for i in range(5)]
    assert torch.equal(found, torch.stack(want))
    slopes = vmap(grad(lambda o, s: call(o, s).sum(), 1), in_dims=(1, 2))(outs, lses)
    wanted = [grad(lambda o, s: call(o, s).sum(), 1)(outs[:, i], lses[:, :, i]) for i in range(5)]
    torch.testing.assert_close(slopes, torch.stack(wanted))


def test_vmap_refuses_what_it_would_change() -> None:
    x = torch.randn(3, 2, 9, 4, 8)
    dropped = {**LISTS, "dropout_p": 0.5, "dropout_seed": 3}
    with pytest.raises(Unsupported, match="dropout_p: expected 0 under vmap"):
        vmap(lambda y: dilated.dilated_attention(y, y, y, **dropped))(x)
    with pytest.raises(Unsupported, match="layout: expected 'bshd' or 'bhsd' under vmap"):
        vmap(lambda y: dilated.dilated_attention(y, y, y, **LISTS, layout="shd"))(x[:, 0])


ONES = torch.ones(2, 9, 4, 8)
FORWARD_MODE: dict[str, Any] = {
    "attention": lambda x: dilated.dilated_attention(x, x, x, **LISTS),
    "value only": lambda x: dilated.dilated_attention(ONES, ONES, x, **LISTS),
    "window": lambda x: dilated.window_attention(x, x, x, **LISTS, seqlen=9)[0],
    "merge": lambda x: dilated.merge([(x, x.new_zeros(2, 4, 9))])[0],
    "fkodom": lambda x: dilated.dilated_attention(x, x, x, **LISTS, preset="fkodom"),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused_not_zero(name: str, requires_grad: bool) -> None:
    call = FORWARD_MODE[name]
    x = torch.randn(2, 9, 4, 8)
    text = "tangents: expected reverse-mode gradients only, got a forward-mode tangent"
    with pytest.raises(Unsupported, match=text):
        jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        leaf = x.clone().requires_grad_(requires_grad)
        dual = forward_ad.make_dual(leaf, torch.ones_like(x))
        with pytest.raises(Unsupported, match=text):
            call(dual)


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(1, 9, 2, 4, requires_grad=True)
    out = dilated.dilated_attention(x, x, x, **LISTS)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(Unsupported, match="create_graph: expected first derivatives only"):
        first.sum().backward()
    parts = [(x, torch.zeros(1, 2, 9, requires_grad=True))] * 2
    (first,) = torch.autograd.grad(dilated.merge(parts)[0].square().sum(), x, create_graph=True)
    with pytest.raises(Unsupported, match="create_graph: expected first derivatives only"):
        first.sum().backward()


def _autocast(dtype: torch.dtype, *inputs: Tensor, **options: Any) -> Tensor:
    with torch.autocast("cpu", dtype=dtype):
        return dilated.dilated_attention(*inputs, **LISTS, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_brings_inputs_together(dtype: torch.dtype) -> None:
    """float32, bfloat16 and float16 mixed: all take autocast's dtype, gradients their own."""
    inputs = [
        torch.randn(2, 9, 4, 8, dtype=d, requires_grad=True)
        for d in (torch.float32, torch.bfloat16, torch.float16)
    ]
    out = _autocast(dtype, *inputs)
    assert out.dtype == dtype
    same = [x.detach().to(dtype) for x in inputs]
    assert torch.equal(out, dilated.dilated_attention(*same, **LISTS))
    out.float().sum().backward()
    assert [x.grad.dtype for x in inputs] == [x.dtype for x in inputs]


REFUSED_IN_LOW_PRECISION: list[tuple[str, dict[str, Any], int, torch.dtype]] = [
    ("float64", {}, 8, torch.float64),
    ("reference", {"backend": "reference"}, 8, torch.float32),
    ("wide heads", {}, 264, torch.float32),
]


@pytest.mark.parametrize(("name", "options", "head_dim", "dtype"), REFUSED_IN_LOW_PRECISION)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_refuses_nothing_that_worked(
    name: str, options: dict[str, Any], head_dim: int, dtype: torch.dtype, low: torch.dtype
) -> None:
    x = torch.randn(1, 9, 2, head_dim, dtype=dtype)
    out = _autocast(low, x, x, x, **options)
    assert torch.equal(out, dilated.dilated_attention(x, x, x, **LISTS, **options))


@pytest.mark.parametrize("name", ["fkodom", "row_shift"])
def test_autocast_of_compositions(name: str) -> None:
    """Merged in float32, rounded once to autocast's dtype."""
    x = torch.rand(2, 9, 4, 8) + 0.5
    out = _autocast(torch.bfloat16, x, x, x, **CALLS[name])
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, dilated.dilated_attention(x, x, x, **LISTS, **CALLS[name]).bfloat16())


@pytest.mark.parametrize("name", ["fkodom", "row_shift"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compositions_round_once(dtype: torch.dtype, name: str) -> None:
    """Output and gradients of low precision are those of float32, rounded."""
    results = []
    for wide in (False, True):
        leaf = (torch.arange(2 * 9 * 4 * 8).view(2, 9, 4, 8) * 0.37).sin().to(dtype) + 1.5
        x = (leaf.float() if wide else leaf).requires_grad_()
        out = dilated.dilated_attention(x, x.detach(), x.detach(), **LISTS, **CALLS[name])
        (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
        results.append((out.to(dtype), gradient.to(dtype)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_autocast_compiles_whole() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 9, 4, 8, requires_grad=True)
    compiled = torch.compile(
        lambda y: _autocast(torch.bfloat16, y, y, y), fullgraph=True, backend="aot_eager"
    )
    out = compiled(x)
    assert torch.equal(out, _autocast(torch.bfloat16, x, x, x))
    out.float().sum().backward()
    assert x.grad is not None
