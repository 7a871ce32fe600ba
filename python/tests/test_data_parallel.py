"""Two real Gloo processes, DDP and FSDP2, train like one on the whole batch. R9, X11."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dilated

WORKER = Path(__file__).with_name("data_parallel_worker.py")


def _train(mode: str, world_size: int, folder: Path) -> list[torch.Tensor]:
    result = folder / f"{mode}.pt"
    source = str(Path(dilated.__file__).parents[1])
    path = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH", "")) if p)
    command = [sys.executable, str(WORKER), mode, str(folder / f"{mode}.store")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(result)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return torch.load(result, weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    return _train("alone", 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(mode: str, alone: list[torch.Tensor], tmp_path: Path) -> None:
    """No unused parameter either: DDP would refuse the second step."""
    for a, b in zip(_train(mode, 2, tmp_path), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
