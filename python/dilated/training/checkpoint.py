"""Checkpoints that survive a crash at any instant: temporary file, fsync, rename, fsync of the
folder.

Files are `checkpoints/step-00000040.pt`, ordinary torch files without code in them. The newest two
are kept. A file counts when its zip checksums hold, so a torn or rotten one is passed over, with a
message.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dilated.training.errors import TrainingError, reason

_KEPT = 2


def checkpoint_files(out: Path) -> list[Path]:
    """The finished checkpoints of a run folder, newest first."""
    return sorted((out / "checkpoints").glob("step-*.pt"), reverse=True)


def save_checkpoint(out: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes one checkpoint; until the rename at its end the previous ones are all that is seen.

    Args:
        out: run folder.
        step: number of finished steps.
        state: tensors, numbers, strings, lists and dicts.

    Returns:
        The new file.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written; earlier checkpoints are
            intact.

    Example:
        >>> import pathlib, tempfile
        >>> from dilated.training import save_checkpoint
        >>> save_checkpoint(pathlib.Path(tempfile.mkdtemp()), 3, {"step": 3}).name
        'step-00000003.pt'
    """
    buffer = io.BytesIO()  # torch's own file writer turns a full disk into an internal error
    torch.save(state, buffer)
    folder = out / "checkpoints"
    path = folder / f"step-{step:08d}.pt"
    temporary = folder / f".{path.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(temporary, buffer.getbuffer())
        os.replace(temporary, path)
        _sync_folder(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = checkpoint_files(out)
        last = f"the last good checkpoint is {kept[0]}" if kept else "there is no checkpoint yet"
        raise TrainingError(
            f"--out: expected to write {path}, got: {reason(error)} ({last})"
        ) from None
    for old in checkpoint_files(out)[_KEPT:]:
        old.unlink(missing_ok=True)
    return path


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Writes a whole file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one checkpoint, checksums first; no code in it is run.

    Raises:
        TrainingError: the file is torn, altered, or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} differs")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(
            f"--resume: expected a readable checkpoint, got {path} ({reason(error)})"
        ) from None
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(
            f"--resume: expected a whole checkpoint, got {path} (damaged: {detail})"
        ) from None
    if not isinstance(state, dict) or "step" not in state:
        raise TrainingError(f"--resume: expected a checkpoint of dilated, got {path}")
    return state


def latest_checkpoint(out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The newest checkpoint that is whole; says which damaged ones it passed over.

    Raises:
        TrainingError: there is none.
    """
    files = checkpoint_files(out)
    if not files:
        raise TrainingError(f"--resume: expected checkpoints in {out / 'checkpoints'}, got none")
    for path in files:
        try:
            return load_checkpoint(path)
        except TrainingError as error:
            say(f"{error}; trying the one before it")
    raise TrainingError(
        f"--resume: expected a whole checkpoint in {out / 'checkpoints'}, got {len(files)} damaged"
    )
