"""The operator as a function: arguments to plain options, then one call of the core."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias, overload

import torch
from torch import Tensor

from . import _fake, _gradients, _ops, _transforms, parity  # noqa: F401 - registers operators
from ._inputs import optional_tensors, require_tensors
from ._options import COLUMN_SUM_PRESETS, attention_options, flag

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import AttentionOptions, Integers, Lengths

Observer: TypeAlias = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], None]
# Who is told of query, key, value and options of a thread's calls: `attention_received`.
observers: list[tuple[int, Observer]] = []


def is_observed() -> bool:
    """Whether anyone watches this thread."""
    if not observers or torch.compiler.is_compiling():
        return False
    return threading.get_ident() in {thread for thread, _ in observers}


def _tell_observers(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
    """Tell each one of this thread once: layers that contain each other may both be watched."""
    here = threading.get_ident()
    entries = [entry for entry in observers if entry[0] == here]
    for entry in entries:  # calls of their own are not observed
        observers.remove(entry)
    try:
        for observe in dict.fromkeys(observe for _, observe in entries):
            observe(query, key, value, options)
    finally:
        observers.extend(entries)


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Integers,
    dilations: Integers,
    key_mask: Tensor | None = ...,
    seqused: Lengths | None = ...,
    cu_seqlens: Lengths | None = ...,
    dropout_seed: SupportsIndex | Tensor | None = ...,
    row_shift: bool = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Integers,
    dilations: Integers,
    key_mask: Tensor | None = ...,
    seqused: Lengths | None = ...,
    cu_seqlens: Lengths | None = ...,
    dropout_seed: SupportsIndex | Tensor | None = ...,
    row_shift: bool = ...,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Integers,
    dilations: Integers,
    key_mask: Tensor | None = ...,
    seqused: Lengths | None = ...,
    cu_seqlens: Lengths | None = ...,
    dropout_seed: SupportsIndex | Tensor | None = ...,
    row_shift: bool = ...,
    return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Integers,
    dilations: Integers,
    key_mask: Tensor | None = None,
    seqused: Lengths | None = None,
    cu_seqlens: Lengths | None = None,
    dropout_seed: SupportsIndex | Tensor | None = None,
    row_shift: bool = False,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
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
        key_mask: bool (batch, seqlen), packed (total,). True means that the key takes part.
        seqused: True length of every sequence, for batches of unequal ones: rows at or beyond it do
            not exist, their output is 0 and their lse -inf.
        cu_seqlens: Starts of packed sequences and their end: 0, ..., total. Needs layout "shd".
        dropout_seed: An integer, or an int64 tensor (seed, offset). None: torch's generator draws
            both.
        row_shift: With preset "torchscale" only: reproduce its shift of rows where a dilation does
            not divide its segment.
        return_lse: Also return the log-sum-exp L.
        is_causal: A query sees only keys at or before its own position. Default False.
        scale: Factor of the scores, a number; None means head_dim ** -0.5.
        offsets: Which residue a head keeps: "paper" (default), "torchscale", "branch", "zero", or a
            table of integers (branches, heads) in which -1 leaves a head out.
        groups: None or "none", "cumulative", "literal": give every branch its own group of heads.
        merge: "lse" (default), "sum" or "mean".
        out_scale: Factor of the output, default 1.
        lse_grad: False treats the merge weights as constants in backward. Default True.
        tail: "mask" (default), or "phantom": zero keys fill the last segment, as in torchscale.
        dropout_p: Probability of dropping an attention weight. Acts whenever it is not 0.
        gqa_offset: Offsets by kv head ("kv", default) or by query head ("q").
        preset: "longnet", "torchscale", "head_groups", "fork" or "fkodom": sets the defaults of the
            options above. groups, merge and out_scale cannot be given with it, the others can.
        layout: "bshd" (default), "bhsd", or "shd" for packed tensors (total, heads, head_dim).
        backend: Back end to use, see :func:`dilated.backends`. None: DILATED_BACKEND or the best.
        head_offset, total_heads, total_kv_heads: The call's heads are [head_offset, head_offset +
            heads) of a model with total_heads query and total_kv_heads key/value heads: what a
            tensor-parallel shard must say. Default: the call has all heads.

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
    require_tensors(query, key, value)
    if observers and not torch.compiler.is_compiling():
        sequences = {"key_mask": key_mask, "seqused": seqused, "cu_seqlens": cu_seqlens}
        lists = {"segments": segments, "dilations": dilations, "row_shift": row_shift}
        _tell_observers(query, key, value, {**lists, **sequences, **options})
    checked = attention_options(segments=segments, dilations=dilations, **options)
    optional, checked = optional_tensors(
        query, checked, key_mask, seqused, cu_seqlens, None, dropout_seed
    )
    if flag("row_shift", row_shift):
        out, lse = _ops.ask(parity.row_shift_op, query, key, value, *optional, *checked)
    elif options.get("preset") in COLUMN_SUM_PRESETS:
        out, lse = _ops.ask(parity.column_sums_op, query, key, value, *optional, *checked)
    else:
        out, lse = _gradients.forward(query, key, value, optional, checked)
    return (out, lse) if flag("return_lse", return_lse) else out
