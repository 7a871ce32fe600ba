"""The one error of the example: a line a user can act on; the program exits with 2."""

from __future__ import annotations


class TrainingError(Exception):
    """A path, a file or a setting that cannot be used; the message is one line with what to do."""


def reason(error: OSError) -> str:
    """What the operating system says of an error, in its own words and without the path."""
    return error.strerror or str(error)
