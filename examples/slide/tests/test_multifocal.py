"""The encoder learns on coarse slides; the program prints and draws what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import multifocal
from classifier import DILATED, SlideClassifier, influence
from lesions import Looks, draw_slides
from multifocal import STAGES, Stage

LOOKS = Looks.draw(0)


def test_influence_is_a_derivative() -> None:
    """Scaling one tile's features moves the logit by its influence, to first order."""
    torch.manual_seed(0)
    model = SlideClassifier(DILATED).double()
    slide = draw_slides(LOOKS, 1, 100, torch.Generator().manual_seed(0))
    slide = slide._replace(features=slide.features.double())
    found = influence(model, slide)[0]
    step = 1e-5
    for tile in (0, 40, 99):
        moved = []
        for sign in (1, -1):
            features = slide.features.clone()
            features[0, tile] *= 1 + sign * step
            moved.append(model(features, slide.coords).item())
        assert abs(moved[0] - moved[1]) / (2 * step) == pytest.approx(found[tile].item(), rel=1e-4)


def test_local_and_dilated_start_alike() -> None:
    (_, a), (_, b), _ = multifocal.models(0)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multifocal, "STAGES", (Stage(100, 2, 2), Stage(400, 1, 1)))
    monkeypatch.setattr(multifocal, "_TILES", 400)
    out = tmp_path / "slide.png"
    assert multifocal.main(["--slides", "2", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for name in ("dilated", "only its local branch", "mean pooling"):
        assert f"\n{name} " in text
    assert out.read_bytes().startswith(b"\x89PNG")


def test_training_ends_at_the_real_shape() -> None:
    assert STAGES[-1].tiles == 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "slide.txt"], "--out: expected a name ending in .png or .svg, got slide.txt"),
        (["--slides", "0"], "--slides: expected >= 1, got 0"),
        (["--threads", "-1"], "--threads: expected >= 1, got -1"),
        (["--steps", "nan"], "--steps: expected > 0, got nan"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert multifocal.main(arguments) == 2
    assert capsys.readouterr().err == f"examples slide: error: {message}\n"
