"""Trains the same model on several processes, each with a part of every sequence.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/longnet/ranks.py --out run
    python examples/longnet/ranks.py --out run      # one process: the same losses

Ranks form a grid (data, sequence): those of a row share the windows of a step, those of a column
hold other windows. Checkpoints are torch.distributed.checkpoint's, whole for any number of ranks;
a run goes on from the newest one by itself, also when torchrun starts its ranks again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

from configuration import TrainConfig, build_model
from corpus import Corpus, read_corpus
from dilated import InvalidProblem, Unsupported
from dilated.cli import Parser, integer, run
from dilated.distributed import SequenceGroups, mean_loss, sum_gradients, sum_over_ranks
from errors import TrainingError
from sampler import NO_TARGET, WindowSampler
from training import build_optimizer, build_schedule

_KEPT = 2


def main(arguments: list[str] | None = None) -> int:
    """One rank. None reads sys.argv. Returns the exit code."""
    return run(_parser(), arguments, (TrainingError, InvalidProblem, Unsupported))


def _parser() -> Parser:
    parser = Parser(prog="ranks", description="Train a LongNet on shards of its sequences.")
    add = parser.add_argument
    add("--input", help="file or folder to learn from (default: the standard library's sources)")
    add("--out", type=Path, default=Path("run-ranks"), help="folder of checkpoints and history")
    for flag, default, text in (
        ("--steps", 40, "optimiser steps"),
        ("--context", 8192, "bytes per window"),
        ("--batch-size", 1, "windows per step"),
        ("--embed-dim", 128, "width of the model"),
        ("--num-layers", 2, "decoder layers"),
        ("--checkpoint-every", 10, "steps between checkpoints"),
        ("--data-ranks", 1, "rows of the grid: ranks / data-ranks share a sequence"),
    ):
        add(flag, type=integer, default=default, help=f"{text} (default: {default})")
    add("--fail-at", type=integer, help="the last rank kills itself once, before this step")
    parser.set_defaults(command="train", run=_train)
    return parser


def _train(options: Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if value is not None}
    config = TrainConfig(warmup_steps=options.steps // 5).with_options(given)
    config.check()
    corpus = read_corpus(config.input, glob=None, context=config.context)
    _join()
    try:
        size = dist.get_world_size()
        if size % options.data_ranks or config.batch_size % options.data_ranks:
            expected = f"a divisor of {size} ranks and of --batch-size {config.batch_size}"
            raise TrainingError(f"--data-ranks: expected {expected}, got {options.data_ranks}")
        _Ranks(config, corpus, options).train()
    finally:
        dist.destroy_process_group()
    return 0


def _join() -> None:
    """All ranks that torchrun started; without it, this process alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Restarted ranks find the store as it was, with the addresses of those that are gone.
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        prefix = f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        fresh = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=fresh, rank=rank, world_size=size)
        cores = os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


class _Ranks:
    """This rank of the run: weights, optimiser and losses are the same bits on all of them."""

    def __init__(self, config: TrainConfig, corpus: Corpus, options: Namespace) -> None:
        self.config, self.out, self.fail_at = config, options.out, options.fail_at
        rows = options.data_ranks
        grid = (rows, dist.get_world_size() // rows)
        mesh = init_device_mesh("cpu", grid, mesh_dim_names=("data", "sequence"))
        self.row, self.rows = mesh.get_local_rank("data"), rows
        self.everyone = SequenceGroups()
        self.groups = SequenceGroups(mesh["sequence"])
        torch.manual_seed(config.seed)
        self.model = build_model(config)
        self.optimizer = build_optimizer(self.model, config)
        self.sampler = WindowSampler(
            corpus, context=config.context, batch_size=config.batch_size, seed=config.seed
        )
        self.losses: list[float] = []
        self._load()
        self.schedule = build_schedule(self.optimizer, config, done=len(self.losses))

    def train(self) -> None:
        """Steps from the newest checkpoint to the last."""
        self._say(f"step {len(self.losses)} of {self.config.steps} on {self.everyone.size} ranks")
        while (step := len(self.losses)) < self.config.steps:
            if step == self.fail_at and self._is_victim():
                os.kill(os.getpid(), signal.SIGKILL)
            with self.everyone, self.groups:
                self.losses.append(self._step())
            step += 1
            if step % self.config.checkpoint_every == 0 or step == self.config.steps:
                self._save()
                self._say(f"step {step} | loss {self.losses[-1]:.4f} nats per byte")

    def _step(self) -> float:
        batch = self.sampler.next_batch()
        shards = self.groups.shards(self.config.context)
        tokens, targets = (
            self.groups.shard(whole[self.row :: self.rows], shards=shards)
            for whole in (batch.tokens, batch.targets)
        )
        logits = self.model(tokens, sequence_groups=self.groups, shards=shards)
        total = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
        )
        count = int((targets != NO_TARGET).sum())
        loss = mean_loss(total, count, sequence_groups=self.everyone)
        self.optimizer.zero_grad()
        loss.backward()
        sum_gradients(self.model.parameters(), sequence_groups=self.everyone)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.schedule.step()
        return float(sum_over_ranks(loss.detach(), sequence_groups=self.everyone))

    def _is_victim(self) -> bool:
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        return first_start and self.everyone.rank == self.everyone.size - 1

    def _say(self, text: str) -> None:
        if self.everyone.rank == 0:
            print(text, flush=True)

    def _state(self, steps: int) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        losses = torch.zeros(steps, dtype=torch.float64)
        losses[: len(self.losses)] = torch.tensor(self.losses, dtype=torch.float64)
        place = torch.tensor(list(self.sampler.state_dict().values()))
        return {"model": model, "optimizer": optimizer, "losses": losses, "sampler": place}

    def _checkpoints(self) -> list[Path]:
        """Whole ones, the newest last: their metadata are written when all else is."""
        return sorted(path.parent for path in self.out.glob("step-*/.metadata"))

    def _save(self) -> None:
        path = self.out / f"step-{len(self.losses):06}"
        save(self._state(len(self.losses)), checkpoint_id=path)
        if self.everyone.rank == 0:
            lines = [json.dumps({"step": i + 1, "loss": x}) for i, x in enumerate(self.losses)]
            (self.out / "history.jsonl").write_text("\n".join(lines) + "\n")
            for old in self._checkpoints()[:-_KEPT]:
                shutil.rmtree(old)

    def _load(self) -> None:
        kept = self._checkpoints()
        if not kept:
            return
        state = self._state(int(kept[-1].name.removeprefix("step-")))
        load(state, checkpoint_id=kept[-1])
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.losses = state["losses"].tolist()
        names = self.sampler.state_dict()
        self.sampler.load_state_dict(dict(zip(names, state["sampler"].tolist(), strict=True)))


if __name__ == "__main__":
    raise SystemExit(main())
