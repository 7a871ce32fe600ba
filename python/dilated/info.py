"""What is installed: back ends, presets, versions."""

from __future__ import annotations

import platform
from typing import NamedTuple

import numpy as np
import torch

from . import _ops
from ._options import NAMES, text_of


class Backend(NamedTuple):
    """An implementation of the operator: name, description (SIMD target, or why not), available.

    Example:
        >>> import dilated
        >>> dilated.backends()[-1].available
        True
    """

    name: str
    description: str
    available: bool


def backends() -> list[Backend]:
    """Every implementation; one that is not available says why in its description.

    Example:
        >>> import dilated
        >>> [b.name for b in dilated.backends()]
        ['cuda', 'cpu', 'reference']
    """
    rows = [line.split(" ", 2) for line in text_of(_ops.ops.backends()).splitlines()]
    return [Backend(name, description, usable == "1") for name, usable, description in rows]


def presets() -> list[str]:
    """Names accepted as ``preset``.

    Example:
        >>> import dilated
        >>> dilated.presets()
        ['longnet', 'torchscale', 'head_groups', 'fork', 'fkodom']
    """
    return list(NAMES["preset"])


def versions() -> dict[str, str]:
    """Versions and paths that a bug report needs.

    Example:
        >>> import dilated
        >>> sorted(dilated.versions())
        ['dilated', 'library', 'machine', 'numpy', 'python', 'torch']
    """
    from . import __version__

    return {
        "dilated": __version__,
        "library": str(_ops.LIBRARY_PATH),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
