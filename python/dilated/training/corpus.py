"""Bytes to learn from, and other bytes to be judged by: any file, or a folder of files.

A folder is split by file: a file is held out when sha256(its relative path) falls into the first
tenth, so the split depends on names only and no text of a held-out file is ever trained on. A
single file is split by position: its last tenth (at least one context) is held out.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dilated.training.errors import TrainingError, reason

_HELD_OUT = 0.1
_SEPARATOR = b"\0"  # between files of the training stream
_SKIPPED_FOLDERS = frozenset(["__pycache__", "site-packages", "dist-packages"])


@dataclass(frozen=True)
class Corpus:
    """Training bytes as one stream, held-out documents one by one; all uint8, one dimension."""

    origin: str
    train: Tensor
    held_out: tuple[Tensor, ...]
    num_train_files: int
    held_out_names: tuple[str, ...]
    fingerprint: str  # sha256 of the training stream

    @property
    def num_held_out_bytes(self) -> int:
        """Bytes of all held-out documents."""
        return sum(document.numel() for document in self.held_out)


def standard_library() -> Path:
    """The folder of the Python standard library's sources on this machine."""
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(path: str | Path | None = None, *, glob: str = "*", context: int = 1) -> Corpus:
    """Reads a file or a folder, splits it, and checks that both parts hold a window.

    Args:
        path: a file or folder; None takes the standard library's `.py` files without its tests,
            which some distributions ship apart.
        glob: of the files of a folder, those whose name matches.
        context: bytes of one training window.

    Returns:
        The corpus.

    Raises:
        TrainingError: nothing readable there, or too few bytes.

    Example:
        >>> import tempfile, pathlib
        >>> from dilated.training import read_corpus
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "text"
        >>> _ = file.write_bytes(b"to be or not to be " * 100)
        >>> read_corpus(file, context=64).train.shape
        torch.Size([1710])
    """
    if path is None:
        root = standard_library()
        names = [name for name in _files(root, "*.py") if not _is_test(name)]
        return _split_files(root, names, context, "the Python standard library's sources")
    root = Path(path)
    if not root.exists():
        raise TrainingError(
            f"--input: expected a readable file or folder, got {root} (it does not exist)"
        )
    if root.is_dir():
        return _split_files(root, _files(root, glob), context, str(root))
    return _split_bytes(_read(root), root.name, context, str(root))


def _is_test(name: str) -> bool:
    return bool({"test", "tests", "idle_test"}.intersection(Path(name).parts[:-1]))


def _files(root: Path, glob: str) -> list[str]:
    """Relative paths, sorted, hidden ones left out; symbolic links to folders are not followed."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED_FOLDERS and f[0] != "."]
        here = Path(folder)
        names += [
            (here / file).relative_to(root).as_posix()
            for file in files
            if file[0] != "." and fnmatch.fnmatch(file, glob) and (here / file).is_file()
        ]
    return sorted(names)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(
            f"--input: expected a readable file, got {path} ({reason(error)})"
        ) from None


def _split_files(root: Path, names: list[str], context: int, origin: str) -> Corpus:
    contents = {name: _read(root / name) for name in names}
    contents = {name: content for name, content in contents.items() if content}
    if not contents:
        found = f"{len(names)} matching files, all empty" if names else "no file matches"
        raise TrainingError(
            f"--input: expected at least one file with bytes in it, got {root} ({found})"
        )
    if len(contents) == 1:
        ((name, content),) = contents.items()
        return _split_bytes(content, name, context, origin)
    ranks = {name: hashlib.sha256(name.encode()).digest() for name in contents}
    bound = int(_HELD_OUT * 256).to_bytes(1, "big")
    held_out = [name for name in contents if ranks[name] < bound]
    held_out = held_out or [min(contents, key=ranks.__getitem__)]
    if len(held_out) == len(contents):
        held_out.remove(max(contents, key=ranks.__getitem__))
    train_names = [name for name in contents if name not in set(held_out)]
    train = _SEPARATOR.join(contents[name] for name in train_names)
    return _checked(origin, train, [(n, contents[n]) for n in held_out], len(train_names), context)


def _split_bytes(content: bytes, name: str, context: int, origin: str) -> Corpus:
    if not content:
        raise TrainingError(f"--input: expected a file with bytes in it, got {origin} (empty)")
    cut = len(content) - max(int(_HELD_OUT * len(content)), context + 1)
    if cut <= context:
        raise TrainingError(
            f"--input: expected at least {2 * (context + 1)} bytes (one window to learn from and "
            f"one to judge by, at --context {context}), got {len(content)} "
            "(a longer file, or a smaller --context)"
        )
    return _checked(origin, content[:cut], [(name, content[cut:])], 1, context)


def _checked(
    origin: str, train: bytes, held_out: list[tuple[str, bytes]], num_files: int, context: int
) -> Corpus:
    if len(train) <= context:
        raise TrainingError(
            f"--input: expected more than {context} bytes to learn from (one window at --context "
            f"{context}), got {len(train)} (more text, or a smaller --context)"
        )
    return Corpus(
        origin=origin,
        train=_tensor(train),
        held_out=tuple(_tensor(content) for _, content in held_out),
        num_train_files=num_files,
        held_out_names=tuple(name for name, _ in held_out),
        fingerprint=hashlib.sha256(train).hexdigest(),
    )


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
