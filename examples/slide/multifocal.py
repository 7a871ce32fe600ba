"""Tells distant lesions from neighbours: `python examples/slide/multifocal.py`.

Trains a small slide encoder on synthetic slides, the same encoder with only its local branch, and
mean pooling, step by step on the same slides: coarse ones first, 10,000 tiles at the end. Prints
their accuracies on new slides, and draws where the class token looks beside the true lesions.
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

from classifier import (
    DILATED,
    LOCAL,
    LOCAL_SEGMENT,
    MeanPooling,
    SlideClassifier,
    class_attention,
)
from dilated import InvalidProblem, Unsupported
from dilated.cli import Parser, Refused, integer, run
from lesions import FEATURES, LESION_SHARE, Looks, Slides, draw_slides
from slide_map import Shown, slide_figure

_TILES = 10_000
_WARMUP_STEPS, _LEARNING_RATE = 30, 3e-3


@dataclass(frozen=True)
class Stage:
    """Steps of training on slides of one size."""

    tiles: int
    batch: int
    steps: int


# Coarse slides teach what to look for and how to tell; whole ones how to find it among 10,000.
STAGES = (Stage(100, 64, 250), Stage(400, 16, 60), Stage(2500, 4, 40), Stage(_TILES, 2, 40))


class Contender:
    """A model and its optimiser."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
        )

    def step(self, slides: Slides, rate: float) -> float:
        """One step at that share of the learning rate; the share of right labels before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * rate
        logits = self.model(slides.features, slides.coords)
        loss = functional.binary_cross_entropy_with_logits(logits[:, 0], slides.label)
        # Where lesions are is easier to learn than how far apart, and leads to it.
        loss = loss + functional.cross_entropy(logits[:, 1:], slides.report)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(right(logits, slides).mean())


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; None reads sys.argv. Returns the exit code."""
    parser = Parser(prog="examples", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("slide.png"), help="picture (default: slide.png)")
    add("--slides", type=integer, default=200, help="to judge by, of each size (default: 200)")
    add("--steps", type=float, default=1.0, help="factor on the steps of training (default: 1)")
    add("--threads", type=integer, help="CPU threads (default: torch's)")
    add("--seed", type=int, default=0, help="of weights and slides (default: 0)")
    parser.set_defaults(command="slide", run=_multifocal)
    return run(parser, arguments, (InvalidProblem, Unsupported))


