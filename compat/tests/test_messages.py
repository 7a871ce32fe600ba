"""Messages that programs written for the package match, and the project's own template in them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dilated
from dilated_attention_pytorch import (
    DilatedAttention,
    ImprovedDilatedAttention,
    ImprovedMultiheadDilatedAttention,
    LongNet,
    MultiheadDilatedAttention,
    RingDilatedAttention,
    RingMultiheadDilatedAttention,
    SparsePatternConfig,
)
from dilated_attention_pytorch.core import MultiheadConfig, RingAttentionConfig, ValidationMixin

X = torch.zeros(2, 16, 4, 8)


def call(*lists: list[int], query: torch.Tensor = X, **options: Any) -> None:
    DilatedAttention(*(lists or ([8], [1])))(query, options.pop("key", query), query, **options)


def embed(shape: tuple[int, ...], **options: Any) -> None:
    MultiheadDilatedAttention(32, 4, [1], [8])(torch.zeros(shape), **options)


INVALID: list[tuple[Callable[[], Any], str]] = [
    (lambda: DilatedAttention([], []), "segment_lengths cannot be empty"),
    (lambda: DilatedAttention([8], []), "dilation_rates cannot be empty"),
    (lambda: DilatedAttention([8], [1, 2]), "must have the same length"),
    (lambda: ImprovedDilatedAttention([8, -4], [1, 2]), r"segment_lengths\[1\].*must be positive"),
    (lambda: RingDilatedAttention([8, 4], [1, 0]), r"dilation_rates\[1\].*must be positive"),
    (lambda: DilatedAttention([8], [1], None, 1.5), "must be between 0.0 and 1.0"),
    (lambda: RingDilatedAttention([8], [1], -0.1), "must be between 0.0 and 1.0"),
    (lambda: RingDilatedAttention([8], [1], block_size=0), "block_size must be positive"),
    (lambda: RingDilatedAttention([8], [1], ring_size=0), "ring_size must be positive"),
    (lambda: RingAttentionConfig([8], [1], max_cached_buffers=-1), "max_cached_buffers"),
    (lambda: SparsePatternConfig(block_size=0), "block_size must be positive"),
    (lambda: MultiheadDilatedAttention(100, 12, [1], [8]), "must be divisible by"),
    (lambda: ImprovedMultiheadDilatedAttention(100, 12, [1], [8]), "must be divisible by"),
    (lambda: RingMultiheadDilatedAttention(100, 0, [8], [1]), "must be divisible by"),
    (lambda: MultiheadConfig(0, 1), "embed_dim must be positive"),
    (lambda: MultiheadConfig(8, 1, layer_norm_eps=0.0), "layer_norm_eps must be positive"),
    (lambda: MultiheadConfig(8, 1, gamma_init=0.0), "gamma_init must be positive"),
    (lambda: MultiheadDilatedAttention(32, 4, [1] * 5, [8] * 5), "num_heads: expected >= 5"),
    (lambda: LongNet(num_decoder_layers=0), "num_decoder_layers.*must be positive"),
    (lambda: LongNet(16, 2, 1, 1, 8, [8], [1], activation="tanh"), "activation: expected relu"),
    (lambda: call([8] * 5, [1] * 5), "num_heads: expected >= 5"),
    (lambda: call(query=X[0]), "query: expected 4D tensor"),
    (lambda: call(key=X[0]), "key: expected 4D tensor"),
    (lambda: call(key=[1.0]), "key: expected 4D tensor, got list"),
    (lambda: call(key=X[:, :, :, :4]), "key.*Shape mismatch at dimension 3"),
    (lambda: call(key=X[:1]), "key.*Shape mismatch at dimension 0"),
    (lambda: call(key=X.double()), "key"),
    (lambda: call(query=X[:, :15]), "Sequence length.*must be divisible by"),
    (lambda: embed((2, 16, 32, 1)), "Expected 3D tensors"),
    (lambda: embed((2, 16, 24)), "embedding dimension"),
    (lambda: embed((2, 16, 32), key=[1.0]), "key: expected a tensor, got list"),
    (lambda: ValidationMixin.validate_attention_mask(X, 2, 16), "attention_mask"),
    (lambda: ValidationMixin.validate_batch_first_format(X, "x", 3), "x: expected 3 dimensions"),
    (
        lambda: ValidationMixin.validate_device_dtype_consistency([X, X.half()], ["x", "y"]),
        "y: expected the dtype of x, torch.float32, got torch.float16",
    ),
    (
        lambda: ValidationMixin.validate_tensor_shapes_match([X, X[0]], ["x", "y"]),
        "y.*Shape mismatch",
    ),
]
UNSUPPORTED: list[tuple[Callable[[], Any], str]] = [
    (lambda: call(attention_mask=torch.zeros(16, 16)), "attention_mask: .*use is_causal"),
    (lambda: embed((2, 16, 32), attn_mask=torch.zeros(16, 16)), "attn_mask: .*use is_causal"),
    (lambda: DilatedAttention([8], [1], op=object()), "op: expected None, got object"),
    (lambda: MultiheadDilatedAttention(32, 4, [1], [8], op=object()), "op: expected None"),
]


@pytest.mark.parametrize(("provoke", "pattern"), INVALID, ids=[text for _, text in INVALID])
def test_broken_rules(provoke: Callable[[], Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        provoke()
    assert isinstance(caught.value, dilated.InvalidProblem)
    assert ": expected " in str(caught.value)
    assert ", got " in str(caught.value)


@pytest.mark.parametrize(("provoke", "pattern"), UNSUPPORTED, ids=[text for _, text in UNSUPPORTED])
def test_what_cannot_be_honoured(provoke: Callable[[], Any], pattern: str) -> None:
    with pytest.raises(NotImplementedError, match=pattern) as caught:
        provoke()
    assert isinstance(caught.value, dilated.Unsupported)


@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "pattern"),
    [(84, 12, "should be divisible by 8"), (2048, 8, "head_dim.*128")],
)
def test_head_dims_that_warn(embed_dim: int, num_heads: int, pattern: str) -> None:
    with pytest.warns(UserWarning, match=pattern):
        MultiheadDilatedAttention(embed_dim, num_heads, [1], [8])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MultiheadDilatedAttention(128, 1, [1], [8])


# Every option without effect, and a call that gives it.
WITHOUT_EFFECT: dict[str, Callable[[], Any]] = {
    "use_tf32": lambda: ImprovedDilatedAttention([8], [1], use_tf32=False),
    "block_size": lambda: RingDilatedAttention([8], [1], block_size=64),
    "ring_size": lambda: RingMultiheadDilatedAttention(32, 4, [8], [1], ring_size=2),
    "use_checkpointing": lambda: RingDilatedAttention([8], [1], use_checkpointing=False),
    "use_memory_pool": lambda: RingAttentionConfig([8], [1], use_memory_pool=False),
    "max_cached_buffers": lambda: RingAttentionConfig([8], [1], max_cached_buffers=5),
    "use_flash_attention": lambda: RingMultiheadDilatedAttention(
        32, 4, [8], [1], use_flash_attention=False
    ),
    "compile_model": lambda: RingMultiheadDilatedAttention(32, 4, [8], [1], compile_model=True),
    "average_attn_weights": lambda: embed((2, 16, 32), average_attn_weights=False),
}


@pytest.mark.parametrize("option", WITHOUT_EFFECT)
def test_options_without_effect_warn_once(option: str) -> None:
    with pytest.warns(UserWarning, match=f"{option}=.* has no effect"):
        WITHOUT_EFFECT[option]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WITHOUT_EFFECT[option]()


def test_the_table_of_options_is_complete() -> None:
    from dilated_attention_pytorch.options_without_effect import _OPTIONS

    assert set(_OPTIONS) == set(WITHOUT_EFFECT)
