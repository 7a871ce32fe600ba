"""LongNet (arXiv 2307.02486): a stack of layers over one sequence, and the language model on it.

    LongNet      x -> layer_norm(layers(dropout(x)))
    LongNetLM    tokens -> output_projection(LongNet(embed_tokens(tokens)))

Parameter names are torchscale's, so that its weights load with `load_state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated._inputs import require_parameter_dtype
from dilated._ranks import telling_ranks
from dilated.errors import InvalidProblem, Unsupported, message
from dilated.models.layers import EncoderLayer, check_layer
from dilated.models.sequences import Rows, rows_of
from dilated.models.xpos import XposTables, xpos_tables

if TYPE_CHECKING:
    from dilated._options import Lengths
    from dilated.distributed import SequenceGroups


class LongNet(nn.Module):
    """Embeddings in, embeddings out: an encoder, or with `is_causal` a decoder, over one sequence.

    There is no second stack that attends to the first one: over one sequence it would read, from
    the same tokens, what more layers of one stack read. Positions are the caller's, added to x, or
    xPos.

    Args:
        embed_dim: width of the residual stream, a multiple of num_heads.
        num_layers: number of layers.
        num_heads: query heads H.
        segments: segment length of every branch.
        dilations: dilation of every branch.
        is_causal: a position sees only itself and earlier ones.
        xpos_scale_base: turn queries and keys by xPos, which fades over this distance; torchscale's
            is 512. Made for causal stacks: where later keys are seen, they grow with distance.
            None: no xPos.
        num_kv_heads: key/value heads, a divisor of num_heads (grouped-query attention); default H.
        ffn_dim: inner width of the feed-forward; default 4 * embed_dim.
        dropout: on x and on both residual branches.
        attention_dropout: on attention probabilities.
        drop_path: probability of leaving a residual branch of the last layer out, per sequence;
            earlier layers have their share of it, the first one 0.
        layer_norm_eps: of all norms.
        activation_checkpointing: recompute each layer in backward (`torch.utils.checkpoint`).
        **attention_options: offsets, groups, merge, out_scale, lse_grad, tail, gqa_offset, scale,
            preset, backend, row_shift of `dilated.dilated_attention`.

    Raises:
        InvalidProblem: a size does not fit another one, or an option is unknown or breaks a rule.
        Unsupported: a causal stack with a preset that sees the future, or a back end that cannot
            run this.

    Example:
        >>> import torch
        >>> from dilated.models import LongNet
        >>> encoder = LongNet(32, 2, 4, segments=[8, 16], dilations=[1, 2])
        >>> encoder(torch.randn(2, 20, 32)).shape
        torch.Size([2, 20, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        *,
        segments: Sequence[int],
        dilations: Sequence[int],
        is_causal: bool = False,
        xpos_scale_base: float | None = None,
        num_kv_heads: int | None = None,
        ffn_dim: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-5,
        activation_checkpointing: bool = False,
        **attention_options: Any,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        ffn_dim = 4 * embed_dim if ffn_dim is None else ffn_dim
        if xpos_scale_base is not None and num_heads > 0 and embed_dim % (2 * num_heads):
            expected = f"a multiple of 2 * num_heads = {2 * num_heads}"
            hint = "xPos rotates pairs of head_dim = embed_dim / num_heads"
            raise InvalidProblem(message("embed_dim", expected, str(embed_dim), hint, op=op))
        check_layer(
            op,
            {"embed_dim": embed_dim, "num_layers": num_layers, "num_heads": num_heads,
             "num_kv_heads": kv_heads, "ffn_dim": ffn_dim},
            {"dropout": dropout, "attention_dropout": attention_dropout, "drop_path": drop_path},
            attention_options,
            is_causal,
        )  # fmt: skip
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.xpos_scale_base = xpos_scale_base
        self.activation_checkpointing = activation_checkpointing
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            EncoderLayer(
                embed_dim,
                num_heads,
                segments=segments,
                dilations=dilations,
                num_kv_heads=kv_heads,
                ffn_dim=ffn_dim,
                is_causal=is_causal,
                dropout=dropout,
                attention_dropout=attention_dropout,
                drop_path=drop_path * layer / max(1, num_layers - 1),
                layer_norm_eps=layer_norm_eps,
                **attention_options,
            )
            for layer in range(num_layers)
        )
        self.layer_norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        LongNet.reset_parameters(self)

    def reset_parameters(self) -> None:
        """MAGNETO's start: Xavier, with gain sqrt(log(2 * layers)) for v, out, fc1 and fc2."""
        # Meta tensors hold no numbers, and torch's normal_ of one would import its whole compiler.
        if self.layer_norm.weight.is_meta:
            return
        gamma = math.sqrt(math.log(2 * len(self.layers)))
        for name, module in [*self.layers.named_modules(), ("layer_norm", self.layer_norm)]:
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                subln = name.endswith(("v_proj", "out_proj", "fc1", "fc2"))
                nn.init.xavier_normal_(module.weight, gain=gamma if subln else 1.0)
                nn.init.zeros_(module.bias)

    @telling_ranks
    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        seqused: Lengths | None = None,
        cu_seqlens: Lengths | None = None,
        sequence_groups: SequenceGroups | None = None,
        shards: Sequence[int] | None = None,
        watch: Callable[[Tensor], Any] | None = None,
    ) -> Tensor:
        """All layers and the norm behind them.

        Args:
            x: (batch, seqlen, embed_dim), packed (total, embed_dim).
            key_mask: bool (batch, seqlen), packed (total,), True = the position may be attended to.
            seqused: the length of every sequence; rows at or beyond it are padding, whatever they
                hold, and their results mean nothing.
            cu_seqlens: starts of packed sequences and their end, 0, ..., total; positions restart.
            sequence_groups: the ranks that hold the sequence, of which x has this rank's rows: its
                positions are those of the whole. Without cu_seqlens and key_mask.
            shards: rows of every rank; goes with sequence_groups.
            watch: called with every hidden state: what enters the first layer, and what leaves each
                layer, before the last norm. None of them is kept.

        Returns:
            Shape of x.

        Raises:
            InvalidProblem: a shape does not fit another one.

        Example:
            >>> import torch
            >>> from dilated.models import LongNet
            >>> encoder = LongNet(32, 2, 4, segments=[8, 16], dilations=[1, 2])
            >>> shapes = []
            >>> x = encoder(torch.randn(30, 32), cu_seqlens=[0, 10, 30], watch=shapes.append)
            >>> len(shapes)
            3
        """
        op = type(self).__name__
        dims = 3 if cu_seqlens is None else 2
        if x.dim() != dims or x.shape[-1] != self.embed_dim:
            form = "batch, seqlen" if cu_seqlens is None else "total"
            expected = f"({form}, {self.embed_dim})" + ("" if dims == 3 else " with cu_seqlens")
            raise InvalidProblem(message("x", expected, f"shape {tuple(x.shape)}", op=op))
        require_parameter_dtype("x", x, self.layer_norm.weight, op)
        sequences: dict[str, Any] = {
            "key_mask": key_mask,
            "seqused": seqused,
            "cu_seqlens": cu_seqlens,
        }
        if sequence_groups is not None:
            sequences |= {"sequence_groups": sequence_groups, "shards": shards}
        rows = _rows(op, x.shape[:-1], x.device, sequences)
        if seqused is not None and rows.length is not None:
            x = x.masked_fill((rows.position >= rows.length)[..., None], 0.0)
        x = self.dropout(x)
        tables: XposTables | None = None
        if self.xpos_scale_base is not None:
            tables = xpos_tables(
                rows.longest,
                self.embed_dim // self.num_heads,
                position=rows.position,
                length=rows.length,
                scale_base=self.xpos_scale_base,
                dtype=_projection_dtype(x),
            )
        for layer in self.layers:
            if watch is not None:
                watch(x)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = cast(
                    Tensor, checkpoint(layer, x, use_reentrant=False, tables=tables, **sequences)
                )
            else:
                x = layer(x, tables=tables, **sequences)
        if watch is not None:
            watch(x)
        return cast(Tensor, self.layer_norm(x))


