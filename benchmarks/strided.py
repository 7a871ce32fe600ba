"""Composition (a): strided views of branches and residues through torch's dense kernel, merged.

A baseline of the benchmark, written as a PyTorch user would; no part of the operator. Rows of one
branch and residue form dense attention problems, so the kernel gives (O_b, l_b), and
    L = log sum_b exp(l_b),  O = sum_b exp(l_b - L) O_b.
The kernel's derivative ignores its log-sum-exp. The exact gradient is therefore the kernel's
backward, per piece, with the *global* O and L; the detached one takes O_b, l_b, exp(l_b - L) dO.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configurations import Attention, Configuration
from kernels import HOST, Kernel

# Elements of q in one kernel call. Below glibc's largest mmap threshold (32 MiB) freed blocks are
# reused without new page faults: all segments at once were 3 % (forward) to 7 % (with backward)
# slower on a 2-core Xeon with AVX-512, pieces of 2 MiB 1-4 %.
_MAX_ELEMENTS = 2_000_000


@dataclass(frozen=True)
class Piece:
    """Equal dense problems, one strided view (batch, segments, residues, heads, rows, ...)."""

    begin: int  # position of the first segment
    segment: int
    num_segments: int
    residue: int  # the first one
    num_residues: int
    heads: range  # those of the first residue
    next_residue_heads: int  # distance to the heads of the next residue
    dilation: int
    rows: int
    phantoms: int  # zero keys that pad the rows, torchscale's tail
    assigns: bool  # first branch, covers everything: writes where the others merge

    def read(self, tensor: Tensor, packed: bool) -> Tensor:
        """Rows of (batch, seqlen, num_heads, ...) for the kernel: (problems, heads, rows, ...)."""
        batch, along_n, along_h, *inner = tensor.stride()
        counts = (self.num_segments, self.num_residues, len(self.heads), self.rows)
        strides = (
            self.segment * along_n,
            along_n + self.next_residue_heads * along_h,
            self.heads.step * along_h,
            self.dilation * along_n,
        )
        first = tensor[:, self.begin + self.residue :, self.heads.start :]
        rows = first.as_strided(
            (tensor.shape[0], *counts, *tensor.shape[3:]), (batch, *strides, *inner)
        ).flatten(0, 2)
        return rows.contiguous() if packed else rows

    def write(
        self, tensors: Sequence[Tensor], parts: Sequence[Tensor]
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """(rows of a tensor, part) by residue: torch.compile forbids writing to as_strided."""
        counts = (-1, self.num_segments, self.num_residues)
        for number in range(self.num_residues):
            first = self.heads.start + number * self.next_residue_heads
            heads = slice(first, first + self._head_span, self.heads.step)
            pairs = []
            for tensor, part in zip(tensors, parts, strict=True):
                rows = tensor[:, self.begin : self.begin + self.num_segments * self.segment]
                rows = rows.unflatten(1, (self.num_segments, -1))
                rows = rows[:, :, self.residue + number :: self.dilation, heads]
                pairs.append((rows, part.unflatten(0, counts)[:, :, number].transpose(2, 3)))
            yield pairs

    @property
    def _head_span(self) -> int:
        return (len(self.heads) - 1) * self.heads.step + 1


def pieces(config: Configuration, max_elements: int = _MAX_ELEMENTS) -> Iterator[Piece]:
    """Cuts a configuration into few kernel calls of equal row counts, without padding."""
    covered = False
    for segment, dilation in config.branches:
        assigns, covered = not covered and dilation == 1, covered or dilation == 1
        slots = -(-segment // dilation)
        full, tail = divmod(config.seqlen, segment)
        for begin, count, length in ((0, full, segment), (full * segment, 1, tail)):
            shapes = [
                (-(-(length - o) // dilation), config.heads_of(dilation, o))
                for o in range(min(dilation, length) if count else 0)
            ]
            first = 0
            while first < len(shapes) and len(shapes[first][1]) > 0:
                rows, heads = shapes[first]
                # One call has one stride between problems: several segments or several residues.
                last = first + 1
                while count == 1 and last < len(shapes):
                    if (shapes[last][0], len(shapes[last][1])) != (rows, len(heads)):
                        break
                    last += 1
                at_once = max(1, max_elements // (rows * len(heads) * config.head_dim))
                for skipped in range(0, count, at_once):
                    yield Piece(
                        begin=begin + skipped * segment,
                        segment=segment,
                        num_segments=min(at_once, count - skipped),
                        residue=first,
                        num_residues=last - first,
                        heads=heads,
                        next_residue_heads=len(heads) if config.torchscale else 1,
                        dilation=dilation,
                        rows=rows,
                        phantoms=slots - rows if config.torchscale and not config.is_causal else 0,
                        assigns=assigns,
                    )
                first = last


def _partial(way: _Way, piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(O_b, l_b) of one piece. Phantom keys have score 0 and value 0: they only rescale."""
    out, lse = way.kernel.forward(q, k, v, way.config.is_causal)
    if piece.phantoms:
        total = torch.logaddexp(lse, torch.full_like(lse, math.log(piece.phantoms)))
        out = out * (lse - total).exp_().unsqueeze(-1)
        lse = total
    return out, lse


