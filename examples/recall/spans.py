"""Associative recall of runs: pairs (key, value) hidden in noise, asked for at the end.

A pair is a run of one key token followed by a run of one value token. The end of the sequence
repeats the keys in another order; at a repeated key the model names the value that followed it:

    . . k3 k3 k3 k3 v7 v7 v7 v7 . . . . k1 k1 k1 k1 v2 v2 v2 v2 . . | . k1 k1 k1 k1 . k3 k3 k3 k3
                                                                           ^ v2           ^ v7

A run as long as the largest dilation holds a position of every residue class, so that every head
sees a part of it from anywhere (semantics.md, §8); a run of one token is the other extreme.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NUM_KEYS = NUM_VALUES = NUM_NOISE = 16
VOCABULARY = NUM_KEYS + NUM_VALUES + NUM_NOISE


class Batch(NamedTuple):
    """Sequences and what is asked of them.

    tokens: (batch, seqlen) int64; keys, values and noise have numbers of their own.
    answers: (batch, seqlen) int64; the value's token at every token of a repeated key, else -1.
    asked: (batch, pairs) int64; the last position of every repeated key, where it is judged.
    stored: (batch, pairs) int64; the last position of the value that is asked for.
    """

    tokens: Tensor
    answers: Tensor
    asked: Tensor
    stored: Tensor


@dataclass(frozen=True)
class Recall:
    """A distribution of sequences: how many pairs, and how long every run is."""

    pairs: int = 4
    run: int = 4

    @property
    def shortest(self) -> int:
        """The length that pairs and questions fill, with as much noise among the questions."""
        return 4 * self.pairs * self.run

    def sample(self, batch: int, seqlen: int, generator: torch.Generator) -> Batch:
        """Draws sequences.

        Args:
            batch: how many.
            seqlen: their length, at least `shortest`.
            generator: of the draw.

        Raises:
            ValueError: seqlen is too short.
        """
        if seqlen < self.shortest:
            raise ValueError(f"seqlen: expected >= {self.shortest} for {self}, got {seqlen}")
        pairs, run = self.pairs, self.run
        tokens = torch.randint(
            NUM_KEYS + NUM_VALUES, VOCABULARY, (batch, seqlen), generator=generator
        )
        keys = torch.rand(batch, NUM_KEYS, generator=generator).argsort(1)[:, :pairs]
        values = NUM_KEYS + torch.randint(NUM_VALUES, (batch, pairs), generator=generator)
        order = torch.rand(batch, pairs, generator=generator).argsort(1)
        body = seqlen - 2 * pairs * run  # the rest is for the questions, half of it noise
        stored = _places(batch, pairs, 2 * run, body, generator)
        asked = body + _places(batch, pairs, run, seqlen - body, generator)
        answers = torch.full_like(tokens, -1)
        _write(tokens, stored, run, keys)
        _write(tokens, stored + run, run, values)
        _write(tokens, asked, run, keys.gather(1, order))
        _write(answers, asked, run, values.gather(1, order))
        return Batch(tokens, answers, asked + run - 1, stored.gather(1, order) + 2 * run - 1)


def _places(batch: int, count: int, length: int, room: int, generator: torch.Generator) -> Tensor:
    """Starts (batch, count) of blocks that do not overlap, in order, anywhere in [0, room)."""
    free = torch.randint(room - count * length + 1, (batch, count), generator=generator)
    return free.sort(1).values + length * torch.arange(count)


def _write(rows: Tensor, starts: Tensor, run: int, what: Tensor) -> None:
    """rows[b, starts[b, i] : ... + run] = what[b, i]."""
    where = starts[..., None] + torch.arange(run)
    rows.scatter_(1, where.flatten(1), what[..., None].expand_as(where).flatten(1))
