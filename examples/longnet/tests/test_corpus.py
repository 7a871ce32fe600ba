"""Any bytes are a corpus, no held-out text is learnt, and what cannot be read is said."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import Corpus, read_corpus
from errors import TrainingError
from sampler import NO_TARGET, WindowSampler


def texts(corpus: Corpus) -> tuple[set[bytes], set[bytes]]:
    """(learnt, held out), document by document."""
    ends = [*(corpus.starts[1:] - 1).tolist(), corpus.train.numel()]
    pairs = zip(corpus.starts.tolist(), ends, strict=True)
    learnt = {corpus.train[a:b].numpy().tobytes() for a, b in pairs}
    return learnt, {document.numpy().tobytes() for document in corpus.held_out}


def test_default_corpus_holds_out_whole_files() -> None:
    corpus = read_corpus(context=16384)
    assert corpus.starts.numel() > 100
    assert len(corpus.held_out) == len(corpus.held_out_names) > 10
    assert all(name.endswith(".py") for name in corpus.held_out_names)
    assert 0.02 < corpus.num_held_out_bytes / corpus.train.numel() < 0.4
    # Most held-out text must not be found in the training stream.
    stream = corpus.train.numpy().tobytes()
    document = max(corpus.held_out, key=len).numpy().tobytes()
    assert document[: len(document) // 2] not in stream


@settings(max_examples=30, deadline=None)
@given(copies=st.lists(st.tuples(st.integers(0, 39), st.sampled_from("fls")), max_size=60))
def test_copies_and_links_stand_on_one_side(
    copies: list[tuple[int, str]], tmp_path_factory
) -> None:
    """Whatever a text is called and however often it lies there, it is learnt or held out."""
    root = tmp_path_factory.mktemp("folder")
    for i in range(40):
        (root / f"{i}.txt").write_bytes(f"text {i}\n".encode() * 20)
    plain = texts(read_corpus(root, context=16))
    for number, (i, kind) in enumerate(copies):
        copy = root / f"copy-{number}"
        if kind == "l":
            copy.symlink_to(root / f"{i}.txt")
        elif kind == "f":
            os.link(root / f"{i}.txt", copy)
        else:  # saved by an editor of another system
            copy.write_bytes((root / f"{i}.txt").read_bytes().replace(b"\n", b"\r\n"))
    corpus = read_corpus(root, context=16)
    found = texts(corpus)
    words = [{b" ".join(text.split()) for text in side} for side in found]
    assert words == [{b" ".join(text.split()) for text in side} for side in plain]
    assert corpus.starts.numel() + len(corpus.held_out) == 40  # each text once
    assert not words[0] & words[1]
    shutil.rmtree(root)


def test_split_follows_the_text_not_its_name(tmp_path: Path) -> None:
    sides = []
    for suffix in ("a", "b"):
        root = tmp_path / suffix
        root.mkdir()
        for i in range(60):
            (root / f"{i * 7 % 60}-{suffix}").write_bytes(f"some text {i} ".encode() * 40)
        sides.append(texts(read_corpus(root, context=16)))
    assert sides[0] == sides[1]
    assert 1 <= len(sides[0][1]) <= 20


def test_any_bytes_are_a_corpus(tmp_path: Path) -> None:
    fasta, binary = tmp_path / "x.fasta", tmp_path / "x.bin"
    fasta.write_bytes(b">seq\n" + b"ACGT" * 300)
    binary.write_bytes(bytes(range(256)) * 8)
    assert read_corpus(fasta, context=64).train.dtype == torch.uint8
    assert read_corpus(binary, context=64).train[:256].tolist() == list(range(256))


def test_names_need_not_be_text(tmp_path: Path) -> None:
    for i in range(3):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff%d" % i)).write_bytes(b"%d" % i * 50)
    assert read_corpus(tmp_path, context=16).starts.numel() == 2


def test_glob_hidden_files_and_what_is_no_file(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", ".hidden.py", "c.py"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    os.mkfifo(tmp_path / "pipe.py")  # opening it would wait for ever
    (tmp_path / "gone.py").symlink_to("nowhere")
    corpus = read_corpus(tmp_path, glob="*.py", context=16)
    assert corpus.starts.numel() + len(corpus.held_out) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: None,
            "--input: expected readable files and folders, got {p} (No such file or directory)",
        ),
        (
            lambda p: p.symlink_to(p),
            "--input: expected readable files and folders, got {p} (Too many levels of symbolic "
            "links)",
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


def test_devices_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"got /dev/zero \(a device or socket\)"):
        read_corpus("/dev/zero", context=64)


@pytest.mark.parametrize("path", [None, "text"])
def test_glob_is_for_folders(path: str | None, text: Path) -> None:
    with pytest.raises(TrainingError, match=r"^--glob: expected a folder as --input, got"):
        read_corpus(None if path is None else text, glob="*.py", context=64)


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose path is too long for the system cannot be listed, even by root."""
    (tmp_path / "a.txt").write_bytes(b"x" * 500)
    (tmp_path / "b.txt").write_bytes(b"y" * 500)
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    with pytest.raises(TrainingError, match=r"readable files and folders.*\(File name too long\)"):
        read_corpus(tmp_path, context=16)


