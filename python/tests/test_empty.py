"""R8: batch, length, heads or key sets of 0 are legal: right shapes, zeros, L = -inf."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dilated

SHAPES = {
    "no batch": (0, 5, 2, 4),
    "no token": (2, 0, 2, 4),
    "no head": (2, 5, 0, 4),
    "nothing at all": (0, 0, 0, 4),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "tail": "phantom"},
        {"merge": "mean"},
        {"lse_grad": False},
        {"dropout_p": 0.5},
        {"preset": "torchscale"},
        {"preset": "torchscale", "row_shift": True},
        {"preset": "fkodom"},
        {"masked": True},
        {"layout": "bhsd"},
    ],
    ids=str,
)
def test_empty_tensors(backend: str, name: str, options: dict[str, Any]) -> None:
    shape = SHAPES[name]
    options = dict(options)
    if options.get("layout") == "bhsd":
        shape = (shape[0], shape[2], shape[1], shape[3])
    if options.pop("masked", False):
        options["key_mask"] = torch.zeros(shape[:2], dtype=torch.bool)
    inputs = [torch.zeros(shape, requires_grad=True) for _ in range(3)]
    call = {"segments": [2, 4], "dilations": [1, 2], "backend": backend, **options}
    out, lse = dilated.dilated_attention(*inputs, **call, return_lse=True)
    batch, seqlen, heads, _ = SHAPES[name]
    assert out.shape == shape
    assert lse.shape == (batch, heads, seqlen)
    gradients = torch.autograd.grad(out.sum() + lse.sum(), inputs)
    assert all(g.shape == shape for g in gradients)


def test_key_value_without_query_heads(backend: str) -> None:
    """Gradients of keys that nobody reads are written zeros."""
    query = torch.zeros(2, 5, 0, 4, requires_grad=True)
    key = torch.randn(2, 5, 2, 4, requires_grad=True)
    out = dilated.dilated_attention(query, key, key, segments=[2], dilations=[1], backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), key)
    assert not gradient.any()


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0, 0]])
def test_packed_without_tokens(backend: str, bounds: list[int]) -> None:
    inputs = [torch.zeros(0, 2, 4, requires_grad=True) for _ in range(3)]
    call = {"segments": [2], "dilations": [1], "layout": "shd", "backend": backend, "merge": "mean"}
    out, lse = dilated.dilated_attention(*inputs, cu_seqlens=bounds, **call, return_lse=True)
    assert out.shape == (0, 2, 4)
    assert lse.shape == (2, 0)
    assert torch.autograd.grad(out.sum(), inputs[0])[0].shape == (0, 2, 4)


def test_packed_with_empty_sequences_between(backend: str) -> None:
    x = torch.randn(6, 2, 4)
    call = {"segments": [4], "dilations": [2], "layout": "shd", "backend": backend}
    a = dilated.dilated_attention(x, x, x, cu_seqlens=[0, 0, 4, 4, 4, 6, 6], **call)
    b = dilated.dilated_attention(x, x, x, cu_seqlens=[0, 4, 6], **call)
    assert torch.equal(a, b)


def test_no_key_at_all(backend: str) -> None:
    """T2: every key masked gives zeros, L = -inf and zero gradients, for every merge."""
    for merge in ("lse", "sum", "mean"):
        inputs = [torch.randn(2, 9, 2, 4, requires_grad=True) for _ in range(3)]
        call = {"segments": [4, 9], "dilations": [1, 2], "merge": merge, "backend": backend}
        out, lse = dilated.dilated_attention(
            *inputs, key_mask=torch.zeros(2, 9, dtype=torch.bool), **call, return_lse=True
        )
        assert not out.any()
        assert bool((lse == -torch.inf).all())
        weights = (torch.randn_like(out), torch.randn_like(lse))
        assert not any(g.any() for g in torch.autograd.grad((out, lse), inputs, weights))


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_modules(shape: tuple[int, ...]) -> None:
    module = dilated.MultiheadDilatedAttention(16, 4, [2, 4], [1, 2], dropout=0.1)
    x = torch.zeros(shape, requires_grad=True)
    out, _ = module(x)
    out.sum().backward()
    assert out.shape == shape
    assert x.grad is not None
    assert x.grad.shape == shape