def _multifocal(options: Namespace) -> int:
    if options.out.suffix not in (".png", ".svg"):
        raise Refused(f"--out: expected a name ending in .png or .svg, got {options.out}")
    if not options.out.parent.is_dir():
        raise Refused(f"--out: expected a name in a folder that exists, got {options.out}")
    for flag, value in (("slides", options.slides), ("threads", options.threads)):
        if value is not None and value < 1:
            raise Refused(f"--{flag}: expected >= 1, got {value}")
    if not 0 < options.steps < float("inf"):
        raise Refused(f"--steps: expected a finite number > 0, got {options.steps}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    stages = [Stage(s.tiles, s.batch, max(1, round(s.steps * options.steps))) for s in STAGES]
    looks = Looks.draw(options.seed)
    print(
        f"Slides of {_TILES:,} tiles with {FEATURES} features, {LESION_SHARE:.0%} of them in two "
        f"lesions: far apart or neighbours? {torch.get_num_threads()} threads.",
        flush=True,
    )
    contenders = build_contenders(options.seed)
    train(contenders, looks, stages, seed=options.seed)
    sizes = list(dict.fromkeys(stage.tiles for stage in stages))
    accuracy = judge(contenders, looks, sizes, seed=options.seed, slides=options.slides)
    print(table(accuracy, options.slides))
    shown = show(contenders[0].model, looks, seed=options.seed)
    slide_figure(shown).savefig(options.out)
    print(f"wrote {options.out}; {time.perf_counter() - begin:.0f} s in all")
    return 0


def build_contenders(seed: int) -> list[Contender]:
    """The models to compare; the first two start with the same weights."""
    found = []
    for name, branches in (("dilated", DILATED), ("only its local branch", LOCAL)):
        torch.manual_seed(seed)
        found.append(Contender(name, SlideClassifier(branches)))
    return [*found, Contender("mean pooling", MeanPooling())]


def train(contenders: list[Contender], looks: Looks, stages: list[Stage], *, seed: int) -> None:
    """Trains all of them on the same slides, which the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    total, done = sum(stage.steps for stage in stages), 0
    with tqdm(desc="training", total=total, unit="step", file=sys.stdout) as bar:
        for stage in stages:
            for _ in range(stage.steps):
                # Linear warm-up; from the middle on, linear decay.
                rate = min((done + 1) / _WARMUP_STEPS, 1, 2 * (1 - done / total))
                labels = torch.rand(stage.batch, generator=generator) < 0.5
                slides = draw_slides(looks, labels, stage.tiles, generator)
                accuracies = [contender.step(slides, rate) for contender in contenders]
                done += 1
                text = " ".join(f"{accuracy:.2f}" for accuracy in accuracies)
                bar.set_postfix_str(f"{stage.tiles} tiles, right {text}", refresh=False)
                bar.update()


@torch.no_grad()
def judge(
    contenders: list[Contender], looks: Looks, sizes: list[int], *, seed: int, slides: int
) -> dict[str, dict[int, float]]:
    """By name and size, the share of right labels on new slides, half of them positive."""
    generator = torch.Generator().manual_seed(seed + 1_000_000)
    found: dict[str, dict[int, float]] = {contender.name: {} for contender in contenders}
    for contender in contenders:
        contender.model.eval()
    with tqdm(desc="judging", total=len(sizes) * slides, unit="slide", file=sys.stdout) as bar:
        for tiles in sizes:
            hits = {contender.name: 0.0 for contender in contenders}
            for number in range(slides):
                slide = draw_slides(looks, torch.tensor([number % 2 == 1]), tiles, generator)
                for contender in contenders:
                    logits = contender.model(slide.features, slide.coords)
                    hits[contender.name] += right(logits, slide).item()
                bar.update()
            for name, count in hits.items():
                found[name][tiles] = count / slides
    return found


def right(logits: torch.Tensor, slides: Slides) -> torch.Tensor:
    """(batch,): 1.0 where the label's logit has the right sign."""
    return ((logits[:, 0] > 0) == (slides.label > 0)).float()


def table(accuracy: dict[str, dict[int, float]], slides: int) -> str:
    """Accuracies by size."""
    sizes = list(next(iter(accuracy.values())))
    lines = ["", f"{'accuracy at tiles':24}" + "".join(f"{n:>8}" for n in sizes)]
    for name, by_size in accuracy.items():
        lines.append(f"{name:24}" + "".join(f"{by_size[n]:8.3f}" for n in sizes))
    return "\n".join(
        [
            *lines,
            f"{slides} new slides of each size; chance is 0.500. A local segment holds "
            f"{LOCAL_SEGMENT} tiles: a coarse slide whole, of others a few rows.",
            "",
        ]
    )


def show(model: nn.Module, looks: Looks, *, seed: int) -> list[Shown]:
    """One slide of each kind that nobody trained on, with the class token's attention."""
    assert isinstance(model, SlideClassifier)
    generator = torch.Generator().manual_seed(seed + 2_000_000)
    slides = draw_slides(looks, torch.tensor([True, False]), _TILES, generator)
    attention, logits = class_attention(model.eval(), slides)
    probability = logits[:, 0].sigmoid()
    return [
        Shown(
            slides.coords[i], slides.lesion[i], attention[i],
            distant=bool(slides.label[i]), probability=float(probability[i]),
        )
        for i in range(2)
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
