"""One rank of test_data_parallel.py: three steps with DDP or FSDP2, or alone on the whole batch.

python data_parallel_worker.py MODE STORE RANK WORLD_SIZE RESULT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

import dilated


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options = {"preset": "torchscale", "num_kv_heads": 2}
        self.layers = nn.ModuleList(
            dilated.MultiheadDilatedAttention(32, 4, [8, 32], [1, 4], **options) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x, is_causal=True)[0]
        return x


def main(mode: str, store: str, rank: int, world_size: int, result: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = Model()
    batch = torch.randn(4, 37, 32)
    if mode != "alone":
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
        batch = batch.chunk(world_size)[rank]
    if mode == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif mode == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    whole = [p.full_tensor() if mode == "fsdp2" else p for p in model.parameters()]
    if rank == 0:
        torch.save([p.detach() for p in whole], result)
    if mode != "alone":
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
