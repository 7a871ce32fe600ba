"""Tells distant lesions from adjacent ones: `python examples/slide/multifocal.py`.

Trains a small slide encoder on synthetic slides, the same encoder with only its local branch, and
mean pooling, all on the same slides: coarse ones first, 10,000 tiles at the end. Prints their
accuracies and draws what moved the encoder beside the true lesions.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from classifier import DILATED, LOCAL, LOCAL_SEGMENT, MeanPooling, SlideClassifier, influence
from dilated import InvalidProblem, Unsupported
from dilated.cli import Parser, Refused, integer, run
from heat_map import slide_figure
from lesions import FEATURES, Looks, Slides, draw_slides

_TILES = 10_000
_WARMUP_STEPS, _LEARNING_RATE = 30, 2e-3


@dataclass(frozen=True)
class Stage:
    """Steps of training on slides of one size."""

    tiles: int
    batch: int
    steps: int


# About as many tiles in every step: coarse slides teach what to look for, whole ones where.
STAGES = (Stage(400, 24, 300), Stage(2500, 4, 100), Stage(_TILES, 2, 60))


@dataclass(frozen=True)
class Result:
    """A trained model and its accuracy by tiles of a slide."""

    name: str
    model: nn.Module
    accuracy: dict[int, float]
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; None reads sys.argv. Returns the exit code."""
    parser = Parser(prog="examples", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("slide.png"), help="picture (default: slide.png)")
    add("--slides", type=integer, default=100, help="to judge by, of each size (default: 100)")
    add("--steps", type=float, default=1.0, help="factor on the steps of training (default: 1)")
    add("--threads", type=integer, help="CPU threads (default: torch's)")
    add("--seed", type=int, default=0, help="of weights and slides (default: 0)")
    parser.set_defaults(command="slide", run=_multifocal)
    return run(parser, arguments, (InvalidProblem, Unsupported))


def _multifocal(options: Namespace) -> int:
    if options.out.suffix not in (".png", ".svg"):
        raise Refused(f"--out: expected a name ending in .png or .svg, got {options.out}")
    for flag, value in (("slides", options.slides), ("threads", options.threads or 1)):
        if value < 1:
            raise Refused(f"--{flag}: expected >= 1, got {value}")
    if not options.steps > 0:
        raise Refused(f"--steps: expected > 0, got {options.steps}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    stages = [Stage(s.tiles, s.batch, max(1, round(s.steps * options.steps))) for s in STAGES]
    looks = Looks.draw(options.seed)
    print(
        f"slides of {_TILES:,} tiles with {FEATURES} features; negative: lesions touch or are one; "
        "positive: as many lesion tiles, far apart",
        flush=True,
    )
    results = [
        train_and_judge(name, model, looks, stages, seed=options.seed, slides=options.slides)
        for name, model in models(options.seed)
    ]
    print(table(results))
    _draw(options.out, results[0].model, looks, options.seed)
    return 0


def models(seed: int) -> list[tuple[str, nn.Module]]:
    """The models to compare; the first two start with the same weights."""
    named = []
    for name, branches in (("dilated", DILATED), ("only its local branch", LOCAL)):
        torch.manual_seed(seed)
        named.append((name, SlideClassifier(branches)))
    return [*named, ("mean pooling", MeanPooling())]


def train_and_judge(
    name: str, model: nn.Module, looks: Looks, stages: list[Stage], *, seed: int, slides: int
) -> Result:
    """Trains on slides that the seed decides, the same for every model; judges on others."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    total, done, begin = sum(stage.steps for stage in stages), 0, time.perf_counter()
    with tqdm(desc=name, total=total, unit="step", file=sys.stdout) as bar:
        for stage in stages:
            for _ in range(stage.steps):
                left = (total - done) / total  # linear decay after a linear warm-up
                for group in optimizer.param_groups:
                    group["lr"] = _LEARNING_RATE * min((done + 1) / _WARMUP_STEPS, left + 0.05, 1)
                batch = draw_slides(looks, stage.batch, stage.tiles, generator)
                logits = model(batch.features, batch.coords)
                loss = functional.binary_cross_entropy_with_logits(logits, batch.label)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                done += 1
                bar.set_postfix_str(f"{stage.tiles} tiles, loss {loss.item():.3f}", refresh=False)
                bar.update()
    seconds = time.perf_counter() - begin
    sizes = dict.fromkeys(stage.tiles for stage in stages)
    accuracy = {n: judge(model, looks, n, seed=seed + 1, slides=slides) for n in sizes}
    return Result(name, model, accuracy, seconds)


@torch.no_grad()
def judge(model: nn.Module, looks: Looks, tiles: int, *, seed: int, slides: int) -> float:
    """The share of right labels on new slides, half of them positive."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    right = 0
    for number in range(slides):
        slide = draw_slides(looks, 1, tiles, generator, label=number % 2)
        right += bool((model(slide.features, slide.coords) > 0) == (slide.label > 0))
    return right / slides


def table(results: list[Result]) -> str:
    """Accuracies by size."""
    sizes = list(results[0].accuracy)
    lines = ["", f"{'accuracy at tiles':24}" + "".join(f"{n:>8}" for n in sizes) + "  seconds"]
    for result in results:
        cells = "".join(f"{result.accuracy[n]:8.2f}" for n in sizes)
        lines.append(f"{result.name:24}{cells}{result.seconds:9.0f}")
    return "\n".join(
        [
            *lines,
            f"Chance is 0.50. A local segment holds {LOCAL_SEGMENT} tiles: a coarse slide whole, of "
            "others a few rows.",
            "",
        ]
    )


def _draw(path: Path, model: nn.Module, looks: Looks, seed: int) -> None:
    """One slide of each kind that nobody trained on."""
    generator = torch.Generator().manual_seed(seed + 2)
    model.eval()
    shown = []
    for label in (1.0, 0.0):
        slide: Slides = draw_slides(looks, 1, _TILES, generator, label=label)
        with torch.no_grad():
            says = float(model(slide.features, slide.coords).sigmoid())
        shown.append((slide, influence(model, slide), says))
    slide_figure(shown).savefig(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(main())
