"""Modules by the name of their kind. All kinds compute the same; "auto" means "improved"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from torch import nn

from dilated.errors import InvalidProblem, message

from ..block_sparse_ring_dilated_attention import BlockSparseRingDilatedAttention
from ..block_sparse_ring_multihead_dilated_attention import BlockSparseRingMultiheadDilatedAttention
from ..dilated_attention import DilatedAttention
from ..improved_dilated_attention import ImprovedDilatedAttention
from ..improved_distributed_dilated_attention import (
    DistributedImprovedDilatedAttention,
    DistributedImprovedMultiheadDilatedAttention,
)
from ..improved_multihead_dilated_attention import ImprovedMultiheadDilatedAttention
from ..left_out import BLOCK_SPARSE, left_out
from ..multihead_dilated_attention import MultiheadDilatedAttention
from ..ring_dilated_attention import RingDilatedAttention
from ..ring_distributed_dilated_attention import RingDistributedDilatedAttention
from ..ring_multihead_dilated_attention import RingMultiheadDilatedAttention
from .config import DilatedAttentionConfig, MultiheadConfig, RingAttentionConfig

SEGMENT_LENGTHS = (2048, 4096, 8192)
DILATION_RATES = (1, 2, 4)

_ATTENTION_REGISTRY: dict[str, type[Any]] = {
    "standard": DilatedAttention,
    "improved": ImprovedDilatedAttention,
    "ring": RingDilatedAttention,
    "distributed": DistributedImprovedDilatedAttention,
    "improved_distributed": DistributedImprovedDilatedAttention,
    "block_sparse_ring": BlockSparseRingDilatedAttention,
}
_MULTIHEAD_REGISTRY: dict[str, type[Any]] = {
    "multihead_standard": MultiheadDilatedAttention,
    "multihead_improved": ImprovedMultiheadDilatedAttention,
    "multihead_ring": RingMultiheadDilatedAttention,
    "multihead_distributed": DistributedImprovedMultiheadDilatedAttention,
    "multihead_improved_distributed": DistributedImprovedMultiheadDilatedAttention,
    "multihead_ring_distributed": RingDistributedDilatedAttention,
    "multihead_block_sparse_ring": BlockSparseRingMultiheadDilatedAttention,
}


def register_attention(name: str, cls: type[nn.Module]) -> None:
    """Let :func:`create_dilated_attention` make `cls(config)` of this name.

    Args:
        name: of the kind.
        cls: takes a :class:`DilatedAttentionConfig`, or has a class method from_config that does.
    """
    _ATTENTION_REGISTRY[name] = cls


def register_multihead_attention(name: str, cls: type[nn.Module]) -> None:
    """Let :func:`create_multihead_dilated_attention` make `cls(multihead_config, config)`.

    Args:
        name: "multihead_" and the name of the kind.
        cls: takes both configurations, or has a class method from_config that does.
    """
    _MULTIHEAD_REGISTRY[name] = cls


def _ensure_implementations_registered() -> None:
    """Do nothing: the tables are complete on import. Programs call it."""


def _class_of(registry: dict[str, type[Any]], attention_type: str, prefix: str = "") -> type[Any]:
    cls = registry.get(prefix + attention_type)
    if cls is None:
        kinds = ", ".join(["auto", *(name.removeprefix(prefix) for name in registry)])
        got = repr(attention_type)
        raise InvalidProblem(message("attention_type", kinds, got, "Unknown attention type",
                                     "dilated_attention_pytorch"))  # fmt: skip
    return cls


def _make(cls: type[Any], *configs: Any) -> Any:
    return getattr(cls, "from_config", cls)(*configs)


def _config_class(attention_type: str) -> type[DilatedAttentionConfig]:
    return RingAttentionConfig if attention_type == "ring" else DilatedAttentionConfig


def _names(config_class: type[Any]) -> set[str]:
    return {field.name for field in fields(config_class)}


def _known(names: set[str], config: Any) -> dict[str, Any]:
    """Those options of a given configuration that the wanted class has, too."""
    return {name: value for name, value in vars(config).items() if name in names} if config else {}


def _require_known(options: dict[str, Any], names: set[str], op: str) -> None:
    for name in options:
        if name not in names:
            expected = f"one of {', '.join(sorted(names))}"
            raise InvalidProblem(message(name, expected, "an unknown option", op=op))


def create_dilated_attention(
    attention_type: str = "auto",
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    **kw: Any,
) -> Any:
    """An attention module.

    Args:
        attention_type: "auto" (which is "improved"), "standard", "improved", "ring", or registered.
        segment_lengths: None means [2048, 4096, 8192].
        dilation_rates: None means [1, 2, 4].
        **kw: options of :class:`DilatedAttentionConfig`, for "ring" of
            :class:`RingAttentionConfig`.

    Returns:
        The module, with segment_lengths and dilation_rates.

    Raises:
        InvalidProblem: an unknown type or option, or a value that breaks a rule.
        Unsupported: a type that is a placeholder.

    Example:
        >>> from dilated_attention_pytorch import create_dilated_attention
        >>> create_dilated_attention("ring", [16, 64], [1, 4], dropout=0.1).dropout
        0.1
    """
    attention_type = "improved" if attention_type == "auto" else attention_type
    cls = _class_of(_ATTENTION_REGISTRY, attention_type)
    config_class = _config_class(attention_type)
    _require_known(kw, _names(config_class), "create_dilated_attention")
    segments = SEGMENT_LENGTHS if segment_lengths is None else segment_lengths
    dilations = DILATION_RATES if dilation_rates is None else dilation_rates
    return _make(cls, config_class(list(segments), list(dilations), **kw))


def create_multihead_dilated_attention(
    attention_type: str = "auto",
    embed_dim: int = 768,
    num_heads: int = 12,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    *,
    multihead_config: MultiheadConfig | None = None,
    attention_config: DilatedAttentionConfig | None = None,
    **kw: Any,
) -> Any:
    """A multi-head module. "standard" returns a tensor from a call, the others (output, None).

    Args:
        attention_type: "auto" (which is "improved"), "standard", "improved", "ring", or registered
            with the prefix "multihead_".
        embed_dim: width of the model.
        num_heads: number of heads; divides embed_dim.
        segment_lengths: None means attention_config's, else [2048, 4096, 8192].
        dilation_rates: None means attention_config's, else [1, 2, 4].
        multihead_config: its options stand where no argument says otherwise; an embed_dim of 768
            and num_heads of 12, the defaults, do not.
        attention_config: the same for the options of attention.
        **kw: further options of both configurations.

    Returns:
        The module, with multihead_config and attention_config.

    Raises:
        InvalidProblem: an unknown type or option, or a value that breaks a rule.
        Unsupported: a type that is a placeholder.

    Example:
        >>> from dilated_attention_pytorch import create_multihead_dilated_attention
        >>> layer = create_multihead_dilated_attention("ring", 64, 4, [16, 64], [1, 4], bias=False)
        >>> layer.head_dim, layer.attention.num_groups
        (16, 2)
    """
    attention_type = "improved" if attention_type == "auto" else attention_type
    cls = _class_of(_MULTIHEAD_REGISTRY, attention_type, "multihead_")
    config_class = _config_class(attention_type)
    multihead_names, attention_names = _names(MultiheadConfig), _names(config_class)
    _require_known(kw, multihead_names | attention_names, "create_multihead_dilated_attention")

    multihead = _known(multihead_names, multihead_config) or {"embed_dim": 768, "num_heads": 12}
    for name, size, default in (("embed_dim", embed_dim, 768), ("num_heads", num_heads, 12)):
        if size != default:
            multihead[name] = size
    attention: dict[str, Any] = {
        "segment_lengths": SEGMENT_LENGTHS,
        "dilation_rates": DILATION_RATES,
    }
    attention |= _known(attention_names, attention_config)
    for name, lengths in (("segment_lengths", segment_lengths), ("dilation_rates", dilation_rates)):
        if lengths is not None:
            attention[name] = tuple(lengths)
    multihead |= {name: value for name, value in kw.items() if name in multihead_names}
    attention |= {name: value for name, value in kw.items() if name in attention_names}
    return _make(cls, MultiheadConfig(**multihead), config_class(**attention))


def create_block_sparse_attention(*_: Any, **__: Any) -> NoReturn:
    """Left out: raises Unsupported."""
    left_out("create_block_sparse_attention", BLOCK_SPARSE)


def create_adaptive_sparse_attention(*_: Any, **__: Any) -> NoReturn:
    """Left out: raises Unsupported."""
    left_out("create_adaptive_sparse_attention", BLOCK_SPARSE)
