"""What PyTorch must know about the operators: shapes of fake tensors, gradients, plain options.

    forward(query, key, value, masks, …)  -> out, lse, branch_out, branch_lse
    backward(dout, dlse, …)               -> dquery, dkey, dvalue

``branch_out`` and ``branch_lse`` are the branches' own results, saved for backward where the merge
needs them, else empty. Rules and messages are the core's: its operator ``check`` sees fake tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library
from .errors import InvalidProblem, Unsupported, message, typed

LIBRARY_PATH = _library.PATH

ops = torch.ops.dilated
_forward = ops.forward.default
_backward = ops.backward.default
_check = ops.check.default

NUM_FORWARD_ARGUMENTS = len(_forward._schema.arguments)

# Operators without tensors read constants only: under fake tensors and tracing they just run.
_queries = torch.library.Library("dilated", "IMPL")
for _name in (
    "check",
    "backends",
    "presets",
    "explain",
    "print_plan",
    "workspace_bytes",
    "count_pairs",
    "attention_pattern",
    "offsets",
    "uses_column_sums",
):
    _queries.impl(_name, torch.library.fallthrough_kernel, "Python")
    _queries.impl(_name, torch.library.fallthrough_kernel, "PythonTLSSnapshot")


class Options(NamedTuple):
    """Options of one call in the order of every schema; None: "the preset's, else the default"."""

    segments: list[int]
    dilations: list[int]
    preset: str | None = None
    offsets: str | None = None
    offset_table: list[int] | None = None
    groups: str | None = None
    merge: str | None = None
    out_scale: float | None = None
    lse_grad: bool | None = None
    tail: str | None = None
    gqa_offset: str | None = None
    is_causal: bool = False
    scale: float | None = None
    dropout_p: float = 0.0


OffsetTable = Sequence[Sequence[int]] | Tensor


def integers(argument: str, values: Iterable[Any]) -> list[int]:
    """Plain ints from any sequence of integers, numpy's included. A string of a list is refused."""
    try:
        if isinstance(values, str):
            raise TypeError
        return [operator.index(value) for value in values]
    except TypeError:
        text = message(argument, "a sequence of integers", repr(values))
        raise InvalidProblem(text) from None


def _table(offsets: OffsetTable, branches: int) -> list[int]:
    rows = offsets.tolist() if isinstance(offsets, Tensor) else offsets
    try:
        table = [integers("offsets", row) for row in rows]
    except TypeError:
        text = message("offsets", "a builder's name or a table (branches, heads)", repr(offsets))
        raise InvalidProblem(text) from None
    if len(table) != branches or len({len(row) for row in table}) > 1:
        lengths = ", ".join(str(len(row)) for row in table)
        raise InvalidProblem(
            message("offsets", f"a table of {branches} equal rows", f"rows of lengths [{lengths}]",
                    "one row per branch, one entry per query head")
        )  # fmt: skip
    return [entry for row in table for entry in row]


def make_options(
    segments: Sequence[int],
    dilations: Sequence[int],
    offsets: str | OffsetTable | None = None,
    **others: Any,
) -> Options:
    """Options from the arguments of the public functions."""
    segments = integers("segments", segments)
    dilations = integers("dilations", dilations)
    if offsets is None or isinstance(offsets, str):
        return Options(segments, dilations, offsets=offsets, **others)
    return Options(segments, dilations, offset_table=_table(offsets, len(segments)), **others)


class Extras(NamedTuple):
    """Optional tensors of one call, in the order of the schema."""

    key_mask: Tensor | None = None
    seqused: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dropout_seed: Tensor | None = None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    layout: str,
    backend: str | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in the user's layout, with gradients.

    Raises:
        InvalidProblem, Unsupported: with the core's message.
    """
    save_branches = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )
    try:
        out, lse, _, _ = _forward(
            query, key, value, *extras, layout, backend or "", save_branches, *options
        )
    except (ValueError, RuntimeError) as error:
        raise typed(error) from None
    return out, lse


# Fake tensors: what tracing and compilers see.
_INPUT_NAMES = ("query", "key", "value", *Extras._fields)


def _number(size: int | torch.SymInt) -> int | None:
    """A number for a size; for a symbol the example's, without a guard. None: unknown even then."""
    if isinstance(size, int):
        return size
    known: int | None = size.node.maybe_as_int()
    return size.node.hint if known is None else known


