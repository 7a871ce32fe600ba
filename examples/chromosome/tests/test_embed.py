"""The encoder is the formula whatever its pieces; the program writes what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import embed
import encoder
from composition import composition, principal_components, window_means
from encoder import ChromosomeEncoder, word_tokens
from fasta import UNKNOWN

BRANCHES = ((16, 64, 1024), (1, 4, 16))


def build() -> ChromosomeEncoder:
    torch.manual_seed(0)
    return ChromosomeEncoder(16, 2, 4, *BRANCHES)


def bases(n: int) -> torch.Tensor:
    return torch.randint(4, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@given(st.lists(st.integers(0, UNKNOWN), min_size=1, max_size=30))
def test_words(codes: list[int]) -> None:
    """Every token is the number of the six bases around its position."""
    padded = [UNKNOWN] * 2 + codes + [UNKNOWN] * 3
    expected = []
    for p in range(len(codes)):
        word = padded[p : p + 6]
        number = sum(letter * 4 ** (5 - i) for i, letter in enumerate(word))
        expected.append(4**6 if UNKNOWN in word else number)
    assert word_tokens(torch.tensor(codes, dtype=torch.uint8)).tolist() == expected


@pytest.mark.parametrize("n", [1, 7, 500])
def test_pieces_change_nothing(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer after another over the whole sequence, without pieces, is the same."""
    model, steps = build(), []
    monkeypatch.setattr(encoder, "_PIECE", 64)
    found = model(bases(n), steps.append)
    assert len(steps) == model.num_steps(n)
    monkeypatch.setattr(encoder, "_PIECE", n)
    whole = model(bases(n), steps.append)
    # Sums of 16 to 32 numbers of size 1, in another order, through two layers.
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


def test_one_end_hears_of_the_other() -> None:
    """A changed base reaches the far end: two layers join any two places."""
    sequence = bases(1000)
    other = sequence.clone()
    other[3] ^= 1
    model = build()
    a, b = (model(x, lambda _: None) for x in (sequence, other))
    assert (a[990:] - b[990:]).abs().amax(1).gt(0).all()


def test_composition() -> None:
    codes = np.array([0, 1, 2, 3, 2, 2, 1, 1, 1, UNKNOWN, 0, 0, 3], np.uint8)
    known = composition(codes, 4)
    assert known.gc.tolist() == [0.5, 1.0, 1 / 3]
    assert known.skew.tolist() == [0.0, 0.0, -1.0]
    means = window_means(torch.arange(26.0).reshape(13, 2), 4)
    assert means.tolist() == [[3, 4], [11, 12], [19, 20]]


def test_principal_components_keep_distances() -> None:
    """All of them are a rotation of the centred points."""
    points = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = torch.from_numpy(principal_components(points, 3))
    torch.testing.assert_close(torch.pdist(turned), torch.pdist(points))
    assert turned.var(0).tolist() == sorted(turned.var(0).tolist(), reverse=True)


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fasta = tmp_path / "a.fa"
    letters = np.array(list("ACGT"))[bases(3000).numpy()]
    fasta.write_text(">small\nAC\n>large one\n" + "".join(letters) + "\n")
    out = tmp_path / "out"
    small = ["--num-layers", "1", "--embed-dim", "16", "--window", "100"]
    assert embed.main(["--fasta", str(fasta), "--out", str(out), *small]) == 0
    text = capsys.readouterr().out
    assert text.startswith("large: 3,000 bases, one sequence; 1 layers, width 16")
    assert "one forward pass: " in text
    stored = np.load(out / "embedding.npy")
    assert stored.shape == (3000, 16)
    assert stored.dtype == np.float16
    torch.manual_seed(0)
    model = ChromosomeEncoder(16, 1, 4, (512, 4096, 32768, 2**23), (1, 4, 16, 64))
    expected = model(bases(3000), lambda _: None)
    assert np.array_equal(stored, expected.numpy().astype(np.float16))
    assert (out / "embedding.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fasta", "nowhere.fa"], "--fasta: expected a file, got nowhere.fa (`make demo-chromo"),
        (["--embed-dim", "12"], "--embed-dim: expected a multiple of 2 * num_heads = 8, got 12"),
        (["--num-layers", "0"], "--num-layers: expected >= 1, got 0"),
        (["--window", "20"], "--window: expected 1 to 10, a third of the sequence, got 20"),
        (["--embed-dim", str(2**40)], "--embed-dim: expected what fits into "),
        (["--segments", "8", "--dilations", "1,2"], "dilated_attention: "),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.fa").write_text(">a\n" + "ACGT" * 8)
    out = tmp_path / "out"
    start = ["--fasta", str(tmp_path / "a.fa"), "--out", str(out), "--window", "5"]
    assert embed.main([*start, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"examples chromosome: error: {message}")
    assert not out.exists()
