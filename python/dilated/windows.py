"""Parts of a call: windows of queries and keys, and the merge of their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from . import _gradients, _ops
from ._inputs import lengths, optional_tensors, require_tensors
from ._options import (
    COLUMN_SUM_PRESETS,
    DTYPES,
    attention_options,
    digit_of,
    integer,
)
from .errors import InvalidProblem, Unsupported, message
from .functional import is_observed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import AttentionOptions, Integers, Lengths


def _per_sequence(argument: str, value: Any, count: Any) -> Tensor:
    """One int64 per sequence, on the CPU, from one for all of them or one for each."""
    cpu = torch.device("cpu")
    tensor = None
    if (isinstance(value, Tensor) and value.dim() == 1) or isinstance(value, Sequence):
        tensor = lengths(argument, value, cpu)
    if tensor is not None:
        if tensor.shape[0] != count:
            expected = f"one integer, or one per sequence, {count}"
            raise InvalidProblem(message(argument, expected, f"{tensor.shape[0]}"))
        return tensor
    return torch.full((count,), integer(argument, value), dtype=torch.int64, device=cpu)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Integers,
    dilations: Integers,
    seqlen: SupportsIndex | Lengths,
    query_start: SupportsIndex | Lengths = 0,
    key_start: SupportsIndex | Lengths = 0,
    query_rows: Lengths | None = None,
    key_rows: Lengths | None = None,
    key_mask: Tensor | None = None,
    seqused: Lengths | None = None,
    dropout_seed: SupportsIndex | Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]:
    r"""Attention of a part of the queries to a part of the keys of every sequence.

    The call holds the query rows at positions [query_start, query_start + m) and the key rows at
    [key_start, key_start + k) of sequences of ``seqlen`` positions. Every option keeps its meaning
    in positions of the whole sequence. Windows that together hold every key once give, merged by
    :func:`dilated.merge`, what :func:`dilated.dilated_attention` gives for all of them: chunked
    prefill, decoding with a cache and context parallelism are calls of this one function.

    Args:
        query: (batch, m, heads, head_dim), or as ``layout`` says.
        key: (batch, k, kv_heads, head_dim).
        value: like key.
        segments: Segment length of every branch.
        dilations: Dilation of every branch.
        seqlen: Length of the sequences; packed, one per sequence.
        query_start: Position of the first query row: one for all sequences, or one per sequence.
        key_start: Position of the first key row, likewise.
        query_rows: With layout "shd", and only then: how many query rows every sequence has.
        key_rows: How many key rows every sequence has, likewise.
        key_mask: bool (batch, k), packed (total keys,).
        seqused: True length of every sequence, at most ``seqlen``.
        dropout_seed: As in :func:`dilated.dilated_attention`: the same for all windows.
        **options: Options of :func:`dilated.dilated_attention`; merge "lse" only.

    Returns:
        (out, lse): the window's own normalised result, float32 (float64 for float64 inputs) and
        shaped like query, and its log-sum-exp (batch, heads, m), packed (heads, total queries).
        Rows that see no key of the window are 0 and -inf. Both are differentiable once.

    Raises:
        InvalidProblem: an argument breaks a rule.
        Unsupported: merges other than "lse" say nothing about single branches, and with
            ``lse_grad=False`` a window of part of the keys has no gradient.

    Example:
        >>> import torch, dilated
        >>> q, k, v = torch.randn(3, 1, 100, 8, 16).unbind(0)
        >>> call = {"segments": [16, 64], "dilations": [1, 4], "seqlen": 100, "is_causal": True}
        >>> halves = [
        ...     dilated.window_attention(
        ...         q[:, 90:], k[:, a:b], v[:, a:b], query_start=90, key_start=a, **call
        ...     )
        ...     for a, b in ((0, 50), (50, 100))
        ... ]
        >>> out, lse = dilated.merge(halves)
        >>> out.shape
        torch.Size([1, 10, 8, 16])
    """
    require_tensors(query, key, value)
    if is_observed():
        hint = "give the layer whole sequences: no cache of keys"
        text = message("layer", "calls with all queries and keys", "a window", hint,
                       "attention_received")  # fmt: skip
        raise Unsupported(text)
    checked = attention_options(segments=segments, dilations=dilations, **options)
    if options.get("preset") in COLUMN_SUM_PRESETS:
        hint = "its column sums run over the whole sequence"
        raise Unsupported(message("preset", "no column sums with windows", "'fkodom'", hint))
    layout = checked.layout
    given = [name for name, rows in (("query_rows", query_rows), ("key_rows", key_rows))
             if (rows is None) == (layout == "shd")]  # fmt: skip
    if given:
        expected = "one number per sequence with layout 'shd', none with others"
        raise InvalidProblem(message(given[0], expected, f"layout '{layout}'"))
    queries: Any
    keys: Any
    if query_rows is not None and key_rows is not None:
        cpu = torch.device("cpu")
        queries = lengths("query_rows", query_rows, cpu)
        keys = lengths("key_rows", key_rows, cpu)
        count = queries.shape[0]
        if keys.shape[0] != count:
            expected = f"as many as query_rows, {count}"
            raise InvalidProblem(message("key_rows", expected, f"{keys.shape[0]}"))
    else:
        for name, tensor in (("query", query), ("key", key)):
            if tensor.dim() != 4:
                got = f"shape {tuple(tensor.shape)}"
                raise InvalidProblem(message(name, f"4 dimensions with layout {layout}", got))
        dim = 1 if layout == "bshd" else 2
        count = query.shape[0]
        queries, keys = query.shape[dim], key.shape[dim]
    starts = [_per_sequence(n, s, count)
              for n, s in (("query_start", query_start), ("key_start", key_start))]  # fmt: skip
    columns = (
        _per_sequence("seqlen", seqlen, count),
        starts[0],
        starts[0] + queries,
        starts[1],
        starts[1] + keys,
    )
    windows = torch.stack(columns, dim=1)
    optional, checked = optional_tensors(
        query, checked, key_mask, seqused, None, windows, dropout_seed
    )
    return _gradients.forward(query, key, value, optional, checked)


def merge(
    parts: Sequence[tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    layout: str = "bshd",
) -> tuple[Tensor, Tensor]:
    r"""Merge partial results that attend to disjoint sets of keys.

    .. math::
        L = \log \sum_i e^{\ell_i} \qquad O = \sum_i e^{\ell_i - L} O_i

    Args:
        parts: Pairs (out, lse) as :func:`dilated.window_attention` returns them, at least one, in
            any order. Rows with lse = -inf are absent.
        dtype: Of the merged output; None means that of the parts.
        layout: That of the parts: "bshd", "bhsd" or "shd".

    Returns:
        (out, lse). Sums are float64 and rounded once. Differentiable once.

    Raises:
        InvalidProblem: no part, or parts of different shapes or dtypes.
        Unsupported: tensors on a device without a merge.

    Example:
        >>> import torch, dilated
        >>> part = torch.ones(1, 2, 1, 4), torch.zeros(1, 1, 2)
        >>> out, lse = dilated.merge([part, part])
        >>> lse.exp()
        tensor([[[2., 2.]]])
    """
    pairs = [tuple(part) for part in parts]
    for i, pair in enumerate(pairs):
        if len(pair) != 2 or not all(isinstance(tensor, Tensor) for tensor in pair):
            got = f"{len(pair)} entries" if len(pair) != 2 else "something else than tensors"
            raise InvalidProblem(message(f"parts[{i}]", "(out, lse)", got, op="merge"))
    if not pairs:
        raise InvalidProblem(message("parts", "at least one partial result", "none", op="merge"))
    outs, lses = ([pair[i] for pair in pairs] for i in (0, 1))
    chosen = outs[0].dtype if dtype is None else dtype
    if chosen not in DTYPES:
        expected = f"one of {', '.join(map(str, DTYPES))}"
        raise InvalidProblem(message("dtype", expected, str(chosen), op="merge"))
    at = digit_of("layout", layout) - 1
    out, lse = _ops.ask(_ops.merge_op, outs, lses, at, DTYPES.index(chosen))
    return out, lse
