"""Sequences over ranks in compiled graphs, with DDP, FSDP2 and shards of heads. R3, R20, X8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sequence_cases import longnet, training_data
from test_sequence import Ranks

import dilated

# Compilers sum in other orders; two layers forth and back.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_compiled_calls_have_the_bits_of_eager_ones(tmp_path: Path) -> None:
    for result in Ranks("compiled", 2, tmp_path).results(2):
        for name, (eager, compiled) in result["pairs"].items():
            for a, b in zip(eager, compiled, strict=True):
                if name == "longnet":
                    scale = max(x.abs().max().item() for x in eager)
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * scale)
                else:
                    assert torch.equal(a, b), name
        assert result["drawn"]
        for gradient, slope in result["slopes"]:
            assert gradient == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_a_short_soak() -> None:
    """`make soak` is the long one."""
    program = Path(__file__).with_name("soak_sequence.py")
    source = str(Path(dilated.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(program), "5", "4"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "all bits are one process's" in done.stdout


def test_ranks_of_sequences_times_others(tmp_path: Path) -> None:
    results = Ranks("parallel", 4, tmp_path).results(4)
    tokens, targets = training_data()
    model = longnet()
    torch.nn.functional.cross_entropy(
        model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1
    ).backward()
    for result in results:
        for name, gradients in result["gradients"].items():
            for gradient, parameter in zip(gradients, model.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad, **CLOSE, msg=name)
    x = torch.randn(3, 1, 37, 4, 6, generator=torch.Generator().manual_seed(4))
    lists = {"segments": [8, 40], "dilations": [1, 2]}
    for name, whole in (
        ("heads", dilated.dilated_attention(*x, **lists)),
        ("autocast", dilated.dilated_attention(*x.bfloat16(), **lists)),
    ):
        rows = [torch.cat([results[r + s][name] for s in (0, 1)], 1) for r in (0, 2)]
        assert torch.equal(torch.cat(rows, 2), whole), name
