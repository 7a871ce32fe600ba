"""Composition (b), torchscale's way: pad, gather by diagonal, flash kernel, scatter, merge dense.

A baseline of the benchmark; no part of the operator. A branch becomes (batch * segments, rows,
heads, head_dim): positions unfold to (rows, r), heads to (., r), and the diagonal over the two r's
keeps residue o for the heads that own it. Partial results return to full size, absent rows with
l_b = -inf. Under preset torchscale plain autograd is the (detached) gradient; the exact one calls
the kernel's backward per branch with the global O and L.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from configurations import Attention, Configuration
from kernels import HOST, Kernel


class _Branch:
    """Gather and scatter of one branch; r need not divide the segment or the number of heads."""

    def __init__(self, config: Configuration, segment: int, dilation: int) -> None:
        self.config, self.segment, self.dilation = config, segment, dilation
        self.num_segments = -(-config.seqlen // segment)
        self.slots = -(-segment // dilation)
        self.heads_together = -(-config.num_heads // dilation)

    def _diagonal(self, padded: Tensor) -> Tensor:
        """View (problems, slots * r, heads * r, ...) as (problems, slots, heads, ..., r)."""
        rows: Tensor = padded.unflatten(1, (self.slots, self.dilation))
        if self.config.torchscale:  # head h keeps floor(h / heads_together)
            heads: Tensor = rows.unflatten(3, (self.dilation, self.heads_together))
            return heads.diagonal(dim1=2, dim2=3)
        heads = rows.unflatten(3, (self.heads_together, self.dilation))
        return heads.diagonal(dim1=2, dim2=4)

    def _heads_last(self, compact: Tensor) -> Tensor:
        """Order of the kernel's heads: residue, then heads that share it."""
        return compact.movedim(-1, 2).flatten(2, 3)

    def gather(self, x: Tensor) -> Tensor:
        """(batch, seqlen, heads, ...) -> (problems, kernel heads, slots, ...), contiguous."""
        inner = [0, 0] * (x.dim() - 3)
        full = self.num_segments * self.segment
        if full > x.shape[1]:
            x = F.pad(x, (*inner, 0, 0, 0, full - x.shape[1]))
        x = x.unflatten(1, (self.num_segments, self.segment)).flatten(0, 1)
        more_heads = self.heads_together * self.dilation - x.shape[2]
        more_rows = self.slots * self.dilation - self.segment
        if more_heads or more_rows:
            x = F.pad(x, (*inner, 0, more_heads, 0, more_rows))
        return self._heads_last(self._diagonal(x)).transpose(1, 2).contiguous()

    def scatter(self, compact: Tensor, absent: float) -> Tensor:
        """The inverse of `gather`, `absent` elsewhere: -> (batch, seqlen, heads, ...)."""
        compact = compact.transpose(1, 2).unflatten(2, (self.dilation, self.heads_together))
        full = compact.new_full(
            (
                compact.shape[0],
                self.slots * self.dilation,
                self.heads_together * self.dilation,
                *compact.shape[4:],
            ),
            absent,
        )
        self._diagonal(full).copy_(compact.movedim(2, -1))
        full = full[:, : self.segment, : self.config.num_heads]
        whole: Tensor = full.unflatten(0, (-1, self.num_segments)).flatten(1, 2)
        return whole[:, : self.config.seqlen]

    def key_bias(self, like: Tensor) -> Tensor | None:
        """(problems, kernel heads, 1, slots): -inf where a padded key must not act."""
        aligned = self.num_segments * self.slots * self.dilation == self.config.seqlen
        if aligned or self.config.torchscale or self.config.is_causal:
            return None
        real = self.gather(
            like.new_ones((like.shape[0], self.config.seqlen, self.config.num_heads, 1))
        )
        return torch.where(real > 0, 0.0, -math.inf).transpose(2, 3)


def _forward(
    branches: list[_Branch], kernel: Kernel, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for branch in branches:
        q, k, v = (branch.gather(x) for x in (query, key, value))
        bias = branch.key_bias(query)
        out, lse = kernel.forward(q, k, v, branch.config.is_causal, bias)
        outs.append(branch.scatter(out, 0.0))
        with torch.no_grad():
            lses.append(branch.scatter(lse, -math.inf))
    with torch.no_grad():
        stacked = torch.stack(lses)
        total = torch.logsumexp(stacked, dim=0)
        shares = (stacked - total.masked_fill(total == -math.inf, 0.0)).exp_()
    merged = outs[0] * shares[0].unsqueeze(-1)
    for part, share in zip(outs[1:], shares[1:], strict=True):
        merged = torch.addcmul(merged, part, share.unsqueeze(-1))
    return merged.to(query.dtype), total


class _ExactGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, config: Configuration, kernel: Kernel
    ) -> Tensor:
        out, lse = _forward(_branches(config), kernel, query, key, value)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.config, ctx.kernel = config, kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        total: list[Tensor] = []
        for branch in _branches(ctx.config):
            q, k, v, g, o = (branch.gather(x) for x in (query, key, value, grad, out))
            bias = branch.key_bias(query)
            grads = ctx.kernel.backward(
                g, (q, k, v), o, branch.gather(lse), branch.config.is_causal, bias
            )
            parts = [branch.scatter(x, 0.0) for x in grads]
            total = [a.add_(b) for a, b in zip(total, parts, strict=True)] if total else parts
        return *total, None, None


def _branches(config: Configuration) -> list[_Branch]:
    return [_Branch(config, segment, dilation) for segment, dilation in config.branches]


def gather(config: Configuration, kernel: Kernel = HOST) -> Attention:
    """Composition (b) for one configuration, on a dense kernel.

    Returns:
        A function of query, key, value (batch, seqlen, num_heads, head_dim), with the
        configuration's gradient.
    """
    if not config.torchscale:
        return cast(Attention, lambda q, k, v: _ExactGather.apply(q, k, v, config, kernel))  # type: ignore[no-untyped-call]
    branches = _branches(config)
    return lambda query, key, value: _forward(branches, kernel, query, key, value)[0]
