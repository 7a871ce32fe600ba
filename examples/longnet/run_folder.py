"""The folder of a run: whoever writes there holds its lock, and every file appears whole or not at
all (temporary file, fsync, rename, fsync of the folder).

`checkpoints/step-00000040.pt` are ordinary torch files without code in them; the newest two are
kept. One counts when its zip checksums hold, so a torn or rotten one is passed over, with a
message.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import torch

from errors import TrainingError, reason

_KEPT = 2
_FORMAT = "dilated examples/longnet 1"
_REPORTS = ("report.html", "report.json")


class RunFolder:
    """Reads freely; writes inside `with`, which takes the folder's lock.

    Args:
        path: the folder, made when first written to.

    Raises:
        TrainingError: from `with`, if the folder cannot be written or another run writes there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._folder = self.path / "checkpoints"
        self._lock = filelock.FileLock(self.path / ".lock", timeout=0)
        self._replaced: list[Path] = []  # of an earlier run, until this one has saved itself

    def __enter__(self) -> RunFolder:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for folder in (self.path, self._folder):
                for stale in folder.glob(".*.tmp"):
                    stale.unlink()
        except filelock.Timeout:
            raise TrainingError(
                f"--out: expected a folder of its own, got {self.path} (another run writes there)"
            ) from None
        except OSError as error:
            raise TrainingError(
                f"--out: expected a writable folder, got {self.path} ({reason(error)})"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def checkpoints(self) -> list[Path]:
        """The finished checkpoints, newest first."""
        try:
            names = os.listdir(self._folder)
        except OSError:
            return []  # the folder is not there yet, or `with` will say what it is
        steps = [int(m[1]) for name in names if (m := re.fullmatch(r"step-(\d{8,})\.pt", name))]
        return [self._checkpoint(step) for step in sorted(steps, reverse=True)]

    def _checkpoint(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.pt"

    def replace_run(self) -> None:
        """The next checkpoint saved here is of a new run: then, not now, the old one goes."""
        self._replaced = [*self.checkpoints(), *(self.path / name for name in _REPORTS)]

    def own_checkpoints(self) -> list[Path]:
        """Those of this run, newest first."""
        return [path for path in self.checkpoints() if path not in self._replaced]

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes one checkpoint; until the rename at its end the previous ones are all that is
        seen.

        Args:
            step: number of finished steps.
            state: tensors, numbers, strings, lists and dicts.

        Raises:
            TrainingError: the disk is full, or the folder cannot be written; earlier checkpoints
                are intact.
        """
        buffer = io.BytesIO()  # torch's own file writer turns a full disk into an internal error
        torch.save({**state, "format": _FORMAT, "step": step}, buffer)
        path = self._checkpoint(step)
        try:
            write_whole(path, buffer.getbuffer())
        except OSError as error:
            kept = self.checkpoints()
            last = f"the last good checkpoint is {kept[0]}" if kept else "there is no checkpoint"
            raise TrainingError(
                f"--out: expected to write {path}, got: {reason(error)} ({last})"
            ) from None
        outdated = [*self._replaced, *self.own_checkpoints()[_KEPT:]]
        self._replaced = []
        for old in outdated:
            if old != path:
                old.unlink(missing_ok=True)
        return path

    def write(self, name: str, content: bytes) -> Path:
        """Writes another file of the run; TrainingError leaves what was there."""
        path = self.path / name
        try:
            write_whole(path, content)
        except OSError as error:
            raise TrainingError(f"--out: expected to write {path}, got: {reason(error)}") from None
        return path

    def latest(self, say: Callable[[str], None] = print) -> dict[str, Any]:
        """The newest checkpoint that is whole; says which damaged ones it passed over.

        Raises:
            TrainingError: there is none.
        """
        files = self.checkpoints()
        if not files:
            raise TrainingError(f"--out: expected checkpoints in {self._folder}, got none")
        for path in files:
            try:
                return load_checkpoint(path)
            except TrainingError as error:
                say(f"{error}; trying the one before it")
        raise TrainingError(
            f"--out: expected a whole checkpoint in {self._folder}, got {len(files)} that are not "
            "(another --out; train and demo have --overwrite)"
        )


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file aside, waits until the disk has it, and gives it its name."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one checkpoint, checksums first; no code in it is run.

    Raises:
        TrainingError: the file is torn, altered, or no checkpoint of this program.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} differs")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(
            f"--out: expected a readable checkpoint, got {path} ({reason(error)})"
        ) from None
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(
            f"--out: expected a whole checkpoint, got {path} (damaged: {detail})"
        ) from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise TrainingError(
            f"--out: expected a checkpoint of this program, got {path} (another program's, or an "
            "older version's)"
        )
    return state
