"""What all modules share. Every attention class computes preset "fork" of `dilated`.

Heads are dealt out to the (segment, dilation) pairs in order; a head attends, with its own pair
only, to the positions of its segment that are congruent to the pair's number modulo the dilation;
its output is divided by the number of pairs. Positions that its pair skips get 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional

import dilated
from dilated._inputs import require_parameter_dtype
from dilated._ranks import telling_ranks
from dilated._torch_masks import key_mask_of
from dilated.errors import InvalidProblem, Unsupported, message

from ..options_without_effect import warn_if_given
from ..utils.validation import ValidationMixin, invalid
from .config import DilatedAttentionConfig, MultiheadConfig

if TYPE_CHECKING:
    from dilated.distributed import SequenceGroups


class BaseDilatedAttention(nn.Module, ValidationMixin):
    """Attention without projections, from a configuration.

    Args:
        config: segments, dilations, dropout, strict_lengths.
        softmax_scale: factor of the scores; None means head_dim ** -0.5.

    Raises:
        InvalidProblem: an option breaks a rule of the operator.
    """

    def __init__(self, config: DilatedAttentionConfig, softmax_scale: float | None = None) -> None:
        super().__init__()
        self.config = config
        self.operator = dilated.DilatedAttention(
            config.segment_lengths,
            config.dilation_rates,
            preset="fork",
            scale=softmax_scale,
            dropout_p=config.dropout,
        )

    @property
    def segment_lengths(self) -> list[int]:
        """Segment length of every group."""
        return list(self.operator.segments)

    @property
    def dilation_rates(self) -> list[int]:
        """Dilation of every group."""
        return list(self.operator.dilations)

    @property
    def dropout(self) -> float:
        """Probability of dropping an attention weight, in training."""
        return float(self.operator.options["dropout_p"])

    @property
    def softmax_scale(self) -> float | None:
        """Factor of the scores; None means head_dim ** -0.5."""
        scale = self.operator.options["scale"]
        return None if scale is None else float(scale)

    @property
    def num_groups(self) -> int:
        """Number of groups of heads."""
        return len(self.operator.segments)

    @telling_ranks
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        attention_mask: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        sequence_groups: SequenceGroups | None = None,
        shards: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (batch, n, heads, head_dim); float32, float64, bfloat16 or float16.
            key: like query.
            value: like query.
            is_causal: a query sees no later key.
            attention_mask: must be None.
            key_mask: bool (batch, n), True = the key takes part; none with sequence_groups.
            sequence_groups: the ranks that hold the sequence, of which rows are this rank's.
            shards: rows of every rank; goes with sequence_groups.

        Returns:
            Like query.

        Raises:
            InvalidProblem: a shape breaks a rule; with strict_lengths, the longest segment does
                not divide n.
            Unsupported: an attention_mask, or no back end can run this.
        """
        if attention_mask is not None:
            hint = "use is_causal, or key_mask of shape (batch, n)"
            got = f"shape {tuple(attention_mask.shape)}"
            raise Unsupported(message("attention_mask", "None", got, hint, type(self).__name__))
        names = ("query", "key", "value")
        for name, tensor in zip(names, (query, key, value)):
            self.validate_tensor_shape(tensor, 4, name)
        self.validate_tensor_shapes_match((query, key, value), names, range(4))
        self.validate_num_heads(query.shape[2], self.num_groups)
        if self.config.strict_lengths:
            if sequence_groups is not None and shards is None:
                hint = "or strict_lengths=False"
                text = message("shards", "rows of every rank", "none", hint, type(self).__name__)
                raise InvalidProblem(text)
            rows = query.shape[1] if shards is None else sum(shards)
            self.validate_sequence_length(rows, self.operator.segments)
        return cast(
            Tensor,
            self.operator(
                query,
                key,
                value,
                is_causal=is_causal,
                key_mask=key_mask,
                sequence_groups=sequence_groups,
                shards=shards,
            ),
        )


