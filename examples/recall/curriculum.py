"""Trains a LongNetLM on recall, short sequences first; judges it at every length.

The first model sets the pace: it goes on to the next length once it answers 95 % at this one, and
at last makes some steps at all lengths with a rate that falls to zero. Models to compare with are
given the same steps at the same lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dilated.models import LongNetLM
from spans import VOCABULARY, Recall

LOCAL_SEGMENT, LONGEST = 64, 1024
_TOKENS_PER_STEP = 4096
_MASTERED, _SMOOTHING = 0.95, 0.9


@dataclass(frozen=True)
class Branches:
    """What a model may see."""

    segments: tuple[int, ...]
    dilations: tuple[int, ...]


DILATED = Branches((LOCAL_SEGMENT, 256, LONGEST), (1, 2, 4))
LOCAL = Branches((LOCAL_SEGMENT,), (1,))


@dataclass(frozen=True)
class Settings:
    """Model and optimiser."""

    branches: Branches = DILATED
    embed_dim: int = 64
    num_layers: int = 2
    num_heads: int = 4
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    last_steps: int = 250
    seed: int = 0


@dataclass
class Trained:
    """A model, the steps it made at each length, and those at all of them."""

    model: LongNetLM
    steps: dict[int, int]
    last_steps: int
    seconds: float


def build_model(settings: Settings) -> LongNetLM:
    """The same weights for every choice of branches: they have none of their own."""
    torch.manual_seed(settings.seed)
    return LongNetLM(
        VOCABULARY,
        settings.embed_dim,
        settings.num_layers,
        settings.num_heads,
        segments=settings.branches.segments,
        dilations=settings.branches.dilations,
        ffn_dim=2 * settings.embed_dim,
        scale_embedding=True,
    )


def train(
    task: Recall,
    lengths: Sequence[int],
    settings: Settings,
    *,
    most_steps: int,
    pace: dict[int, int] | None = None,
    show: Callable[[int, float], None] = lambda length, accuracy: None,
) -> Trained:
    """Trains through the lengths, then on all of them with a rate that falls to zero.

    Args:
        task: what to recall.
        lengths: of the sequences, ascending.
        settings: of model and optimiser.
        most_steps: at one length, whether or not it is mastered.
        pace: steps at each length; None: until mastered.
        show: is told length and running accuracy after every step.
    """
    begin, run = time.perf_counter(), _Run(task, settings)
    steps: dict[int, int] = {}
    for length in lengths:
        running = 0.0
        for step in range(1, (most_steps if pace is None else pace[length]) + 1):
            running += (1 - _SMOOTHING) * (run.step(length, 1.0) - running)
            steps[length] = step
            show(length, running)
            if pace is None and running > _MASTERED:
                break
    for step in range(settings.last_steps):
        length = lengths[-1 - step % len(lengths)]
        running += (1 - _SMOOTHING) * (run.step(length, 1 - step / settings.last_steps) - running)
        show(length, running)
    return Trained(run.model, steps, settings.last_steps, time.perf_counter() - begin)


class _Run:
    """A model, its optimiser and its sequences."""

    def __init__(self, task: Recall, settings: Settings) -> None:
        self.task, self.settings, self.done = task, settings, 0
        self.model = build_model(settings)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )

    def step(self, length: int, rate: float) -> float:
        """One step at that share of the learning rate; the share of right answers before it."""
        warm = min(1.0, (self.done + 1) / self.settings.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate * warm
        batch = self.task.sample(max(1, _TOKENS_PER_STEP // length), length, self.generator)
        wanted = batch.answers >= 0
        logits = self.model.output_projection(self.model.features(batch.tokens)[wanted])
        targets = batch.answers[wanted]
        loss = functional.cross_entropy(logits, targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        return float((logits.argmax(-1) == targets).float().mean())


@dataclass(frozen=True)
class Accuracy:
    """Shares of right answers: of all, and by whether the value that is asked for ends in the
    residue class of the question, where the far branch sees it. NaN where there are none.
    """

    all: float
    same_class: float
    other_class: float


@torch.no_grad()
def judge(model: LongNetLM, task: Recall, length: int, *, seed: int, answers: int) -> Accuracy:
    """Answers to fresh questions, beyond the reach of the local branch if length allows.

    Args:
        model: is put into evaluation mode.
        task: what to recall.
        length: of the sequences.
        seed: of the sequences; not one of training.
        answers: how many to ask for, at least.
    """
    model.eval()
    dilation = DILATED.dilations[-1]
    generator = torch.Generator().manual_seed(seed)
    right, same = [], []
    per_batch = max(1, 4 * _TOKENS_PER_STEP // length)
    for _ in range(-(-answers // (per_batch * task.pairs))):
        batch = task.sample(per_batch, length, generator)
        rows = torch.arange(per_batch)[:, None]
        logits = model.output_projection(model.features(batch.tokens)[rows, batch.asked])
        right.append(logits.argmax(-1) == batch.answers[rows, batch.asked])
        same.append(batch.asked % dilation == batch.stored % dilation)
    hits, near = torch.cat(right).double().flatten(), torch.cat(same).flatten()
    return Accuracy(*(float(part.mean()) for part in (hits, hits[near], hits[~near])))
