"""Dropout: one site, on probabilities, from (seed, offset) alone. R5, X5, T13, M16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Case, assert_close, definition, run
from torch import Tensor

import dilated

SHAPE: dict[str, Any] = {"segments": [6, 24], "dilations": [1, 2]}
N, HEADS = 24, 2


def _kept(backend: str, seed: Tensor, p: float, dtype: torch.dtype, batch: int) -> Tensor:
    """The mask as the operator applies it: (branches, batch, heads, n, n), read through V =
    identity.
    """
    query, key = torch.zeros(2, batch, N, HEADS, N, dtype=dtype).unbind(0)
    value = torch.eye(N, dtype=dtype)[None, :, None, :].expand(batch, N, HEADS, N)
    table = dilated.plan(1, HEADS, **SHAPE).offsets
    masks = []
    for branch in range(2):
        only = [row if b == branch else [-1] * HEADS for b, row in enumerate(table)]
        call = {**SHAPE, "offsets": only, "dropout_p": p, "dropout_seed": seed, "backend": backend}
        masks.append(dilated.dilated_attention(query, key, value, **call).transpose(1, 2) != 0)
    return torch.stack(masks)


@pytest.mark.parametrize("options", [{}, {"merge": "mean"}, {"lse_grad": False}], ids=str)
def test_mask_read_back_reproduces_outputs_and_gradients(
    backend: str, options: dict[str, Any]
) -> None:
    """M16: the definition with the mask read back, forward and backward; L is unaffected."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    seed = torch.tensor([11, 22])
    case = Case(N, 2, HEADS, HEADS, 8, *SHAPE.values(), options)
    masks = _kept(backend, seed, 0.4, dtype, 2)
    exact = definition(case, dtype, torch.float64, dropout_masks=masks, dropout_p=0.4)
    got = run(case, dtype, dropout_p=0.4, dropout_seed=seed, backend=backend)
    assert_close(got, exact, 1e-12 if backend == "reference" else 2e-6)
    without = definition(case, dtype, torch.float64)
    torch.testing.assert_close(got["lse"].double(), without["lse"], rtol=1e-5, atol=1e-5)


def test_back_ends_and_dtypes_draw_the_same_mask() -> None:
    seed = torch.tensor([5, 6])
    a = _kept("reference", seed, 0.5, torch.float64, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(a, _kept("cpu", seed, 0.5, dtype, 1))


def test_share_of_kept_weights_and_independence() -> None:
    """Kept fraction within 4 sigma; batch, head, branch, seed and offset draw differently."""
    masks = _kept("cpu", torch.tensor([1, 2]), 0.3, torch.float32, 4)
    seen = dilated.reference.branch_mask(N, 24, 2, 0)[1]
    kept = masks[1, :, 0][:, seen].float()
    sigma = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - 0.7) < 4 * sigma
    assert not torch.equal(masks[1, 0, 0], masks[1, 1, 0])
    assert not torch.equal(masks[0, 0, 0], masks[0, 0, 1])
    dense = dilated.reference.branch_mask(N, 6, 1, 0)[1] & seen  # keys that both branches hold
    assert not torch.equal(masks[0, 0, 0][dense], masks[1, 0, 0][dense])
    for seed in ([1, 3], [2, 2]):
        other = _kept("cpu", torch.tensor(seed), 0.3, torch.float32, 4)
        assert not torch.equal(masks, other)


def test_mean_over_seeds_is_the_result_without_dropout(backend: str) -> None:
    data = Case(N, 1, HEADS, HEADS, 8).tensors(torch.float32)
    inputs = [data[name] for name in ("query", "key", "value")]
    draws = 512 if backend == "cpu" else 64
    outs = torch.stack(
        [
            dilated.dilated_attention(
                *inputs, **SHAPE, dropout_p=0.3, dropout_seed=s, backend=backend
            )
            for s in range(draws)
        ]
    )
    plain = dilated.dilated_attention(*inputs, **SHAPE, backend=backend)
    deviation = (outs.mean(dim=0) - plain) / (outs.std(dim=0) / draws**0.5)
    assert float(deviation.square().mean()) < 1.5  # 1 on average over 384 outputs
    assert float(deviation.abs().max()) < 6.0


def test_p_zero_p_one_and_no_row_lost() -> None:
    """R5: p = 0 is exact, p = 1 gives 0 with finite gradients; no row of >= 64 keys is dropped
    whole.
    """
    data = Case(128, 1, 1, 1, 8).tensors(torch.float32)
    inputs = [data[name].requires_grad_() for name in ("query", "key", "value")]
    dense: dict[str, Any] = {"segments": [128], "dilations": [1]}
    plain = dilated.dilated_attention(*inputs, **dense)
    assert torch.equal(
        plain, dilated.dilated_attention(*inputs, **dense, dropout_p=0.0, dropout_seed=1)
    )
    nothing, lse = dilated.dilated_attention(*inputs, **dense, dropout_p=1.0, return_lse=True)
    assert not nothing.any()
    assert bool(lse.isfinite().all())
    gradients = torch.autograd.grad(nothing.sum(), inputs)
    assert not any(g.any() for g in gradients)
    ones = torch.ones_like(inputs[2])
    out = dilated.dilated_attention(*inputs[:2], ones, **dense, dropout_p=0.5, dropout_seed=3)
    assert bool((out > 0).all())


def test_seed_forms() -> None:
    """An int, a tensor, and none: drawn from torch's generator, so manual_seed repeats it."""
    data = Case(N, 1, HEADS, HEADS, 8).tensors(torch.float32)
    inputs = [data[name] for name in ("query", "key", "value")]

    def call(seed: Any) -> Tensor:
        return dilated.dilated_attention(*inputs, **SHAPE, dropout_p=0.5, dropout_seed=seed)

    assert torch.equal(call(7), call(torch.tensor([7, 0])))
    assert torch.equal(call(7), call(torch.tensor([7, 0], dtype=torch.int32)))
    torch.manual_seed(3)
    first, second = call(None), call(None)
    torch.manual_seed(3)
    assert torch.equal(first, call(None))
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    dilated.dilated_attention(*inputs, **SHAPE)
    call(7)
    assert torch.equal(state, torch.get_rng_state()), "the generator moved without need"


def test_modules_drop_in_training_only() -> None:
    """T13: eval equals p = 0 in every grad mode."""
    x = torch.randn(1, N, HEADS, 8)
    module = dilated.DilatedAttention(**SHAPE, dropout_p=0.5)
    plain = dilated.dilated_attention(x, x, x, **SHAPE)
    assert not torch.equal(module(x, x, x), plain)
    module.eval()
    assert torch.equal(module(x, x, x), plain)
    with torch.no_grad():
        assert torch.equal(module(x, x, x), plain)
        module.train()
        assert not torch.equal(module(x, x, x), plain)
