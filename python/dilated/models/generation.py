"""Sampling from a LongNetLM by running it again for every token.

Cost: one whole forward of `window` tokens per new token; nothing is cached. A window that is a
multiple of the longest segment keeps the newest token at the end of every segment, where it sees
most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dilated.errors import InvalidProblem
from dilated.models.longnet import LongNetLM


@torch.no_grad()
def generate(
    model: LongNetLM,
    prompt: Tensor,
    num_tokens: int,
    *,
    window: int = 2048,
    temperature: float = 0.8,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues `prompt`; every new token costs a forward over the last `window` tokens.

    Args:
        model: any causal model from tokens (1, n) to logits (1, n, vocab); put into eval mode
            meanwhile.
        prompt: (n,) int64, n >= 1.
        num_tokens: how many to add.
        window: how many of the newest tokens the model reads.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep only the k likeliest tokens.
        generator: source of the random numbers.

    Returns:
        The new tokens only, (num_tokens,) int64.

    Raises:
        InvalidProblem: the prompt is empty, or a number is out of range.

    Example:
        >>> import torch
        >>> from dilated.models import LongNetLM, generate
        >>> model = LongNetLM(256, 32, 2, 4, segments=[8, 16], dilations=[1, 2])
        >>> generate(model, torch.tensor([100, 101]), 3, window=16).shape
        torch.Size([3])
    """
    if prompt.ndim != 1 or prompt.numel() == 0:
        raise InvalidProblem(
            f"generate: prompt: expected shape (n,) with n >= 1, got {tuple(prompt.shape)}"
        )
    for name, value, low in (("num_tokens", num_tokens, 0), ("window", window, 1)):
        if value < low:
            raise InvalidProblem(f"generate: {name}: expected >= {low}, got {value}")
    if temperature < 0:
        raise InvalidProblem(f"generate: temperature: expected >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise InvalidProblem(f"generate: top_k: expected >= 1, got {top_k}")
    was_training = model.training
    model.eval()
    tokens = prompt
    try:
        for _ in range(num_tokens):
            features = model.features(tokens[None, -window:])
            logits = model.output_projection(features[0, -1]).float()
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None and top_k < logits.shape[-1]:
                    floor = logits.topk(top_k).values[-1]
                    logits = logits.masked_fill(logits < floor, -torch.inf)
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, token))
    finally:
        model.train(was_training)
    return tokens[prompt.numel() :]
