"""Trains a LongNetLM on recall, short sequences first; judges it at every length.

The first model sets the pace: it goes on to the next length once it answers almost everything at
this one. Models to compare with are given the same steps at the same lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from dilated.models import LongNetLM
from spans import VOCABULARY, Recall

LOCAL_SEGMENT, LONGEST = 64, 1024
_TOKENS_PER_STEP = 4096
_MASTERED, _SMOOTHING = 0.98, 0.9


@dataclass(frozen=True)
class Branches:
    """What a model may see."""

    segments: tuple[int, ...]
    dilations: tuple[int, ...]


DILATED = Branches((LOCAL_SEGMENT, LONGEST), (1, 4))
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
    seed: int = 0


@dataclass
class Trained:
    """A model and the number of steps it made at each length."""

    model: LongNetLM
    steps: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


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
    show: Callable[[int, int, float], None] = lambda length, step, accuracy: None,
) -> Trained:
    """Trains through the lengths.

    Args:
        task: what to recall.
        lengths: of the sequences, ascending.
        settings: of model and optimiser.
        most_steps: at one length, whether or not it is mastered.
        pace: steps at each length; None: until mastered.
        show: is told length, step and running accuracy after every step.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    trained = Trained(build_model(settings))
    model, begin, done = trained.model, time.perf_counter(), 0
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    for length in lengths:
        running = 0.0
        for step in range(1, (most_steps if pace is None else pace[length]) + 1):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, (done + 1) / settings.warmup_steps)
            batch = task.sample(max(1, _TOKENS_PER_STEP // length), length, generator)
            wanted = batch.answers >= 0
            logits = model.output_projection(model.features(batch.tokens)[wanted])
            targets = batch.answers[wanted]
            loss = functional.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            right = float((logits.argmax(-1) == targets).float().mean())
            running += (1 - _SMOOTHING) * (right - running)
            trained.steps[length] = step
            show(length, step, running)
            if pace is None and running > _MASTERED:
                break
    trained.seconds = time.perf_counter() - begin
    return trained


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
