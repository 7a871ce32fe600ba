"""The operator as a module.

It holds plain values only: copies, pickles, state dicts, DDP and FSDP need no care.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

from torch import Tensor, nn

from . import _ops
from ._options import OPTION_DEFAULTS, attention_options, flag, integers
from ._ranks import telling_ranks
from .errors import InvalidProblem, message
from .functional import dilated_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from ._options import AttentionOptions, Integers, Lengths
    from .distributed import SequenceGroups


def _plain(name: str, value: Any) -> Any:
    """Tables of offsets as tuples of ints, everything else as it is."""
    if name != "offsets" or value is None or isinstance(value, str):
        return value
    rows = value.tolist() if isinstance(value, Tensor) else value
    return tuple(tuple(integers("offsets", row)) for row in rows)


class DilatedAttention(nn.Module):
    """:func:`dilated.dilated_attention` with fixed options; dropout acts in training only.

    Args:
        segments: Segment length of every branch.
        dilations: Dilation of every branch.
        row_shift: As in :func:`dilated.dilated_attention`.
        **options: Options of :func:`dilated.dilated_attention`: is_causal, scale, offsets, groups,
            merge, out_scale, lse_grad, tail, dropout_p, gqa_offset, preset, layout, backend,
            head_offset, total_heads, total_kv_heads.

    Raises:
        InvalidProblem, Unsupported: the options are wrong whatever the shapes.

    Example:
        >>> import torch, dilated
        >>> attention = dilated.DilatedAttention([16, 64], [1, 4], is_causal=True)
        >>> q, k, v = torch.randn(3, 2, 100, 8, 16).unbind(0)
        >>> attention(q, k, v).shape
        torch.Size([2, 100, 8, 16])
    """

    def __init__(
        self,
        segments: Integers,
        dilations: Integers,
        *,
        row_shift: bool = False,
        **options: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        checked = attention_options(segments=segments, dilations=dilations, **options)
        _ops.ask(_ops.ops.check_options, *checked)
        self.segments = tuple(integers("segments", segments))
        self.dilations = tuple(integers("dilations", dilations))
        self.row_shift = flag("row_shift", row_shift)
        preset = options.get("preset")
        if self.row_shift and preset != "torchscale":
            expected = "False, or preset 'torchscale'"
            raise InvalidProblem(message("row_shift", expected, f"preset {preset!r}"))
        self.options: AttentionOptions = {  # type: ignore[assignment]
            name: _plain(name, value) for name, value in options.items()
        }

    @property
    def is_causal(self) -> bool:
        """Whether every call is causal."""
        return bool(self.options.get("is_causal", False))

    @overload
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = ...,
        is_causal: bool = ..., key_mask: Tensor | None = ..., seqused: Lengths | None = ...,
        cu_seqlens: Lengths | None = ..., dropout_seed: SupportsIndex | Tensor | None = ...,
        sequence_groups: SequenceGroups | None = ..., shards: Sequence[SupportsIndex] | None = ...,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, return_lse: bool,
        is_causal: bool = ..., key_mask: Tensor | None = ..., seqused: Lengths | None = ...,
        cu_seqlens: Lengths | None = ..., dropout_seed: SupportsIndex | Tensor | None = ...,
        sequence_groups: SequenceGroups | None = ..., shards: Sequence[SupportsIndex] | None = ...,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip

    @telling_ranks
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        return_lse: bool = False,
        is_causal: bool = False,
        key_mask: Tensor | None = None,
        seqused: Lengths | None = None,
        cu_seqlens: Lengths | None = None,
        dropout_seed: SupportsIndex | Tensor | None = None,
        sequence_groups: SequenceGroups | None = None,
        shards: Sequence[SupportsIndex] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Output like query, or (output, lse). Arguments as in :func:`dilated.dilated_attention`.

        ``is_causal=True`` here or in the constructor makes the call causal. With
        ``sequence_groups`` the rows are this rank's, and so is the output: arguments and errors are
        those of :func:`dilated.distributed.dilated_attention`. ``shards`` needs them.
        """
        options = self.options.copy()
        if flag("is_causal", is_causal):
            options["is_causal"] = True
        if not self.training:
            options["dropout_p"] = 0.0
        if sequence_groups is not None:
            from .distributed import dilated_attention as sharded_attention

            return sharded_attention(
                query,
                key,
                value,
                sequence_groups=sequence_groups,
                segments=self.segments,
                dilations=self.dilations,
                shards=shards,
                key_mask=key_mask,
                seqused=seqused,
                cu_seqlens=cu_seqlens,
                dropout_seed=dropout_seed,
                row_shift=self.row_shift,
                return_lse=return_lse,
                **options,
            )
        if shards is not None:
            expected = "none without sequence_groups"
            raise InvalidProblem(message("shards", expected, f"{list(shards)}"))
        return dilated_attention(
            query,
            key,
            value,
            segments=self.segments,
            dilations=self.dilations,
            key_mask=key_mask,
            seqused=seqused,
            cu_seqlens=cu_seqlens,
            dropout_seed=dropout_seed,
            row_shift=self.row_shift,
            return_lse=return_lse,
            **options,
        )

    def extra_repr(self) -> str:
        """Segments, dilations and the options that differ from their defaults."""
        given: dict[str, Any] = {"segments": self.segments, "dilations": self.dilations}
        for name, value in self.options.items():
            default = OPTION_DEFAULTS[name]
            if type(value) is not type(default) or value != default:
                given[name] = value
        if self.row_shift:
            given["row_shift"] = True
        return ", ".join(f"{name}={value!r}" for name, value in given.items())
