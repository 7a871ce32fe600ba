"""Reads a nucleotide sequence from a FASTA file, plain or compressed (.gz, .xz)."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dilated.cli import Refused

UNKNOWN = 4  # N and the codes that stand for several bases
_OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}
_CODES = np.full(256, UNKNOWN, np.uint8)
for _code, _letters in enumerate((b"Aa", b"Cc", b"Gg", b"TtUu")):
    _CODES[list(_letters)] = _code


def read_records(path: Path) -> dict[str, NDArray[np.uint8]]:
    """Every sequence of the file by its name, the first word after `>`.

    Returns:
        Arrays (bases,) of A = 0, C = 1, G = 2, T = 3, anything else = `UNKNOWN`.

    Raises:
        Refused: the file cannot be read, is damaged, or is no FASTA file.
    """
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            content: bytes = file.read()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Refused(f"--fasta: expected a readable file, got {path} ({reason})") from None
    head, *records = (b"\n" + content).split(b"\n>")
    if head.strip() or not records:
        raise Refused(f"--fasta: expected a file that starts with '>', got {path}")
    sequences: dict[str, NDArray[np.uint8]] = {}
    for record in records:
        title, _, lines = record.partition(b"\n")
        letters = np.frombuffer(lines.translate(None, b"\r\n\t "), np.uint8)
        words = title.decode(errors="replace").split()
        name = words[0] if words else f"record {len(sequences) + 1}"
        if name in sequences:
            raise Refused(f"--fasta: expected names that differ, got {name} twice in {path}")
        sequences[name] = _CODES[letters]
    return sequences


def choose(records: dict[str, NDArray[np.uint8]], name: str | None) -> str:
    """The record of that name; without one the longest, which is the chromosome.

    Raises:
        Refused: there is no such record, or it is empty.
    """
    if name is None:
        name = max(records, key=lambda record: records[record].size)
    if name not in records:
        raise Refused(f"--record: expected one of {', '.join(records)}, got {name}")
    if not records[name].size:
        raise Refused(f"--record: expected a sequence with bases, got the empty {name}")
    return name
