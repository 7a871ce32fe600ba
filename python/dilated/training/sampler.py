"""Which bytes each step sees: every epoch cuts the stream at a random phase and shuffles the
windows.

The order is a function of (seed, epoch); the state is three numbers, so a checkpoint repeats it
exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor


class WindowSampler:
    """Deterministic windows of `context` + 1 bytes, no byte learnt twice in an epoch.

    Args:
        stream: (num_bytes,) uint8, longer than `context`.
        context: bytes the model reads; the window has one more, the last target.
        batch_size: windows of one step.
        seed: of the order.

    Example:
        >>> import torch
        >>> from dilated.training import WindowSampler
        >>> stream = torch.arange(100, dtype=torch.uint8)
        >>> sampler = WindowSampler(stream, context=8, batch_size=2, seed=0)
        >>> sampler.next_batch().shape
        torch.Size([2, 9])
    """

    def __init__(self, stream: Tensor, *, context: int, batch_size: int, seed: int) -> None:
        self._stream, self._context, self._batch_size = stream, context, batch_size
        self._seed, self._epoch, self._position = seed, 0, 0
        self._starts = self._order()

    def _order(self) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        phases = min(self._context, self._stream.numel() - self._context)
        phase = int(torch.randint(phases, (), generator=generator))
        count = (self._stream.numel() - 1 - phase) // self._context
        return torch.randperm(count, generator=generator) * self._context + phase

    def next_batch(self) -> Tensor:
        """The next windows, (batch_size, context + 1) int64."""
        windows = []
        for _ in range(self._batch_size):
            if self._position == self._starts.numel():
                self._epoch, self._position = self._epoch + 1, 0
                self._starts = self._order()
            start = int(self._starts[self._position])
            windows.append(self._stream[start : start + self._context + 1])
            self._position += 1
        return torch.stack(windows).long()

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on from here."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to the place another sampler of the same stream stood at."""
        self._seed, self._epoch = state["seed"], state["epoch"]
        self._starts = self._order()
        self._position = state["position"]
