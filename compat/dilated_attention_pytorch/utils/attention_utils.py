"""Dense attention and its parts in plain PyTorch, O(n^2) in memory: for tests and small inputs.

Nothing of the package computes attention with these; `dilated.dilated_attention` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dilated.errors import message

from ..left_out import left_out
from .validation import invalid

HAS_SDPA = True  # every PyTorch that `dilated` admits has it
HAS_FLASH_ATTN = False  # nothing here calls flash-attn


def _mask_scores(scores: Tensor, attention_mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    if attention_mask is None:
        return scores
    if attention_mask.dtype == torch.bool:
        return scores.masked_fill(~attention_mask, -torch.inf)
    return scores + attention_mask


def compute_attention_scores(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Masked scores scale * q k^T.

    Args:
        q: (..., n, head_dim).
        k: like q.
        scale: factor of the products; None means head_dim ** -0.5.
        attention_mask: broadcasts to (..., n, n). A bool one keeps where it is True, any other is
            added, as in torch's scaled_dot_product_attention.
        is_causal: -inf above the diagonal.

    Returns:
        (..., n, n), dtype of q.

    Example:
        >>> import torch
        >>> from dilated_attention_pytorch.utils.attention_utils import compute_attention_scores
        >>> compute_attention_scores(torch.ones(1, 2, 4), torch.ones(1, 2, 4), is_causal=True)
        tensor([[[2., -inf],
                 [2., 2.]]])
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _mask_scores(q @ k.transpose(-2, -1) * scale, attention_mask, is_causal)


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool = False,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Dense attention that stores its weights.

    Args:
        q: (..., n, heads, head_dim).
        k: like q.
        v: like q.
        is_causal: a query sees no later key.
        attention_mask: as in :func:`compute_attention_scores`, for scores (..., heads, n, n).
        dropout_p: probability of dropping a weight; acts whenever it is not 0.

    Returns:
        Like q.
    """
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    weights = compute_attention_scores(q, k, None, attention_mask, is_causal).softmax(-1)
    return (functional.dropout(weights, dropout_p) @ v).transpose(-3, -2)


def optimize_attention_computation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool = False,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """:func:`standard_attention` by torch's fused operator; the same arguments, no stored weights.

    With a mask and is_causal both act.
    """
    if is_causal and attention_mask is not None:
        zeros = q.new_zeros(q.shape[-3], k.shape[-3])
        attention_mask, is_causal = _mask_scores(zeros, attention_mask, is_causal=True), False
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=attention_mask, dropout_p=dropout_p, is_causal=is_causal
    )
    return out.transpose(-3, -2)


def create_dilated_mask(
    seq_len: int, segment_length: int, dilation_rate: int, device: torch.device | str | None = None
) -> Tensor:
    """A strided sliding window. It is not the pattern of the operator: see `dilated pattern`.

    Query i sees every dilation_rate-th position of [s, i + h], counted from s = max(0, i - h),
    where h = segment_length // 2 * dilation_rate.

    Args:
        seq_len: n.
        segment_length: width of the window, in strides.
        dilation_rate: stride, >= 1.
        device: of the mask.

    Returns:
        bool (n, n), True = seen.
    """
    position = torch.arange(seq_len, device=device)
    reach = segment_length // 2 * dilation_rate
    start = (position - reach).clamp(min=0)[:, None]
    inside = (position >= start) & (position <= position[:, None] + reach)
    return inside & ((position - start) % dilation_rate == 0)


