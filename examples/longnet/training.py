"""The training loop: AdamW, warm-up and cosine, clipped gradients, checkpoints that resume to the
bit.

Everything the next step reads is in the checkpoint: weights, optimiser, sampler, random state,
step; the learning rate follows from step and configuration. Weights are saved only after they gave
a finite loss and a finite gradient for the bytes that come next, so every checkpoint can go on.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from tqdm import tqdm

from configuration import TrainConfig, build_model, flag
from corpus import Corpus
from dilated.models import LongNetLM
from errors import TrainingError, reason
from run_folder import RunFolder
from sampler import NO_TARGET, Batch, WindowSampler
from stop import StopRequest, stop_on_signal

# What --resume may change; the rest is the run.
_CHANGEABLE = ("steps", "learning_rate", "checkpoint_every", "input", "glob")
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class TrainResult:
    """A run as it stands: model, history, and whether (and by which signal) it was stopped."""

    model: LongNetLM
    config: TrainConfig
    history: list[
        dict[str, float]
    ]  # of each step: step, loss (nats), learning_rate, grad_norm, seconds
    corpus: str  # fingerprint of what it learnt from
    signal: int | None = None


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms and biases do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, done: int = 0
) -> LRScheduler:
    """Linear warm-up, then half a cosine down to the final rate; `done` steps are behind it."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.learning_rate
    warmup = config.warmup_steps
    rest: LRScheduler = CosineAnnealingLR(
        optimizer,
        T_max=max(1, config.steps - warmup),
        eta_min=config.final_rate * config.learning_rate,
    )
    if warmup:
        rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        rest = SequentialLR(optimizer, [rise, rest], milestones=[warmup])
    optimizer.step()  # without gradients: nothing moves, and the scheduler sees its order kept
    for _ in range(done):
        rest.step()
    return rest


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean nats per byte that has a target."""
    packed = {} if batch.cu_seqlens is None else {"cu_seqlens": batch.cu_seqlens}
    logits = model(batch.tokens, **packed).flatten(0, -2)
    return functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=NO_TARGET)


class _Run:
    """What a step changes, and how it goes to and from a checkpoint."""

    def __init__(self, config: TrainConfig, corpus: Corpus, state: dict[str, Any] | None) -> None:
        self.config, self.corpus = config, corpus
        torch.manual_seed(config.seed)
        self.model = build_model(config)
        self.optimizer = build_optimizer(self.model, config)
        self.sampler = WindowSampler(
            corpus,
            context=config.context,
            batch_size=config.batch_size,
            seed=config.seed,
            separate_documents=config.separate_documents,
        )
        self.history: list[dict[str, float]] = []
        if state is not None:
            with _written_by_this_program():
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.sampler.load_state_dict(state["sampler"])
                self.history = list(state["history"])
                torch.set_rng_state(state["rng"])
        self.schedule = build_schedule(self.optimizer, config, done=len(self.history))
        self.model.train()
        self.mark()

    def mark(self) -> None:
        """Remembers from where the next batch and its dropout are drawn."""
        self._place = {"sampler": self.sampler.state_dict(), "rng": torch.get_rng_state()}

    def gradients(self) -> tuple[float, float]:
        """Loss and gradient norm of the next batch, left in the parameters and clipped."""
        loss = loss_of(self.model, self.sampler.next_batch())
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        return loss.item(), norm.item()

    def save(self, folder: RunFolder) -> None:
        """A checkpoint that goes on where `mark` was."""
        state = {
            "config": self.config.to_json(),
            "corpus": self.corpus.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            **self._place,
        }
        folder.save(len(self.history), state)
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in self.history)
        folder.write("history.jsonl", lines.encode())


def train(
    config: TrainConfig,
    corpus: Corpus,
    folder: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    plain: bool | None = None,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Trains a model and writes checkpoints; a signal saves and returns early.

    Args:
        config: the run. With `resume`, that of the checkpoint, but for what may change.
        corpus: from `read_corpus`, the same one when resuming.
        folder: of the run, locked (inside its `with`).
        resume: go on from the newest whole checkpoint; the losses that follow are those of a run
            that was never stopped, bit for bit, on the same machine and number of threads.
        overwrite: the first checkpoint of this run replaces those of an earlier one.
        plain: progress as lines; None asks the terminal.
        say: receives messages.

    Raises:
        TrainingError: a setting cannot work, the folder holds another run, a checkpoint is
            damaged, the corpus is another one, loss or gradient are not finite, or the standard
            output is gone.
    """
    config.check()
    if config.separate_documents and corpus.starts.numel() == 1:
        raise TrainingError(
            f"--separate-documents: expected several documents, got one ({corpus.origin})"
        )
    state = None
    if resume:
        state = folder.latest(say)
        check_resumed(state, config, corpus)
    elif overwrite:
        folder.replace_run()
    elif kept := folder.checkpoints():
        raise TrainingError(
            f"--out: expected a folder without checkpoints, got {folder.path} with {kept[0].name} "
            "(--resume continues that run, --overwrite replaces it)"
        )
    run = _Run(config, corpus, state)
    first = len(run.history)
    result = TrainResult(run.model, config, run.history, corpus.fingerprint)
    if state is not None:
        say(f"resumed at step {first} of {config.steps}")
        if first == config.steps:
            return result
    show = _Display(first, config.steps, plain)
    with stop_on_signal() as stop:
        try:
            _steps(run, folder, show, stop)
        finally:
            show.close()
    if stop.output is not None and stop.signal is None:
        raise TrainingError(
            f"standard output: expected one that takes lines, got: {reason(stop.output)} (stopped "
            f"at step {len(run.history)} of {config.steps}, saved; --resume goes on)"
        )
    return replace(result, signal=stop.signal)


