"""One rank of test_sequence.py.

python sequence_worker.py SCENARIO FOLDER RANK WORLD_SIZE
    cases       every case of sequence_cases.py; rank r writes results-WORLD_SIZE-r.pt
    mismatches  calls that differ between ranks; writes errors-r.pt
    killed, stopped, late, raising
                the last rank fails in the second call; the others write errors-r.pt
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sequence_cases import cases

from dilated.distributed import SequenceGroups, dilated_attention

TIMEOUT = 3.0
CALL = {"segments": [8, 40], "dilations": [1, 2]}


def run_cases(groups: SequenceGroups) -> list[dict[str, torch.Tensor]]:
    results = []
    for number, sharded in enumerate(cases(groups.size)):
        begin = sum(sharded.shards[: groups.rank])
        rows = sharded.shards[groups.rank]
        shards = sharded.shards if number % 2 else None
        results.append(
            sharded.run(
                dilated_attention,
                lambda x, dim: x.narrow(dim, begin, rows),
                groups=groups,
                shards=shards,
            )
        )
    return results


def error_of(call: Any) -> tuple[str, str, float]:
    """Type and text of what a call raises, and the seconds until then."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def mismatches(rank: int) -> dict[str, Any]:
    """One rank, the last of three, calls differently."""
    x = torch.randn(3, 1, 12, 2, 4)
    odd = rank == dist.get_world_size() - 1
    calls = {
        "option": lambda groups: dilated_attention(*x, groups=groups, is_causal=odd, **CALL),
        "branches": lambda groups: dilated_attention(
            *x, groups=groups, segments=[8, 41 if odd else 40], dilations=[1, 2]
        ),
        "dtype": lambda groups: dilated_attention(
            *(x.double() if odd else x), groups=groups, **CALL
        ),
        "error": lambda groups: dilated_attention(
            *x, groups=groups, **{**CALL, "dilations": [1, 0 if odd else 2]}
        ),
        "shards": lambda groups: dilated_attention(
            *x, groups=groups, shards=None if odd else [12, 12, 12], **CALL
        ),
        "seqused": lambda groups: dilated_attention(*x, groups=groups, seqused=[30 + odd], **CALL),
    }
    errors = {name: error_of(lambda: call(SequenceGroups(timeout=TIMEOUT)))
              for name, call in calls.items()}  # fmt: skip

    def calls_differ(groups: SequenceGroups) -> None:
        query = x[0].clone().requires_grad_()
        out = dilated_attention(query, *x[1:], groups=groups, **CALL)
        if odd:
            dilated_attention(query, *x[1:], groups=groups, **CALL)
        else:
            out.sum().backward()

    groups = SequenceGroups(timeout=TIMEOUT)
    errors["calls"] = error_of(lambda: calls_differ(groups))
    errors["after"] = error_of(lambda: dilated_attention(*x, groups=groups, **CALL))
    return errors


def failing(scenario: str, rank: int, folder: Path) -> dict[str, Any]:
    groups = SequenceGroups(timeout=TIMEOUT)
    x = torch.randn(3, 1, 12, 2, 4)
    dilated_attention(*x, groups=groups, **CALL)
    if rank == groups.size - 1:
        if scenario == "raising":
            raise SystemExit(3)
        if scenario == "late":
            time.sleep(2.5 * TIMEOUT)
        else:
            os.kill(os.getpid(), signal.SIGKILL if scenario == "killed" else signal.SIGSTOP)
    return {"call": error_of(lambda: dilated_attention(*x, groups=groups, **CALL))}


def main(scenario: str, folder: Path, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/{scenario}-{size}.store"
    dist.init_process_group("gloo", store, rank=rank, world_size=size)
    torch.manual_seed(rank)
    if scenario == "cases":
        torch.save(run_cases(SequenceGroups(timeout=60)), folder / f"results-{size}-{rank}.pt")
    else:
        errors = mismatches(rank) if scenario == "mismatches" else failing(scenario, rank, folder)
        torch.save(errors, folder / f"{scenario}-{rank}.pt")
    if scenario in ("cases", "mismatches"):
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
