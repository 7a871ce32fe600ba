"""The far keys of a shard in a ring: one rank's rows at a time, results merged as they come.

forward   for every rank: its rows -> one call over all branches -> merge in float32
backward  the rows and their results again -> gradients in float32 -> home, added in ring order

Half precision is widened: no partial sum is rounded to it. Sums are in another order than one
process's, so bits differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._options import DTYPES, LAYOUTS
from ._agreement import agree_on_backward
from ._messages import GRADIENTS_TAG, ROWS_TAG, Exchange
from ._plans import Call


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _hops(
    call: Call, key: Tensor, value: Tensor
) -> Iterator[tuple[int, tuple[Tensor, Tensor] | None]]:
    """Every rank, this one first, with its keys and values if this rank reads some of them.

    The next packet is under way while a hop is being computed.
    """
    yield call.groups.rank, (_wide(key), _wide(value))
    rank, size = call.groups.rank, call.groups.size
    hops = call.plan.ring()
    sides = call.by_token(key), call.by_token(value)
    batch, _, heads, head_dim = sides[0].shape
    packet = torch.stack([side[:, hops[rank].rows, hops[rank].heads] for side in sides])
    operation = f"ring of call {call.number}"

    def pass_on(distance: int, packet: Tensor) -> tuple[Exchange, Tensor]:
        """Send the packet that came from `distance` - 1 ranks before; receive the one before."""
        held, next_held = (rank - distance + 1) % size, (rank - distance) % size
        sends = {(rank + 1) % size: packet} if distance <= hops[held].last else {}
        arrived = key.new_empty(2, batch, len(hops[next_held].rows), head_dim)
        receives = {(rank - 1) % size: arrived} if distance <= hops[next_held].last else {}
        return Exchange(call.groups, sends, receives, ROWS_TAG, operation), arrived

    exchange, arrived = pass_on(1, packet)
    for distance in range(1, size):
        exchange.finish()
        packet = arrived
        if distance + 1 < size:
            exchange, arrived = pass_on(distance + 1, packet)
        source = (rank - distance) % size
        if rank in hops[source].readers:
            shape = 2, batch, call.plan.shards[source], heads, head_dim
            wide = _wide(packet)
            dense = wide.new_zeros(shape)
            dense[:, :, hops[source].rows, hops[source].heads] = wide
            yield source, (call.by_token(dense[0]), call.by_token(dense[1]))
        else:
            yield source, None


def _optional(call: Call, source: int) -> _ops.OptionalTensors:
    return _ops.OptionalTensors(
        seqused=call.seqused, windows=call.windows(source), dropout_seed=call.dropout_seed
    )


class RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(query)
        layout, dtype = LAYOUTS.index(call.options.layout), DTYPES.index(wide.dtype)
        merged: tuple[Tensor, Tensor] | None = None
        for source, packet in _hops(call, key, value):
            if packet is None:
                continue
            part = _ops.ask(_ops.forward_op, wide, *packet, *_optional(call, source), *call.options)
            if merged is None:
                merged = part
            else:
                outs, lses = zip(merged, part)
                merged = _ops.ask(_ops.merge_op, outs, lses, layout, dtype)
        assert merged is not None
        out, lse = merged
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out.to(query.dtype), lse.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        with call.groups:
            agree_on_backward(call)
            return _backward(call, ctx.saved_tensors, dout, dlse)


def _backward(
    call: Call, saved: tuple[Tensor, ...], dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse = saved
    wide = _wide(query)
    dout = torch.zeros_like(out) if dout is None else _wide(dout)
    hops, rank, size = call.plan.ring(), call.groups.rank, call.groups.size
    mine = hops[rank]
    dquery = torch.zeros_like(wide)
    dkey, dvalue = torch.zeros_like(_wide(key)), torch.zeros_like(_wide(value))

    def part_gradients(part: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Gradients of a part of the merge: its share w of all keys, dw = w dO (O_part - O)."""
        share = (part[1] - lse).exp().where(part[1].isfinite(), 0.0)
        slope = call.by_rows((dout * (part[0] - out)).sum(-1))
        dpart = dout * call.by_rows(share)[..., None]
        return dpart, share * (slope if dlse is None else slope + dlse)

    def bring_home(distance: int, given: tuple[Tensor, ...] | None) -> None:
        """Gradients of the rows of `distance` ranks before go there; own ones come."""
        source, reader = (rank - distance) % size, (rank + distance) % size
        sends, receives = {}, {}
        if given is not None:
            at = hops[source]
            sends[source] = torch.stack([call.by_token(g)[:, at.rows, at.heads] for g in given])
        if reader in mine.readers:
            shape = 2, call.by_token(key).shape[0], len(mine.rows), key.shape[-1]
            receives[reader] = dkey.new_empty(shape)
        Exchange(
            call.groups, sends, receives, GRADIENTS_TAG, f"gradients of call {call.number}"
        ).finish()
        for arrived in receives.values():
            for side, part in zip((dkey, dvalue), arrived):
                call.by_token(side)[:, mine.rows, mine.heads] += part

    # Every hop ends with its gradients, read or not: ranks stay in step.
    for source, packet in _hops(call, key, value):
        distance, given = (rank - source) % size, None
        if packet is not None:
            rest = *_optional(call, source), *call.options
            part = _ops.ask(_ops.forward_saving_op, wide, *packet, *rest)
            dpart = part_gradients(part)
            given = _ops.ask(_ops.backward_op, *dpart, wide, *packet, *part, *rest)
            dquery += given[0]
        if distance > 0:
            bring_home(distance, None if given is None else given[1:])
        elif given is not None:
            dkey += given[1]
            dvalue += given[2]
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype), None
