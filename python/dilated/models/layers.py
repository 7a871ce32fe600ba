"""Layers of which the models are made, with norms where MAGNETO (arXiv 2210.06423) puts them.

    q, k, v = projections of self_attn_layer_norm(x)
    x = x + drop_path(dropout(out_proj(inner_attn_ln(attention(xpos(q), xpos(k), v)))))
    x = x + drop_path(dropout(fc2(ffn_layernorm(gelu(fc1(final_layer_norm(x)))))))

Parameter names are torchscale's, so that its weights load with `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional

from dilated._inputs import lengths, require_parameter_dtype
from dilated._options import COLUMN_SUM_PRESETS, OPTION_DEFAULTS
from dilated._plan import plan
from dilated._ranks import telling_ranks
from dilated.errors import InvalidProblem, Unsupported, message
from dilated.functional import dilated_attention
from dilated.models.sequences import sequence_of_row
from dilated.models.xpos import XposTables, apply_xpos
from dilated.modules import DilatedAttention

if TYPE_CHECKING:
    from dilated._options import Lengths
    from dilated.distributed import SequenceGroups

# What a layer decides itself.
_OWN_OPTIONS = {"is_causal", "dropout_p", "layout", "head_offset", "total_heads", "total_kv_heads"}
_ATTENTION_OPTIONS = {*OPTION_DEFAULTS, "row_shift"} - _OWN_OPTIONS


def check_layer(
    op: str,
    sizes: Mapping[str, int],
    probabilities: Mapping[str, float],
    attention_options: Mapping[str, Any],
    is_causal: bool,
) -> None:
    """Raises what no layer can be made of.

    Args:
        op: whose errors these are.
        sizes: embed_dim, num_heads, num_kv_heads and others that must be at least 1.
        probabilities: numbers from 0 to 1.
        attention_options: options of the operator that the model hands on.
        is_causal: whether the layer is.

    Raises:
        InvalidProblem: a number breaks a rule, or an option is unknown.
        Unsupported: a causal layer with a preset that sees the future.
    """
    for name, size in sizes.items():
        if size < 1:
            raise InvalidProblem(message(name, ">= 1", str(size), op=op))
    embed_dim, heads, kv_heads = (sizes[n] for n in ("embed_dim", "num_heads", "num_kv_heads"))
    if embed_dim % heads:
        expected = f"a multiple of num_heads = {heads}"
        raise InvalidProblem(message("embed_dim", expected, str(embed_dim), op=op))
    if heads % kv_heads:
        expected = f"a divisor of num_heads = {heads}"
        raise InvalidProblem(message("num_kv_heads", expected, str(kv_heads), op=op))
    for name, p in probabilities.items():
        if not 0.0 <= p <= 1.0:
            raise InvalidProblem(message(name, "0 to 1", str(p), op=op))
    unknown = sorted(attention_options.keys() - _ATTENTION_OPTIONS)
    if unknown:
        expected = f"one of {', '.join(sorted(_ATTENTION_OPTIONS))}"
        raise InvalidProblem(message(unknown[0], expected, "an unknown option", op=op))
    preset = attention_options.get("preset")
    if is_causal and preset in COLUMN_SUM_PRESETS:
        hint = "it divides by sums over all positions, later ones included"
        raise Unsupported(message("preset", "a causal one", repr(preset), hint, op=op))


class SelfAttention(nn.Module):
    """Dilated self-attention with the norm before the output projection."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        segments: Sequence[int],
        dilations: Sequence[int],
        is_causal: bool,
        dropout: float,
        layer_norm_eps: float,
        attention_options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        # The module checks the options and makes them plain values; a call adds its layout.
        checked = DilatedAttention(segments, dilations, is_causal=is_causal, **attention_options)
        self.segments, self.dilations = checked.segments, checked.dilations
        self.options, self.row_shift = checked.options, checked.row_shift
        self.dropout = dropout
        self.head_dim = embed_dim // num_heads
        kv_dim = self.head_dim * num_kv_heads
        # One position says now whether options and heads fit; the core knows the rules.
        plan(
            1, num_heads, num_kv_heads=num_kv_heads, head_dim=self.head_dim,
            segments=self.segments, dilations=self.dilations, **self.options,
        )  # fmt: skip
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, kv_dim)
        self.v_proj = nn.Linear(embed_dim, kv_dim)
        self.inner_attn_ln = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, tables: XposTables | None, sequences: Mapping[str, Any]) -> Tensor:
        """(batch, seqlen, embed_dim) or packed (total, embed_dim) -> the same.

        `tables` turn queries and keys; `sequences` are key_mask, seqused, cu_seqlens of the
        operator, and sequence_groups and shards of the one over ranks.
        """
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if tables is not None:
            query, key = apply_xpos(query, tables.query), apply_xpos(key, tables.key)
        call: dict[str, Any] = {
            **self.options,
            "layout": "shd" if x.dim() == 2 else "bshd",
            "dropout_p": self.dropout if self.training else 0.0,
        }
        attention: Any = dilated_attention
        if "sequence_groups" in sequences:
            from dilated.distributed import dilated_attention as attention
        out: Tensor = attention(
            query,
            key,
            value,
            segments=self.segments,
            dilations=self.dilations,
            row_shift=self.row_shift,
            **call,
            **sequences,
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


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, leaves a residual out of whole sequences.

    What is kept is divided by the probability of keeping it.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, cu_seqlens: Lengths | None = None) -> Tensor:
        """(batch, seqlen, embed_dim), or (total, embed_dim) with cu_seqlens -> the same."""
        if self.p == 0.0 or not self.training:
            return x
        bounds = lengths("cu_seqlens", cu_seqlens, x.device)
        count = x.shape[0] if bounds is None else bounds.numel() - 1
        keep = x.new_empty(count).bernoulli_(1.0 - self.p)
        if self.p < 1.0:
            keep = keep / (1.0 - self.p)
        if bounds is None:
            return x * keep[:, None, None]
        return x * keep[sequence_of_row(bounds, x.shape[0])][:, None]

    def extra_repr(self) -> str:
        """The probability of leaving out."""
        return f"p={self.p}"


