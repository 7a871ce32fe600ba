"""dilated_attention on shards in compiled graphs: one opaque operator each way.

    sharded_attention(query, key, value, …)        -> out, lse, what backward needs, state
    sharded_attention_backward(dout, dlse, …)      -> dquery, dkey, dvalue

Ranks must compile the same function for the same shards: no compiler then adds, drops or moves an
exchange on one of them alone. Tracing communicates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import _fake, _ops
from .._inputs import optional_tensors
from .._options import Options, integers
from ..errors import InvalidProblem, Unsupported, message
from . import _class_rows
from ._attention import agreed_call, call_shapes, check_call, plan_of
from ._groups import SequenceGroups, groups_named
from ._plans import Call
from ._transports import transport_index, transport_of

if TYPE_CHECKING:
    from .._options import Lengths

_OF_CALL = (
    "Tensor? seqused, Tensor? scale_tensor, str groups, SymInt[] shards, SymInt[] cu_seqlens, "
    "str transport, float? scale, float? out_scale, float dropout_p, SymInt[] options"
)
_SAVED = (
    "Tensor out, Tensor lse, Tensor class_rows, Tensor lse_residual, Tensor branch_out, "
    "Tensor branch_lse, Tensor state"
)
_INPUTS = "Tensor query, Tensor key, Tensor value"


def _options(scale_tensor: Tensor | None, rest: tuple[Any, ...]) -> Options:
    scale, out_scale, dropout_p, packed = rest
    scale = scale if scale_tensor is None else float(scale_tensor)
    return Options(scale, out_scale, dropout_p, list(packed))


def _sharded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_seed: Tensor | None,
    drawn: bool,
    seqused: Tensor | None,
    scale_tensor: Tensor | None,
    name: str,
    shards: Sequence[int],
    cu_seqlens: Sequence[int],
    transport: str,
    *rest: Any,
) -> tuple[Tensor, ...]:
    groups, options = groups_named(name), _options(scale_tensor, rest)
    with groups:
        call = agreed_call(
            groups,
            lambda: check_call(
                groups,
                (query, key, value),
                shards,
                seqused,
                list(cu_seqlens) or None,
                dropout_seed,
                transport or None,
                options,
                drawn=drawn,
            ),
        )
        saved = _class_rows.forward(call, query, key, value)
    seed = [0, 0] if call.dropout_seed is None else call.dropout_seed.tolist()
    return (*saved, torch.tensor([call.number, *seed]))


def _sharded_attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *saved, state = rest[:7]
    seqused, scale_tensor, name, shards, cu_seqlens, transport = rest[7:13]
    groups, options = groups_named(name), _options(scale_tensor, rest[13:])
    shapes = call_shapes(options.layout, query, key, seqused is not None, list(cu_seqlens))
    plan = plan_of(groups, shapes, list(shards), options)
    call = Call(
        groups,
        int(state[0]),
        plan,
        transport_of(plan, options, transport or None),
        options,
        shapes[3],
        list(cu_seqlens),
        seqused,
        state[1:] if options.dropout_p > 0 else None,
    )
    return _class_rows.backward(call, (query, key, value), tuple(saved), dout, dlse)


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, _drawn: bool, *of_call: Any
) -> tuple[Tensor, ...]:
    seqused, _, name, shards, cu_seqlens, transport, *rest = of_call
    options = _options(None, tuple(rest))
    options = options._replace(packed=[int(entry) for entry in options.packed])
    cu = [int(entry) for entry in cu_seqlens]
    starts = query.new_empty([len(cu)], dtype=torch.int64) if cu else None
    optional = _ops.OptionalTensors(cu_seqlens=starts, dropout_seed=seed)
    saves = _fake.check((query, key, value, *optional), options) > 0
    shapes = call_shapes(options.layout, query, key, seqused is not None, cu)
    shapes = tuple(int(size) for size in shapes)  # one graph per size: the plan has no symbols
    with _disable_current_modes():  # rows of the plan are numbers
        plan = plan_of(groups_named(name), shapes, [int(rows) for rows in shards], options)
    transport_of(plan, options, transport or None)
    batch, heads, head_dim = shapes[3], shapes[5], shapes[7]
    rows = shards[groups_named(name).rank]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty([*([] if cu else [batch]), heads, rows], dtype=wide)
    sequences = len(cu) - 1 if cu else 1
    kept = _fake.branch_rows(rows, sequences, True, options) if saves else 0
    return (
        query.new_empty(query.shape),
        lse,
        key.new_empty([2, batch, plan.class_rows, head_dim]),
        torch.empty_like(lse),
        lse.new_empty([batch, heads, kept, head_dim]),
        lse.new_empty([batch, heads, kept, 2]),
        query.new_empty([3], dtype=torch.int64),
    )


def _fake_backward(_dout: Any, _dlse: Any, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


_sharded_op = torch.library.custom_op(
    "dilated::sharded_attention",
    _sharded_attention,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? dropout_seed, bool drawn, {_OF_CALL}) -> ({_SAVED})",
)
_backward_op = torch.library.custom_op(
    "dilated::sharded_attention_backward",
    _sharded_attention_backward,
    mutates_args=(),
    schema=f"(Tensor? dout, Tensor? dlse, {_INPUTS}, {_SAVED}, {_OF_CALL}) -> "
    "(Tensor dquery, Tensor dkey, Tensor dvalue)",
)
_sharded_op.register_fake(_fake_forward)
_backward_op.register_fake(_fake_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[5:7])
    ctx.of_call = inputs[7:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Any, dlse: Any, *_: Any) -> tuple[Any, ...]:
    gradients = _backward_op(dout, dlse, *ctx.saved_tensors, *ctx.of_call)
    return (*gradients, *(None,) * (4 + len(ctx.of_call)))


_sharded_op.register_autograd(_backward, setup_context=_setup_context)


def compiled_attention(
    groups: SequenceGroups,
    inputs: tuple[Tensor, Tensor, Tensor],
    shards: Sequence[SupportsIndex] | None,
    seqused: Lengths | None,
    cu_seqlens: Lengths | None,
    dropout_seed: SupportsIndex | Tensor | None,
    transport: str | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """dilated_attention of a checked call, as a compiler records it."""
    transport_index(transport)
    if transport == "ring":
        raise Unsupported(message("transport", "another in a compiled graph", "'ring'"))
    if shards is None:
        hint = "a graph has one number of rows per rank"
        raise InvalidProblem(message("shards", "rows of every rank", "none", hint))
    if isinstance(cu_seqlens, Tensor):
        hint = "call .tolist(): what travels depends on it"
        raise Unsupported(message("cu_seqlens", "a list in a compiled graph", "a Tensor", hint))
    optional, options = optional_tensors(
        inputs[0], options, None, seqused, None, None, dropout_seed
    )
    out, lse, *_ = _sharded_op(
        *inputs,
        optional.dropout_seed,
        dropout_seed is None,
        optional.seqused,
        optional.scale_tensor,
        groups.name,
        integers("shards", shards),
        [] if cu_seqlens is None else integers("cu_seqlens", cu_seqlens),
        transport or "",
        *options,
    )
    return out, lse
