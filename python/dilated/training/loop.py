"""The training loop: AdamW, warm-up and cosine, clipped gradients, checkpoints that resume to the
bit.

Everything the next step reads is in the checkpoint: weights, optimiser, sampler, random state,
step. The learning rate is a function of the step alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dilated.models import LongNetLM
from dilated.training.checkpoint import (
    checkpoint_files,
    latest_checkpoint,
    save_checkpoint,
    write_durably,
)
from dilated.training.configuration import TrainConfig, flag
from dilated.training.corpus import Corpus
from dilated.training.errors import TrainingError, reason
from dilated.training.interrupt import stop_on_signal
from dilated.training.progress import progress
from dilated.training.sampler import WindowSampler


@dataclass(frozen=True)
class TrainResult:
    """A run as it stands: the model, its history and whether (and by which signal) it was
    stopped.
    """

    model: LongNetLM
    config: TrainConfig
    history: list[
        dict[str, float]
    ]  # per step: step, loss (nats), learning_rate, grad_norm, seconds
    signal: int | None

    @property
    def finished(self) -> bool:
        """Whether every step was made."""
        return len(self.history) >= self.config.steps


def build_model(config: TrainConfig) -> LongNetLM:
    """The byte-level model of a configuration, with weights drawn from torch's random state."""
    arguments = asdict(config.model)
    sizes = (arguments.pop(name) for name in ("embed_dim", "num_layers", "num_heads"))
    return LongNetLM(256, *sizes, **arguments)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms and biases do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step-th step (from 0): linear warm-up, then half a cosine down to the final rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))
    return config.final_learning_rate + cosine * (config.learning_rate - config.final_learning_rate)


def loss_of(model: LongNetLM, window: Tensor) -> Tensor:
    """Mean nats per byte of windows (batch, context + 1) int64."""
    logits = model(window[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def train(
    config: TrainConfig,
    corpus: Corpus,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    plain: bool | None = None,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Trains a model and writes checkpoints under `out`; Ctrl-C saves and returns early.

    Args:
        config: the run. With `resume`, that of the checkpoint counts, except `steps`.
        corpus: from `read_corpus`, the same one when resuming.
        out: run folder, created when missing.
        resume: go on from the newest whole checkpoint; the losses that follow are those of a run
            that was never stopped, bit for bit, on the same machine and number of threads.
        overwrite: delete the checkpoints of an earlier run in `out`.
        plain: progress as lines; None asks the terminal.
        say: receives messages.

    Returns:
        Model and history; `signal` is set when the run was stopped.

    Raises:
        TrainingError: the folder cannot be written or holds another run, a checkpoint is damaged,
            the corpus is another one, or the loss is not finite.
    """
    out = Path(out)
    _prepare_folder(out, resume, overwrite)
    state = latest_checkpoint(out, say) if resume else None
    if state is not None:
        config = _resumed_config(state, config, corpus)
    torch.manual_seed(config.seed)
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    sampler = WindowSampler(
        corpus.train, context=config.context, batch_size=config.batch_size, seed=config.seed
    )
    history: list[dict[str, float]] = []
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sampler.load_state_dict(state["sampler"])
        torch.set_rng_state(state["rng"])
        history = list(state["history"])
        say(f"resumed at step {len(history)} of {config.steps}")

    def save() -> None:
        state = {
            "step": len(history),
            "config": config.to_dict(),
            "corpus": corpus.fingerprint,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sampler": sampler.state_dict(),
            "rng": torch.get_rng_state(),
            "history": history,
        }
        save_checkpoint(out, len(history), state)
        write_history(out, history)

    first = len(history)
    model.train()
    with stop_on_signal() as stop, progress(first, config.steps, plain=plain) as show:
        while len(history) < config.steps and not stop:
            record = _step(model, optimizer, sampler, config, len(history))
            if not math.isfinite(record["loss"]):
                kept = checkpoint_files(out)
                raise TrainingError(
                    f"--learning-rate: expected a finite loss, got {record['loss']} at step "
                    f"{len(history) + 1} (try a smaller rate than {config.learning_rate:g}; "
                    f"{f'last good checkpoint: {kept[0]}' if kept else 'no checkpoint yet'})"
                )
            history.append(record)
            rate = config.batch_size * config.context / record["seconds"]
            show(len(history), record["loss"] / math.log(2), rate)
            if len(history) % config.checkpoint_every == 0 and len(history) < config.steps:
                save()
        if len(history) > first or state is None:
            save()
    return TrainResult(model, config, history, stop.signal)


def _step(
    model: LongNetLM,
    optimizer: torch.optim.AdamW,
    sampler: WindowSampler,
    config: TrainConfig,
    step: int,
) -> dict[str, float]:
    begin = time.perf_counter()
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, sampler.next_batch())
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    return {
        "step": step + 1,
        "loss": loss.item(),
        "learning_rate": rate,
        "grad_norm": norm.item(),
        "seconds": time.perf_counter() - begin,
    }


def write_history(out: Path, history: list[dict[str, float]]) -> None:
    """One JSON object per step in `history.jsonl`; floats are written so that they read back
    exactly.
    """
    lines = "".join(json.dumps(record) + "\n" for record in history)
    temporary = out / ".history.jsonl.tmp"
    try:
        write_durably(temporary, lines.encode())
        temporary.replace(out / "history.jsonl")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainingError(
            f"--out: expected to write {out / 'history.jsonl'}, got: {reason(error)}"
        ) from None


def _prepare_folder(out: Path, resume: bool, overwrite: bool) -> None:
    kept = checkpoint_files(out)
    if kept and not resume and not overwrite:
        raise TrainingError(
            f"--out: expected a folder without checkpoints, got {out} with {kept[0].name} "
            "(--resume continues that run, --overwrite deletes it)"
        )
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = out / "checkpoints" / ".probe.tmp"
        write_durably(probe, b"dilated")
        for stale in (out / "checkpoints").glob(".*.tmp"):
            stale.unlink()
        if overwrite and not resume:
            for path in kept:
                path.unlink()
    except OSError as error:
        raise TrainingError(
            f"--out: expected a writable folder, got {out} ({reason(error)})"
        ) from None


def _resumed_config(state: dict[str, Any], asked: TrainConfig, corpus: Corpus) -> TrainConfig:
    # The same bytes under another path are the same corpus; the fingerprint decides.
    movable = {"steps": asked.steps, "input": asked.input}
    config = TrainConfig.from_dict({**state["config"], **movable})
    if state["corpus"] != corpus.fingerprint:
        raise TrainingError(
            f"--input: expected the corpus of the checkpoint (sha256 {state['corpus'][:12]}), got "
            f"{corpus.origin} (sha256 {corpus.fingerprint[:12]}; its files changed)"
        )
    if config.to_dict() != asked.to_dict():
        changed = _first_difference(config.to_dict(), asked.to_dict())
        raise TrainingError(
            f"{changed} (--resume continues a run as it was started; only --steps may change)"
        )
    return config


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    for name, value in before.items():
        if isinstance(value, dict) and value != now[name]:
            return _first_difference(value, now[name])
        if value != now[name]:
            return f"{flag(name)}: expected {value} as in the checkpoint, got {now[name]}"
    raise AssertionError("no difference")
