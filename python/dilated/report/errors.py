"""What a report says when its drawing library is not there."""

from __future__ import annotations

import importlib.util


class MissingPackage(ImportError):
    """An optional package is needed; the message has the command that installs it."""


def need_matplotlib() -> None:
    """Raises MissingPackage unless matplotlib can be imported."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage("matplotlib is needed for pictures: pip install 'dilated[demo]'")