def _steps(run: _Run, folder: RunFolder, show: _Display, stop: StopRequest) -> None:
    """Steps until the last one or a request; the run is saved whenever it leaves whole."""
    config, history = run.config, run.history
    saved = len(history)
    while True:
        begin = time.perf_counter()
        run.mark()
        try:
            loss, norm = run.gradients()
        except BaseException:  # out of memory, say: these weights are still those of the last step
            if len(history) > saved and _finite(run.model):
                run.save(folder)
            raise
        _check_finite(run, folder, loss, norm)
        ended = bool(stop) or len(history) == config.steps
        if ended or (len(history) % config.checkpoint_every == 0 and len(history) > saved):
            run.save(folder)
            saved = len(history)
        if ended:
            return
        rate = run.optimizer.param_groups[0]["lr"]
        run.optimizer.step()
        run.schedule.step()
        seconds = time.perf_counter() - begin
        history.append(
            {
                "step": len(history) + 1,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "seconds": seconds,
            }
        )
        try:
            show(len(history), loss / math.log(2), config.batch_size * config.context / seconds)
        except OSError as error:
            stop.output = error


def _finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


def _check_finite(run: _Run, folder: RunFolder, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    kept = folder.own_checkpoints()
    rate = f"--learning-rate {run.config.learning_rate / 4:g}"
    advice = f"go on from {kept[0].name} with --resume {rate}" if kept else f"start with {rate}"
    raise TrainingError(
        f"--learning-rate: expected a finite loss and gradient, got loss {loss} and gradient norm "
        f"{norm} after {len(run.history)} steps at {run.config.learning_rate:g} ({advice})"
    )


@contextmanager
def _written_by_this_program() -> Iterator[None]:
    """A checkpoint whose parts do not fit each other is the user's to mend, in one line."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise TrainingError(
            f"--out: expected a checkpoint of this program, got one that does not fit it ({what})"
        ) from None


def saved_config(state: dict[str, Any]) -> TrainConfig:
    """The configuration of a checkpoint."""
    with _written_by_this_program():
        return TrainConfig.from_json(state["config"])


def saved_result(state: dict[str, Any]) -> TrainResult:
    """The run of a checkpoint as it stands."""
    with _written_by_this_program():
        model = build_model(config := saved_config(state))
        model.load_state_dict(state["model"])
        return TrainResult(model, config, list(state["history"]), state["corpus"])


def check_resumed(state: dict[str, Any], asked: TrainConfig, corpus: Corpus) -> None:
    """Raises TrainingError if the run of a checkpoint is not the one that is asked for."""
    before, now = (asdict(config) for config in (saved_config(state), asked))
    for values in (before, now):
        values.update(values.pop("model"))
    # The same bytes under another path are the same corpus; the fingerprint decides.
    for name in before:
        if name not in _CHANGEABLE and before[name] != now[name]:
            raise TrainingError(
                f"{flag(name)}: expected {before[name]} as in the checkpoint, got {now[name]} "
                f"(only {', '.join(flag(n) for n in _CHANGEABLE)} may change; --overwrite starts "
                "anew)"
            )
    if asked.steps < state["step"]:
        raise TrainingError(
            f"--steps: expected >= {state['step']}, the steps made so far, got {asked.steps}"
        )
    if state["corpus"] != corpus.fingerprint:
        raise TrainingError(
            f"--input: expected the corpus of the checkpoint (sha256 {state['corpus'][:12]}), got "
            f"{corpus.origin} (sha256 {corpus.fingerprint[:12]}; its files changed)"
        )


class _Display:
    """A tqdm bar on a terminal, else a line every ten seconds."""

    def __init__(self, first: int, steps: int, plain: bool | None) -> None:
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._plain = plain if plain is not None else not on_terminal
        self._first, self._steps, self._begin = first, steps, time.monotonic()
        self._last = -math.inf
        columns, lines = shutil.get_terminal_size()  # tqdm shows nothing where a terminal says 0
        tqdm.monitor_interval = 0  # no thread that writes when nobody asked
        self._bar = tqdm(
            total=steps,
            initial=first,
            unit="step",
            file=sys.stdout,
            disable=self._plain,
            ncols=columns,
            nrows=lines,
        )

    def __call__(self, step: int, bits: float, rate: float) -> None:
        """Shows one finished step; OSError if nobody can see it."""
        text = f"{bits:.3f} bits/byte | {rate / 1e3:.1f} kB/s"
        now = time.monotonic()
        if not self._plain:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif step == self._steps or now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            left = (now - self._begin) / (step - self._first) * (self._steps - step)
            print(
                f"step {step}/{self._steps} | {text} | {tqdm.format_interval(left)} left",
                flush=True,
            )

    def close(self) -> None:
        """Leaves the bar as it is."""
        with suppress(OSError):
            self._bar.close()
