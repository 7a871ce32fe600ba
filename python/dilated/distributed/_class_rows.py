"""The far keys of a shard as class rows: all ranks but the ring's.

forward   pack rows -> exchange -> class rows -> one call over all branches: one process's bits
backward  one call -> float32 gradients of class rows -> exchange -> sum in rank order -> round
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _ops
from ._agreement import agree_on_backward
from ._messages import ROWS_TAG, Exchange
from ._plans import Call


def _exchange_keys(call: Call, key: Tensor, value: Tensor) -> Tensor:
    """Class rows of keys and values, (2, batch, class rows, head_dim); some are unset: nobody
    needs them.
    """
    plan, rank = call.plan, call.groups.rank
    sides = call.by_token(key), call.by_token(value)
    batch, head_dim = sides[0].shape[0], key.shape[-1]

    def packed(rows: Tensor, heads: Tensor) -> Tensor:
        return torch.stack([side[:, rows, heads] for side in sides])

    if call.transport == "all_gather":
        gather = plan.gather(rank)
        sends = {peer: packed(*rows) for peer, rows in gather.sends.items()}
        counts = {peer: message.size for peer, message in gather.receives.items()}
    else:
        sends = {p: packed(rows.rows, rows.heads) for p, rows in plan.sends.items() if p != rank}
        counts = {peer: len(rows.rows) for peer, rows in plan.receives.items() if peer != rank}
    arrived = {peer: key.new_empty(2, batch, count, head_dim) for peer, count in counts.items()}
    exchange = Exchange(call.groups, sends, arrived, ROWS_TAG, f"keys of call {call.number}")
    class_rows = key.new_empty(2, batch, plan.class_rows, head_dim)
    if rank in plan.receives:
        own = plan.sends[rank]
        class_rows[:, :, plan.receives[rank].class_rows] = packed(own.rows, own.heads)
    exchange.finish()
    for peer, part in arrived.items():
        if call.transport == "all_gather":
            part = part[:, :, gather.receives[peer].read]
        if peer in plan.receives:
            class_rows[:, :, plan.receives[peer].class_rows] = part
    return class_rows


def _add_gradients(
    call: Call, dkey: Tensor, dvalue: Tensor, dclass_key: Tensor, dclass_value: Tensor
) -> None:
    """Send the gradients of other ranks' rows home; add those of the own rows in rank order."""
    plan, rank = call.plan, call.groups.rank
    dclass = torch.stack([dclass_key, dclass_value])

    def part(peer: int) -> Tensor:
        return dclass[:, :, plan.receives[peer].class_rows]

    sends = {peer: part(peer) for peer in plan.receives if peer != rank}
    shape = 2, dclass.shape[1], dclass.shape[3]
    arrived = {
        peer: dclass.new_empty(*shape[:2], len(rows.rows), shape[2])
        for peer, rows in plan.sends.items()
        if peer != rank
    }
    Exchange(call.groups, sends, arrived, ROWS_TAG, f"gradients of call {call.number}").finish()
    batch = torch.arange(shape[1])[:, None]
    for peer, rows in sorted(plan.sends.items()):
        for side, given in zip((dkey, dvalue), part(rank) if peer == rank else arrived[peer]):
            # Rows that several branches share occur several times; sums are in their order.
            call.by_token(side).index_put_((batch, rows.rows, rows.heads), given, accumulate=True)


def _rest(call: Call) -> tuple[Any, ...]:
    return (call.seqused, call.windows(call.groups.rank), call.dropout_seed, *call.options)


def forward(call: Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Out, lse, and what backward needs: class rows (2, batch, rows, head_dim), then the core's."""
    class_rows = _exchange_keys(call, key, value)
    out, lse, *saved = _ops.ask(
        _ops.ops.forward_class_rows, query, key, value, *class_rows, *_rest(call)
    )
    return out, lse, class_rows, *saved


def backward(
    call: Call,
    inputs: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, ...],
    dout: Tensor | None,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from what `forward` returned."""
    out, lse, class_rows, *rest = saved
    with call.groups:
        if not call.plan.is_local:
            agree_on_backward(call)
        dquery, dkey, dvalue, *dclass = _ops.ask(
            _ops.ops.backward_class_rows,
            torch.zeros_like(out) if dout is None else dout,
            dlse,
            *inputs,
            *class_rows,
            out,
            lse,
            *rest,
            *_rest(call),
        )
        if not call.plan.is_local:
            _add_gradients(call, dkey, dvalue, *dclass)
        return dquery, dkey.to(inputs[1].dtype), dvalue.to(inputs[2].dtype)


class ClassRowsAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        saved = forward(call, query, key, value)
        ctx.save_for_backward(query, key, value, *saved)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return saved[0], saved[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        return (*backward(ctx.call, tensors[:3], tensors[3:], dout, dlse), None)
