"""Random calls over ranks against one process, for a while: `make soak`.

python soak_sequence.py SECONDS RANKS

Every rank compares its rows with its own call of the whole sequence, to the bit. Memory and open
files must not grow: both are compared between a fifth of the time and the end.
"""

from __future__ import annotations

import os
import random
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sequence_cases import random_case

import dilated
from dilated.distributed import SequenceGroups, dilated_attention, sum_over_ranks

TRANSPORTS = (None, "all_to_all", "all_gather")
# Allocators keep some; a message of every call, or its plan, would be more.
_MOST_GROWTH = 64 << 20


def _open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def _check(groups: SequenceGroups, draw: random.Random) -> None:
    sharded = random_case(draw, groups.size)
    begin, rows = sum(sharded.shards[: groups.rank]), sharded.shards[groups.rank]
    given = sharded.shards if draw.random() < 0.5 else None
    attention = partial(
        dilated_attention,
        sequence_groups=groups,
        shards=given,
        transport=draw.choice(TRANSPORTS),
    )
    got = sharded.run(attention, lambda x, dim: x.narrow(dim, begin, rows))
    whole = sharded.run(dilated.dilated_attention, lambda x, dim: x)
    rows_dim = 0 if sharded.cu_seqlens is not None else 1
    for name in ("out", "lse", "dquery"):
        mine = whole[name].narrow(-1 if name == "lse" else rows_dim, begin, rows)
        bits = [x.contiguous().view(torch.uint8) for x in (got[name], mine)]
        assert torch.equal(*bits), (sharded, name)


def _rank(rank: int, size: int, seconds: float, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    groups = SequenceGroups(timeout=60)
    draw = random.Random(0)  # the same on all ranks
    begin, calls, before = time.monotonic(), 0, (0, 0)
    going = True
    while going:
        with groups:
            _check(groups, draw)
            calls += 1
            passed = time.monotonic() - begin
            if before == (0, 0) and passed > seconds / 5:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _open_files()
            # All stop together: when all have had their time.
            more = sum_over_ranks(torch.tensor(passed < seconds).long(), sequence_groups=groups)
            going = bool(more)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[0]) * 1024
    assert grown < _MOST_GROWTH, f"{grown} bytes more than after a fifth of the time"
    assert _open_files() <= before[1], "open files grow"
    if rank == 0:
        print(f"{calls} calls over {size} ranks in {passed:.0f} s: all bits are one process's")
    dist.barrier()
    dist.destroy_process_group()


def main(seconds: float, size: int) -> None:
    """Run the ranks; an exception of one ends all."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (size, seconds, f"{folder}/store"), nprocs=size)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
