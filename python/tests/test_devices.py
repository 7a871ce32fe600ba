"""Devices: nothing follows torch's default one; CUDA tensors run where there are kernels and a
device, and are refused with the reason where there are not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dilated
from dilated import InvalidProblem, Unsupported, _ops
from dilated._options import attention_options

LISTS: dict[str, Any] = {"segments": [4, 8], "dilations": [1, 2]}
CUDA = next(b for b in dilated.backends() if b.name == "cuda")


@pytest.fixture(params=["context", "default"])
def meta_is_default(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process in which new tensors are on the device "meta" unless they say otherwise."""
    if request.param == "context":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


X = torch.randn(2, 9, 4, 8)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: dilated.dilated_attention(x, x, x, **LISTS),
    "sum": lambda x: dilated.dilated_attention(x, x, x, **LISTS, merge="sum"),
    "lists": lambda x: dilated.dilated_attention(x, x, x, **LISTS, seqused=[9, 4]),
    "packed": lambda x: dilated.dilated_attention(
        x[0], x[0], x[0], **LISTS, layout="shd", cu_seqlens=[0, 4, 9]
    ),
    "seed": lambda x: dilated.dilated_attention(x, x, x, **LISTS, dropout_p=0.5, dropout_seed=3),
    "drawn": lambda x: dilated.dilated_attention(x, x, x, **LISTS, dropout_p=0.5),
    "fkodom": lambda x: dilated.dilated_attention(x, x, x, **LISTS, preset="fkodom"),
    "row_shift": lambda x: dilated.dilated_attention(
        x, x, x, **LISTS, preset="torchscale", row_shift=True, seqused=[9, 4]
    ),
    "window": lambda x: dilated.window_attention(
        x, x[:, 2:], x[:, 2:], **LISTS, seqlen=9, key_start=[2, 2]
    )[0],
    "packed window": lambda x: dilated.window_attention(
        x[0], x[1], x[1], **LISTS, layout="shd", seqlen=[9, 4], query_rows=[5, 4], key_rows=[9, 0]
    )[0],
    "merge": lambda x: dilated.merge([(x, x.new_zeros(2, 4, 9))] * 2)[0],
    "module": lambda x: dilated.DilatedAttention(**LISTS, preset="fork")(x, x, x),
    "reference": lambda x: dilated.reference.dilated_attention(
        x, x, x, **LISTS, offsets=[[0] * 4] * 2, tail="phantom", seqused=[9, 4]
    )[0],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("meta_is_default")
def test_real_tensors_where_meta_is_the_default(name: str) -> None:
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    out = CALLS[name](x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.device.type == gradient.device.type == "cpu"
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", [n for n in CALLS if n != "reference"])
def test_meta_tensors(name: str) -> None:
    """Shapes without memory, forward and backward."""
    x = torch.empty(2, 9, 4, 8, device="meta", requires_grad=True)
    out = CALLS[name](x)
    assert out.is_meta
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@pytest.mark.usefixtures("meta_is_default")
def test_questions_where_meta_is_the_default() -> None:
    plan = dilated.plan(9, 4, **LISTS, cu_seqlens=[0, 4, 9])
    assert "cpu" in str(plan)
    assert "cpu" in plan.explain()
    assert dilated.plan(4, **LISTS).pattern().device.type == "cpu"
    assert dilated.backends()[-1].available
    assert dilated.MultiheadDilatedAttention(8, 2, **LISTS).q_proj.weight.is_meta


def test_cuda_says_why_it_is_not_available() -> None:
    reasons = ("this build contains no CUDA kernels", "no CUDA device")
    assert CUDA.available == (not CUDA.description.startswith(reasons))
    assert not CUDA.available or torch.cuda.is_available()


# Views of fake CUDA tensors need a PyTorch built for CUDA.
@pytest.mark.parametrize("name", ["plain", "sum", "lists", "seed", "drawn", "fkodom", "row_shift",
                                  "module"])  # fmt: skip
def test_cuda_tensors_run_or_are_refused_with_the_reason(name: str) -> None:
    """The operators are registered for CUDA; what they raise there is the core's."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 9, 4, 8, device="cuda")
        if CUDA.available:
            assert CALLS[name](x).shape == x.shape
            return
        with pytest.raises(Unsupported) as caught:
            CALLS[name](x)
    expected = "backend: expected a back end that can run this problem, got float32 on cuda"
    reasons = f"cuda: {CUDA.description}; cpu: tensors are not on the CPU"
    assert f"{expected} ({reasons}" in str(caught.value)


def test_a_forced_back_end_says_why_not() -> None:
    refusals = {"cpu": "tensors are not on the CPU"}
    if not CUDA.available:
        refusals["cuda"] = CUDA.description
        with pytest.raises(Unsupported, match="got float32 on cuda"):
            dilated.plan(9, 4, **LISTS, device="cuda")
    with FakeTensorMode():
        x = torch.empty(2, 9, 4, 8, device="cuda:1")
        for backend, reason in refusals.items():
            with pytest.raises(Unsupported, match=re.escape(f"got {backend} ({reason})")):
                dilated.dilated_attention(x, x, x, **LISTS, backend=backend)


def test_operators_are_registered_for_both_devices() -> None:
    for name in ("forward", "forward_saving", "backward", "merge", "merge_backward"):
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dilated::{name}", key), name


def test_other_devices_are_named() -> None:
    with FakeTensorMode():
        x, y = torch.empty(2, 9, 4, 8), torch.empty(2, 9, 4, 8, device="cuda")
        mask = torch.empty(2, 9, dtype=torch.bool, device="cuda")
        with pytest.raises(InvalidProblem, match="key: expected query's device cpu, got cuda:0"):
            dilated.dilated_attention(x, y, x, **LISTS)
        with pytest.raises(InvalidProblem, match="key_mask: expected query's device cpu, got cuda"):
            dilated.dilated_attention(x, x, x, **LISTS, key_mask=mask)


def test_lengths_and_seeds_go_where_the_call_runs() -> None:
    """On CUDA they are read by kernels; what the host reads stays on the host."""
    from dilated._inputs import optional_tensors

    options = attention_options(**LISTS, dropout_p=0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(2, 9, 4, 8, device="cuda")
        optional, _ = optional_tensors(query, options, None, [4, 9], [0, 9], None, 7)
        drawn, _ = optional_tensors(query, options, None, torch.tensor([4, 9]), None, None, None)
    assert isinstance(optional, _ops.OptionalTensors)
    assert optional.seqused.device.type == optional.dropout_seed.device.type == "cuda"
    assert drawn.seqused.device.type == drawn.dropout_seed.device.type == "cuda"
    assert optional.cu_seqlens.device.type == "cpu"
