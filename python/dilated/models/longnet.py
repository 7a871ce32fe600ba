"""LongNetLM, the decoder of arXiv 2307.02486: a MAGNETO transformer whose attention is dilated.

One layer, with norms where MAGNETO (arXiv 2210.06423) puts them:
    q, k, v = projections of self_attn_layer_norm(x)
    x = x + out_proj(inner_attn_ln(attention(xpos(q), xpos(k), v)))
    x = x + fc2(ffn_layernorm(gelu(fc1(final_layer_norm(x)))))
Parameter names are torchscale's, so that its weights load with `load_state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dilated._inputs import lengths
from dilated._options import COLUMN_SUM_PRESETS, OPTION_DEFAULTS
from dilated.errors import InvalidProblem, Unsupported
from dilated.functional import dilated_attention
from dilated.models.xpos import XposTables, apply_xpos, xpos_tables

if TYPE_CHECKING:
    from dilated._options import Lengths

# What the model decides itself.
_OWN_OPTIONS = {"is_causal", "dropout_p", "layout", "head_offset", "total_heads", "total_kv_heads"}
_ATTENTION_OPTIONS = OPTION_DEFAULTS.keys() - _OWN_OPTIONS


class SelfAttention(nn.Module):
    """Causal dilated self-attention with xPos and the norm before the output projection."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        segments: tuple[int, ...],
        dilations: tuple[int, ...],
        dropout: float,
        layer_norm_eps: float,
        attention_options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.segments, self.dilations = segments, dilations
        self.dropout = dropout
        self.attention_options = dict(attention_options)
        kv_dim = embed_dim // num_heads * num_kv_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, kv_dim)
        self.v_proj = nn.Linear(embed_dim, kv_dim)
        self.inner_attn_ln = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, tables: XposTables, sequences: Mapping[str, Any]) -> Tensor:
        """(batch, seqlen, embed_dim) or packed (total, embed_dim) -> the same."""
        query = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
        key = self.k_proj(x).unflatten(-1, (self.num_kv_heads, -1))
        value = self.v_proj(x).unflatten(-1, (self.num_kv_heads, -1))
        out = dilated_attention(
            apply_xpos(query, tables.query),
            apply_xpos(key, tables.key),
            value,
            segments=self.segments,
            dilations=self.dilations,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
            layout="shd" if x.dim() == 2 else "bshd",
            **sequences,
            **self.attention_options,
        )
        return cast(Tensor, self.out_proj(self.inner_attn_ln(out.flatten(-2))))


class FeedForward(nn.Module):
    """fc2(ffn_layernorm(gelu(fc1(x))))."""

    def __init__(self, embed_dim: int, ffn_dim: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, ffn_dim)
        self.ffn_layernorm = nn.LayerNorm(ffn_dim, eps=layer_norm_eps)
        self.fc2 = nn.Linear(ffn_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., embed_dim) -> the same."""
        return cast(Tensor, self.fc2(self.ffn_layernorm(functional.gelu(self.fc1(x)))))


class DecoderLayer(nn.Module):
    """One layer of the file's formula."""

    def __init__(
        self, attention: SelfAttention, ffn: FeedForward, embed_dim: int, dropout: float, eps: float
    ) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim, eps=eps)
        self.self_attn = attention
        self.final_layer_norm = nn.LayerNorm(embed_dim, eps=eps)
        self.ffn = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, tables: XposTables, sequences: Mapping[str, Any]) -> Tensor:
        """(batch, seqlen, embed_dim) or packed (total, embed_dim) -> the same."""
        x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x), tables, sequences))
        return cast(Tensor, x + self.dropout(self.ffn(self.final_layer_norm(x))))


