"""Typed errors. The core writes their messages: ``op: argument: expected …, got … (hint)``."""

from __future__ import annotations

_UNSUPPORTED_PREFIX = "dilated::Unsupported: "  # bindings/torch/arguments.h


class InvalidProblem(ValueError):
    """An argument breaks a rule of the specification; the message names it.

    Example:
        >>> import torch, dilated
        >>> x = torch.zeros(1, 4, 2, 8)
        >>> try:
        ...     dilated.dilated_attention(x, x, x, segments=[4], dilations=[0])
        ... except dilated.InvalidProblem as error:
        ...     print(error)
        dilated_attention: dilations[0]: expected 1 <= dilation <= 2^40, got 0
    """


class Unsupported(NotImplementedError):
    """A legal request that no back end (or not the forced one) can run; the message says why."""


class DistributedAttentionError(RuntimeError):
    """Other ranks did not answer: the message names the operation and the ranks.

    Nothing was computed. The groups refuse further calls: start the job again.

    Attributes:
        operation: What was exchanged.
        ranks: Ranks in the group that did not answer in time.
    """

    def __init__(self, text: str, operation: str, ranks: tuple[int, ...]) -> None:
        super().__init__(text)
        self.operation = operation
        self.ranks = ranks


def message(
    argument: str, expected: str, got: str, hint: str = "", op: str = "dilated_attention"
) -> str:
    """The template, for rules about Python objects that never reach the core."""
    tail = f" ({hint})" if hint else ""
    return f"{op}: {argument}: expected {expected}, got {got}{tail}"


def typed(error: Exception) -> Exception:
    """The typed error for what an operator raised; any other error comes back as it is."""
    text = str(error)
    if isinstance(error, InvalidProblem | Unsupported):
        return error
    if isinstance(error, ValueError):
        return InvalidProblem(text)
    if isinstance(error, RuntimeError) and text.startswith(_UNSUPPORTED_PREFIX):
        return Unsupported(text.removeprefix(_UNSUPPORTED_PREFIX))
    return error