def _mix(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges a part into rows of the result, in place."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1))
    out.addcmul_(part, (part_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)


@dataclass(frozen=True)
class _Way:
    """How a composition computes a configuration."""

    config: Configuration
    cut: tuple[Piece, ...]
    packed: bool
    kernel: Kernel


class _Strided(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, way: _Way, keep: bool
    ) -> Tensor:
        config = way.config
        out = torch.empty_like(query)
        lse = query.new_empty(
            query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32)
        )
        if min(config.dilations) > 1:  # rows that no branch covers
            out.zero_()
            lse.fill_(-math.inf)
        partials: list[Tensor] = []
        for piece in way.cut:
            q, k, v = (piece.read(x, way.packed) for x in (query, key, value))
            part, part_lse = _partial(way, piece, q, k, v)
            if keep and config.torchscale:
                partials += [part, part_lse]
            for (out_rows, one), (lse_rows, one_lse) in piece.write((out, lse), (part, part_lse)):
                if piece.assigns:
                    out_rows.copy_(one)
                    lse_rows.copy_(one_lse)
                    continue
                _mix(out_rows, lse_rows, one, one_lse)
        ctx.save_for_backward(query, key, value, out, lse, *partials)
        ctx.way = way
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *partials = ctx.saved_tensors
        way: _Way = ctx.way
        config = way.config
        fresh = torch.zeros_like if min(config.dilations) > 1 else torch.empty_like
        grads = [fresh(x) for x in (query, key, value)]
        for number, piece in enumerate(way.cut):
            packed = way.packed and piece.dilation > 1  # packing dense rows gained nothing here
            q, k, v, g = (piece.read(x, packed) for x in (query, key, value, grad))
            part_lse = piece.read(lse, True)
            if config.torchscale:
                part, own_lse = partials[2 * number : 2 * number + 2]
                g = g * (own_lse - part_lse).exp_().unsqueeze(-1)
                part_lse = own_lse
            else:
                part = piece.read(out, packed)
            part_grads = way.kernel.backward(g, (q, k, v), part, part_lse, config.is_causal)
            for pairs in piece.write(grads, part_grads):
                for rows, one in pairs:
                    if piece.assigns:
                        rows.copy_(one)
                    else:
                        rows.add_(one)
        return *grads, None, None


def strided(
    config: Configuration,
    packed: bool = False,
    max_elements: int = _MAX_ELEMENTS,
    kernel: Kernel = HOST,
) -> Attention:
    """Composition (a): strided views into the kernel, or (`packed`) copies of cache-sized pieces.

    Args:
        config: What to compute.
        packed: Copy the rows of a piece.
        max_elements: Of q in one kernel call.
        kernel: Runs the pieces.

    Returns:
        A function of query, key, value (batch, seqlen, num_heads, head_dim), with the
        configuration's gradient.
    """
    cut = tuple(pieces(config, max_elements))
    way = _Way(config, cut, packed, kernel)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        out: Tensor = _Strided.apply(  # type: ignore[no-untyped-call]
            query, key, value, way, keep
        )
        return out

    return attention
