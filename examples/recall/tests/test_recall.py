"""The dilated branch finds what the local branch cannot see; the program says so."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import recall
from curriculum import DILATED, LOCAL, Settings, build_model, judge, train
from recall import LENGTHS, RUNS, SINGLES


def test_recall_beyond_the_local_branch() -> None:
    """To sixteen times the local segment, within three minutes of one core."""
    begin = time.process_time()
    dilated = train(RUNS, LENGTHS, Settings(), most_steps=2000)
    assert time.process_time() - begin < 180
    local = train(RUNS, LENGTHS, Settings(branches=LOCAL), most_steps=2000, pace=dilated.steps)
    for length in LENGTHS:
        assert judge(dilated.model, RUNS, length, seed=1, answers=1000).all >= 0.95
    assert judge(local.model, RUNS, LENGTHS[-1], seed=1, answers=1000).all <= 0.2


def test_models_differ_in_what_they_see_only() -> None:
    """Equal weights, and a value beyond the local segment moves the dilated model only."""
    torch.manual_seed(0)
    models = [build_model(Settings(branches=branches)) for branches in (DILATED, LOCAL)]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
    batch = RUNS.sample(1, 256, torch.Generator().manual_seed(0))
    other = batch.tokens.clone()
    other[0, batch.stored[0, 0] - 3 : batch.stored[0, 0] + 1] ^= 1
    with torch.no_grad():
        moved = [(m(batch.tokens) - m(other))[0, batch.asked[0]].abs().max() for m in models]
    assert moved[0] > 0
    assert moved[1] == 0


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "recall.png"
    arguments = ["--longest", "128", "--most-steps", "2", "--answers", "10", "--out", str(out)]
    assert recall.main(arguments) == 0
    text = capsys.readouterr().out
    assert "runs of 4, dilated" in text
    assert "Steps of every model: 2 at 64, 2 at 128, then 2 at all." in text
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--longest", "63"], "--longest: expected 64 to 1024, got 63"),
        (["--longest", "2048"], "--longest: expected 64 to 1024, got 2048"),
        (["--out", "table.txt"], "--out: expected a name ending in .png or .svg, got table.txt"),
        (["--most-steps", "0"], "--most-steps: expected >= 1, got 0"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recall.main(arguments) == 2
    assert capsys.readouterr().err == f"examples recall: error: {message}\n"


def test_single_tokens_have_the_shape_of_runs() -> None:
    assert SINGLES.pairs == RUNS.pairs
    assert (SINGLES.run, RUNS.run) == (1, max(DILATED.dilations))