def test_held_out_part_is_long_enough_for_its_windows(tmp_path: Path) -> None:
    """Found before a run, not after it."""
    for i in range(30):
        (tmp_path / f"{i}").write_bytes(os.urandom(400))
    assert read_corpus(tmp_path, context=2000).num_held_out_bytes > 2000 - 30
    with pytest.raises(TrainingError, match=r"bytes to (learn from|judge by) \(one window at"):
        read_corpus(tmp_path, context=7000)


@pytest.mark.parametrize("context", [1, 64])
def test_shortest_input_works(tmp_path: Path, context: int) -> None:
    path = tmp_path / "input"
    path.write_bytes(bytes(range(2 * context + 2)))
    corpus = read_corpus(path, context=context)
    assert corpus.train.numel() == corpus.num_held_out_bytes == context + 1
    batch = WindowSampler(corpus, context=context, batch_size=2, seed=0).next_batch()
    assert batch.tokens.shape == batch.targets.shape == (2, context)


# --- sampler ------------------------------------------------------------------------------------


def _corpus(tmp_path: Path, *lengths: int) -> Corpus:
    for i, n in enumerate(lengths):
        (tmp_path / f"{i}").write_bytes(bytes([65 + i]) * n)
    return read_corpus(tmp_path, context=1)


@pytest.mark.parametrize("seed", [5, -(2**63), 2**64 - 1])
def test_sampler_reads_every_window_once_and_resumes(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "input"
    path.write_bytes(bytes(i % 251 for i in range(1100)))
    options: dict[str, Any] = {"context": 10, "batch_size": 3, "seed": seed}
    sampler = WindowSampler(read_corpus(path, context=10), **options)
    for _ in range(20):
        sampler.next_batch()
    assert len(set(sampler._starts.tolist())) == sampler._starts.numel()  # no window twice
    state = sampler.state_dict()
    expected = [sampler.next_batch() for _ in range(40)]  # over the end of the epoch
    other = WindowSampler(read_corpus(path, context=10), **options)
    other.load_state_dict(state)
    for batch in expected:
        assert torch.equal(batch.tokens, other.next_batch().tokens)


@pytest.mark.parametrize("context", [1, 5, 16, 40])
def test_separate_documents_are_cut_at_their_ends(tmp_path: Path, context: int) -> None:
    """Every byte has the target it has in the joined batch, but for those behind a last byte."""
    corpus = _corpus(tmp_path, 7, 1, 30, 12, 2, 25, 9, 16)
    options: dict[str, Any] = {"context": context, "batch_size": 2, "seed": 0}
    joined = WindowSampler(corpus, **options)
    apart = WindowSampler(corpus, separate_documents=True, **options)
    for _ in range(30):
        whole, batch = joined.next_batch(), apart.next_batch()
        bounds = batch.cu_seqlens
        assert bounds is not None
        assert bounds[0] == 0
        assert bounds[-1] == 2 * context
        assert context in bounds  # windows are apart, too
        assert torch.equal(batch.tokens, whole.tokens.flatten())
        crossing = batch.tokens == 0  # the separator is a document's last byte
        assert torch.equal(batch.targets == NO_TARGET, crossing)
        assert torch.equal(batch.targets[~crossing], whole.targets.flatten()[~crossing])
        for a, b in pairwise(bounds):
            letters = set(batch.tokens[a:b].tolist()) - {0}
            assert b > a
            assert len(letters) <= 1  # one document
