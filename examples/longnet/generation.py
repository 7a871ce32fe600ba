"""Sampling from any causal model by running it again for every token.

Cost: one whole forward of `window` tokens per new token; nothing is cached. A window that is a
multiple of the longest segment keeps the newest token at the end of every segment, where it sees
most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dilated import InvalidProblem

_GREEDY = 1e-6  # temperatures below it take the likeliest token


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own flag comes back after."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def generate(
    model: nn.Module,
    prompt: Tensor,
    num_tokens: int,
    *,
    window: int = 2048,
    temperature: float = 0.8,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continues `prompt` token by token; each costs a forward over the last `window` tokens.

    Args:
        model: any causal module from tokens (1, n) to logits (1, n, vocab), wrapped and compiled
            ones too; in eval mode meanwhile.
        prompt: (n,) integers, n >= 1.
        num_tokens: how many to add.
        window: how many of the newest tokens the model reads.
        temperature: divides the logits; below 1e-6 the likeliest token is taken.
        top_k: draw from exactly so many of the likeliest tokens.
        generator: source of the random numbers.

    Yields:
        The new tokens.

    Raises:
        InvalidProblem: now, the prompt is empty or a number is out of range; later, the model gives
            no probabilities.
    """
    if prompt.ndim != 1 or prompt.numel() == 0:
        raise InvalidProblem(
            f"generate: prompt: expected shape (n,) with n >= 1, got {tuple(prompt.shape)}"
        )
    for name, value, low in (("num_tokens", num_tokens, 0), ("window", window, 1)):
        if value < low:
            raise InvalidProblem(f"generate: {name}: expected >= {low}, got {value}")
    if not 0 <= temperature < math.inf:
        raise InvalidProblem(
            f"generate: temperature: expected a finite number >= 0, got {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise InvalidProblem(f"generate: top_k: expected >= 1, got {top_k}")

    def draw() -> Iterator[int]:
        tokens = prompt.long()
        with evaluating(model):
            for _ in range(num_tokens):
                tokens = tokens[-window:]
                with torch.no_grad():
                    logits = model(tokens[None])[0, -1].double()
                token = _draw(logits, temperature, top_k, generator)
                tokens = torch.cat((tokens, token))
                yield int(token)

    return draw()


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """(vocab,) float64 -> one token, (1,)."""
    likeliest = logits.max()
    if not likeliest.isfinite() or logits.isnan().any():
        raise InvalidProblem("generate: model: expected logits, got nan or infinity")
    if temperature < _GREEDY:
        return logits.argmax(dim=-1, keepdim=True)
    kept = logits.topk(min(top_k or logits.numel(), logits.numel()))
    probabilities = ((kept.values - likeliest) / temperature).softmax(-1)
    return kept.indices[torch.multinomial(probabilities, 1, generator=generator)]
