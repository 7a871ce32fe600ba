"""Every public module, small, with inputs: what copies, checkpoints and processes are tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchscale_restated import arguments

import dilated
from dilated import models
from dilated.compat import torchscale
from dilated_attention_pytorch import create_multihead_dilated_attention

LISTS: dict[str, Any] = {"segments": [8, 32], "dilations": [1, 4]}


class Layer(nn.Module):
    """A layer that nn.TransformerEncoder can stack; it deep-copies what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = dilated.MultiheadDilatedAttention(
            32, 4, **LISTS, num_kv_heads=2, preset="torchscale", dropout=0.1
        )
        self.norm = nn.LayerNorm(32)

    def forward(self, src: Tensor, **_: Any) -> Tensor:
        return src + self.self_attn(self.norm(src))[0]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "DilatedAttention": lambda: dilated.DilatedAttention(
        **LISTS, offsets=[[0] * 4, [3, 2, 1, 0]], dropout_p=0.1
    ),
    "MultiheadDilatedAttention": lambda: dilated.MultiheadDilatedAttention(
        32, 4, **LISTS, num_kv_heads=2, is_causal=True
    ),
    "preset": lambda: dilated.MultiheadDilatedAttention(32, 4, **LISTS, preset="fork"),
    "stack": lambda: nn.TransformerEncoder(Layer(), 4, enable_nested_tensor=False),
    "EncoderLayer": lambda: models.EncoderLayer(
        32, 4, **LISTS, ffn_dim=48, dropout=0.1, attention_dropout=0.1, drop_path=0.2
    ),
    "DecoderLayer": lambda: models.DecoderLayer(32, 4, **LISTS, num_kv_heads=2, ffn_dim=48),
    "LongNet": lambda: models.LongNet(32, 2, 4, **LISTS, ffn_dim=48, xpos_scale_base=512.0),
    "LongNetLM": lambda: models.LongNetLM(31, 32, 2, 4, **LISTS, ffn_dim=48, dropout=0.1),
    "torchscale": lambda: torchscale.DilatedAttention(
        arguments(xpos_rel_pos=True), 32, 4, dropout=0.1, self_attention=True, subln=True
    ),
    "dilated_attention_pytorch": lambda: create_multihead_dilated_attention(
        "auto", 32, 4, segment_lengths=[5, 20], dilation_rates=[1, 4]
    ),
    "SlideEncoder": lambda: models.SlideEncoder(12, 32, 2, 4, **LISTS, slide_ngrids=40),
}


def inputs(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """What the module is called with; drawn."""
    if name == "DilatedAttention":
        return tuple(torch.randn(batch, 20, 4, 8, dtype=dtype) for _ in range(3))
    if name == "torchscale":
        return (torch.randn(batch, 20, 32, dtype=dtype),) * 3
    if name == "LongNetLM":
        return (torch.randint(31, (batch, 20)),)
    if name == "SlideEncoder":
        return torch.randn(batch, 20, 12, dtype=dtype), torch.randint(10240, (batch, 20, 2))
    return (torch.randn(batch, 20, 32, dtype=dtype),)


def output(module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    """The tensor that the module returns, alone or first in a tuple or list."""
    out = module(*given)
    return out if isinstance(out, Tensor) else out[0]
