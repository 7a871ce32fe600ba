"""Parity with upstream, composed of single-branch calls: fkodom's column sums, torchscale's shift.

    column sums:  O(p) = out_scale * sum_b O_b(p) / sum_p' O_b(p')
    row shift:    every segment is padded to a multiple of its dilation, and row p of the padded
                  sequence is returned as row p of the sequence

Inputs of fewer bits become float32, so that branches are merged in float32 and the output is
rounded once. For parity, not for speed. Both are operators of their own, that PyTorch takes apart
where it differentiates or compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._fake import check, split
from ._ops import OptionalTensors
from ._options import DTYPES, Options
from .errors import InvalidProblem, Unsupported, message

_TO_BSHD = {"bshd": (0, 1, 2, 3), "bhsd": (0, 2, 1, 3)}


def _autocast_dtype(query: Tensor) -> torch.dtype | None:
    """None where autocast is off, or does not know the device."""
    device = query.device.type
    known = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if known else None


def _out_dtype(query: Tensor) -> torch.dtype:
    """The input's, or autocast's."""
    dtype = _autocast_dtype(query)
    if dtype is None or dtype not in DTYPES or query.dtype == torch.float64:
        return query.dtype
    return dtype


def _inputs(tensors: tuple[Tensor, ...], layout: str) -> list[Tensor]:
    """(batch, seqlen, heads, head_dim), float32 or float64."""
    order = _TO_BSHD[layout]
    return [(x if x.dtype == torch.float64 else x.float()).permute(order) for x in tensors]


def _branches(query: Tensor, key: Tensor, options: Options) -> list[tuple[int, int, list[int]]]:
    """Segment, dilation and the offset of every query head, per branch, from the core."""
    heads, kv_heads = int(query.shape[2]), int(key.shape[2])
    flat = _ops.ask(_ops.ops.offsets, heads, kv_heads, *options)
    rows = [flat[b * heads : (b + 1) * heads] for b in range(len(options.segments))]
    return list(zip(options.segments, options.dilations, rows, strict=True))


def _attend(
    tensors: tuple[Tensor, Tensor, Tensor], optional: OptionalTensors, branch: int, options: Options
) -> tuple[Tensor, Tensor]:
    """One branch. Branches drop independently: another offset each."""
    if optional.dropout_seed is not None:
        seed, offset = optional.dropout_seed.unbind()
        optional = optional._replace(dropout_seed=torch.stack([seed, offset + branch]))
    if _autocast_dtype(tensors[0]) is None:
        out, lse = _ops.forward_op(*tensors, *optional, *options)
        return out, lse
    with torch.autocast(tensors[0].device.type, enabled=False):
        out, lse = _ops.forward_op(*tensors, *optional, *options)
    return out, lse


def merge_by_lse(
    outs: list[Tensor], lses: list[Tensor], weights_have_gradient: bool
) -> tuple[Tensor, Tensor]:
    """L = log sum_b exp(l_b), O = sum_b exp(l_b - L) O_b; absent branches have l_b = -inf.

    Args:
        outs: (batch, seqlen, heads, head_dim) per branch.
        lses: (batch, heads, seqlen) per branch.
        weights_have_gradient: False takes exp(l_b - L) as constants in O; L keeps its gradient.
    """
    stacked = torch.stack(lses)
    lse = torch.logsumexp(stacked, dim=0)
    reference = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = torch.exp(stacked - reference)
    if not weights_have_gradient:
        weights = weights.detach()
    columns = weights.transpose(-1, -2).unsqueeze(-1)  # (branches, batch, seqlen, heads, 1)
    out = (columns * torch.stack(outs)).sum(dim=0)
    return out, lse


def _column_sums(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Preset fkodom: (out, lse) in the user's layout."""
    optional, options = split(rest)
    # The core's rules for the whole call, before it is taken apart.
    check((query, key, value, *optional), options)
    if options.layout not in _TO_BSHD:
        got = f"'{options.layout}'"
        raise Unsupported(message("layout", "'bshd' or 'bhsd' with column sums", got))
    q, k, v = _inputs((query, key, value), options.layout)
    out = torch.zeros_like(q)
    lses = []
    branches = _branches(q, k, options)
    for b, (segment, dilation, row) in enumerate(branches):
        single = options.single_branch(segment, dilation, row)
        branch_out, lse = _attend((q, k, v), optional, b, single)
        runs = torch.tensor(row, device=q.device).ge(0).view(1, 1, -1, 1)
        covered = runs & lse.transpose(1, 2).unsqueeze(-1).ne(-torch.inf)
        sums = branch_out.sum(dim=1, keepdim=True)
        # Heads outside the branch are divided by 1: 0 / 0 would reach the gradient through `where`.
        quotient = branch_out / torch.where(runs, sums, torch.ones_like(sums))
        out = out + torch.where(covered, quotient, torch.zeros_like(quotient))
        lses.append(lse)
    scaled = (out / len(branches)).to(_out_dtype(query))
    lse = torch.logsumexp(torch.stack(lses), dim=0)
    return scaled.permute(_TO_BSHD[options.layout]).contiguous(), lse