class LongNetLM(LongNet):
    """The paper's causal language model: tokens in, logits of the next token out.

    Args:
        vocab_size: number of tokens; 256 for bytes.
        embed_dim: width of the residual stream, a multiple of 2 * num_heads.
        num_layers: decoder layers.
        num_heads: query heads H.
        segments: segment length w_b of every branch.
        dilations: dilation r_b of every branch.
        xpos_scale_base: distance over which xPos fades; torchscale's 512.
        scale_embedding: multiply embeddings by sqrt(embed_dim); torchscale's default is not to.
        **options: num_kv_heads, ffn_dim, dropout, attention_dropout, drop_path, layer_norm_eps,
            activation_checkpointing of `LongNet`, and options of the operator as there.

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
        xpos_scale_base: float = 512.0,
        scale_embedding: bool = False,
        **options: Any,
    ) -> None:
        if vocab_size < 1:
            raise InvalidProblem(message("vocab_size", ">= 1", str(vocab_size), op="LongNetLM"))
        super().__init__(
            embed_dim,
            num_layers,
            num_heads,
            segments=segments,
            dilations=dilations,
            is_causal=True,
            xpos_scale_base=xpos_scale_base,
            **options,
        )
        self.embed_scale = math.sqrt(embed_dim) if scale_embedding else 1.0
        self.embed_tokens = nn.Embedding(vocab_size, embed_dim)
        self.output_projection = nn.Linear(embed_dim, vocab_size, bias=False)
        self._reset_tokens()

    def reset_parameters(self) -> None:
        """`LongNet`'s start, and embeddings and projection of variance 1 / embed_dim."""
        super().reset_parameters()
        self._reset_tokens()

    def _reset_tokens(self) -> None:
        for weight in (self.embed_tokens.weight, self.output_projection.weight):
            nn.init.normal_(weight, std=self.embed_dim**-0.5)

    @telling_ranks
    def features(
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        seqused: Lengths | None = None,
        cu_seqlens: Lengths | None = None,
        sequence_groups: SequenceGroups | None = None,
        shards: Sequence[int] | None = None,
    ) -> Tensor:
        """What the output projection reads, (*tokens.shape, embed_dim); arguments of `forward`."""
        shape = "(batch, seqlen)" if cu_seqlens is None else "(total,) with cu_seqlens"
        if tokens.dim() != (2 if cu_seqlens is None else 1) or tokens.is_floating_point():
            got = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
            raise InvalidProblem(message("tokens", f"integers {shape}", got, op="LongNetLM"))
        if seqused is not None:  # padding may be any number
            given: dict[str, Any] = {"seqused": seqused, "cu_seqlens": cu_seqlens}
            if sequence_groups is not None:
                given |= {"sequence_groups": sequence_groups, "shards": shards}
            rows = _rows("LongNetLM", tokens.shape, tokens.device, given)
            assert rows.length is not None
            tokens = tokens.masked_fill(rows.position >= rows.length, 0)
        return super().forward(
            self.embed_scale * self.embed_tokens(tokens),
            key_mask=key_mask,
            seqused=seqused,
            cu_seqlens=cu_seqlens,
            sequence_groups=sequence_groups,
            shards=shards,
        )

    def forward(  # type: ignore[override]  # tokens, not embeddings
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        seqused: Lengths | None = None,
        cu_seqlens: Lengths | None = None,
        sequence_groups: SequenceGroups | None = None,
        shards: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of the token after each position.

        Args:
            tokens: integers (batch, seqlen), packed (total,).
            key_mask: bool like tokens, True = the token may be attended to.
            seqused: the length of every sequence; tokens at or beyond it are padding, whatever they
                are, and their logits mean nothing.
            cu_seqlens: starts of packed sequences and their end, 0, ..., total; positions restart.
            sequence_groups: as `LongNet`; tokens are this rank's.
            shards: rows of every rank.

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
        features = self.features(
            tokens,
            key_mask=key_mask,
            seqused=seqused,
            cu_seqlens=cu_seqlens,
            sequence_groups=sequence_groups,
            shards=shards,
        )
        return cast(Tensor, self.output_projection(features))


def _rows(op: str, shape: torch.Size, device: torch.device, sequences: Mapping[str, Any]) -> Rows:
    """The rows of a call, of one process or of this rank."""
    groups: SequenceGroups | None = sequences.get("sequence_groups")
    rows = rows_of(op, shape, device, sequences["seqused"], sequences["cu_seqlens"])
    if groups is None:
        return rows
    if sequences["cu_seqlens"] is not None:
        raise Unsupported(message("cu_seqlens", "none over ranks", "a pack", op=op))
    shards = sequences["shards"]
    if shards is None:
        hint = "positions are those of the whole sequence"
        raise InvalidProblem(message("shards", "the rows of every rank", "none", hint, op=op))
    return rows._replace(longest=sum(shards), position=groups.positions(shards).to(device))


def _projection_dtype(x: Tensor) -> torch.dtype:
    """What the projections of x will have: autocast's dtype, or its own."""
    device = x.device.type
    on = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype
