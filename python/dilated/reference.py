"""The definition in plain torch: dense masks, one softmax per branch, any dtype, differentiable.

    l_b = log(sum_{j in K_b} e^{s_pj} + z_b)        O_b = sum_j e^{s_pj - l_b} v_j
    L   = log sum_b e^{l_b}                         O   = out_scale * merge_b(O_b)

Memory grows with seqlen squared: for tests and for reading. Offsets come as a table; names of
builders and presets are the core's business (:func:`dilated.plan`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def branch_mask(
    n: int,
    segment: int,
    dilation: int,
    offset: int,
    is_causal: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """One head in one branch: covered (n,), sees (n, n), and z (n,) if zero keys filled tails."""
    position = torch.arange(n, device=device)
    w = max(1, min(segment, n))
    phase = position % w
    covered = (phase % dilation == offset) & (offset >= 0)
    sees = covered[:, None] & covered & (position[:, None] // w == position // w)
    slots = -(-w // dilation)
    phantom = torch.where(covered, slots - sees.sum(dim=1), 0)
    if is_causal:
        sees = sees & (position <= position[:, None])
        phantom = torch.zeros_like(phantom)
    return covered, sees, phantom


def _softmax(scores: Tensor, sees: Tensor, phantom: Tensor) -> tuple[Tensor, Tensor]:
    """P = e^{s - l} where a key is seen, l = log(sum e^s + z); without any key P = 0, l = -inf."""
    masked = scores.masked_fill(~sees, -math.inf)
    zero_keys = phantom.to(scores.dtype).log().expand(scores.shape[:-1])
    empty = (~sees.any(dim=-1) & (phantom == 0)).expand(scores.shape[:-1])
    columns = torch.cat([masked, zero_keys.unsqueeze(-1)], dim=-1)
    columns = columns.masked_fill(empty.unsqueeze(-1), 0.0)  # any number: dropped below
    lse = torch.logsumexp(columns, dim=-1)
    weights = torch.exp(columns[..., :-1] - lse.unsqueeze(-1)).masked_fill(~sees, 0.0)
    return weights, lse.masked_fill(empty, -math.inf)


def _used_rows(
    used: int,
    tensors: list[Tensor],
    key_mask: Tensor | None,
    dropout_masks: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """One sequence as if it had `used` rows; the others are 0 and -inf."""
    absent = tensors[0].shape[1] - used
    out, lse = dilated_attention(
        *(x[:, :used] for x in tensors),
        key_mask=None if key_mask is None else key_mask[:, :used],
        dropout_masks=None if dropout_masks is None else dropout_masks[..., :used, :used],
        **options,
    )
    return pad(out, (0, 0, 0, 0, 0, absent)), pad(lse, (0, absent), value=-math.inf)


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segments: Sequence[int],
    dilations: Sequence[int],
    offsets: Sequence[Sequence[int]],
    is_causal: bool = False,
    scale: float | None = None,
    merge: str = "lse",
    out_scale: float = 1.0,
    lse_grad: bool = True,
    tail: str = "mask",
    key_mask: Tensor | None = None,
    seqused: Sequence[int] | None = None,
    dropout_masks: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Dilated attention of one unpacked batch.

    Args:
        query: (batch, seqlen, heads, head_dim).
        key: (batch, seqlen, kv_heads, head_dim).
        value: like key.
        segments: Segment length per branch.
        dilations: Dilation per branch.
        offsets: (branches, heads): residue that a head keeps, -1 leaves it out.
        is_causal: Keys after the query are not seen.
        scale: Factor of the scores, default head_dim ** -0.5.
        merge: "lse", "sum" or "mean".
        out_scale: Factor of the output.
        lse_grad: False takes the merge weights as constants.
        tail: "mask" or "phantom".
        key_mask: bool (batch, seqlen), True = key takes part.
        seqused: True length of every sequence: rows at or beyond it do not exist, their out is 0
            and their lse -inf.
        dropout_masks: bool (branches, batch, heads, seqlen, seqlen), True = kept.
        dropout_p: Kept weights are divided by 1 - dropout_p.

    Returns:
        out (batch, seqlen, heads, head_dim) and lse (batch, heads, seqlen).

    Example:
        >>> import torch
        >>> from dilated import reference
        >>> x = torch.randn(1, 6, 1, 4, dtype=torch.float64)
        >>> dense_branch = {"segments": [6], "dilations": [1], "offsets": [[0]]}
        >>> out, lse = reference.dilated_attention(x, x, x, **dense_branch)
        >>> y = x.transpose(1, 2)
        >>> dense = torch.nn.functional.scaled_dot_product_attention(y, y, y)
        >>> torch.allclose(out, dense.transpose(1, 2))
        True
    """
    if seqused is not None and len(seqused) > 0:
        rows = [
            _used_rows(
                used, [x[s : s + 1] for x in (query, key, value)],
                None if key_mask is None else key_mask[s : s + 1],
                None if dropout_masks is None else dropout_masks[:, s : s + 1],
                segments=segments, dilations=dilations, offsets=offsets, is_causal=is_causal,
                scale=scale, merge=merge, out_scale=out_scale, lse_grad=lse_grad, tail=tail,
                dropout_p=dropout_p,
            )
            for s, used in enumerate(seqused)
        ]  # fmt: skip
        return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])
    n, heads, head_dim = query.shape[1:]
    repeats = heads // max(1, key.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (batch, heads, seqlen, head_dim)
    if key_mask is not None:  # 0 * NaN would let masked keys and values through
        k, v = (x.masked_fill(~key_mask[:, None, :, None], 0.0) for x in (k, v))
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = (head_dim**-0.5 if scale is None else scale) * q @ k.transpose(-1, -2)
    outs, lses, covers = [], [], []
    for b, (segment, dilation) in enumerate(zip(segments, dilations, strict=True)):
        shape = (n, segment, dilation)
        masks = [branch_mask(*shape, o, is_causal, query.device) for o in offsets[b]]
        covered, sees, phantom = (torch.stack(parts) for parts in zip(*masks, strict=True))
        sees = sees.unsqueeze(0) if key_mask is None else sees & key_mask[:, None, None, :]
        weights, lse = _softmax(
            scores, sees, phantom if tail == "phantom" else torch.zeros_like(phantom)
        )
        if dropout_masks is not None:
            weights = weights * dropout_masks[b] / (1.0 - dropout_p)
        outs.append(weights @ v)
        lses.append(lse)
        covers.append(covered.to(scores.dtype))
    stacked = torch.stack(lses)
    total = torch.logsumexp(stacked, dim=0)
    share = torch.exp(stacked - total.masked_fill(total == -math.inf, 0.0))
    if merge == "lse":
        share = share if lse_grad else share.detach()
    elif merge == "mean":
        share = torch.stack(covers) / torch.stack(covers).sum(dim=0).clamp(min=1.0)
        share = share.unsqueeze(1)
    else:
        share = torch.ones_like(share)
    out = out_scale * (share.unsqueeze(-1) * torch.stack(outs)).sum(dim=0)
    return out.transpose(1, 2), total
