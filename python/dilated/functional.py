"""The operator as a function: arguments to plain options, then one call of the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from . import _ops
from ._composite import column_sum_attention, row_shifted_attention
from .errors import InvalidProblem, message

if TYPE_CHECKING:
    from typing_extensions import Required, Unpack

IntSequence = Sequence[int] | Tensor

_COLUMN_SUM_PRESETS = frozenset(
    name
    for name in _ops.ops.presets()
    if _ops.ops.uses_column_sums(*_ops.Options([1], [1], preset=name))
)


def _int64(argument: str, values: IntSequence | None) -> Tensor | None:
    """Lengths as the core reads them: int64, on the CPU, contiguous."""
    if values is None:
        return None
    if not isinstance(values, Tensor):
        return torch.tensor(_ops.integers(argument, values), dtype=torch.int64)
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise InvalidProblem(message(argument, "integers", f"dtype {values.dtype}"))
    return values.to("cpu", torch.int64).contiguous()


def _seed(dropout_p: float, seed: int | Tensor | None) -> Tensor | None:
    """(seed, offset); drawn from torch's default generator if not given."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (2,), dtype=torch.int64)
    if isinstance(seed, Tensor):
        return seed.to("cpu", torch.int64).contiguous()
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        expected = "a 64-bit int, or an int64 tensor (seed, offset)"
        raise InvalidProblem(message("dropout_seed", expected, repr(seed)))
    return torch.tensor([seed, 0], dtype=torch.int64)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to matrix products: floating inputs but float64 take its dtype."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t.dtype.is_floating_point and t.dtype != torch.float64 else t
        for t in tensors
    )


class AttentionOptions(TypedDict, total=False):
    """Keyword arguments of :func:`dilated_attention`, for type checkers."""

    segments: Required[Sequence[int]]
    dilations: Required[Sequence[int]]
    is_causal: bool
    scale: float | None
    offsets: str | _ops.OffsetTable | None
    groups: str | None
    merge: str | None
    out_scale: float | None
    lse_grad: bool | None
    tail: str | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    key_mask: Tensor | None
    seqused: IntSequence | None
    cu_seqlens: IntSequence | None
    gqa_offset: str | None
    preset: str | None
    layout: str
    backend: str | None
    row_shift: bool


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Sequence[int],
    dilations: Sequence[int],
    is_causal: bool = False,
    scale: float | None = None,
    offsets: str | _ops.OffsetTable | None = None,
    groups: str | None = None,
    merge: str | None = None,
    out_scale: float | None = None,
    lse_grad: bool | None = None,
    tail: str | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    key_mask: Tensor | None = None,
    seqused: IntSequence | None = None,
    cu_seqlens: IntSequence | None = None,
    gqa_offset: str | None = None,
    preset: str | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    backend: str | None = None,
    row_shift: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Dilated self-attention: branches of segments and strides, merged by one softmax.

    .. math::
        K_b(p) = \{ base + o + i r_b \} \quad L = \log \sum_b e^{\ell_b} \quad
        O = \mathrm{out\_scale} \sum_b e^{\ell_b - L} O_b

    With ``merge="lse"`` that is one softmax over the keys of all branches together. A row that no
    branch covers gets ``O = 0`` and ``L = -inf``. Any length is allowed, nothing has to divide.

    Args:
        query: (batch, seqlen, heads, head_dim); float32, float64, bfloat16 or float16. Any strides
            with a contiguous last dimension, expanded tensors included.
        key: (batch, seqlen, kv_heads, head_dim); kv_heads divides heads.
        value: like key.
        segments: Segment length of every branch, >= 1; one segment if longer than the sequence.
        dilations: Dilation of every branch, >= 1.
        is_causal: A query sees only keys at or before its own position.
        scale: Factor of the scores; None means head_dim ** -0.5.
        offsets: Which residue a head keeps: "paper" (default), "torchscale", "branch", "zero", or a
            table of integers (branches, heads) in which -1 leaves a head out.
        groups: None or "none", "cumulative", "literal": give every branch its own group of heads.
        merge: "lse" (default), "sum" or "mean".
        out_scale: Factor of the output, default 1.
        lse_grad: False treats the merge weights as constants in backward. Default True.
        tail: "mask" (default), or "phantom": zero keys fill the last segment, as in torchscale.
        dropout_p: Probability of dropping an attention weight. Acts whenever it is not 0.
        dropout_seed: An int, or an int64 tensor (seed, offset). None: torch's generator draws both.
        key_mask: bool (batch, seqlen), packed (total,). True means that the key takes part.
        seqused: Length per sequence; later keys are masked.
        cu_seqlens: Starts of packed sequences and their end: 0, ..., total. Needs layout "shd".
        gqa_offset: Offsets by kv head ("kv", default) or by query head ("q").
        preset: "longnet", "torchscale", "head_groups", "fork" or "fkodom": sets the defaults of the
            options above. groups, merge and out_scale cannot be given with it, the others can.
        layout: "bshd", "bhsd", or "shd" for packed tensors (total, heads, head_dim).
        return_lse: Also return the log-sum-exp L.
        backend: Back end to use, see :func:`dilated.backends`. None: DILATED_BACKEND or the best.
        row_shift: With preset "torchscale" only: reproduce its shift of rows where a dilation does
            not divide its segment.

    Returns:
        Output like query (contiguous), or (output, lse) with lse of shape (batch, heads, seqlen),
        packed (heads, total), float32 (float64 for float64 inputs). Both are differentiable once.

    Raises:
        InvalidProblem: an argument breaks a rule; the message names argument, rule and value.
        Unsupported: no back end can run this.

    Example:
        >>> import torch, dilated
        >>> q, k, v = torch.randn(3, 2, 100, 8, 16).unbind(0)
        >>> out = dilated.dilated_attention(q, k, v, segments=[16, 64], dilations=[1, 4])
        >>> out.shape
        torch.Size([2, 100, 8, 16])
    """
    options = _ops.make_options(
        segments,
        dilations,
        offsets,
        preset=preset,
        groups=groups,
        merge=merge,
        out_scale=out_scale,
        lse_grad=lse_grad,
        tail=tail,
        gqa_offset=gqa_offset,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
    )
    query, key, value = _autocast(query, key, value)
    extras = _ops.Extras(
        key_mask,
        _int64("seqused", seqused),
        _int64("cu_seqlens", cu_seqlens),
        _seed(dropout_p, dropout_seed),
    )
    if row_shift:
        attend = row_shifted_attention
    elif preset in _COLUMN_SUM_PRESETS:
        attend = column_sum_attention
    else:
        attend = _ops.forward
    out, lse = attend(query, key, value, extras, layout, backend, options)
    return (out, lse) if return_lse else out
