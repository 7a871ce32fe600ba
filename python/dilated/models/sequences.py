"""Rows of a batch or a pack: each one's position in its sequence, and the sequence's length."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dilated._inputs import lengths
from dilated.errors import InvalidProblem, message

if TYPE_CHECKING:
    from dilated._options import Lengths


class Rows(NamedTuple):
    """What rows know: `position` is (seqlen,), packed (total,); `length` broadcasts to the rows.

    `length` is None if every sequence has `longest` positions.
    """

    longest: int
    position: Tensor
    length: Tensor | None


def sequence_of_row(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) int64: which packed sequence each row belongs to."""
    rows = torch.arange(total, device=cu_seqlens.device)
    found = torch.searchsorted(cu_seqlens[1:], rows, right=True)
    return found.clamp(max=cu_seqlens.numel() - 2)


def rows_of(
    op: str,
    shape: torch.Size,
    device: torch.device,
    seqused: Lengths | None,
    cu_seqlens: Lengths | None,
) -> Rows:
    """The rows of a batch (batch, seqlen), or of a pack (total,) with cu_seqlens.

    Args:
        op: whose errors these are.
        shape: (batch, seqlen) or (total,).
        device: where positions are made.
        seqused: the length of every sequence, or None.
        cu_seqlens: starts of packed sequences and their end, or None.

    Raises:
        InvalidProblem: as many lengths as sequences are not given.
    """
    position = torch.arange(shape[-1], device=device)
    if cu_seqlens is None:
        used = _checked(op, "seqused", seqused, shape[0], device)
        return Rows(shape[-1], position, None if used is None else used[:, None])
    bounds = _checked(op, "cu_seqlens", cu_seqlens, None, device)
    assert bounds is not None
    whole = bounds.diff()
    used = _checked(op, "seqused", seqused, whole.numel(), device)
    # Compiled, the longest of a tensor is not known: the whole bounds it.
    unknown = whole.numel() == 0 or torch.compiler.is_compiling()
    longest = shape[0] if unknown else int(whole.max())
    sequence = sequence_of_row(bounds, shape[0])
    length = whole if used is None else used
    return Rows(longest, position - bounds[sequence], length[sequence])


def _checked(
    op: str, name: str, values: Lengths | None, count: int | None, device: torch.device
) -> Tensor | None:
    found = lengths(name, values, device)
    if found is None:
        return None
    fits = found.numel() == count if count is not None else found.numel() > 0
    if found.dim() != 1 or not fits:
        expected = "0, ..., total" if count is None else f"one length for each of {count} sequences"
        raise InvalidProblem(message(name, expected, f"shape {tuple(found.shape)}", op=op))
    return found