def create_block_diagonal_mask(
    seq_len: int, block_size: int, device: torch.device | str | None = None, overlap: int = 0
) -> Tensor:
    """Blocks of positions that see each other, and `overlap` positions on either side of theirs.

    Args:
        seq_len: n.
        block_size: positions per block; the last may be shorter.
        device: of the mask.
        overlap: positions of the neighbours that see a block and are seen by it.

    Returns:
        bool (n, n), True = seen; symmetric.
    """
    position = torch.arange(seq_len, device=device)
    start = (position // block_size * block_size)[:, None]
    reached = (position >= start - overlap) & (position < start + block_size + overlap)
    return reached | reached.T


def apply_dilated_attention_pattern(
    scores: Tensor, segment_length: int, dilation_rate: int, group_idx: int, total_groups: int
) -> Tensor:
    """-inf wherever :func:`create_dilated_mask` hides a key.

    Args:
        scores: (..., n, n).
        segment_length: of the mask.
        dilation_rate: of the mask.
        group_idx: the caller's group, below total_groups. The mask is the same for all.
        total_groups: number of groups.

    Returns:
        Like scores.

    Raises:
        InvalidProblem: there is no such group.
    """
    if not 0 <= group_idx < total_groups:
        raise invalid("group_idx", f"0 <= group_idx < {total_groups}", group_idx)
    mask = create_dilated_mask(scores.shape[-1], segment_length, dilation_rate, scores.device)
    return scores.masked_fill(~mask, -torch.inf)


def compute_alibi_bias(
    seq_len: int,
    num_heads: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """ALiBi (arXiv 2108.12409): slope_h * (j - i) with slope_h = 2 ** (-8 (h + 1) / num_heads).

    Args:
        seq_len: n.
        num_heads: heads.
        device: of the result.
        dtype: of the result.

    Returns:
        (heads, n, n), antisymmetric: what a causal mask leaves is <= 0.
    """
    head = torch.arange(1, num_heads + 1, device=device, dtype=dtype)
    position = torch.arange(seq_len, device=device, dtype=dtype)
    slope = torch.exp2(-8 * head / num_heads)
    return slope[:, None, None] * (position - position[:, None])


def compute_rotary_embeddings(
    seq_len: int,
    dim: int,
    device: torch.device | str | None = None,
    base: int = 10000,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Tables of RoPE (arXiv 2104.09864): angles p * base ** (-2 i / dim), once per half.

    Args:
        seq_len: n.
        dim: even.
        device: of the tables.
        base: of the frequencies.
        dtype: of the tables; angles are float64.

    Returns:
        cosine and sine, (n, dim) each; columns i and i + dim / 2 are equal.

    Raises:
        AssertionError: dim is odd (the package's type of error, unlike all others here).
    """
    if dim % 2:
        text = message("dim", "an even number", str(dim), op="compute_rotary_embeddings")
        raise AssertionError(text)
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = torch.arange(seq_len, device=device)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary_embeddings(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs (i, i + head_dim / 2) of q and k, each pair by its own frequency.

    Args:
        q: (..., n, heads, head_dim).
        k: like q.
        cos: (n, head_dim), from :func:`compute_rotary_embeddings`.
        sin: like cos.

    Returns:
        Rotated q and k.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotate(q), rotate(k)


def split_attention_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """(..., n, embed_dim) -> (..., n, heads, head_dim)."""
    return tensor.reshape(*tensor.shape[:-1], num_heads, tensor.shape[-1] // num_heads)


def merge_attention_heads(tensor: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """(..., n, heads, head_dim) -> (..., n, heads * head_dim)."""
    return tensor.reshape(*tensor.shape[:-2], num_heads * head_dim)


def create_4d_causal_mask(*_: Any, **__: Any) -> Tensor:
    """Left out: raises Unsupported."""
    left_out("create_4d_causal_mask", "pass is_causal=True")


def apply_head_specific_masks(*_: Any, **__: Any) -> Tensor:
    """Left out: raises Unsupported."""
    left_out("apply_head_specific_masks", "torch.Tensor.masked_fill")


def compute_position_embeddings(*_: Any, **__: Any) -> Tensor:
    """Left out: raises Unsupported."""
    left_out("compute_position_embeddings", "dilated.models.apply_xpos on queries and keys")


def get_attention_backend_info(*_: Any, **__: Any) -> dict[str, Any]:
    """Left out: raises Unsupported."""
    left_out("get_attention_backend_info", "dilated.backends()")
