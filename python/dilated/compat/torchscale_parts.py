"""Modules of which torchscale's attention is made, with its names of parameters and buffers."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from dilated.models.xpos import apply_xpos, xpos_tables


class Multiway(nn.Module):
    """Two copies of a module: A for what stands before split_position in dim 1, B for the rest."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.A = module
        self.B = copy.deepcopy(module)
        cast(nn.Linear, self.B).reset_parameters()
        self.split_position = -1

    def forward(self, x: Tensor) -> Tensor:
        """Shape of A's result for x (batch, seqlen, ...)."""
        if self.split_position in (-1, 0):
            return cast(Tensor, (self.A if self.split_position else self.B)(x))
        first, second = x.tensor_split([self.split_position], dim=1)
        return torch.cat([self.A(first), self.B(second)], dim=1)


class Xpos(nn.Module):
    """xPos with upstream's buffer, so that its state dicts load; (rows, seqlen, head_dim)."""

    scale: Tensor

    def __init__(self, head_dim: int, scale_base: int) -> None:
        super().__init__()
        self.head_dim, self.scale_base = head_dim, scale_base
        pairs = torch.arange(0, head_dim, 2)
        self.register_buffer("scale", (pairs + 0.4 * head_dim) / (1.4 * head_dim))

    def forward(self, x: Tensor, offset: int = 0, downscale: bool = False) -> Tensor:
        """Shape and dtype of x, whose first row stands at `offset`; keys are scaled down."""
        length = x.shape[1] + offset
        tables = xpos_tables(
            length,
            self.head_dim,
            position=torch.arange(offset, length, device=x.device),
            scale_base=self.scale_base,
            dtype=x.dtype,
        )
        table = tables.key if downscale else tables.query
        return apply_xpos(x.unsqueeze(2), table).squeeze(2)