class LongNetLM(nn.Module):
    """The paper's causal language model: tokens in, logits of the next token out.

    Args:
        vocab_size: number of tokens; 256 for bytes.
        embed_dim: width of the residual stream, a multiple of 2 * num_heads.
        num_layers: decoder layers.
        num_heads: query heads H.
        segments: segment length w_b of every branch.
        dilations: dilation r_b of every branch.
        num_kv_heads: key/value heads, a divisor of num_heads (grouped-query attention); default H.
        ffn_dim: inner width of the feed-forward; default 4 * embed_dim.
        dropout: on embeddings and on both residual branches.
        attention_dropout: on attention probabilities.
        xpos_scale_base: distance over which xPos fades; torchscale's 512.
        layer_norm_eps: of all norms.
        scale_embedding: multiply embeddings by sqrt(embed_dim); torchscale's default is not to.
        activation_checkpointing: recompute each layer in backward (`torch.utils.checkpoint`).
        **attention_options: offsets, groups, merge, out_scale, lse_grad, tail, gqa_offset, scale,
            preset, backend of `dilated.dilated_attention`.

    Raises:
        InvalidProblem: a size does not fit another one, or an option is unknown or breaks a rule.
        Unsupported: a preset that sees the future, or a back end that cannot run this.

    Example:
        >>> import torch
        >>> from dilated.models import LongNetLM
        >>> model = LongNetLM(256, 32, 2, 4, segments=[8, 16], dilations=[1, 2])
        >>> model(torch.zeros(1, 16, dtype=torch.int64)).shape
        torch.Size([1, 16, 256])
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        *,
        segments: Sequence[int],
        dilations: Sequence[int],
        num_kv_heads: int | None = None,
        ffn_dim: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        xpos_scale_base: float = 512.0,
        layer_norm_eps: float = 1e-5,
        scale_embedding: bool = False,
        activation_checkpointing: bool = False,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        ffn_dim = 4 * embed_dim if ffn_dim is None else ffn_dim
        _check_sizes(vocab_size, embed_dim, num_layers, num_heads, num_kv_heads, ffn_dim)
        for name, p in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if not 0.0 <= p <= 1.0:
                raise InvalidProblem(f"LongNetLM: {name}: expected 0 to 1, got {p}")
        unknown = sorted(attention_options.keys() - _ATTENTION_OPTIONS)
        if unknown:
            raise InvalidProblem(
                f"LongNetLM: {unknown[0]}: expected one of "
                f"{', '.join(sorted(_ATTENTION_OPTIONS))}, "
                f"got an unknown option"
            )
        if attention_options.get("preset") in COLUMN_SUM_PRESETS:
            raise Unsupported(
                f"LongNetLM: preset: expected a causal one, got {attention_options['preset']!r} "
                "(it divides by sums over all positions, later ones included)"
            )
        # One position says now whether the options fit; the operator knows the rules.
        head_dim = embed_dim // num_heads
        dilated_attention(
            torch.zeros(1, 1, num_heads, head_dim, device="cpu"),
            *(torch.zeros(1, 1, num_kv_heads, head_dim, device="cpu") for _ in range(2)),
            segments=segments, dilations=dilations, is_causal=True, **attention_options,
        )  # fmt: skip
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.embed_scale = math.sqrt(embed_dim) if scale_embedding else 1.0
        self.xpos_scale_base = xpos_scale_base
        self.activation_checkpointing = activation_checkpointing
        self.embed_tokens = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(
                SelfAttention(
                    embed_dim,
                    num_heads,
                    num_kv_heads,
                    segments=tuple(int(w) for w in segments),
                    dilations=tuple(int(r) for r in dilations),
                    dropout=attention_dropout,
                    layer_norm_eps=layer_norm_eps,
                    attention_options=attention_options,
                ),
                FeedForward(embed_dim, ffn_dim, layer_norm_eps),
                embed_dim,
                dropout,
                layer_norm_eps,
            )
            for _ in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.output_projection = nn.Linear(embed_dim, vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MAGNETO's start: Xavier, with gain sqrt(log(2 * layers)) for v, out, fc1 and fc2."""
        gamma = math.sqrt(math.log(2 * len(self.layers)))
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear) and module.bias is not None:
                subln = name.endswith(("v_proj", "out_proj", "fc1", "fc2"))
                nn.init.xavier_normal_(module.weight, gain=gamma if subln else 1.0)
                nn.init.zeros_(module.bias)
        std = self.embed_dim**-0.5
        nn.init.normal_(self.embed_tokens.weight, std=std)
        nn.init.normal_(self.output_projection.weight, std=std)

    def features(
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        seqused: Lengths | None = None,
        cu_seqlens: Lengths | None = None,
    ) -> Tensor:
        """What the output projection reads, (*tokens.shape, embed_dim); arguments of `forward`."""
        given = {"key_mask": key_mask, "seqused": seqused, "cu_seqlens": cu_seqlens}
        sequences = {name: value for name, value in given.items() if value is not None}
        longest, position, length = _positions(tokens, seqused, cu_seqlens)
        if seqused is not None and length is not None:
            tokens = tokens.masked_fill(position >= length, 0)  # padding may be any number
        x = self.dropout(self.embed_scale * self.embed_tokens(tokens))
        dtype = torch.get_autocast_dtype("cpu") if _autocast_on(x) else x.dtype
        tables = xpos_tables(
            longest,
            self.embed_dim // self.num_heads,
            position=position,
            length=length,
            scale_base=self.xpos_scale_base,
            dtype=dtype,
        )
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(layer, x, tables, sequences, use_reentrant=False))
            else:
                x = layer(x, tables, sequences)
        return cast(Tensor, self.layer_norm(x))

    def forward(
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        seqused: Lengths | None = None,
        cu_seqlens: Lengths | None = None,
    ) -> Tensor:
        """Logits of the token after each position.

        Args:
            tokens: integers (batch, seqlen), packed (total,).
            key_mask: bool like tokens, True = the token may be attended to.
            seqused: the length of every sequence; tokens at or beyond it are padding, whatever they
                are, and their logits mean nothing.
            cu_seqlens: starts of packed sequences and their end, 0, ..., total; positions restart.

        Returns:
            (*tokens.shape, vocab_size).

        Raises:
            InvalidProblem: a shape does not fit another one.

        Example:
            >>> import torch
            >>> from dilated.models import LongNetLM
            >>> model = LongNetLM(256, 32, 2, 4, segments=[8, 16], dilations=[1, 2])
            >>> model(torch.zeros(30, dtype=torch.int64), cu_seqlens=[0, 10, 30]).shape
            torch.Size([30, 256])
        """
        features = self.features(tokens, key_mask=key_mask, seqused=seqused, cu_seqlens=cu_seqlens)
        return cast(Tensor, self.output_projection(features))


