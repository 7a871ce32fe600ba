"""Shapes of fake tensors: what tracing and compilers see. Rules and messages are the core's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._ops import INPUT_NAMES, OptionalTensors
from ._options import DTYPES, Options


def known_size(size: int | torch.SymInt) -> int | None:
    """A number for a size; for a symbol the example's, without a guard. None: unknown even then."""
    if isinstance(size, int):
        return size
    known: int | None = size.node.maybe_as_int()
    return size.node.hint if known is None else known


def _seqlen_dim(options: Options) -> int:
    return {"bshd": 1, "bhsd": 2, "shd": 0}[options.layout]


def _heads_dim(options: Options) -> int:
    return {"bshd": 2, "bhsd": 1, "shd": 1}[options.layout]


def check(tensors: Sequence[Tensor | None], options: Options) -> int:
    """Raise what the core would raise for these tensors (query, key, value, optional).

    Returns how many rows of branch results per head forward_saving saves. Nothing is computed.
    """
    given = [(n, t) for n, t in zip(INPUT_NAMES, tensors, strict=True) if t is not None]
    sizes = [known_size(size) for _, t in given for size in t.shape]
    strides = [known_size(stride) for _, t in given for stride in t.stride()]
    if None in sizes or None in strides:  # data-dependent: not even an example; heads must do
        at = _heads_dim(options)
        tiny = [
            t.new_empty([int(size) if i == at else 1 for i, size in enumerate(t.shape)])
            for t in tensors[:3]
            if t is not None
        ]
        return check((*tiny, None, None, None, None, *tensors[-2:]), options)
    on_meta = tensors[0] is not None and tensors[0].device.type == "meta"
    devices = [
        "cpu" if t.device.type == "cpu" or (on_meta and t.device.type == "meta") else str(t.device)
        for _, t in given
    ]
    rows: int = _ops.ask(
        _ops.ops.check.default,
        [name for name, _ in given],
        [str(t.dtype).removeprefix("torch.") for _, t in given],
        devices,
        [t.dim() for _, t in given],
        sizes,
        strides,
        *options.known(known_size),
    )
    return rows


def split(rest: Sequence[Any]) -> tuple[OptionalTensors, Options]:
    """What follows query, key and value in the arguments of forward."""
    count = len(OptionalTensors._fields)
    return OptionalTensors(*rest[:count]), Options(*rest[count:])


def _lse_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def branch_rows(seqlen: Any, sequences: Any, windows: bool, options: Options) -> Any:
    """Plan::branch_rows (include/dilated/plan.h), for symbolic seqlen too."""
    extra = 3 * sequences if windows else sequences + 1
    rows = 0
    for segment, dilation in zip(options.segments, options.dilations, strict=True):
        rows = rows + torch.sym_min(seqlen, seqlen // dilation + seqlen // segment + extra)
    return rows


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    optional, options = split(rest)
    check((query, key, value, *optional), options)
    heads, seqlen = query.shape[_heads_dim(options)], query.shape[_seqlen_dim(options)]
    batch = [] if query.dim() == 3 else [query.shape[0]]
    dtype = _lse_dtype(query)
    out = query.new_empty(query.shape, dtype=query.dtype if optional.windows is None else dtype)
    return out, query.new_empty([*batch, heads, seqlen], dtype=dtype)


def _forward_saving_fake(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    optional, options = split(rest)
    out, lse = _forward_fake(query, key, value, *rest)
    rows: Any = 0
    batch = 1 if query.dim() == 3 else query.shape[0]
    heads: Any = query.shape[_heads_dim(options)]
    if check((query, key, value, *optional), options) > 0:
        heads = int(heads)  # whether branches are saved depends on it: one graph per number
        sequences: Any = 1
        if query.dim() == 3 and optional.cu_seqlens is not None:
            sequences = optional.cu_seqlens.shape[0] - 1
        elif query.dim() == 3 and optional.windows is not None:
            sequences = optional.windows.shape[0]
        seqlen = query.shape[_seqlen_dim(options)]
        rows = branch_rows(seqlen, sequences, optional.windows is not None, options)
    return (
        out,
        lse,
        torch.empty_like(lse),
        lse.new_empty([batch, heads, rows, query.shape[-1]]),
        lse.new_empty([batch, heads, rows, 2]),
    )


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _merge_fake(outs: list[Tensor], lses: list[Tensor], layout: int, dtype: int) -> Any:
    return outs[0].new_empty(outs[0].shape, dtype=DTYPES[dtype]), lses[0].new_empty(lses[0].shape)


def _merge_backward_fake(
    dout: Tensor, dlse: Tensor | None, outs: list[Tensor], lses: list[Tensor], layout: int
) -> tuple[list[Tensor], list[Tensor]]:
    return [x.new_empty(x.shape) for x in outs], [x.new_empty(x.shape) for x in lses]


torch.library.register_fake("dilated::forward", _forward_fake)
torch.library.register_fake("dilated::forward_saving", _forward_saving_fake)
torch.library.register_fake("dilated::backward", _backward_fake)
torch.library.register_fake("dilated::merge", _merge_fake)
torch.library.register_fake("dilated::merge_backward", _merge_backward_fake)
