"""Training on shards by torchrun: one process's losses, restarts, checkpoints for any ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "ranks.py"
STEPS = 6
# A hang is a failure, not a wait.
GUARD = 120


def _run(text: Path, out: Path, ranks: int, *more: str, steps: int = STEPS) -> list[float]:
    """The losses of a run over `ranks` processes; 1 needs no torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [
        sys.executable,
        *([] if ranks == 1 else [*launcher, "--max-restarts=1"]),
        str(PROGRAM),
        f"--input={text}",
        f"--out={out}",
        f"--steps={steps}",
        "--context=512",
        "--embed-dim=32",
        "--checkpoint-every=2",
        *more,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=GUARD, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (out / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(b"".join(f"line {i} of {i * i}\n".encode() for i in range(2000)))
    return path


@pytest.fixture(scope="module")
def two(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The folder of a run over two ranks, and its losses."""
    out = tmp_path_factory.mktemp("two")
    return out, _run(text, out, 2)


def test_ranks_learn_what_one_process_learns(
    text: Path, two: tuple[Path, list[float]], tmp_path: Path
) -> None:
    # Weights differ by sums in another order, 1e-7 of them, which every step passes on.
    assert two[1] == pytest.approx(_run(text, tmp_path, 1), rel=1e-5)
    assert two[1][-1] < two[1][0]


def test_a_killed_rank_is_started_again_with_the_same_losses(
    text: Path, two: tuple[Path, list[float]], tmp_path: Path
) -> None:
    assert _run(text, tmp_path, 2, "--fail-at=3") == two[1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_checkpoints_fit_any_number_of_ranks(
    ranks: int, text: Path, two: tuple[Path, list[float]], tmp_path: Path
) -> None:
    out = shutil.copytree(two[0], tmp_path / "copy")
    shutil.rmtree(out / f"step-{STEPS:06}")
    losses = _run(text, out, ranks)
    assert losses[: STEPS - 2] == two[1][: STEPS - 2]
    assert losses == pytest.approx(two[1], rel=1e-5)


def test_data_and_sequence_ranks(text: Path, tmp_path: Path) -> None:
    grid = _run(text, tmp_path / "grid", 4, "--batch-size=2", "--data-ranks=2", steps=2)
    alone = _run(text, tmp_path / "alone", 1, "--batch-size=2", steps=2)
    assert grid == pytest.approx(alone, rel=1e-5)
