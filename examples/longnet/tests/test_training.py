"""Training learns, resumes to the bit, and saves nothing that cannot go on."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import training
from configuration import ModelConfig, TrainConfig, build_model
from corpus import Corpus, read_corpus
from errors import TrainingError
from run_folder import RunFolder
from sampler import Batch
from training import TrainResult, build_optimizer, build_schedule, loss_of, train

TINY = TrainConfig(
    context=64,
    batch_size=2,
    steps=6,
    learning_rate=1e-2,
    warmup_steps=2,
    checkpoint_every=2,
    model=ModelConfig(
        embed_dim=16, num_layers=2, num_heads=2, segments=(16, 64), dilations=(1, 2), dropout=0.1
    ),
)


def quiet_train(config: TrainConfig, corpus: Corpus, out: Path, **options: Any) -> TrainResult:
    with RunFolder(out) as folder:
        return train(config, corpus, folder, plain=True, say=lambda _: None, **options)


def losses(result: TrainResult) -> list[float]:
    return [record["loss"] for record in result.history]


def newest(out: Path) -> int:
    return int(RunFolder(out).checkpoints()[0].stem[5:])


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (100, 1), (100, 0), (5, 10)])
@pytest.mark.parametrize("done", [0, 1, 7])
def test_rate_warms_up_then_falls(steps: int, warmup: int, done: int) -> None:
    """Linear up to the rate, half a cosine down to a tenth of it; the same after a resume."""
    config = replace(TINY, steps=steps, warmup_steps=warmup, learning_rate=1.0)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), config)
    schedule = build_schedule(optimizer, config, done)
    for step in range(done, steps):
        place = min(1.0, (step - warmup) / max(1, steps - warmup))
        expected = (step + 1) / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * place)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12), step
        optimizer.step()
        schedule.step()


def test_training_learns(corpus: Corpus, tmp_path: Path) -> None:
    config = replace(TINY, steps=30, model=replace(TINY.model, dropout=0.0))
    result = quiet_train(config, corpus, tmp_path / "run")
    assert losses(result)[-1] < 0.7 * losses(result)[0]
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == losses(result)


# --- documents kept apart -----------------------------------------------------------------------


def test_a_pack_learns_what_its_documents_learn_alone() -> None:
    """Loss and gradients of packed pieces are those of every piece by itself."""
    config = replace(TINY, model=replace(TINY.model, dropout=0.0))
    torch.manual_seed(0)
    model = build_model(config).double()
    lengths, starts = [30, 1, 40, 57], [0, 30, 31, 71, 128]
    tokens, targets = torch.randint(256, (2, 128))
    targets[[29, 70]] = -100
    loss = loss_of(model, Batch(tokens, targets, starts))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    pieces = zip(tokens.split(lengths), targets.split(lengths), strict=True)
    parts = [
        loss_of(model, Batch(a[None], b[None])) * int((b >= 0).sum())
        for a, b in pieces
        if (b >= 0).any()
    ]
    alone = sum(parts) / int((targets >= 0).sum())
    assert loss.item() == pytest.approx(alone.item(), rel=1e-12)
    for g, h in zip(gradients, torch.autograd.grad(alone, list(model.parameters())), strict=True):
        assert torch.allclose(g, h, rtol=1e-8, atol=1e-12)


def test_documents_apart_train_and_resume(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}").write_bytes(f"text {i} ".encode() * (5 + i))
    corpus = read_corpus(tmp_path / "texts", context=64)
    config = replace(TINY, separate_documents=True)
    whole = quiet_train(config, corpus, tmp_path / "whole")
    _stopped_after(3, corpus, tmp_path / "parts", config)
    assert losses(quiet_train(config, corpus, tmp_path / "parts", resume=True)) == losses(whole)
    assert losses(quiet_train(TINY, corpus, tmp_path / "joined")) != losses(whole)


def test_one_document_cannot_be_kept_apart(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^--separate-documents: expected several documents"):
        quiet_train(replace(TINY, separate_documents=True), corpus, tmp_path / "run")


# --- stop and resume ----------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_is_exact_to_the_bit(corpus: Corpus, tmp_path: Path, stop: int) -> None:
    """Losses, rates and weights of an interrupted run equal those of a whole one, with dropout."""
    whole = quiet_train(TINY, corpus, tmp_path / "whole")
    _stopped_after(stop, corpus, tmp_path / "parts")
    assert newest(tmp_path / "parts") == stop
    torch.manual_seed(12345)  # whatever the random state was before, the checkpoint's counts
    resumed = quiet_train(TINY, corpus, tmp_path / "parts", resume=True)
    for before, after in zip(whole.history, resumed.history, strict=True):
        names = ("step", "loss", "learning_rate", "grad_norm")
        assert [before[name] for name in names] == [after[name] for name in names]
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def _during_step(step: int, act: Any) -> Any:
    """`_Run.gradients`, but `act` comes first in that step (from 1)."""
    original = training._Run.gradients

    def gradients(run: Any) -> tuple[float, float]:
        if len(run.history) == step - 1:
            act(run)
        return original(run)

    return gradients


def _stopped_after(steps: int, corpus: Corpus, out: Path, config: TrainConfig = TINY) -> None:
    """Runs until real signals that arrive while step `steps` is at work."""
    original = training._Run.mark

    def mark(run: Any) -> None:
        original(run)
        if len(run.history) == steps:
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # impatience harms nobody
                os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "mark", mark)
        result = quiet_train(config, corpus, out)
    assert result.signal == signal.SIGTERM
    assert len(result.history) == steps


@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT", "SIGUSR1", "SIGXCPU"])
def test_every_signal_saves(
    corpus: Corpus, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name)
    monkeypatch.setattr(
        training._Run, "gradients", _during_step(4, lambda _: os.kill(os.getpid(), number))
    )
    assert quiet_train(TINY, corpus, tmp_path / "run").signal == number
    assert newest(tmp_path / "run") == 3


def test_ignored_signals_stay_ignored(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(
        training._Run, "gradients", _during_step(4, lambda _: os.kill(os.getpid(), signal.SIGHUP))
    )
    try:
        assert quiet_train(TINY, corpus, tmp_path / "run").signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_in_a_step_saves_the_steps_before(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory at step 4: the run goes on from 3 as if nothing had been."""
    whole = quiet_train(TINY, corpus, tmp_path / "whole")

    def fail(run: Any) -> None:
        run.sampler.next_batch()
        torch.rand(3)
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "gradients", _during_step(4, fail))
        with pytest.raises(MemoryError):
            quiet_train(TINY, corpus, tmp_path / "run")
    assert newest(tmp_path / "run") == 3
    assert losses(quiet_train(TINY, corpus, tmp_path / "run", resume=True)) == losses(whole)


