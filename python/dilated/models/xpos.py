"""xPos (arXiv 2212.10554): rotary positions with a decay, on dense q and k before the operator.

Pair i of D/2 turns by the angle p * 10000^(-2i/D) and is scaled by zeta_i^(±(p - c) / scale_base),
    zeta_i = (2i + 0.4 D) / (1.4 D),   c = ceil(n / 2),
queries up and keys down, so that q_p . k_j depends on p - j only and fades as j falls behind.
Positions are absolute, 0..n-1; branches and segments never restart them. The numbers are
torchscale's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dilated.errors import InvalidProblem

# Largest |log2| of a factor: x times it must stay finite and, at the small end, a normal number.
_MAX_LOG2_SCALE = {
    torch.float16: 8.0,
    torch.bfloat16: 118.0,
    torch.float32: 118.0,
    torch.float64: 1000.0,
}


class XposTables(NamedTuple):
    """The factors of every position, (..., head_dim / 2, 2) each: scaled (cosine, sine)."""

    query: Tensor
    key: Tensor


def xpos_tables(
    seqlen: int,
    head_dim: int,
    *,
    position: Tensor | None = None,
    length: Tensor | None = None,
    scale_base: float = 512.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> XposTables:
    """Cosines and sines of xPos for every position, scaled up for queries and down for keys.

    Args:
        seqlen: n, the number of positions of the longest sequence.
        head_dim: D, even.
        position: where each row stands in its sequence, (...) int64; None means 0..n-1.
        length: the length of each row's sequence, broadcast to `position`; None means n.
        scale_base: distance over which pair i fades by zeta_i; torchscale's 512.
        dtype: of the tensors that will be rotated. Half types get float32 tables: the product is
            rounded once, at its end.
        device: where the tables are made, if `position` does not say it.

    Returns:
        Two tables (..., head_dim / 2, 2), float32, or float64 for float64; (seqlen, ...) without
        `position`.

    Raises:
        InvalidProblem: head_dim is odd, or the sequence is so long that scaled numbers leave the
            dtype.

    Example:
        >>> from dilated.models import xpos_tables
        >>> xpos_tables(8, 4).query.shape
        torch.Size([8, 2, 2])
    """
    if head_dim % 2:
        raise InvalidProblem(
            f"xpos_tables: head_dim: expected an even number, got {head_dim} (pairs are rotated)"
        )
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    limit = _MAX_LOG2_SCALE[dtype]
    reach = (seqlen + 1) // 2 / scale_base * math.log2(1.4 / 0.4)
    if reach > limit:
        needed = math.ceil(scale_base * reach / limit)
        raise InvalidProblem(
            f"xpos_tables: seqlen: expected <= {int(seqlen * limit / reach)} for {dtype} with "
            f"scale_base = {scale_base:g}, got {seqlen} "
            f"(use scale_base >= {needed} or a wider dtype)"
        )
    if position is None:
        position = torch.arange(seqlen, device=device)
    centre = (seqlen + 1) // 2 if length is None else (length + 1) // 2
    # float64 here: position * frequency in float32 is off by 1e-3 rad at position 16,384.
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device=position.device)
    angle = position[..., None].double() * 10000.0 ** (-2.0 * pair / head_dim)
    zeta = (2.0 * pair + 0.4 * head_dim) / (1.4 * head_dim)
    scale = zeta ** ((position - centre)[..., None].double() / scale_base)
    turn = torch.stack((angle.cos(), angle.sin()), dim=-1)
    scale = scale[..., None]
    return XposTables((turn * scale).to(table_dtype), (turn / scale).to(table_dtype))


def apply_xpos(x: Tensor, table: Tensor) -> Tensor:
    """Rotates neighbouring pairs: (a, b) -> (a cos - b sin, b cos + a sin).

    Args:
        x: (batch, seqlen, num_heads, head_dim), packed (total, num_heads, head_dim).
        table: (seqlen, head_dim / 2, 2) or one per row of x, from `xpos_tables`.

    Returns:
        Shape and dtype of x; half types are computed in float32 and rounded once.

    Raises:
        RuntimeError: the table does not fit x.

    Example:
        >>> import torch
        >>> from dilated.models import apply_xpos, xpos_tables
        >>> apply_xpos(torch.ones(1, 8, 2, 4), xpos_tables(8, 4).query).shape
        torch.Size([1, 8, 2, 4])
    """
    pairs = x.to(table.dtype).unflatten(-1, (-1, 2))
    table = table.unsqueeze(-3)  # the same for every head
    if torch.compiler.is_compiling():  # Inductor fuses this and has no complex numbers
        a, b = pairs.unbind(-1)
        cos, sin = table.unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:  # one pass; four times faster than the strided form on 2 cores at (16384, 4, 32)
        turned = torch.view_as_real(
            torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(table)
        )
    return turned.flatten(-2).to(x.dtype)
