"""One rank of test_data_parallel.py: three steps of every public module, or a checkpoint of them,
then one step more.

python data_parallel_worker.py MODE FOLDER RANK WORLD_SIZE
    alone    the whole batch in one process
    ddp      a part of the batch in each process
    save     the same with FSDP2; writes FOLDER/checkpoint after the three steps
    load     reads it instead of them, with FSDP2, or alone if WORLD_SIZE is 1
Rank 0 writes the parameters before and after the last step to FOLDER/MODE-WORLD_SIZE.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from public_modules import MODULES, inputs, output
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Everything(nn.Module):
    """All public modules side by side; the loss is the sum of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: build() for name, build in MODULES.items()})

    def forward(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        losses = [output(part, batch[name]).square().mean() for name, part in self.parts.items()]
        return torch.stack(losses).sum()


def parameters(model: nn.Module) -> list[Tensor]:
    """All of them, whole, in this process."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().clone() for p in whole]


def main(mode: str, folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = Everything().eval()  # without dropout, whose draws depend on the batch
    batch = {name: inputs(name, batch=6) for name in MODULES}
    together = mode not in ("alone", "load") or world_size > 1
    if together:
        store = f"file://{folder}/{mode}-{world_size}.store"
        dist.init_process_group("gloo", store, rank=rank, world_size=world_size)
        batch = {
            name: tuple(x.chunk(world_size)[rank] for x in whole) for name, whole in batch.items()
        }
    if mode == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif together:
        mesh = init_device_mesh("cpu", (world_size,))
        for part in model.parts.values():
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()

    checkpoint = folder / "checkpoint"
    if mode == "load":
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=checkpoint, no_dist=not together)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
    else:
        for _ in range(3):
            step()
    if mode == "save":
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=checkpoint)
    before = parameters(model)
    step()
    record = {"before": before, "after": parameters(model)}
    if rank == 0:
        torch.save(record, folder / f"{mode}-{world_size}.pt")
    if together:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
