"""Gradients: finite differences (M17), detached weights (M15), which inputs get one, no second
    derivative.

Rows X6 (no gradient from the future), 22 (gradcheck in float64).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Case, definition, error, run

import dilated

SHAPE: dict[str, Any] = {"segments": [4, 7], "dilations": [1, 2]}


def _inputs(n: int = 9, heads: int = 2, kv_heads: int = 2, head_dim: int = 3) -> list[torch.Tensor]:
    data = Case(n, 1, heads, kv_heads, head_dim).tensors(torch.float64)
    return [data[name].requires_grad_() for name in ("query", "key", "value")]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"merge": "sum"},
        {"merge": "mean", "out_scale": 0.5},
        {"tail": "phantom"},
        {"groups": "cumulative", "merge": "sum"},
        {"dropout_p": 0.4, "dropout_seed": 7},
        {"dropout_p": 0.4, "dropout_seed": 7, "merge": "mean"},
        {"scale": -0.7},
    ],
    ids=str,
)
def test_gradcheck_of_out_and_lse(options: dict[str, Any]) -> None:
    """M17: dO and dL together; every row has a key here, so every L is finite."""

    def function(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return dilated.dilated_attention(*inputs, **SHAPE, **options, return_lse=True)

    covered = function(*_inputs())[1].isfinite()

    def finite(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, lse = function(*inputs)
        return out, lse[covered]

    assert torch.autograd.gradcheck(finite, _inputs())


def test_gradcheck_with_key_mask_and_grouped_queries() -> None:
    mask = torch.tensor([[True, False, True, True, False, True, True, False, True]])

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return dilated.dilated_attention(*inputs, **SHAPE, key_mask=mask)

    assert torch.autograd.gradcheck(function, _inputs(heads=4, kv_heads=2))


def test_gradcheck_packed() -> None:
    inputs = [x.detach()[0].requires_grad_() for x in _inputs(n=10)]

    def function(*packed: torch.Tensor) -> torch.Tensor:
        return dilated.dilated_attention(*packed, **SHAPE, layout="shd", cu_seqlens=[0, 3, 3, 10])

    assert torch.autograd.gradcheck(function, inputs)


def test_detached_weights_change_dq_but_not_dv() -> None:
    """M15: against the definition with detached weights, dL honoured in both."""
    exact, detached = Case(), Case(options={"lse_grad": False})
    a, b = run(exact, torch.float64), run(detached, torch.float64)
    for name, got in b.items():
        assert error(got, definition(detached, torch.float64, torch.float64)[name]) < 1e-12
    assert error(a["dvalue"], b["dvalue"]) < 1e-12
    assert error(a["dquery"], b["dquery"]) > 1e-3


def test_gradient_of_lse_alone_and_of_out_alone() -> None:
    inputs = _inputs()
    out, lse = dilated.dilated_attention(*inputs, **SHAPE, return_lse=True)
    assert lse.requires_grad
    weight = torch.randn_like(lse)
    from_lse = torch.autograd.grad(lse, inputs, weight, retain_graph=True)
    assert float(from_lse[0].abs().max()) > 0
    assert float(from_lse[2].abs().max()) == 0  # L does not depend on the values
    weight_out = torch.randn_like(out)
    from_out = torch.autograd.grad(out, inputs, weight_out, retain_graph=True)
    both = torch.autograd.grad((out, lse), inputs, (weight_out, weight))
    for a, b, c in zip(from_lse, from_out, both, strict=True):
        torch.testing.assert_close(a + b, c)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_only_inputs_that_ask_get_a_gradient(which: int) -> None:
    inputs = [x.detach() for x in _inputs()]
    inputs[which].requires_grad_()
    dilated.dilated_attention(*inputs, **SHAPE, merge="sum").sum().backward()
    full = _inputs()
    dilated.dilated_attention(*full, **SHAPE, merge="sum").sum().backward()
    for i, (x, y) in enumerate(zip(inputs, full, strict=True)):
        assert (x.grad is None) == (i != which)
        if i == which:
            torch.testing.assert_close(x.grad, y.grad)


def test_expanded_gradient_and_shared_input() -> None:
    """out.sum() sends an expanded gradient; one tensor in three roles collects all three."""
    x = _inputs()[0]
    dilated.dilated_attention(x, x, x, **SHAPE).sum().backward()
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    out = dilated.dilated_attention(*parts, **SHAPE)
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad, sum(p.grad for p in parts))


def test_no_graph_without_grad_mode() -> None:
    inputs = _inputs()
    with torch.no_grad():
        assert not dilated.dilated_attention(*inputs, **SHAPE).requires_grad
    with torch.inference_mode():
        assert dilated.dilated_attention(*inputs, **SHAPE).is_inference()


def test_second_derivative_is_refused() -> None:
    inputs = _inputs()
    out = dilated.dilated_attention(*inputs, **SHAPE)
    (gradient,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(dilated.Unsupported) as caught:
        gradient.sum().backward()
    assert str(caught.value) == (
        "dilated_attention: create_graph: expected first derivatives only, got a second one (the "
        "gradient of dilated_attention is not differentiable; dilated.reference is)"
    )


@pytest.mark.parametrize("preset", ["longnet", "torchscale", "head_groups", "fork"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_gradient_reaches_the_future(preset: str, dtype: torch.dtype) -> None:
    """Row X6, M6: dO[p]/dx[j] is 0 for j > p; outputs before a changed token keep their bits."""
    data = Case(20, 1, 4, 2, 6).tensors(dtype)
    inputs = [data[name].requires_grad_() for name in ("query", "key", "value")]
    call = {"segments": [4, 8, 16], "dilations": [1, 2, 4], "preset": preset, "is_causal": True}
    out = dilated.dilated_attention(*inputs, **call)
    for p in range(20):
        gradients = torch.autograd.grad(out[:, p].sum(), inputs, retain_graph=True)
        for gradient in gradients:
            assert not gradient[:, p + 1 :].any()
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[:, 11] += 3.0
    after = dilated.dilated_attention(*changed, **call)
    assert torch.equal(after[:, :11], out[:, :11])
    assert not torch.equal(after[:, 11:], out[:, 11:])


def test_same_bits_every_time_and_for_any_number_of_threads(backend: str) -> None:
    """M13, forward and backward."""
    case = Case(97, 2, 4, 2, 16, [16, 64], [1, 4], {"merge": "mean"}, masked=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(case, torch.float32, backend=backend))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, tensor in result.items():
            assert torch.equal(tensor, results[0][name]), name
