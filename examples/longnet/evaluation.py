"""Held-out bits per byte against context length, on the same scored bytes at every length.

A window of the longest context is taken from a held-out document; its last `scored` bytes are
predicted. For a shorter context c the model reads only the c bytes that end at the same place,
positions 0..c-1. Segments of w <= c bytes then end where the window ends for every c that w
divides, so the curve shows what the bytes on the left buy and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from corpus import Corpus
from errors import TrainingError
from generation import evaluating

_SCORED = 256
_TOKENS_AT_ONCE = 16384


@dataclass(frozen=True)
class ContextCurve:
    """Bits per byte at every context length, over `num_windows` times `scored_bytes` bytes."""

    contexts: tuple[int, ...]
    bits_per_byte: tuple[float, ...]
    gain: tuple[float, ...]  # mean over windows of bits at the shortest context minus bits here
    gain_standard_error: tuple[float, ...]  # over windows, paired
    num_windows: int
    scored_bytes: int


def context_lengths(longest: int) -> tuple[int, ...]:
    """256, 512, ... up to `longest`, which is always the last."""
    lengths = []
    length = min(_SCORED, longest)
    while length < longest:
        lengths.append(length)
        length *= 2
    return (*lengths, longest)


def held_out_windows(corpus: Corpus, longest: int, count: int) -> Tensor:
    """Up to `count` windows of longest + 1 held-out bytes, evenly spaced, scored ends disjoint.

    Windows lie inside single documents; only when no document is long enough are they joined.
    """
    documents = [d for d in corpus.held_out if d.numel() > longest]
    if not documents:
        documents = [corpus.joined_held_out()]
        if documents[0].numel() <= longest:
            raise TrainingError(
                f"--input: expected more than {longest} held-out bytes, got {documents[0].numel()} "
                "(more text, or a smaller --context)"
            )
    scored = min(_SCORED, longest)
    starts = [
        (document, start)
        for document in documents
        for start in range(0, document.numel() - longest, scored)
    ]
    count = min(count, len(starts))
    chosen = [starts[i * len(starts) // count] for i in range(count)]
    return torch.stack([document[start : start + longest + 1] for document, start in chosen])


@torch.no_grad()
def bits_by_context(
    model: nn.Module, corpus: Corpus, *, longest: int, num_windows: int = 64
) -> ContextCurve:
    """Bits per byte of held-out text for contexts 256, 512, ... `longest`.

    Args:
        model: any causal module from bytes (batch, n) to logits (batch, n, 256); in eval mode
            meanwhile.
        corpus: its `held_out` part is read.
        longest: the longest context.
        num_windows: at most so many windows.

    Returns:
        The curve, with the standard error of each gain over the shortest context.

    Raises:
        TrainingError: fewer held-out bytes than `longest` + 1, or the model gives no finite bits.
    """
    windows = held_out_windows(corpus, longest, num_windows)
    contexts = context_lengths(longest)
    bits = []
    with evaluating(model):
        for context in contexts:
            at_once = max(1, _TOKENS_AT_ONCE // context)
            parts = [_window_bits(model, part, context) for part in windows.split(at_once)]
            bits.append(torch.cat(parts))
    table = torch.stack(bits)  # (contexts, windows)
    if not table.isfinite().all():
        raise TrainingError("evaluation: expected finite bits per byte, got nan or infinity")
    gain = table[0] - table
    error = gain.std(dim=1) / math.sqrt(len(windows)) if len(windows) > 1 else gain[:, 0] * 0
    return ContextCurve(
        contexts=contexts,
        bits_per_byte=tuple(table.mean(dim=1).tolist()),
        gain=tuple(gain.mean(dim=1).tolist()),
        gain_standard_error=tuple(error.tolist()),
        num_windows=len(windows),
        scored_bytes=min(_SCORED, longest),
    )


def _window_bits(model: nn.Module, windows: Tensor, context: int) -> Tensor:
    """Mean bits of the scored bytes of each window, (windows,) float64."""
    scored = min(_SCORED, context)
    tokens = windows[:, -(context + 1) :].long()
    logits = model(tokens[:, :-1])[:, -scored:].double()
    nats = functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, -scored:].flatten(), reduction="none"
    )
    bits: Tensor = nats.unflatten(0, (-1, scored)).mean(dim=1) / math.log(2)
    return bits
