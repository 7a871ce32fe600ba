"""Parity with upstream, composed of single-branch calls: fkodom's column sums, torchscale's shift.

    column sums:  O(p) = out_scale * sum_b O_b(p) / sum_p' O_b(p')
    row shift:    every segment is padded to a multiple of its dilation, and row p of the padded
                  sequence is returned as row p of the sequence

Both call the operator once per branch and merge here, in PyTorch. For parity, not for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _ops
from .errors import InvalidProblem, Unsupported, message

_TO_BSHD = {"bshd": (0, 1, 2, 3), "bhsd": (0, 2, 1, 3)}


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


def _branch_extras(extras: _ops.Extras, branch: int) -> _ops.Extras:
    """Branches drop independently: another offset each."""
    if extras.dropout_seed is None:
        return extras
    shift = torch.tensor([0, branch], dtype=torch.int64)
    return extras._replace(dropout_seed=extras.dropout_seed + shift)


def _single_branch(
    options: _ops.Options, segment: int, dilation: int, row: list[int]
) -> _ops.Options:
    return _ops.Options(
        [segment],
        [dilation],
        offset_table=row,
        is_causal=options.is_causal,
        scale=options.scale,
        dropout_p=options.dropout_p,
    )


def _offset_rows(query: Tensor, key: Tensor, layout: str, options: _ops.Options) -> list[list[int]]:
    """Offsets per branch and query head, from the core."""
    dim = 1 if layout == "bhsd" else -2
    heads = query.shape[dim]
    flat = _ops.ops.offsets(heads, key.shape[dim], *options)
    return [flat[b * heads : (b + 1) * heads] for b in range(len(options.segments))]


def column_sum_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: _ops.Extras,
    layout: str,
    backend: str | None,
    options: _ops.Options,
) -> tuple[Tensor, Tensor]:
    """Preset fkodom (semantics §4, colsum): (out, lse) in the user's layout."""
    # The core's rules for the whole call, before it is taken apart.
    _ops.check((query, key, value, *extras), layout, backend or "", options)
    to_bshd = _TO_BSHD.get(layout)
    if to_bshd is None:
        raise Unsupported(message("layout", "'bshd' or 'bhsd' with column sums", f"'{layout}'"))
    q, k, v = (t.permute(to_bshd) for t in (query, key, value))
    out = torch.zeros_like(q)
    lses = []
    for b, row in enumerate(_offset_rows(query, key, layout, options)):
        single = _single_branch(options, options.segments[b], options.dilations[b], row)
        branch_out, lse = _ops.forward(q, k, v, _branch_extras(extras, b), "bshd", backend, single)
        runs = torch.tensor(row, device=q.device).ge(0).view(1, 1, -1, 1)
        covered = runs & lse.transpose(1, 2).unsqueeze(-1).ne(-torch.inf)
        sums = branch_out.sum(dim=1, keepdim=True)
        # Heads outside the branch are divided by 1: 0 / 0 would reach the gradient through `where`.
        quotient = branch_out / torch.where(runs, sums, torch.ones_like(sums))
        out = out + torch.where(covered, quotient, torch.zeros_like(quotient))
        lses.append(lse)
    scaled = out / len(options.segments)
    return scaled.permute(to_bshd).contiguous(), torch.logsumexp(torch.stack(lses), dim=0)


def _pad_segments(x: Tensor, segment: int, padded: int) -> Tensor:
    """(batch, n, ...) -> (batch, segments * padded, ...): zero rows after every segment."""
    batch, n = x.shape[:2]
    count = -(-n // segment)
    whole = x.new_zeros(batch, count * segment, *x.shape[2:])
    whole[:, :n] = x
    result = x.new_zeros(batch, count, padded, *x.shape[2:])
    result[:, :, :segment] = whole.view(batch, count, segment, *x.shape[2:])
    return result.flatten(1, 2)


def row_shifted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: _ops.Extras,
    layout: str,
    backend: str | None,
    options: _ops.Options,
) -> tuple[Tensor, Tensor]:
    """Preset torchscale with upstream's shift of rows: (out, lse) in the user's layout."""
    if options.preset != "torchscale":
        text = message("row_shift", "False, or preset 'torchscale'", f"preset {options.preset!r}")
        raise InvalidProblem(text)
    # All rules of the core but the one about the shift: no segment is shorter than the sequence.
    longest = max(query.shape, default=1)
    long = [w if w < 1 else max(w, longest) for w in options.segments]
    unshifted = options._replace(segments=long)
    _ops.check((query, key, value, *extras), layout, backend or "", unshifted)
    to_bshd = _TO_BSHD.get(layout)
    if to_bshd is None or extras.cu_seqlens is not None or options.tail == "mask":
        got = "tail 'mask'" if options.tail == "mask" else f"layout '{layout}'"
        raise Unsupported(
            message("row_shift", "unpacked tensors and tail 'phantom'", got,
                    "upstream knows neither packed sequences nor masked tails")
        )  # fmt: skip
    q, k, v = (t.permute(to_bshd) for t in (query, key, value))
    n = q.shape[1]
    key_mask = extras.key_mask
    if extras.seqused is not None:
        used = torch.arange(n) < extras.seqused.unsqueeze(1)
        key_mask = used if key_mask is None else key_mask & used
    outs, lses = [], []
    for b, row in enumerate(_offset_rows(query, key, layout, options)):
        dilation = options.dilations[b]
        segment = max(1, min(options.segments[b], n))
        padded = -(-segment // dilation) * dilation
        mask = None
        if key_mask is not None:  # a masked key leaves, the zero rows stay
            mask = ~_pad_segments(~key_mask, segment, padded)
        branch_extras = _branch_extras(extras._replace(key_mask=mask, seqused=None), b)
        q_b, k_b, v_b = (_pad_segments(x, segment, padded) for x in (q, k, v))
        single = _single_branch(options, padded, dilation, row)
        out, lse = _ops.forward(q_b, k_b, v_b, branch_extras, "bshd", backend, single)
        outs.append(out[:, :n])
        lses.append(lse[:, :, :n])
    out, lse = merge_by_lse(outs, lses, weights_have_gradient=bool(options.lse_grad))
    return out.to(query.dtype).permute(to_bshd).contiguous(), lse
