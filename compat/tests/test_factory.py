"""The factory: kinds, defaults, configurations against arguments, registered classes, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from restated import DILATIONS, SEGMENTS, output
from torch import nn

import dilated
from dilated_attention_pytorch import (
    DilatedAttention,
    ImprovedDilatedAttention,
    ImprovedMultiheadDilatedAttention,
    MultiheadDilatedAttention,
    RingDilatedAttention,
    RingMultiheadDilatedAttention,
    create_dilated_attention,
    create_multihead_dilated_attention,
)
from dilated_attention_pytorch.core import (
    BaseDilatedAttention,
    BaseMultiheadDilatedAttention,
    DilatedAttentionConfig,
    MultiheadConfig,
    RingAttentionConfig,
    factory,
    register_attention,
    register_multihead_attention,
)

KINDS = {
    "auto": (ImprovedDilatedAttention, ImprovedMultiheadDilatedAttention),
    "improved": (ImprovedDilatedAttention, ImprovedMultiheadDilatedAttention),
    "standard": (DilatedAttention, MultiheadDilatedAttention),
    "ring": (RingDilatedAttention, RingMultiheadDilatedAttention),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_built_and_runs(kind: str) -> None:
    """X13: most of the package's kinds could not be built."""
    attention_class, multihead_class = KINDS[kind]
    attention = create_dilated_attention(kind, SEGMENTS, DILATIONS, dropout=0.1)
    assert type(attention) is attention_class
    assert attention.dropout == 0.1
    assert attention(*torch.randn(3, 1, 16, 2, 8).unbind()).shape == (1, 16, 2, 8)

    module = create_multihead_dilated_attention(
        kind, 32, 4, SEGMENTS, DILATIONS, dropout=0.1, bias=False, layer_norm=False,
        gamma_init=2.0, dtype=torch.float64, strict_lengths=False,
    )  # fmt: skip
    assert type(module) is multihead_class
    assert module.attention.dropout == 0.1
    assert module.gamma_init == 2.0
    assert module.out_proj.bias is None
    assert module.q_ln is None
    x = torch.randn(1, 17, 32, dtype=torch.float64)
    assert output(module, x).shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
def test_defaults(kind: str) -> None:
    assert create_dilated_attention(kind).segment_lengths == [2048, 4096, 8192]
    module = create_multihead_dilated_attention(kind)
    assert (module.embed_dim, module.num_heads) == (768, 12)
    assert module.attention.segment_lengths == [2048, 4096, 8192]
    assert module.attention.dilation_rates == [1, 2, 4]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config_class", [DilatedAttentionConfig, RingAttentionConfig])
def test_configurations_and_arguments_that_override_them(kind: str, config_class: Any) -> None:
    attention = config_class(SEGMENTS, DILATIONS, dropout=0.2, strict_lengths=False)
    multihead = MultiheadConfig(48, 6, bias=False)
    module = create_multihead_dilated_attention(
        kind, multihead_config=multihead, attention_config=attention
    )
    assert (module.embed_dim, module.num_heads, module.bias) == (48, 6, False)
    assert module.attention.segment_lengths == SEGMENTS
    assert module.attention_config.dropout == 0.2
    assert not module.attention_config.strict_lengths
    module = create_multihead_dilated_attention(
        kind, 64, 8, [8, 32], multihead_config=multihead, attention_config=attention, dropout=0.3
    )
    assert (module.embed_dim, module.num_heads, module.bias) == (64, 8, False)
    assert module.attention.segment_lengths == [8, 32]
    assert module.attention.dilation_rates == DILATIONS
    assert module.attention.dropout == 0.3
    assert (multihead.embed_dim, attention.dropout) == (48, 0.2)  # what was given stays as it is


def test_configurations_alone() -> None:
    only = create_multihead_dilated_attention("auto", multihead_config=MultiheadConfig(48, 6))
    assert (only.embed_dim, only.attention.num_groups) == (48, 3)
    config = DilatedAttentionConfig(SEGMENTS, DILATIONS)
    other = create_multihead_dilated_attention("auto", attention_config=config)
    assert (other.embed_dim, other.attention.num_groups) == (768, 2)


class Doubled(BaseDilatedAttention):
    """A class of the user's."""

    def forward(self, query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return 2 * query


class Identity(BaseMultiheadDilatedAttention):
    """A class of the user's, by the hooks of the base class."""

    def _create_attention_module(self) -> Doubled:
        return Doubled(self.attention_config)

    def _init_qkv_projections(self, factory_kwargs: dict[str, Any]) -> None:
        self.embedding = nn.Linear(self.embed_dim, self.embed_dim, **factory_kwargs)

    def forward(self, query: torch.Tensor, *_: Any, **__: Any) -> Any:
        return query


def test_registered_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "_ATTENTION_REGISTRY", dict(factory._ATTENTION_REGISTRY))
    monkeypatch.setattr(factory, "_MULTIHEAD_REGISTRY", dict(factory._MULTIHEAD_REGISTRY))
    register_attention("doubled", Doubled)
    register_multihead_attention("multihead_identity", Identity)
    attention = create_dilated_attention("doubled", SEGMENTS, DILATIONS)
    assert type(attention) is Doubled
    assert attention.segment_lengths == SEGMENTS
    module = create_multihead_dilated_attention("identity", 32, 4, SEGMENTS, DILATIONS)
    assert type(module) is Identity
    assert type(module.attention) is Doubled
    assert set(module.state_dict()) >= {"embedding.weight", "out_proj.weight", "q_ln.weight"}


@pytest.mark.parametrize("create", [create_dilated_attention, create_multihead_dilated_attention])
def test_errors(create: Any) -> None:
    with pytest.raises(ValueError, match="Unknown attention type") as caught:
        create("fastest")
    assert "auto, standard, improved, ring" in str(caught.value)
    with pytest.raises(dilated.InvalidProblem, match=r"custom_param: expected one of .*dropout"):
        create("improved", custom_param=42)
    with pytest.raises(dilated.InvalidProblem, match="block_size: expected one of"):
        create("improved", block_size=64)
    for kind in ("distributed", "block_sparse_ring"):
        with pytest.raises(dilated.Unsupported, match="not implemented"):
            create(kind)
