"""Associative recall far beyond the local branch: `python examples/recall/recall.py`.

Trains the same small LongNetLM three times with the same steps: with its dilated branch on runs of
tokens, with only its local branch on runs, and with its dilated branch on single tokens. Prints a
table of accuracies by length and writes a picture of it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from curriculum import (
    DILATED,
    LOCAL,
    LOCAL_SEGMENT,
    LONGEST,
    Accuracy,
    Settings,
    Trained,
    judge,
    train,
)
from dilated import InvalidProblem, Unsupported
from dilated.cli import Parser, Refused, integer, run
from spans import NUM_VALUES, Recall

RUNS = Recall(run=DILATED.dilations[-1])
SINGLES = Recall(run=1)
LENGTHS = tuple(64 * 2**i for i in range(5))
_COLOURS = ("#0b6e99", "#c44e52", "#8a8a8a")


@dataclass(frozen=True)
class Row:
    """One model's line of the table."""

    name: str
    trained: Trained
    accuracies: dict[int, Accuracy]


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; None reads sys.argv. Returns the exit code."""
    parser = Parser(prog="examples", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("recall.png"), help="picture (default: recall.png)")
    add("--longest", type=integer, default=LONGEST, help=f"length to reach (default: {LONGEST})")
    add("--most-steps", type=integer, default=2000, help="at one length, or at all (default: 2000)")
    add("--answers", type=integer, default=2000, help="to judge by, at each length")
    add("--threads", type=integer, default=1, help="CPU threads (default: 1)")
    add("--seed", type=int, default=0, help="of weights and sequences (default: 0)")
    parser.set_defaults(command="recall", run=_recall)
    return run(parser, arguments, (InvalidProblem, Unsupported))


def _recall(options: Namespace) -> int:
    lengths = tuple(n for n in LENGTHS if n <= options.longest)
    if not lengths or options.longest > LONGEST:
        raise Refused(f"--longest: expected {LENGTHS[0]} to {LONGEST}, got {options.longest}")
    if options.out.suffix not in (".png", ".svg"):
        raise Refused(f"--out: expected a name ending in .png or .svg, got {options.out}")
    if not options.out.parent.is_dir():
        raise Refused(f"--out: expected a name in a folder that exists, got {options.out}")
    for flag in ("most_steps", "answers", "threads"):
        if getattr(options, flag) < 1:
            name = flag.replace("_", "-")
            raise Refused(f"--{name}: expected >= 1, got {getattr(options, flag)}")
    torch.set_num_threads(options.threads)
    rows = compare(
        lengths,
        Settings(seed=options.seed, last_steps=min(Settings.last_steps, options.most_steps)),
        most_steps=options.most_steps,
        answers=options.answers,
    )
    print(table(rows))
    recall_figure(rows).savefig(options.out)
    print(f"wrote {options.out}")
    return 0


def compare(
    lengths: tuple[int, ...], settings: Settings, *, most_steps: int, answers: int
) -> list[Row]:
    """The three models; the first one's steps are those of all."""
    rows: list[Row] = []
    dilated, local = replace(settings, branches=DILATED), replace(settings, branches=LOCAL)
    for name, task, of_model in (
        (f"runs of {RUNS.run}, dilated", RUNS, dilated),
        (f"runs of {RUNS.run}, only the local branch", RUNS, local),
        ("single tokens, dilated", SINGLES, dilated),
    ):
        pace = rows[0].trained.steps if rows else None
        with tqdm(
            desc=name,
            unit="step",
            file=sys.stdout,
            total=pace and sum(pace.values()) + settings.last_steps,
        ) as bar:
            trained = train(
                task, lengths, of_model, most_steps=most_steps, pace=pace, show=_on(bar)
            )
        accuracies = {
            n: judge(trained.model, task, n, seed=settings.seed + 1, answers=answers)
            for n in lengths
        }
        rows.append(Row(name, trained, accuracies))
    return rows


def _on(bar: tqdm) -> Callable[[int, float], None]:
    def show(length: int, accuracy: float) -> None:
        bar.set_postfix_str(f"length {length}, accuracy {accuracy:.3f}", refresh=False)
        bar.update()

    return show


def table(rows: list[Row]) -> str:
    """Accuracies by length, and what the limit of single tokens consists of."""
    lengths = list(rows[0].accuracies)
    lines = ["", f"{'accuracy at length':32}" + "".join(f"{n:>8}" for n in lengths) + "  seconds"]
    for row in rows:
        cells = "".join(f"{row.accuracies[n].all:8.3f}" for n in lengths)
        lines.append(f"{row.name:32}{cells}{row.trained.seconds:9.0f}")
    single, dilation = rows[-1].accuracies, DILATED.dilations[-1]
    for name, attribute in (("same class", "same_class"), ("another class", "other_class")):
        cells = "".join(f"{getattr(single[n], attribute):8.3f}" for n in lengths)
        lines.append(f"{'  … value and question in ' + name:32}{cells}")
    steps = ", ".join(f"{count} at {n}" for n, count in rows[0].trained.steps.items())
    return "\n".join(
        [
            *lines,
            f"Chance is {1 / NUM_VALUES:.3f}. Steps of every model: {steps}, then "
            f"{rows[0].trained.last_steps} at all.",
            f"The far branch (dilation {dilation}) shows a head one position in {dilation}: always "
            f"one of a run of {dilation};",
            "a single token is seen directly only by questions of its own residue class.",
            "",
        ]
    )


def recall_figure(rows: list[Row]) -> Figure:
    """Accuracy against length."""
    figure = Figure(figsize=(8, 4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    lengths = list(rows[0].accuracies)
    for row, colour in zip(rows, _COLOURS, strict=True):
        values = [row.accuracies[n].all for n in lengths]
        axes.plot(lengths, values, marker="o", color=colour, label=row.name)
    axes.axhline(1 / NUM_VALUES, color="black", linestyle=":", linewidth=1, label="chance")
    axes.axvline(LOCAL_SEGMENT, color="black", linestyle="--", linewidth=0.8)
    axes.annotate("local segment", (LOCAL_SEGMENT, 0.5), (4, 0), textcoords="offset points",
                  rotation=90, va="center", fontsize=8)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set(xlabel="sequence length (tokens)", ylabel="share of right answers", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1, 0.6))
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