def _positions(
    tokens: Tensor, seqused: Lengths | None, cu_seqlens: Lengths | None
) -> tuple[int, Tensor, Tensor | None]:
    """The longest length, and of every token its position and (if they differ) its length."""
    shape = "(batch, seqlen)" if cu_seqlens is None else "(total,) with cu_seqlens"
    if tokens.dim() != (2 if cu_seqlens is None else 1) or tokens.is_floating_point():
        raise InvalidProblem(
            f"LongNetLM: tokens: expected integers {shape}, got {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}"
        )
    rows = torch.arange(tokens.shape[-1], device=tokens.device)
    if cu_seqlens is None:
        used = _lengths("seqused", seqused, tokens.shape[0], tokens.device)
        return tokens.shape[-1], rows, None if used is None else used[:, None]
    bounds = _lengths("cu_seqlens", cu_seqlens, None, tokens.device)
    assert bounds is not None
    whole = bounds.diff()
    used = _lengths("seqused", seqused, whole.numel(), tokens.device)
    # Compiled, the longest of a tensor is not known: the whole bounds it.
    unknown = whole.numel() == 0 or torch.compiler.is_compiling()
    longest = tokens.shape[0] if unknown else int(whole.max())
    sequence = torch.searchsorted(bounds[1:], rows, right=True).clamp(max=whole.numel() - 1)
    return longest, rows - bounds[sequence], (whole if used is None else used)[sequence]


def _lengths(
    name: str, values: Lengths | None, count: int | None, device: torch.device
) -> Tensor | None:
    found = lengths(name, values, device)
    if found is None:
        return None
    fits = found.numel() == count if count is not None else found.numel() > 0
    if found.dim() != 1 or not fits:
        expected = "0, ..., total" if count is None else f"one length for each of {count} sequences"
        raise InvalidProblem(
            f"LongNetLM: {name}: expected {expected}, got shape {tuple(found.shape)}"
        )
    return found


def _autocast_on(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def _check_sizes(
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    ffn_dim: int,
) -> None:
    sizes = {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "ffn_dim": ffn_dim,
    }
    for name, size in sizes.items():
        if size < 1:
            raise InvalidProblem(f"LongNetLM: {name}: expected >= 1, got {size}")
    if embed_dim % (2 * num_heads):
        raise InvalidProblem(
            f"LongNetLM: embed_dim: expected a multiple of 2 * num_heads = {2 * num_heads}, "
            f"got {embed_dim} (xPos rotates pairs of head_dim = embed_dim / num_heads)"
        )
    if num_heads % num_kv_heads:
        raise InvalidProblem(
            f"LongNetLM: num_kv_heads: expected a divisor of num_heads = {num_heads}, "
            f"got {num_kv_heads}"
        )