def _pad_segments(x: Tensor, segment: Any, padded: Any) -> Tensor:
    """(batch, n, ...) -> (batch, segments * padded, ...): zero rows after every segment."""
    batch, n = x.shape[:2]
    count = -(-n // segment)
    whole = torch.cat([x, x.new_zeros(batch, count * segment - n, *x.shape[2:])], dim=1)
    cut = whole.view(batch, count, segment, *x.shape[2:])
    zeros = x.new_zeros(batch, count, padded - segment, *x.shape[2:])
    return torch.cat([cut, zeros], dim=2).flatten(1, 2)


def _pad_lengths(lengths: Tensor | None, segment: int, dilation: int) -> Tensor | None:
    """Lengths once every segment is padded; a sequence's only segment may be a shorter one."""
    if lengths is None:
        return None

    def up(x: Tensor | int, step: int) -> Any:
        return (x + (step - 1)) // step

    alone = up(lengths, dilation) * dilation
    whole = up(lengths, segment) * (up(segment, dilation) * dilation)
    return torch.where(lengths <= segment, alone, whole)


def _row_shift(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Preset torchscale with upstream's shift of rows: (out, lse) in the user's layout."""
    optional, options = split(rest)
    preset = options.name("preset")
    if preset != "torchscale":
        text = message("row_shift", "False, or preset 'torchscale'", f"preset {preset!r}")
        raise InvalidProblem(text)
    # All rules of the core but the one about the shift: no segment is shorter than the sequence.
    check((query, key, value, *optional), options.with_segments_of(2**40))
    masked_tail = options.name("tail") == "mask"
    if options.layout not in _TO_BSHD or optional.cu_seqlens is not None or masked_tail:
        got = "tail 'mask'" if masked_tail else f"layout '{options.layout}'"
        raise Unsupported(
            message("row_shift", "unpacked tensors and tail 'phantom'", got,
                    "upstream knows neither packed sequences nor masked tails")
        )  # fmt: skip
    q, k, v = _inputs((query, key, value), options.layout)
    n = q.shape[1]
    key_mask, used = optional.key_mask, None
    if optional.seqused is not None:  # rows beyond are the zero rows that fill a last segment
        used = torch.arange(n, device=q.device) < optional.seqused.unsqueeze(1)
        q, k, v = (x.masked_fill(~used[..., None, None], 0.0) for x in (q, k, v))
        key_mask = None if key_mask is None else key_mask | ~used
    outs, lses = [], []
    for b, (given, dilation, row) in enumerate(_branches(q, k, options)):
        segment = max(1, min(given, int(n)))
        padded = -(-segment // dilation) * dilation
        mask = None
        if key_mask is not None:  # a masked key leaves, the zero rows stay
            mask = ~_pad_segments(~key_mask, segment, padded)
        branch_tensors = optional._replace(
            key_mask=mask, seqused=_pad_lengths(optional.seqused, segment, dilation)
        )
        q_b, k_b, v_b = (_pad_segments(x, segment, padded) for x in (q, k, v))
        single = options.single_branch(padded, dilation, row)
        out, lse = _attend((q_b, k_b, v_b), branch_tensors, b, single)
        outs.append(out[:, :n])
        lses.append(lse[:, :, :n])
        if used is not None:
            outs[-1] = outs[-1].masked_fill(~used[..., None, None], 0.0)
            lses[-1] = lses[-1].masked_fill(~used[:, None], -torch.inf)
    weights_have_gradient = options.digit("lse_grad") == 2
    out, lse = merge_by_lse(outs, lses, weights_have_gradient)
    return out.to(_out_dtype(query)).permute(_TO_BSHD[options.layout]).contiguous(), lse


def _define(name: str, function: Callable[..., Any]) -> Any:
    """The operator `name` with the arguments of forward, taken apart by PyTorch."""
    schema = str(_ops.forward_op._schema)
    _library.define(name + schema[schema.index("(") :])
    _library.impl(name, function, "CompositeImplicitAutograd")
    return getattr(_ops.ops, name).default


_library = torch.library.Library("dilated", "FRAGMENT")
column_sums_op = _define("column_sums", _column_sums)
row_shift_op = _define("row_shift", _row_shift)