class EncoderLayer(nn.Module):
    """One transformer layer: dilated self-attention and a feed-forward, as the file's formula says.

    Weights start as those of `nn.Linear`; `LongNet` gives its layers MAGNETO's start, which depends
    on their number.

    Args:
        embed_dim: width of the residual stream, a multiple of num_heads.
        num_heads: query heads H.
        segments: segment length of every branch.
        dilations: dilation of every branch.
        num_kv_heads: key/value heads, a divisor of num_heads; default H.
        ffn_dim: inner width of the feed-forward; default 4 * embed_dim.
        is_causal: a position sees only itself and earlier ones.
        dropout: on both residual branches.
        attention_dropout: on attention probabilities.
        drop_path: probability of leaving a residual branch out, per sequence.
        layer_norm_eps: of all norms.
        **attention_options: offsets, groups, merge, out_scale, lse_grad, tail, gqa_offset, scale,
            preset, backend, row_shift of `dilated.dilated_attention`.

    Raises:
        InvalidProblem: a size does not fit another one, or an option is unknown or breaks a rule.
        Unsupported: a causal layer with a preset that sees the future, or a back end that cannot
            run this.

    Example:
        >>> import torch
        >>> from dilated.models import EncoderLayer
        >>> layer = EncoderLayer(32, 4, segments=[8, 16], dilations=[1, 2])
        >>> layer(torch.randn(2, 20, 32), seqused=[20, 11]).shape
        torch.Size([2, 20, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        segments: Sequence[int],
        dilations: Sequence[int],
        num_kv_heads: int | None = None,
        ffn_dim: int | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-5,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        ffn_dim = 4 * embed_dim if ffn_dim is None else ffn_dim
        check_layer(
            type(self).__name__,
            {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": kv_heads,
             "ffn_dim": ffn_dim},
            {"dropout": dropout, "attention_dropout": attention_dropout, "drop_path": drop_path},
            attention_options,
            is_causal,
        )  # fmt: skip
        self.self_attn_layer_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.self_attn = SelfAttention(
            embed_dim,
            num_heads,
            kv_heads,
            segments=segments,
            dilations=dilations,
            is_causal=is_causal,
            dropout=attention_dropout,
            layer_norm_eps=layer_norm_eps,
            attention_options=attention_options,
        )
        self.final_layer_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.ffn = FeedForward(embed_dim, ffn_dim, layer_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    @telling_ranks
    def forward(
        self,
        x: Tensor,
        *,
        tables: XposTables | None = None,
        key_mask: Tensor | None = None,
        seqused: Lengths | None = None,
        cu_seqlens: Lengths | None = None,
        sequence_groups: SequenceGroups | None = None,
        shards: Sequence[int] | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: (batch, seqlen, embed_dim), packed (total, embed_dim) with cu_seqlens.
            tables: of `dilated.models.xpos_tables`, to turn queries and keys; None: no xPos.
            key_mask: bool (batch, seqlen), packed (total,), True = the position may be attended to.
            seqused: the length of every sequence.
            cu_seqlens: starts of packed sequences and their end, 0, ..., total.
            sequence_groups: the ranks that hold the sequence, of which x has this rank's
                rows.
            shards: rows of every rank.

        Returns:
            Shape and dtype of x. Rows at or beyond seqused mean nothing.

        Raises:
            InvalidProblem: a shape or a dtype does not fit another one.
            Unsupported: drop_path in training over ranks, which would have to leave out the same
                sequences.
        """
        require_parameter_dtype("x", x, self.final_layer_norm.weight, type(self).__name__)
        if sequence_groups is not None and self.training and self.drop_path.p > 0.0:
            op = type(self).__name__
            raise Unsupported(message("drop_path", "0 over ranks", str(self.drop_path.p), op=op))
        given = {"key_mask": key_mask, "seqused": seqused, "cu_seqlens": cu_seqlens,
                 "sequence_groups": sequence_groups, "shards": shards}  # fmt: skip
        sequences = {name: value for name, value in given.items() if value is not None}
        attended = self.self_attn(self.self_attn_layer_norm(x), tables, sequences)
        x = x + self.drop_path(self.dropout(attended), cu_seqlens)
        widened = self.ffn(self.final_layer_norm(x))
        return cast(Tensor, x + self.drop_path(self.dropout(widened), cu_seqlens))


class DecoderLayer(EncoderLayer):
    """The causal `EncoderLayer`: a layer of a decoder that reads nothing but its own sequence.

    Args:
        embed_dim, num_heads, **options: of `EncoderLayer`, without is_causal.

    Raises:
        InvalidProblem, Unsupported: as `EncoderLayer`.

    Example:
        >>> import torch
        >>> from dilated.models import DecoderLayer, xpos_tables
        >>> layer = DecoderLayer(32, 4, segments=[8, 16], dilations=[1, 2])
        >>> layer(torch.randn(2, 20, 32), tables=xpos_tables(20, 8)).shape
        torch.Size([2, 20, 32])
    """

    def __init__(self, embed_dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, is_causal=True, **options)
