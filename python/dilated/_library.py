"""Loads the compiled operators. ``DILATED_LIBRARY`` names another build of them (development)."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_NAME = "libdilated_torch.so"


def _find() -> Path:
    override = os.environ.get("DILATED_LIBRARY")
    path = Path(override) if override else Path(__file__).with_name(_NAME)
    if not path.is_file():
        origin = "DILATED_LIBRARY names it" if override else "the package was not built"
        raise ImportError(
            f"dilated: compiled operators not found: {path} ({origin}; "
            "`pip install .` builds them, or set DILATED_LIBRARY to a built library)"
        )
    return path


def load() -> Path:
    """Load the operators into ``torch.ops.dilated`` and return the library's path.

    Raises:
        ImportError: the library is missing, or PyTorch is older than 2.11.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        raise ImportError(f"dilated: PyTorch >= 2.11 is needed, this is {torch.__version__}")
    path = _find()
    torch.ops.load_library(path)
    return path


PATH = load()

ops = torch.ops.dilated
