"""Which bytes each step sees: every epoch cuts the stream at a random phase and shuffles the
windows.

The order is a function of (seed, epoch); the state is three numbers, so a checkpoint repeats it
exactly.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from corpus import Corpus

NO_TARGET = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class Batch:
    """Inputs and, for each, the byte after it; `cu_seqlens` if the documents are kept apart."""

    tokens: Tensor  # (batch, context) int64, packed (batch * context,)
    targets: Tensor  # of the same shape; NO_TARGET behind the last byte of a document
    cu_seqlens: list[int] | None = None


class WindowSampler:
    """Deterministic windows of `context` bytes and their targets, no byte learnt twice in an epoch.

    Args:
        corpus: its training stream is longer than `context`.
        context: bytes the model reads; the window has one more, the last target.
        batch_size: windows of one step.
        seed: of the order.
        separate_documents: pack the documents' pieces instead of reading on over their ends.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        context: int,
        batch_size: int,
        seed: int,
        separate_documents: bool = False,
    ) -> None:
        self._stream, self._documents = corpus.train, corpus.starts
        self._context, self._batch_size = context, batch_size
        self._separate = separate_documents
        self._seed, self._epoch, self._position = seed, 0, 0
        self._starts = self._order()

    def _order(self) -> Tensor:
        digest = hashlib.sha256(f"{self._seed} {self._epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        phases = min(self._context, self._stream.numel() - self._context)
        phase = int(torch.randint(phases, (), generator=generator))
        count = (self._stream.numel() - 1 - phase) // self._context
        return torch.randperm(count, generator=generator) * self._context + phase

    def next_batch(self) -> Batch:
        """The next windows."""
        starts = []
        for _ in range(self._batch_size):
            if self._position == self._starts.numel():
                self._epoch, self._position = self._epoch + 1, 0
                self._starts = self._order()
            starts.append(int(self._starts[self._position]))
            self._position += 1
        windows = torch.stack([self._stream[s : s + self._context + 1] for s in starts]).long()
        tokens, targets = windows[:, :-1], windows[:, 1:].contiguous()
        if not self._separate:
            return Batch(tokens, targets)
        bounds = [0]
        for row, start in enumerate(starts):
            low, high = torch.searchsorted(
                self._documents, torch.tensor([start, start + self._context]), right=True
            ).tolist()
            begins = self._documents[low:high] - start  # of documents inside, 1 .. context
            targets[row, begins - 1] = NO_TARGET
            inside = begins[begins < self._context] + row * self._context
            bounds += [*inside.tolist(), (row + 1) * self._context]
        return Batch(tokens.flatten(), targets.flatten(), bounds)

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on from here."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to the place another sampler of the same corpus and seed stood at."""
        self._epoch = state["epoch"]
        self._starts = self._order()
        self._position = state["position"]
