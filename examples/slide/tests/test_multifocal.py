"""The encoder learns on coarse slides; the program prints and draws what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import multifocal
from classifier import DILATED, LOCAL_SEGMENT, SlideClassifier, class_attention
from lesions import FEATURES, LESION_SHARE, Looks, draw_slides
from multifocal import STAGES, Stage, build_contenders, judge, train

LOOKS = Looks.draw(0)


def test_far_lesions_reach_the_dilated_model_only() -> None:
    """Tiles beyond the local segment, in the class token's residue class."""
    dilated, local, _ = (contender.model for contender in build_contenders(0))
    for p, q in zip(dilated.parameters(), local.parameters(), strict=True):
        assert torch.equal(p, q)
    slide = draw_slides(LOOKS, torch.tensor([True]), 2500, torch.Generator().manual_seed(0))
    changed = slide.features.clone()
    changed[:, LOCAL_SEGMENT:] += 1  # the class token is position 0, this tile the next segment's
    with torch.no_grad():
        moved = [
            (m(changed, slide.coords) - m(slide.features, slide.coords)).abs().max()
            for m in (dilated, local)
        ]
    assert moved[0] > 0
    assert moved[1] == 0


def test_learning() -> None:
    """On coarse slides, which a local segment holds, attention learns what mean pooling cannot."""
    dilated, _, pooled = build_contenders(0)
    contenders = [dilated, pooled]
    train(contenders, LOOKS, [Stage(100, 32, 250)], seed=0)
    accuracy = judge(contenders, LOOKS, [100], seed=0, slides=200)
    assert accuracy["dilated"][100] > 0.9
    # Chance is 0.5, with a deviation of 0.035 over 200 slides.
    assert accuracy["mean pooling"][100] < 0.65


def test_class_attention() -> None:
    torch.manual_seed(0)
    model = SlideClassifier(DILATED)
    slides = draw_slides(LOOKS, torch.tensor([True, False]), 2500, torch.Generator().manual_seed(0))
    attention, logits = class_attention(model, slides)
    assert torch.allclose(attention.sum(1), torch.ones(2))
    # Beyond its local segment the class token sees positions 0 modulo 4 (tile 3 is position 4).
    far = attention[:, LOCAL_SEGMENT - 1 :]
    seen = torch.arange(LOCAL_SEGMENT, 2501) % 4 == 0
    assert (far[:, seen] > 0).all()
    assert (far[:, ~seen] == 0).all()
    with torch.no_grad():
        assert torch.equal(logits, model(slides.features, slides.coords))


def test_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multifocal, "STAGES", (Stage(100, 2, 2), Stage(400, 1, 1)))
    monkeypatch.setattr(multifocal, "_TILES", 400)
    out = tmp_path / "slide.png"
    assert multifocal.main(["--slides", "2", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{FEATURES} features, {LESION_SHARE:.0%} of them in two lesions" in text
    for name in ("dilated", "only its local branch", "mean pooling"):
        assert f"\n{name} " in text
    assert out.read_bytes().startswith(b"\x89PNG")


def test_training_ends_at_the_real_shape() -> None:
    assert STAGES[-1].tiles == 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "slide.txt"], "--out: expected a name ending in .png or .svg, got slide.txt"),
        (["--out", "no/a.png"], "--out: expected a name in a folder that exists, got no/a.png"),
        (["--slides", "0"], "--slides: expected >= 1, got 0"),
        (["--threads", "-1"], "--threads: expected >= 1, got -1"),
        (["--threads", "0"], "--threads: expected >= 1, got 0"),
        (["--steps", "nan"], "--steps: expected a finite number > 0, got nan"),
        (["--steps", "inf"], "--steps: expected a finite number > 0, got inf"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert multifocal.main(arguments) == 2
    assert capsys.readouterr().err == f"examples slide: error: {message}\n"
