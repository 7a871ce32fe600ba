"""What the package's classes compute, restated in plain PyTorch, and one module of each class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import dilated_attention_pytorch as package

SEGMENTS, DILATIONS = [4, 16], [1, 3]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[int],
    dilations: Sequence[int],
    is_causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Head by head, segment by segment: the rows of one group see each other and nothing else."""
    heads, groups = query.shape[2], len(segments)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out = 0 * (query + key + value)  # part of the graph, whatever the groups cover
    first = 0
    for group, (segment, dilation) in enumerate(zip(segments, dilations)):
        last = first + heads // groups + (group < heads % groups)
        for start in range(0, query.shape[1], segment):
            stop = min(start + segment, query.shape[1])
            rows = torch.arange(start + group % dilation, max(stop, start + group % dilation),
                                dilation)  # fmt: skip
            for head in range(first, last):
                q, k, v = (x[:, rows, head] for x in (query, key, value))
                scores = scale * q @ k.transpose(1, 2)
                if is_causal:
                    scores = scores.masked_fill(rows[:, None] < rows, -torch.inf)
                if key_mask is not None:
                    scores = scores.masked_fill(~key_mask[:, None, rows], -torch.inf)
                nothing = (scores == -torch.inf).all(-1, keepdim=True)
                weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
                out[:, rows, head] = weights @ v / groups
        first = last
    return out


def projected(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Query, key and value of a multi-head module, from its state dict."""
    state = dict(module.named_parameters())
    if "qkv_proj.weight" in state:
        weights, biases = state["qkv_proj.weight"].chunk(3), state["qkv_proj.bias"].chunk(3)
        return list(map(functional.linear, (query, key, value), weights, biases))
    return [
        functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
        for x, name in ((query, "q_proj"), (key, "k_proj"), (value, "v_proj"))
    ]


def multihead(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: object
) -> Tensor:
    """A multi-head module, from its state dict, num_heads and the lists of its attention."""
    state = dict(module.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in state:
            return x
        shape = (x.shape[-1],)
        return functional.layer_norm(x, shape, state[f"{name}.weight"], state[f"{name}.bias"])

    q, k, v = projected(module, query, key, value)
    if "q_proj.weight" in state:
        q, k = norm(q, "q_ln"), norm(k, "k_ln")
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)) for x in (q, k, v))
    lists = module.attention.segment_lengths, module.attention.dilation_rates
    out = norm(attention(q, k, v, *lists, **options).flatten(-2), "q_ln")
    return functional.linear(out, state["out_proj.weight"], state["out_proj.bias"])


def moved(module: nn.Module) -> nn.Module:
    """The module with every parameter away from its special first value (1 or 0)."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


# Every public module that computes something, with 24 = 4 * 6 channels and dropout in training.
MODULES: dict[str, Callable[[], nn.Module]] = {
    "DilatedAttention": lambda: package.DilatedAttention(
        SEGMENTS, DILATIONS, attention_dropout=0.2
    ),
    "ImprovedDilatedAttention": lambda: package.ImprovedDilatedAttention(SEGMENTS, DILATIONS, 0.2),
    "RingDilatedAttention": lambda: package.RingDilatedAttention(SEGMENTS, DILATIONS, 0.2),
    "MultiheadDilatedAttention": lambda: package.MultiheadDilatedAttention(
        32, 4, DILATIONS, SEGMENTS, 0.2
    ),
    "ImprovedMultiheadDilatedAttention": lambda: package.ImprovedMultiheadDilatedAttention(
        32, 4, DILATIONS, SEGMENTS, 0.2
    ),
    "RingMultiheadDilatedAttention": lambda: package.RingMultiheadDilatedAttention(
        32, 4, SEGMENTS, DILATIONS, 0.2
    ),
    "DilatedTransformerEncoderLayer": lambda: package.DilatedTransformerEncoderLayer(
        32, 4, SEGMENTS, DILATIONS, 48, 0.2
    ),
    "DilatedTransformerDecoderLayer": lambda: package.DilatedTransformerDecoderLayer(
        32, 4, SEGMENTS, DILATIONS, 48, 0.2, "gelu"
    ),
    "LongNet": lambda: package.LongNet(32, 4, 1, 2, 48, SEGMENTS, DILATIONS, 0.2, "gelu"),
    "LongNetLM": lambda: package.LongNetLM(50, 32, 4, 2, 1, 48, SEGMENTS, DILATIONS, 0.2),
}


def inputs(name: str) -> tuple[Tensor, ...]:
    """Inputs of that module, 32 positions."""
    if name.endswith("LM"):
        return (torch.randint(50, (2, 32)),)
    if name.endswith(("MultiheadDilatedAttention", "EncoderLayer")) or name == "LongNet":
        return (torch.randn(2, 32, 32),)
    if name.endswith("DecoderLayer"):
        return torch.randn(2, 2, 32, 32).unbind()
    return torch.randn(3, 2, 32, 4, 8).unbind()


def output(module: nn.Module, *given: Tensor) -> Tensor:
    """What a call returns, without the place of the weights."""
    result = module(*given)
    return result[0] if isinstance(result, tuple) else result
