"""Records come out as written, whatever the line length, case and compression."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilated.cli import Refused
from fasta import UNKNOWN, choose, read_records

LETTERS = "ACGTUacgtuNRYn"


def codes(sequence: str) -> list[int]:
    plain = sequence.upper().replace("U", "T")
    return ["ACGT".index(letter) if letter in "ACGT" else UNKNOWN for letter in plain]


@given(
    sequences=st.lists(st.text(LETTERS, max_size=50), min_size=1, max_size=4),
    width=st.integers(1, 60),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[str], width: int, newline: str
) -> None:
    lines = []
    for number, sequence in enumerate(sequences):
        lines.append(f">name{number} of a sequence")
        lines += [sequence[i : i + width] for i in range(0, len(sequence), width)]
    path = tmp_path_factory.getbasetemp() / "sequences.fasta"
    path.write_bytes(newline.join([*lines, ""]).encode())
    expected = {f"name{number}": codes(sequence) for number, sequence in enumerate(sequences)}
    assert {name: found.tolist() for name, found in read_records(path).items()} == expected


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".fa", bytes), (".fa.gz", gzip.compress), (".fna.xz", lzma.compress)]
)
def test_compressed(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"sequence{suffix}"
    path.write_bytes(compress(b">a\nACGT\n>b\nNN\nAA\n"))
    records = read_records(path)
    assert {name: found.tolist() for name, found in records.items()} == {
        "a": [0, 1, 2, 3],
        "b": [4, 4, 0, 0],
    }
    assert choose(records, None) == "a"
    assert choose(records, "b") == "b"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.fa", b"ACGT\n", "--fasta: expected a file that starts with '>'"),
        ("empty.fa", b"", "--fasta: expected a file that starts with '>'"),
        ("broken.gz", b"\x1f\x8b\x08", "--fasta: expected a readable file"),
        ("cut.gz", gzip.compress(b">a\nACGT")[:12], "--fasta: expected a readable file"),
        ("bits.gz", gzip.compress(b">a")[:10] + b"\xff" * 9, "--fasta: expected a readable file"),
        ("broken.xz", b"no", "--fasta: expected a readable file"),
        ("twice.fa", b">a\nA\n>a b\nC", "--fasta: expected names that differ"),
    ],
)
def test_damaged(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=f"^{message}, got .*{name}"):
        read_records(tmp_path / name)


def test_records_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_bytes(b">a\n>b\nA")
    records = read_records(tmp_path / "a.fa")
    with pytest.raises(Refused, match=r"^--record: expected one of a, b, got c"):
        choose(records, "c")
    with pytest.raises(Refused, match=r"^--record: expected a sequence with bases, got the empty"):
        choose(records, "a")
