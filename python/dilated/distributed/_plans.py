"""What this rank sends and receives: the core's exchange plan as index tensors; one agreed call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _ops
from .._options import Options

if TYPE_CHECKING:
    from ._groups import SequenceGroups

#: ExchangePlan.reach, as the core numbers it.
LOCAL, NEIGHBOURS, FAR = range(3)


class Rows(NamedTuple):
    """Rows that travel between this rank and one peer, int64 (n,) each."""

    branches: Tensor
    rows: Tensor  # of the sender's key tensor
    heads: Tensor  # key/value heads
    class_rows: Tensor  # of the receiver's class rows


class Message(NamedTuple):
    """A message of an all-gather and the rows of it that the receiver reads."""

    size: int
    read: Tensor  # int64, aligned with Rows of the receiver


class Gather(NamedTuple):
    """An all-gather: every rank of a segment has all rows of its other ranks."""

    sends: dict[int, tuple[Tensor, Tensor]]  # rows and heads
    receives: dict[int, Message]


class Hop(NamedTuple):
    """What one rank's packet in a ring holds, and who reads it."""

    rows: Tensor
    heads: Tensor
    readers: frozenset[int]
    last: int  # how many ranks on the last reader is; 0 for none


@dataclass(frozen=True)
class ExchangePlan:
    """The exchange of one call as one rank sees it. The peers include the rank itself."""

    shards: tuple[int, ...]
    reach: int
    class_rows: int
    hashes: tuple[int, ...]
    sends: dict[int, Rows]
    receives: dict[int, Rows]
    #: How the core is asked, and what a transport has made of the answers.
    asked: tuple[Any, ...]
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        """No rank sends anything."""
        return self.reach == LOCAL

    def gather(self, rank: int) -> Gather:
        """Messages of an all-gather inside every segment's ranks."""
        if "gather" not in self.made:
            self.made["gather"] = _gather(self, rank)
        return self.made["gather"]  # type: ignore[no-any-return]

    def ring(self) -> list[Hop]:
        """Packets of a ring, of all ranks."""
        if "ring" not in self.made:
            self.made["ring"] = [_hop(self, rank) for rank in range(len(self.shards))]
        return self.made["ring"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Call:
    """One call that all ranks agreed on."""

    groups: SequenceGroups
    number: int
    plan: ExchangePlan
    transport: str
    options: Options
    batch: int
    cu_seqlens: list[int]
    seqused: Tensor | None
    dropout_seed: Tensor | None

    def by_token(self, x: Tensor) -> Tensor:
        """(batch, rows, heads, head_dim) from the user's layout, or back: a view."""
        layout = self.options.layout
        if layout == "shd":
            return x.unsqueeze(0) if x.dim() == 3 else x.squeeze(0)
        return x.transpose(1, 2) if layout == "bhsd" else x

    def by_rows(self, x: Tensor) -> Tensor:
        """(…, heads, rows) like an output without head_dim, or back: a view."""
        return x if self.options.layout == "bhsd" else x.transpose(-1, -2)

    def windows(self, keys_of: int) -> Tensor:
        """(sequences, 5): length, positions of this rank's queries and of a rank's keys."""
        shards = self.plan.shards
        if self.options.layout == "shd":
            starts = torch.tensor(self.cu_seqlens, dtype=torch.int64)
        else:
            starts = torch.tensor([0, sum(shards)])
        first, last = starts[:-1], starts[1:]
        columns = [last - first]
        for rank in (self.groups.rank, keys_of):
            begin = sum(shards[:rank])
            for row in (begin, begin + shards[rank]):
                columns.append(torch.full_like(first, row).clamp(first, last) - first)
        windows = torch.stack(columns, dim=1)
        return windows if self.options.layout == "shd" else windows.repeat(self.batch, 1)


def _by_peer(table: Tensor) -> dict[int, Rows]:
    """Runs (peer, branch, kv_head, row, step, count, class_row), sorted by peer, as rows."""
    peers = {}
    for peer in table[:, 0].unique_consecutive().tolist():
        _, branch, head, row, step, count, class_row = table[table[:, 0] == peer].unbind(1)
        total = int(count.sum())
        within = torch.arange(total) - (count.cumsum(0) - count).repeat_interleave(count)
        peers[peer] = Rows(
            branch.repeat_interleave(count),
            row.repeat_interleave(count) + within * step.repeat_interleave(count),
            head.repeat_interleave(count),
            class_row.repeat_interleave(count) + within,
        )
    return peers


def _runs(asked: tuple[Any, ...], rank: int) -> tuple[dict[int, Rows], dict[int, Rows]]:
    shapes, shards, options = asked
    sends, receives = _ops.ask(_ops.ops.exchange_runs, shapes, shards, rank, *options)
    return _by_peer(sends), _by_peer(receives)


def make_exchange_plan(
    shapes: tuple[int, ...], shards: tuple[int, ...], rank: int, options: Options
) -> ExchangePlan:
    """Ask the core. `shapes` is the whole call's (bindings/torch/arguments.h).

    Raises:
        InvalidProblem, Unsupported: with the core's message.
    """
    asked = (list(shapes), list(shards), options)
    reach, class_rows, _, *hashes = _ops.ask(
        _ops.ops.exchange_numbers, list(shapes), list(shards), rank, *options
    )
    sends, receives = ({}, {}) if reach == LOCAL else _runs(asked, rank)
    return ExchangePlan(shards, reach, class_rows, tuple(hashes), sends, receives, asked)


def _keys(rows: Tensor, heads: Tensor, kv_heads: int) -> Tensor:
    """One number for every row of every head."""
    return rows * kv_heads + heads


def _gather(plan: ExchangePlan, rank: int) -> Gather:
    shapes, shards, options = plan.asked
    kv_heads = shapes[6]
    # Ranks of one segment have each other's rows, be they read or not.
    asked = shapes, shards, options.without_causality()
    own, given = _runs(asked, rank)

    def parts(sends: dict[int, Rows], sender: int) -> list[tuple[set[int], Tensor]]:
        """Per branch: who gets the sender's rows, and which these are."""
        others = {peer: rows for peer, rows in sends.items() if peer != sender}
        result = []
        for branch in range(len(options.segments)):
            found = {
                peer: _keys(rows.rows, rows.heads, kv_heads)[rows.branches == branch]
                for peer, rows in others.items()
            }
            found = {peer: keys for peer, keys in found.items() if len(keys)}
            union = torch.cat([*found.values(), torch.empty(0, dtype=torch.int64)]).unique()
            result.append((set(found), union))
        return result

    empty = torch.empty(0, dtype=torch.int64)
    mine = parts(own, rank)
    sends = {}
    for peer in sorted(set().union(*(peers for peers, _ in mine))):
        keys = torch.cat([empty, *(union for peers, union in mine if peer in peers)])
        sends[peer] = keys // kv_heads, keys % kv_heads
    receives = {}
    for peer in sorted(given):
        if peer == rank:
            continue
        begin, read = 0, empty
        rows = plan.receives.get(peer)
        if rows is not None:
            read = torch.empty_like(rows.rows)
        for branch, (peers, union) in enumerate(parts(_runs(asked, peer)[0], peer)):
            if rank not in peers:
                continue
            if rows is not None:
                here = rows.branches == branch
                keys = _keys(rows.rows[here], rows.heads[here], kv_heads)
                read[here] = begin + torch.searchsorted(union, keys)
            begin += len(union)
        receives[peer] = Message(begin, read)
    return Gather(sends, receives)


def _hop(plan: ExchangePlan, rank: int) -> Hop:
    kv_heads, ranks = plan.asked[0][6], len(plan.shards)
    sends = {peer: rows for peer, rows in _runs(plan.asked, rank)[0].items() if peer != rank}
    keys = torch.cat(
        [torch.empty(0, dtype=torch.int64)]
        + [_keys(rows.rows, rows.heads, kv_heads) for rows in sends.values()]
    ).unique()
    last = max(((peer - rank) % ranks for peer in sends), default=0)
    return Hop(keys // kv_heads, keys % kv_heads, frozenset(sends), last)
