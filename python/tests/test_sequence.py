"""Real Gloo processes that share sequences: one process's bits, and failures that are loud. R3, R4,
R20, X6, X8, X10.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sequence_cases import Sharded, cases
from torch import Tensor

import dilated
from dilated.distributed import SequenceGroups

WORKER = Path(__file__).with_name("sequence_worker.py")
# A hang is a failure, not a wait.
GUARD = 90


def _start(scenario: str, size: int, folder: Path) -> list[subprocess.Popen[str]]:
    source = str(Path(dilated.__file__).parents[1])
    path = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH", "")) if p)
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), scenario, str(folder), str(rank), str(size)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(size)
    ]


def _run(scenario: str, size: int, folder: Path, survivors: int | None = None) -> None:
    """All processes; the first `survivors` of them, all by default, must end well."""
    processes = _start(scenario, size, folder)
    count = size if survivors is None else survivors
    try:
        errors = [process.communicate(timeout=GUARD)[1] for process in processes[:count]]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes[:count]]
    assert not any(codes), f"{codes}\n" + "\n".join(errors)


def _ulps(actual: Tensor, expected: Tensor) -> float:
    """Largest difference in units in the last place of the largest number."""
    if expected.numel() == 0:
        return 0.0
    largest = expected.abs().max().item()
    unit = torch.finfo(expected.dtype).eps * largest
    return (actual - expected).abs().max().item() / unit if unit > 0 else 0.0


def _joined(parts: list[dict[str, Tensor]], sharded: Sharded) -> dict[str, Tensor]:
    rows_dim = 0 if sharded.cu_seqlens is not None else 1
    return {
        name: torch.cat([part[name] for part in parts], -1 if name == "lse" else rows_dim)
        for name in parts[0]
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_have_the_bits_of_one_process(size: int, tmp_path: Path) -> None:
    """dK and dV are sums in another order: 4 units in the last place of float32, rounded once."""
    _run("cases", size, tmp_path)
    results = [torch.load(tmp_path / f"results-{size}-{rank}.pt") for rank in range(size)]
    for number, sharded in enumerate(cases(size)):
        got = _joined([result[number] for result in results], sharded)
        expected = sharded.run(dilated.dilated_attention, lambda x, dim: x)
        for name in ("out", "lse", "dquery"):
            bits = [x.contiguous().view(torch.uint8) for x in (got[name], expected[name])]
            assert torch.equal(*bits), (number, name)
        for name in ("dkey", "dvalue"):
            assert _ulps(got[name], expected[name]) <= 4, (number, name)


@pytest.fixture(scope="module")
def mismatches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mismatches")
    _run("mismatches", 3, folder)
    return [torch.load(folder / f"mismatches-{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("option", "other options on ranks [2]"),
        ("branches", "other segments, dilations or offsets on ranks [2]"),
        ("dtype", "other shapes, dtype or heads on ranks [2]"),
        ("shards", "other shards or cu_seqlens on ranks [2]"),
        ("seqused", "another seqused on ranks [2]"),
        ("calls", "another number of calls on ranks [2]; another pass on ranks [2]"),
    ],
)
def test_other_calls_are_the_same_error_on_all_ranks(
    name: str, words: str, mismatches: list[dict[str, Any]]
) -> None:
    text = f"dilated_attention: groups: expected the same call on all ranks, got {words}"
    for errors in mismatches:
        kind, got, seconds = errors[name]
        assert (kind, got) == ("InvalidProblem", text)
        assert seconds < 2


def test_an_error_of_one_rank_is_told_to_the_others(mismatches: list[dict[str, Any]]) -> None:
    kinds, texts, seconds = zip(*(errors["error"] for errors in mismatches), strict=True)
    assert kinds == ("InvalidProblem",) * 3
    assert "dilations[1]: expected 1 <= dilation" in texts[2]
    assert texts[0] == texts[1]
    assert "an error of ranks [2] in call 1" in texts[0]
    assert max(seconds) < 2


def test_no_call_follows_a_failed_one(mismatches: list[dict[str, Any]]) -> None:
    for errors in mismatches:
        kind, text, _ = errors["after"]
        assert kind == "DistributedAttentionError"
        assert "no call after a failed one (another number of calls" in text


@pytest.mark.parametrize("scenario", ["killed", "stopped", "late", "raising"])
def test_a_rank_that_does_not_answer_is_an_error_of_the_others(
    scenario: str, tmp_path: Path
) -> None:
    _run(scenario, 3, tmp_path, survivors=2)
    for rank in range(2):
        kind, text, seconds = torch.load(tmp_path / f"{scenario}-{rank}.pt")["call"]
        assert kind == "DistributedAttentionError", text
        assert "call 2 over 3 ranks: expected an answer within 3 s" in text
        assert "2]" in text
        assert seconds < 5


def test_groups_know_shards_and_positions() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = SequenceGroups()
        assert groups.shards(7) == [7]
        assert groups.positions([5]).tolist() == [0, 1, 2, 3, 4]
        x = torch.arange(6).reshape(1, 6)
        assert torch.equal(groups.shard(x), x)
        with pytest.raises(dilated.InvalidProblem, match="shards: expected one number of rows per"):
            groups.positions([1, 2])
        with pytest.raises(dilated.InvalidProblem, match="timeout: expected seconds > 0, got -1"):
            SequenceGroups(timeout=-1)
    finally:
        dist.destroy_process_group()
    with pytest.raises(dilated.InvalidProblem, match="an initialised torch.distributed"):
        SequenceGroups()