def test_finished_run_resumes_to_nothing_or_to_more(corpus: Corpus, tmp_path: Path) -> None:
    first = quiet_train(TINY, corpus, tmp_path / "run")
    again = quiet_train(TINY, corpus, tmp_path / "run", resume=True)
    assert losses(again) == losses(first)
    more = quiet_train(replace(TINY, steps=9), corpus, tmp_path / "run", resume=True)
    assert losses(more)[:6] == losses(first)
    assert len(more.history) == 9
    with pytest.raises(TrainingError) as caught:
        quiet_train(replace(TINY, steps=5), corpus, tmp_path / "run", resume=True)
    assert str(caught.value) == "--steps: expected >= 9, the steps made so far, got 5"


# --- divergence ---------------------------------------------------------------------------------


def _wild_from(step: int) -> Any:
    """Weights so large, from that step on, that the next loss is not finite."""

    def act(run: Any) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = 1e30

    return _during_step(step, act)


def test_divergence_leaves_a_run_that_can_go_on(corpus: Corpus, tmp_path: Path) -> None:
    """The advice, followed, works: the weights of every checkpoint gave a finite gradient."""
    out = tmp_path / "run"
    every = replace(TINY, checkpoint_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "gradients", _wild_from(4))
        with pytest.raises(TrainingError) as caught:
            quiet_train(every, corpus, out)
    assert str(caught.value).startswith(
        "--learning-rate: expected a finite loss and gradient, got loss nan and gradient norm nan "
        "after 4 steps at 0.01 (go on from step-00000003.pt with --resume --learning-rate 0.0025)"
    )
    assert newest(out) == 3  # step 4 made the weights finite, but useless
    resumed = quiet_train(replace(every, learning_rate=0.0025), corpus, out, resume=True)
    assert resumed.history[2]["learning_rate"] == pytest.approx(0.01)
    assert 0 < resumed.history[3]["learning_rate"] < 0.0025
    assert len(resumed.history) == 6
    for line in (out / "history.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_divergence_at_the_last_step_is_not_saved(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "gradients", _wild_from(6))
        with pytest.raises(TrainingError, match="after 6 steps"):
            quiet_train(TINY, corpus, tmp_path / "run")
    assert newest(tmp_path / "run") == 4


def test_divergence_at_once_keeps_the_run_it_was_to_replace(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = quiet_train(TINY, corpus, out)
    wild = replace(TINY, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(
        TrainingError, match=r"after 1 steps at 1e\+30 \(start with --learning-rate"
    ):
        quiet_train(wild, corpus, out, overwrite=True)
    assert losses(quiet_train(TINY, corpus, out, resume=True)) == losses(first)


# --- settings -----------------------------------------------------------------------------------


def test_wrong_settings_name_themselves(corpus: Corpus, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    quiet_train(TINY, corpus, out)
    with pytest.raises(TrainingError) as caught:
        quiet_train(TINY, corpus, out)
    assert str(caught.value) == (
        f"--out: expected a folder without checkpoints, got {out} with step-00000006.pt "
        "(--resume continues that run, --overwrite replaces it)"
    )
    with pytest.raises(TrainingError) as caught:
        quiet_train(replace(TINY, batch_size=1), corpus, out, resume=True)
    assert str(caught.value) == (
        "--batch-size: expected 2 as in the checkpoint, got 1 (only --steps, --learning-rate, "
        "--checkpoint-every, --input, --glob may change; --overwrite starts anew)"
    )
    text.write_bytes(text.read_bytes()[::-1])
    changed = read_corpus(text, context=64)
    with pytest.raises(TrainingError) as caught:
        quiet_train(TINY, changed, out, resume=True)
    assert str(caught.value) == (
        f"--input: expected the corpus of the checkpoint (sha256 {corpus.fingerprint[:12]}), got "
        f"{text} (sha256 {changed.fingerprint[:12]}; its files changed)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size: expected >= 1, got 0"),
        ({"warmup_steps": -1}, "--warmup-steps: expected >= 0, got -1"),
        ({"learning_rate": math.nan}, "--learning-rate: expected a finite number > 0, got nan"),
        ({"learning_rate": math.inf}, "--learning-rate: expected a finite number > 0, got inf"),
        ({"seed": 2**64}, f"--seed: expected an integer of 64 bits, got {2**64}"),
        ({"context": 10**18}, "--context, --batch-size: expected a run that fits into the "),
        ({"embed_dim": 10**18}, "--embed-dim, --num-layers, --ffn-dim: expected a run that fits "),
        ({"num_layers": 10**18}, "--embed-dim, --num-layers, --ffn-dim: expected a run that fits "),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError) as caught:
        TINY.with_options(changes).check()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63, 2**64 - 1])
def test_seeds_of_64_bits(corpus: Corpus, tmp_path: Path, seed: int) -> None:
    quiet_train(replace(TINY, seed=seed, steps=1), corpus, tmp_path / "run")
    resumed = quiet_train(replace(TINY, seed=seed, steps=2), corpus, tmp_path / "run", resume=True)
    assert len(resumed.history) == 2


def test_configuration_goes_through_json() -> None:
    config = replace(TINY, input="/\udcff/text")  # a name that is no text
    assert TrainConfig.from_json(config.to_json()) == config


def test_rates_are_written_down(corpus: Corpus, tmp_path: Path) -> None:
    result = quiet_train(replace(TINY, steps=20), corpus, tmp_path / "run")
    rates = [record["learning_rate"] for record in result.history]
    assert rates[:2] == pytest.approx([0.005, 0.01])
    assert all(a > b for a, b in pairwise(rates[2:]))
