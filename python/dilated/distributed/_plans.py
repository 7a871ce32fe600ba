"""Which rows this rank sends and receives: the core's exchange plan as index tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _ops
from .._options import Options


class Rows(NamedTuple):
    """Rows that travel between this rank and one peer, int64 (n,) each."""

    rows: Tensor  # of the sender's key tensor
    heads: Tensor  # key/value heads
    class_rows: Tensor  # of the receiver's class rows


@dataclass(frozen=True)
class ExchangePlan:
    """The exchange of one call as one rank sees it. The peers include the rank itself."""

    shards: tuple[int, ...]
    is_local: bool  # no rank sends anything
    class_rows: int
    hashes: tuple[int, ...]
    sends: dict[int, Rows]
    receives: dict[int, Rows]


def _by_peer(table: Tensor) -> dict[int, Rows]:
    """Runs (peer, kv_head, row, step, count, class_row), sorted by peer, as rows."""
    peers = {}
    for peer in table[:, 0].unique_consecutive().tolist():
        _, head, row, step, count, class_row = table[table[:, 0] == peer].unbind(1)
        total = int(count.sum())
        within = torch.arange(total) - (count.cumsum(0) - count).repeat_interleave(count)
        peers[peer] = Rows(
            row.repeat_interleave(count) + within * step.repeat_interleave(count),
            head.repeat_interleave(count),
            class_row.repeat_interleave(count) + within,
        )
    return peers


def make_exchange_plan(
    shapes: tuple[int, ...], shards: tuple[int, ...], rank: int, options: Options
) -> ExchangePlan:
    """Ask the core. `shapes` is the whole call's (bindings/torch/arguments.h).

    Raises:
        InvalidProblem, Unsupported: with the core's message.
    """
    asked = (list(shapes), list(shards), rank, *options)
    numbers = _ops.ask(_ops.ops.exchange_numbers, *asked)
    local = bool(numbers[0])
    sends, receives = ({}, {}) if local else map(_by_peer, _ops.ask(_ops.ops.exchange_runs, *asked))
    return ExchangePlan(shards, local, numbers[1], tuple(numbers[3:]), sends, receives)