class BaseMultiheadDilatedAttention(nn.Module, ValidationMixin):
    """Projections and norms around an attention module, from two configurations.

    Subclasses make the attention and the projections of query, key and value. Parameter names are
    the package's: checkpoints load.

    Args:
        multihead_config: sizes, bias, norms, device and dtype of the parameters.
        attention_config: segments, dilations, dropout.

    Raises:
        InvalidProblem: there are fewer heads than groups.
    """

    batch_first = True  # what nn.TransformerEncoder asks its layers' self_attn

    def __init__(
        self, multihead_config: MultiheadConfig, attention_config: DilatedAttentionConfig
    ) -> None:
        super().__init__()
        self.validate_num_heads(multihead_config.num_heads, attention_config.num_groups)
        self.multihead_config = multihead_config
        self.attention_config = attention_config
        self.attention = self._create_attention_module()
        place = {"device": multihead_config.device, "dtype": multihead_config.dtype}
        self._init_qkv_projections(place)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim, self.bias, **place)
        self.q_ln = self._norm(place)
        self.k_ln = self._norm(place)
        self.reset_parameters()

    @property
    def embed_dim(self) -> int:
        """Width of the model."""
        return self.multihead_config.embed_dim

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return self.multihead_config.num_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.multihead_config.head_dim

    @property
    def bias(self) -> bool:
        """Whether projections have a bias."""
        return self.multihead_config.bias

    @property
    def gamma_init(self) -> float:
        """Gain of value and output projections at initialisation."""
        return self.multihead_config.gamma_init

    def _norm(self, place: dict[str, Any]) -> nn.LayerNorm | None:
        if not self.multihead_config.layer_norm:
            return None
        return nn.LayerNorm(self.embed_dim, self.multihead_config.layer_norm_eps, **place)

    def _create_attention_module(self) -> BaseDilatedAttention:
        raise NotImplementedError

    def _init_qkv_projections(self, factory_kwargs: dict[str, Any]) -> None:
        raise NotImplementedError

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """MAGNETO (arXiv 2210.06423): Xavier-normal, values and output with gain gamma_init."""
        initialise(self.out_proj, self.gamma_init)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, None]:
        """Project, attend, normalise, project.

        Args:
            query: (batch, n, embed_dim).
            key: like query; None means query.
            value: like query; None means query.
            key_padding_mask: bool (batch, n), True = the key is ignored; or float, -inf = the key
                is ignored, else 0, as torch's encoder hands it on.
            need_weights: asks for a tuple; weights are never formed, None stands in their place.
            attn_mask: must be None.
            is_causal: a position sees no later one.
            average_attn_weights: no effect; warns if not True.

        Returns:
            (output, None), output like query.

        Raises:
            InvalidProblem: a shape breaks a rule, or the dtype is not the parameters'.
            Unsupported: an attn_mask, or a padding mask with other numbers.
        """
        if attn_mask is not None:
            hint = "use is_causal=True, which needs no mask, or key_padding_mask"
            got = f"shape {tuple(attn_mask.shape)}"
            raise Unsupported(message("attn_mask", "None", got, hint, type(self).__name__))
        warn_if_given(average_attn_weights=average_attn_weights)
        key = query if key is None else key
        value = query if value is None else value
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise invalid(name, "a tensor", type(tensor).__name__)
            shape = tuple(tensor.shape)
            if tensor.dim() != 3:
                raise invalid(name, "(batch, n, embed_dim)", f"shape {shape}",
                              "Expected 3D tensors")  # fmt: skip
            if shape[2] != self.embed_dim:
                raise invalid(name, f"embedding dimension {self.embed_dim}", shape[2])
            require_parameter_dtype(name, tensor, self.out_proj.weight, type(self).__name__)
        heads = [
            projected.unflatten(-1, (self.num_heads, self.head_dim))
            for projected in self._project(query, key, value)
        ]
        key_mask = None
        if key_padding_mask is not None:
            key_mask = key_mask_of(key_padding_mask, type(self).__name__)
        out = self.attention(*heads, is_causal=is_causal, key_mask=key_mask).flatten(-2)
        if self.q_ln is not None:
            out = self.q_ln(out)
        return self.out_proj(out), None

    def extra_repr(self) -> str:
        """Sizes and switches."""
        config = self.multihead_config
        return (
            f"embed_dim={config.embed_dim}, num_heads={config.num_heads}, bias={config.bias}, "
            f"layer_norm={config.layer_norm}"
        )


class FusedMultiheadDilatedAttention(BaseMultiheadDilatedAttention):
    """One projection for query, key and value. Queries and keys are not normalised.

    k_ln is read by nothing, here as in the package: it keeps its names in state dicts and is
    frozen, so that nobody (DDP) waits for its gradient.
    """

    def __init__(
        self, multihead_config: MultiheadConfig, attention_config: DilatedAttentionConfig
    ) -> None:
        super().__init__(multihead_config, attention_config)
        if self.k_ln is not None:
            self.k_ln.requires_grad_(False)

    def _init_qkv_projections(self, factory_kwargs: dict[str, Any]) -> None:
        self.qkv_proj = nn.Linear(self.embed_dim, 3 * self.embed_dim, self.bias, **factory_kwargs)

    def reset_parameters(self) -> None:
        """MAGNETO (arXiv 2210.06423): Xavier-normal, values and output with gain gamma_init."""
        super().reset_parameters()
        for weight, gain in zip(
            self.qkv_proj.weight.detach().chunk(3), (1.0, 1.0, self.gamma_init)
        ):
            nn.init.xavier_normal_(weight, gain)
        if self.qkv_proj.bias is not None:
            nn.init.zeros_(self.qkv_proj.bias)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if query is key and key is value:
            q, k, v = self.qkv_proj(query).chunk(3, dim=-1)
            return q, k, v
        weights = self.qkv_proj.weight.chunk(3)
        biases = (None,) * 3 if self.qkv_proj.bias is None else self.qkv_proj.bias.chunk(3)
        q, k, v = map(functional.linear, (query, key, value), weights, biases)
        return q, k, v


def initialise(projection: nn.Linear, gain: float = 1.0) -> None:
    """Xavier-normal weights and zero bias."""
    nn.init.xavier_normal_(projection.weight, gain)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
