"""Real Gloo processes: every public module under DDP and FSDP2, and its checkpoints. R9, X11."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dilated

WORKER = Path(__file__).with_name("data_parallel_worker.py")
Record = dict[str, list[torch.Tensor]]


def _train(mode: str, world_size: int, folder: Path) -> Record:
    """Parameters before and after the last step."""
    source = str(Path(dilated.__file__).parents[1])
    path = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH", "")) if p)
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), mode, str(folder), str(rank), str(world_size)],
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
    codes = [process.returncode for process in processes]
    assert not any(codes), f"{codes}\n" + "\n".join(errors)
    return torch.load(folder / f"{mode}-{world_size}.pt", weights_only=True)


def _assert_equal_up_to_sums(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Gradients are summed in another order."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data_parallel")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Record:
    return _train("alone", 1, folder)


@pytest.fixture(scope="module")
def saved(folder: Path) -> Record:
    return _train("save", 2, folder)


def test_ddp_trains_like_one_process(alone: Record, folder: Path) -> None:
    """No unused parameter either: DDP would refuse the second step."""
    for name, parameters in _train("ddp", 2, folder).items():
        _assert_equal_up_to_sums(parameters, alone[name])


def test_fsdp2_trains_like_one_process(alone: Record, saved: Record) -> None:
    for name, parameters in saved.items():
        _assert_equal_up_to_sums(parameters, alone[name])


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_of_two_processes_resumes_on_others(
    world_size: int, saved: Record, folder: Path
) -> None:
    """torch.distributed.checkpoint: weights bit for bit, momentum by the step that follows."""
    loaded = _train("load", world_size, folder)
    for a, b in zip(loaded["before"], saved["before"], strict=True):
        assert torch.equal(a, b)
    _assert_equal_up_to_sums(loaded["after"], saved["after"])
