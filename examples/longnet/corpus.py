"""Bytes to learn from, and other bytes to be judged by: any file, or a folder of files.

A folder is split by content: a file is held out when the hash of its words falls into the first
tenth, so copies of a text and links to it stand on one side, whatever they are called, and a text
is learnt once. A single text is split by position: its last tenth (at least one context) is held
out.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from errors import TrainingError, reason

_HELD_OUT = 26 / 256  # a tenth
_SEPARATOR = b"\0"  # between documents; belongs to the one before
_SKIPPED_FOLDERS = frozenset(["__pycache__", "site-packages", "dist-packages"])


@dataclass(frozen=True)
class Corpus:
    """Training bytes as one stream, held-out documents one by one; all uint8, one dimension."""

    origin: str
    train: Tensor
    starts: Tensor  # int64, of the documents in `train`
    held_out: tuple[Tensor, ...]
    held_out_names: tuple[str, ...]
    fingerprint: str  # sha256 of all bytes and of their split

    @property
    def num_held_out_bytes(self) -> int:
        """Bytes of all held-out documents."""
        return sum(document.numel() for document in self.held_out)

    def joined_held_out(self) -> Tensor:
        """The held-out documents as one, joined as the training stream is."""
        separator = torch.frombuffer(bytearray(_SEPARATOR), dtype=torch.uint8)
        parts = [part for document in self.held_out for part in (separator, document)]
        return torch.cat(parts[1:])


def read_corpus(
    path: str | Path | None = None, *, glob: str | None = None, context: int = 1
) -> Corpus:
    """Reads a file or a folder, splits it, and checks that both parts hold a window.

    Args:
        path: a file or folder; None takes the standard library's `.py` files without its tests,
            which some distributions ship apart.
        glob: of the files of a folder, those whose name matches; None takes all.
        context: bytes of one training window.

    Raises:
        TrainingError: something there cannot be read, or too few bytes.
    """
    if glob is not None and (path is None or not Path(path).is_dir()):
        raise TrainingError(f"--glob: expected a folder as --input, got {path or 'none'}")
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        names = [name for name in _files(root, "*.py") if not _is_test(name)]
        return _split_files(root, names, context, "the Python standard library's sources")
    root = Path(path)
    kind = _status(root).st_mode
    if stat.S_ISDIR(kind):
        return _split_files(root, _files(root, glob or "*"), context, str(root))
    if not stat.S_ISREG(kind) and not stat.S_ISFIFO(kind):
        raise TrainingError(f"--input: expected a file or folder, got {root} (a device or socket)")
    return _split_text(_read(root), root.name, context, str(root))


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        _unreadable(path, error)


def _unreadable(path: object, error: OSError) -> NoReturn:
    raise TrainingError(
        f"--input: expected readable files and folders, got {path} ({reason(error)})"
    ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _unreadable(path, error)


def _is_test(name: str) -> bool:
    return bool({"test", "tests", "idle_test"}.intersection(Path(name).parts[:-1]))


def _files(root: Path, glob: str) -> list[str]:
    """Relative paths, sorted, hidden ones left out; symbolic links to folders are not followed."""

    def refuse(error: OSError) -> None:
        _unreadable(error.filename, error)

    names = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and f[0] != "."]
        for file in files:
            path = Path(folder, file)
            dangling = path.is_symlink() and not os.path.exists(path)  # no text to read
            if file[0] == "." or not fnmatch.fnmatch(file, glob) or dangling:
                continue
            if stat.S_ISREG(_status(path).st_mode):
                names.append(path.relative_to(root).as_posix())
    return sorted(names)


def _split_files(root: Path, names: list[str], context: int, origin: str) -> Corpus:
    texts: dict[bytes, tuple[str, bytes]] = {}  # by the hash of their words; the first name counts
    for name in names:
        content = _read(root / name)
        if content:
            words = b" ".join(content.split())  # line ends and indentation make no other text
            texts.setdefault(hashlib.sha256(words).digest(), (name, content))
    if not texts:
        found = f"{len(names)} matching files, all empty" if names else "no file matches"
        raise TrainingError(
            f"--input: expected at least one file with bytes in it, got {root} ({found})"
        )
    if len(texts) == 1:
        ((name, content),) = texts.values()
        return _split_text(content, name, context, origin)
    held_out, size = [], 0
    ranked = sorted(texts)
    for rank in ranked[:-1]:  # one text at least is learnt
        if rank[0] >= _HELD_OUT * 256 and size > context:
            break
        held_out.append(texts[rank])
        size += len(texts[rank][1]) + 1
    learnt = sorted(texts[rank] for rank in ranked[len(held_out) :])
    return _corpus(origin, learnt, sorted(held_out), context)


def _split_text(content: bytes, name: str, context: int, origin: str) -> Corpus:
    if not content:
        raise TrainingError(f"--input: expected a file with bytes in it, got {origin} (empty)")
    cut = len(content) - max(len(content) // 10, context + 1)
    if cut <= context:
        raise TrainingError(
            f"--input: expected at least {2 * (context + 1)} bytes (one window to learn from and "
            f"one to judge by, at --context {context}), got {len(content)} "
            "(a longer file, or a smaller --context)"
        )
    return _corpus(origin, [(name, content[:cut])], [(name, content[cut:])], context)


def _corpus(
    origin: str, learnt: list[tuple[str, bytes]], held_out: list[tuple[str, bytes]], context: int
) -> Corpus:
    stream = _SEPARATOR.join(content for _, content in learnt)
    judged = _SEPARATOR.join(content for _, content in held_out)
    for purpose, part in (("learn from", stream), ("judge by", judged)):
        if len(part) <= context:
            raise TrainingError(
                f"--input: expected more than {context} bytes to {purpose} (one window at "
                f"--context {context}), got {len(part)} (more text, or a smaller --context)"
            )
    lengths = torch.tensor([0, *(len(content) + 1 for _, content in learnt[:-1])])
    return Corpus(
        origin=origin,
        train=_tensor(stream),
        starts=lengths.cumsum(0),
        held_out=tuple(_tensor(content) for _, content in held_out),
        held_out_names=tuple(name for name, _ in held_out),
        fingerprint=hashlib.sha256(b"%d " % len(stream) + stream + judged).hexdigest(),
    )


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
