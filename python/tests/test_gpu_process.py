"""How calls on CUDA tensors behave beside what else runs: host, graphs, autocast, other devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dilated

pytestmark = pytest.mark.gpu

CALL: dict[str, Any] = {"segments": [64, 300], "dilations": [1, 3], "is_causal": True}
DTYPES = [torch.float32, torch.bfloat16]


def _inputs(dtype: torch.dtype, device: str = "cuda") -> list[Tensor]:
    return [torch.randn(2, 333, 4, 64, device=device, dtype=dtype).requires_grad_()
            for _ in range(3)]  # fmt: skip


def _step(inputs: list[Tensor], dout: Tensor, **more: Any) -> list[Tensor]:
    out = dilated.dilated_attention(*inputs, **CALL, **more)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_host_neither_waits_nor_copies(dtype: torch.dtype) -> None:
    inputs, dout = _inputs(dtype), torch.randn(2, 333, 4, 64, device="cuda", dtype=dtype)
    _step(inputs, dout)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            _step(inputs, dout)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        names = torch.zeros(3).cuda()  # a copy that the profiler must see
    del names
    events = [event.name for event in profile.events()]
    assert sum("Memcpy HtoD" in name for name in events) == 1
    assert any("merge" in name or "attention" in name or "sm90" in name for name in events)
    waits = [name for name in events if "Synchronize" in name]
    assert len(waits) <= 2, waits  # of that copy, and of the profiler's end


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_what_runs_beside(dtype: torch.dtype) -> None:
    inputs, dout = _inputs(dtype), torch.randn(2, 333, 4, 64, device="cuda", dtype=dtype)
    want = _step(inputs, dout)
    other = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    for delay in (0, 10_000, 300_000):
        with torch.cuda.stream(side):
            torch.cuda._sleep(delay)
            other @ other
        found = _step(inputs, dout)
        for a, b in zip(want, found, strict=True):
            assert torch.equal(a, b)
    torch.cuda.synchronize()


def test_autocast() -> None:
    module = dilated.MultiheadDilatedAttention(256, 4, segments=[64, 300], dilations=[1, 3]).cuda()
    x = torch.randn(2, 333, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        out, _ = module(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    gradients = [x.grad, *(p.grad for p in module.parameters())]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


@pytest.fixture
def one_rank(tmp_path: Any) -> Any:
    """A group of NCCL with this process only."""
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1,
        device_id=torch.device("cuda", 0),
    )  # fmt: skip
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_data_parallel_wrappers_change_no_bit(wrapper: str) -> None:
    torch.manual_seed(0)
    module = dilated.MultiheadDilatedAttention(256, 4, segments=[64, 300], dilations=[1, 3]).cuda()
    x = torch.randn(2, 333, 256, device="cuda")
    module(x)[0].square().sum().backward()
    want = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    if wrapper == "ddp":
        wrapped: Any = DistributedDataParallel(module, device_ids=[0])
    else:
        wrapped = fully_shard(module)
    wrapped(x)[0].square().sum().backward()
    assert want
    for name, p in module.named_parameters():
        assert p.grad is not None
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        assert torch.equal(grad, want[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_is_used() -> None:
    inputs = [x.detach() for x in _inputs(torch.bfloat16)]
    dout = torch.randn_like(inputs[0])
    want = _step([x.requires_grad_() for x in inputs], dout)
    there = [x.detach().to("cuda:1").requires_grad_() for x in inputs]
    for current in (0, 1):
        with torch.cuda.device(current):
            found = _step(there, dout.to("cuda:1"))
            assert torch.cuda.current_device() == current
        for a, b in zip(want, found, strict=True):
            assert b.device == torch.device("cuda", 1)
            assert torch.equal(a.cpu(), b.cpu())