def check(tensors: Sequence[Tensor | None], layout: str, backend: str, options: Options) -> bool:
    """Raise what the core would raise for these tensors (query, key, value, extras).

    Returns whether forward saves results of every branch for backward. Nothing is computed.
    """
    given = [(n, t) for n, t in zip(_INPUT_NAMES, tensors, strict=True) if t is not None]
    sizes = [_number(size) for _, t in given for size in t.shape]
    strides = [_number(stride) for _, t in given for stride in t.stride()]
    if None in sizes or None in strides:  # data-dependent: not even an example; heads must do
        heads_at = 2 if layout == "bshd" else 1
        tiny = [
            t.new_empty([int(size) if i == heads_at else 1 for i, size in enumerate(t.shape)])
            for t in tensors[:3]
            if t is not None
        ]
        return check((*tiny, None, None, None, tensors[6]), layout, backend, options)
    on_meta = tensors[0] is not None and tensors[0].device.type == "meta"
    devices = [
        "cpu" if t.device.type == "cpu" or (on_meta and t.device.type == "meta") else str(t.device)
        for _, t in given
    ]
    try:
        needed: bool = _check(
            [name for name, _ in given],
            [str(t.dtype).removeprefix("torch.") for _, t in given],
            devices,
            [t.dim() for _, t in given],
            sizes,
            strides,
            layout,
            backend,
            *options,
        )
    except (ValueError, RuntimeError) as error:
        raise typed(error) from None
    return needed


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _branch_rows(seqlen: Any, sequences: Any, options: Options) -> Any:
    """Plan::branch_rows (include/dilated/plan.h), for symbolic seqlen too."""
    rows = 0
    for segment, dilation in zip(options.segments, options.dilations, strict=True):
        bound = seqlen // dilation + seqlen // segment + sequences + 1
        rows = rows + torch.sym_min(seqlen, bound)
    return rows


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    seqused: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_seed: Tensor | None,
    layout: str,
    backend: str,
    save_branches: bool,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(*given)
    tensors = (query, key, value, key_mask, seqused, cu_seqlens, dropout_seed)
    needed = check(tensors, layout, backend, options)
    if layout == "shd":
        batch, (seqlen, heads, head_dim) = 1, query.shape
        lse_shape = [heads, seqlen]
    else:
        order = (0, 1, 2, 3) if layout == "bshd" else (0, 2, 1, 3)
        batch, seqlen, heads, head_dim = (query.shape[i] for i in order)
        lse_shape = [batch, heads, seqlen]
    rows: Any = 0
    if save_branches and needed:
        heads = int(heads)  # whether branches are saved depends on it: one graph per number
        rows = _branch_rows(seqlen, 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1, options)
    dtype = _lse_dtype(query)
    return (
        query.new_empty(query.shape),
        query.new_empty(lse_shape, dtype=dtype),
        query.new_empty([batch, heads, rows, head_dim], dtype=dtype),
        query.new_empty([batch, heads, rows], dtype=dtype),
    )


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


torch.library.register_fake("dilated::forward", _forward_fake)
torch.library.register_fake("dilated::backward", _backward_fake)


# Gradients.
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (layout, backend, _), options = inputs[:7], inputs[7:10], inputs[10:]
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.settings = (layout, backend, *options)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _gradient(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    rest = (None,) * (NUM_FORWARD_ARGUMENTS - 3)
    if dout is None and dlse is None:
        return (None, None, None, *rest)
    saved = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(saved[3])
    return (*_backward(dout, dlse, *saved, *ctx.settings), *rest)


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
    raise Unsupported(
        message("create_graph", "first derivatives only", "a second one",
                "the gradient of dilated_attention is not differentiable; dilated.reference is")
    )  # fmt: skip


torch.library.register_autograd("dilated::forward", _gradient, setup_context=_setup_context)
torch.library.register_autograd(
    "dilated::backward", _no_second_derivative, setup_context=_no_context
)
