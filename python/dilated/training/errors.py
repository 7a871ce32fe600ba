"""The one error of training and report: a line a user can act on; the program prints it and exits
with 2.
"""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A path, a file or a setting that cannot be used; the message is one line and says what to do.

    Example:
        >>> from dilated.training import TrainingError, read_corpus
        >>> try:
        ...     read_corpus("no/such/file")
        ... except TrainingError as error:
        ...     print(error)
        --input: expected a readable file or folder, got no/such/file (it does not exist)
    """


def reason(error: OSError) -> str:
    """What the operating system says of an error, in its own words and without the path."""
    return error.strerror or str(error)
