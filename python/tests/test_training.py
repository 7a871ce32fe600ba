"""Corpus, sampler, checkpoints, resume to the bit, every unusable path with its whole message."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dilated import training
from dilated.training import (
    ModelConfig,
    TrainConfig,
    TrainingError,
    WindowSampler,
    bits_by_context,
    build_model,
    latest_checkpoint,
    load_checkpoint,
    read_corpus,
    save_checkpoint,
    train,
)
from dilated.training import checkpoint as checkpoint_module
from dilated.training.checkpoint import checkpoint_files
from dilated.training.evaluation import held_out_windows
from dilated.training.loop import learning_rate

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


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"".join(f"line {i} of {i * i}\n".encode() for i in range(400)))
    return path


@pytest.fixture
def corpus(text: Path) -> training.Corpus:
    return read_corpus(text, context=64)


def quiet_train(*arguments: Any, **options: Any) -> training.TrainResult:
    return train(*arguments, plain=True, say=lambda _: None, **options)


def losses(result: training.TrainResult) -> list[float]:
    return [record["loss"] for record in result.history]


# --- corpus -------------------------------------------------------------------------------------


def test_default_corpus_holds_out_whole_files() -> None:
    corpus = read_corpus(context=16384)
    assert corpus.num_train_files > 100
    assert len(corpus.held_out) == len(corpus.held_out_names) > 10
    assert all(name.endswith(".py") for name in corpus.held_out_names)
    assert 0.02 < corpus.num_held_out_bytes / corpus.train.numel() < 0.4
    # Most held-out text must not be found in the training stream.
    stream = corpus.train.numpy().tobytes()
    document = max(corpus.held_out, key=len).numpy().tobytes()
    assert document[: len(document) // 2] not in stream


def test_split_depends_on_names_only(tmp_path: Path) -> None:
    def held_out(root: Path, suffix: bytes) -> tuple[str, ...]:
        (root / "sub").mkdir(parents=True)
        for i in range(60):
            (root / "sub" / f"{i}.txt").write_bytes(b"some text " * 40 + suffix)
        return read_corpus(root, context=16).held_out_names

    first = held_out(tmp_path / "a", b"")
    assert first == held_out(tmp_path / "b", b"other words")
    assert 1 <= len(first) <= 20


def test_any_bytes_are_a_corpus(tmp_path: Path) -> None:
    fasta, binary = tmp_path / "x.fasta", tmp_path / "x.bin"
    fasta.write_bytes(b">seq\n" + b"ACGT" * 300)
    binary.write_bytes(bytes(range(256)) * 8)
    assert read_corpus(fasta, context=64).train.dtype == torch.uint8
    assert read_corpus(binary, context=64).train[:256].tolist() == list(range(256))


def test_glob_and_hidden_files(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", ".hidden.py", "c.py"):
        (tmp_path / name).write_bytes(b"x" * 100)
    corpus = read_corpus(tmp_path, glob="*.py", context=16)
    assert corpus.num_train_files + len(corpus.held_out) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: None,
            "--input: expected a readable file or folder, got {p} (it does not exist)",
        ),
        (
            lambda p: p.write_bytes(b""),
            "--input: expected a file with bytes in it, got {p} (empty)",
        ),
        (
            lambda p: p.write_bytes(b"x" * 129),
            "--input: expected at least 130 bytes (one window to learn from and one to judge by, "
            "at --context 64), got 129 (a longer file, or a smaller --context)",
        ),
        (
            lambda p: p.mkdir(),
            "--input: expected at least one file with bytes in it, got {p} (no file matches)",
        ),
    ],
)
def test_unusable_input(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "input"
    make(path)
    with pytest.raises(TrainingError) as caught:
        read_corpus(path, context=64)
    assert str(caught.value) == message.format(p=path)


def test_shortest_input_works(tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_bytes(bytes(range(130)))
    corpus = read_corpus(path, context=64)
    assert corpus.train.numel() == corpus.num_held_out_bytes == 65


# --- sampler ------------------------------------------------------------------------------------


def test_sampler_reads_every_window_once_and_resumes() -> None:
    stream = torch.arange(1000).to(torch.uint8)
    sampler = WindowSampler(stream, context=10, batch_size=3, seed=5)
    first = [sampler.next_batch() for _ in range(20)]
    starts = torch.cat(first)[:, 0]
    assert len(set(sampler._starts.tolist())) == sampler._starts.numel()  # no window twice
    state = sampler.state_dict()
    expected = [sampler.next_batch() for _ in range(40)]  # over the end of the epoch
    other = WindowSampler(stream, context=10, batch_size=3, seed=5)
    other.load_state_dict(state)
    assert all(torch.equal(a, other.next_batch()) for a in expected)
    assert starts.numel() == 60


def test_learning_rate_warms_up_then_falls() -> None:
    config = replace(TINY, steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


# --- training and resume ------------------------------------------------------------------------


def test_training_learns(corpus: training.Corpus, tmp_path: Path) -> None:
    config = replace(TINY, steps=30, model=replace(TINY.model, dropout=0.0))
    result = quiet_train(config, corpus, tmp_path / "run")
    assert result.finished
    assert losses(result)[-1] < 0.7 * losses(result)[0]
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == losses(result)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resume_is_exact_to_the_bit(corpus: training.Corpus, tmp_path: Path, stop: int) -> None:
    """Losses and weights of an interrupted run equal those of a whole one, with dropout."""
    whole = quiet_train(TINY, corpus, tmp_path / "whole")
    state = _stopped_after(stop, corpus, tmp_path / "parts")
    assert state["step"] == stop
    torch.manual_seed(12345)  # whatever the random state was before, the checkpoint's counts
    resumed = quiet_train(TINY, corpus, tmp_path / "parts", resume=True)
    assert losses(resumed) == losses(whole)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def _stopped_after(steps: int, corpus: training.Corpus, out: Path) -> dict[str, Any]:
    """Runs TINY until a real SIGINT that arrives during step `steps`."""
    import signal

    from dilated.training import loop

    original = loop._step

    def step(*arguments: Any) -> dict[str, float]:
        if arguments[-1] == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", step)
        result = quiet_train(TINY, corpus, out)
    assert result.signal == signal.SIGINT
    assert not result.finished
    return latest_checkpoint(out)


def test_finished_run_resumes_to_nothing(corpus: training.Corpus, tmp_path: Path) -> None:
    first = quiet_train(TINY, corpus, tmp_path / "run")
    again = quiet_train(TINY, corpus, tmp_path / "run", resume=True)
    assert losses(again) == losses(first)


def test_two_checkpoints_are_kept(corpus: training.Corpus, tmp_path: Path) -> None:
    quiet_train(TINY, corpus, tmp_path / "run")
    names = [path.name for path in checkpoint_files(tmp_path / "run")]
    assert names == ["step-00000006.pt", "step-00000004.pt"]


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["half", "flipped", "empty"])
def test_damaged_checkpoint_falls_back(
    corpus: training.Corpus, tmp_path: Path, damage: str
) -> None:
    quiet_train(TINY, corpus, tmp_path / "run")
    newest, before = checkpoint_files(tmp_path / "run")
    content = bytearray(newest.read_bytes())
    if damage == "half":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray()
    newest.write_bytes(content)
    said: list[str] = []
    state = latest_checkpoint(tmp_path / "run", said.append)
    assert state["step"] == 4
    assert len(said) == 1
    assert said[0].startswith(f"--resume: expected a whole checkpoint, got {newest} (damaged: ")
    assert said[0].endswith("trying the one before it")
    before.write_bytes(b"")
    with pytest.raises(TrainingError) as caught:
        latest_checkpoint(tmp_path / "run", said.append)
    folder = tmp_path / "run" / "checkpoints"
    assert str(caught.value) == f"--resume: expected a whole checkpoint in {folder}, got 2 damaged"


def test_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(bytes(content)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_durably", full)
    with pytest.raises(TrainingError) as caught:
        save_checkpoint(tmp_path, 2, {"step": 2})
    folder = tmp_path / "checkpoints"
    assert str(caught.value) == (
        f"--out: expected to write {folder / 'step-00000002.pt'}, got: No space left on device "
        f"(the last good checkpoint is {folder / 'step-00000001.pt'})"
    )
    assert os.listdir(folder) == ["step-00000001.pt"]
    assert load_checkpoint(folder / "step-00000001.pt") == {"step": 1}


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([1, 2], path)
    with pytest.raises(TrainingError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == f"--resume: expected a checkpoint of dilated, got {path}"


def test_wrong_settings_name_themselves(
    corpus: training.Corpus, tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "run"
    quiet_train(TINY, corpus, out)
    with pytest.raises(TrainingError) as caught:
        quiet_train(TINY, corpus, out)
    assert str(caught.value) == (
        f"--out: expected a folder without checkpoints, got {out} with step-00000006.pt "
        "(--resume continues that run, --overwrite deletes it)"
    )
    with pytest.raises(TrainingError) as caught:
        quiet_train(replace(TINY, batch_size=1), corpus, out, resume=True)
    assert str(caught.value) == (
        "--batch-size: expected 2 as in the checkpoint, got 1 (--resume continues a run as it was "
        "started; only --steps may change)"
    )
    text.write_bytes(text.read_bytes()[::-1])
    changed = read_corpus(text, context=64)
    with pytest.raises(TrainingError) as caught:
        quiet_train(TINY, changed, out, resume=True)
    assert str(caught.value) == (
        f"--input: expected the corpus of the checkpoint (sha256 {corpus.fingerprint[:12]}), got "
        f"{text} (sha256 {changed.fingerprint[:12]}; its files changed)"
    )
    assert quiet_train(TINY, corpus, out, overwrite=True).finished


def test_unwritable_folder(corpus: training.Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    out = tmp_path / "file" / "run"
    with pytest.raises(TrainingError) as caught:
        quiet_train(TINY, corpus, out)
    assert str(caught.value) == f"--out: expected a writable folder, got {out} (Not a directory)"


def test_infinite_loss_stops(corpus: training.Corpus, tmp_path: Path) -> None:
    wild = replace(TINY, learning_rate=1e30, warmup_steps=0, grad_clip=1e30)
    with pytest.raises(TrainingError, match=r"^--learning-rate: expected a finite loss, got nan"):
        quiet_train(wild, corpus, tmp_path / "run")


def test_settings_out_of_range() -> None:
    with pytest.raises(TrainingError) as caught:
        replace(TINY, batch_size=0)
    assert str(caught.value) == "--batch-size: expected >= 1, got 0"
    assert TrainConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY


# --- evaluation ---------------------------------------------------------------------------------


def test_same_bytes_are_scored_at_every_context(tmp_path: Path) -> None:
    """A model that ignores its context gives the same bits at every length."""
    path = tmp_path / "text"
    path.write_bytes(os.urandom(20000))
    corpus = read_corpus(path, context=1024)
    model = build_model(replace(TINY, context=1024))
    torch.nn.init.zeros_(model.output_projection.weight)
    curve = bits_by_context(model, corpus, longest=1024, num_windows=3)
    assert curve.contexts == (256, 512, 1024)
    assert curve.bits_per_byte == pytest.approx((8.0, 8.0, 8.0))
    assert curve.scored_bytes == 256
    windows = held_out_windows(corpus, 1024, 3)
    assert windows.shape == (3, 1025)
    assert len({bytes(window[-256:].tolist()) for window in windows}) == 3


def test_evaluation_equals_the_loss(corpus: training.Corpus) -> None:
    """With one window as long as the scored part, bits are the training loss of that window."""
    import math

    model = build_model(TINY).eval()
    curve = bits_by_context(model, corpus, longest=64, num_windows=1)
    window = held_out_windows(corpus, 64, 1).long()
    with torch.no_grad():
        nats = training.loop.loss_of(model, window).item()
    assert curve.contexts == (64,)
    assert curve.bits_per_byte[0] == pytest.approx(nats / math.log(2), abs=1e-6)
