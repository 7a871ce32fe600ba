"""Names, signatures and placeholders. The lists are facts about the package, written down here."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
from typing import Any

import pytest

import dilated
import dilated_attention_pytorch as package

NONE = object()  # no default

LISTS = {"segment_lengths": NONE, "dilation_rates": NONE}
SWAPPED = {"dilation_rates": NONE, "segment_lengths": NONE}
PLACE = {"device": None, "dtype": None}
NORMS = {
    "dropout": 0.0,
    "bias": True,
    "layer_norm": True,
    "layer_norm_eps": 1e-5,
    "gamma_init": 1.0,
}
RING = {"block_size": 1024, "ring_size": None, "use_checkpointing": True}
MODEL = {
    "d_model": 768, "nhead": 12, "num_encoder_layers": 12, "num_decoder_layers": 12,
    "dim_feedforward": 3072, "segment_lengths": (2048, 4096, 8192, 16384, 32768),
    "dilation_rates": (1, 2, 4, 6, 12), "dropout": 0.0, "activation": "relu",
    "layer_norm_eps": 1e-5, **PLACE,
}  # fmt: skip
LAYER = {
    "d_model": NONE, "nhead": NONE, **LISTS, "dim_feedforward": 2048, "dropout": 0.1,
    "activation": "relu", "layer_norm_eps": 1e-5, "gamma_init": 1.0, **PLACE,
}  # fmt: skip
HEADS = {"embed_dim": NONE, "num_heads": NONE}

# module, class, arguments of the constructor, whether it takes further keywords
CONSTRUCTORS: list[tuple[str, str, dict[str, Any], bool]] = [
    (
        "dilated_attention",
        "DilatedAttention",
        {**LISTS, "softmax_scale": None, "attention_dropout": 0.0, "op": None},
        True,
    ),
    (
        "improved_dilated_attention",
        "ImprovedDilatedAttention",
        {**LISTS, "dropout": 0.0, "use_tf32": True},
        True,
    ),
    (
        "ring_dilated_attention",
        "RingDilatedAttention",
        {**LISTS, "dropout": 0.0, "use_tf32": True, **RING, **PLACE},
        False,
    ),
    (
        "multihead_dilated_attention",
        "MultiheadDilatedAttention",
        {**HEADS, **SWAPPED, **NORMS, **PLACE, "op": None},
        False,
    ),
    (
        "improved_multihead_dilated_attention",
        "ImprovedMultiheadDilatedAttention",
        {**HEADS, **SWAPPED, **NORMS, **PLACE, "use_tf32": True},
        False,
    ),
    (
        "ring_multihead_dilated_attention",
        "RingMultiheadDilatedAttention",
        {
            **HEADS, **LISTS, **NORMS, **RING, "use_tf32": True, "use_flash_attention": True,
            "compile_model": False, **PLACE,
        },
        False,
    ),
    ("transformer", "DilatedTransformerEncoderLayer", LAYER, False),
    ("transformer", "DilatedTransformerDecoderLayer", LAYER, False),
    ("long_net", "LongNet", MODEL, False),
    ("long_net", "LongNetLM", {"num_tokens": NONE, **MODEL}, False),
    (
        "core.config",
        "DilatedAttentionConfig",
        {**LISTS, "dropout": 0.0, "use_tf32": True, **PLACE},
        False,
    ),
    (
        "core.config",
        "MultiheadConfig",
        {**HEADS, **{name: NORMS[name] for name in list(NORMS)[1:]}, **PLACE},
        False,
    ),
    (
        "core.config",
        "RingAttentionConfig",
        {
            **LISTS, "dropout": 0.0, "use_tf32": True, **PLACE, **RING, "use_memory_pool": True,
            "max_cached_buffers": 50,
        },
        False,
    ),
]  # fmt: skip

ATTEND = {"query": NONE, "key": NONE, "value": NONE, "is_causal": False, "attention_mask": None}
MULTIHEAD = {
    "query": NONE, "key": None, "value": None, "key_padding_mask": None, "need_weights": False,
    "attn_mask": None, "is_causal": False, "average_attn_weights": True,
}  # fmt: skip
FORWARDS = {
    "DilatedAttention": ATTEND,
    "ImprovedDilatedAttention": ATTEND,
    "RingDilatedAttention": ATTEND,
    "MultiheadDilatedAttention": MULTIHEAD,
    "ImprovedMultiheadDilatedAttention": MULTIHEAD,
    "RingMultiheadDilatedAttention": MULTIHEAD,
    "DilatedTransformerEncoderLayer": {"src": NONE, "is_causal": False},
    "DilatedTransformerDecoderLayer": {
        "tgt": NONE, "memory": NONE, "tgt_is_causal": False, "memory_is_causal": False,
    },
    "LongNet": {"x": NONE, "is_causal": True},
    "LongNetLM": {"x": NONE, "is_causal": True},
}  # fmt: skip


def module(name: str) -> Any:
    return importlib.import_module(f"dilated_attention_pytorch.{name}")


def positional(function: Any) -> dict[str, Any]:
    """Arguments that may be given by position, and their defaults."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind == parameter.POSITIONAL_OR_KEYWORD and name != "self":
            default = parameter.default
            if name == "activation":
                default = default.__name__
            found[name] = NONE if default is parameter.empty else default
    return found


@pytest.mark.parametrize(
    ("path", "name", "arguments", "open_ended"), CONSTRUCTORS, ids=[c[1] for c in CONSTRUCTORS]
)
def test_constructors(path: str, name: str, arguments: dict[str, Any], open_ended: bool) -> None:
    """Order and defaults of what may be given by position; beyond it, strict_lengths only."""
    cls = getattr(module(path), name)
    assert list(positional(cls).items()) == list(arguments.items())
    kinds = {p.kind: n for n, p in inspect.signature(cls).parameters.items()}
    assert (inspect.Parameter.VAR_KEYWORD in kinds) == open_ended
    if not open_ended and name != "MultiheadConfig":
        assert kinds[inspect.Parameter.KEYWORD_ONLY] == "strict_lengths"
    if dataclasses.is_dataclass(cls):
        assert {field.name for field in dataclasses.fields(cls)} >= set(arguments)


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name: str) -> None:
    forward = getattr(package, name).forward
    assert list(positional(forward).items()) == list(FORWARDS[name].items())


def test_functions() -> None:
    factory, attention = module("core.factory"), module("dilated_attention")
    kind = {"attention_type": "auto"}
    lists = {"segment_lengths": None, "dilation_rates": None}
    assert positional(factory.create_dilated_attention) == {**kind, **lists}
    sizes = {"embed_dim": 768, "num_heads": 12}
    assert positional(factory.create_multihead_dilated_attention) == {**kind, **sizes, **lists}
    assert positional(attention.create_dilated_attention) == LISTS
    improved = module("improved_dilated_attention")
    assert positional(improved.create_improved_dilated_attention) == LISTS
    assert factory._ensure_implementations_registered() is None
    made = attention.create_dilated_attention([8], [1], attention_dropout=0.5)
    assert type(made) is package.DilatedAttention
    assert made.dropout == 0.5
    made = improved.create_improved_dilated_attention([8], [1], dropout=0.5)
    assert type(made) is package.ImprovedDilatedAttention
    for path, name in (
        ("multihead_dilated_attention", "create_multihead_dilated_attention"),
        ("improved_multihead_dilated_attention", "create_improved_multihead_dilated_attention"),
    ):
        made = getattr(module(path), name)(32, 4, [1, 2], [8, 16], dropout=0.5)
        assert made.attention.segment_lengths == [8, 16]


def test_sparse_pattern_config_holds_values() -> None:
    config = package.SparsePatternConfig(block_size=1, pattern_type="local_window")
    assert config.sparsity_ratio == 0.25
    assert (config.local_window_size, config.global_tokens, config.block_size) == (512, 64, 1)


# Names that the package lists in __all__, three of which it could not import.
TOP_LEVEL = """
DilatedAttention MultiheadDilatedAttention ImprovedDilatedAttention
ImprovedMultiheadDilatedAttention DistributedImprovedDilatedAttention
DistributedImprovedMultiheadDilatedAttention RingDilatedAttention UnfoldRingDilatedAttention
RingMultiheadDilatedAttention DilatedTransformerEncoderLayer DilatedTransformerDecoderLayer LongNet
BlockSparseRingDilatedAttention BlockSparseRingMultiheadDilatedAttention
BlockSparseRingDistributedDilatedAttention BlockSparseMemoryPool SparsePatternConfig
DistributedSparseConfig DistributedSparsePattern PatternType PatternConfig ContentAdaptiveSparsity
SparsePatternGenerator PatternQualityAnalyzer PatternOptimizer
create_block_sparse_multihead_attention create_adaptive_sparse_multihead_attention
create_dilated_attention create_multihead_dilated_attention create_block_sparse_attention
create_adaptive_sparse_attention
"""


def test_import_star() -> None:
    for name in ("dilated_attention_pytorch", "dilated_attention_pytorch.core",
                 "dilated_attention_pytorch.utils"):  # fmt: skip
        names: dict[str, Any] = {}
        exec(f"from {name} import *", names)
        assert set(importlib.import_module(name).__all__) <= set(names)
    assert set(TOP_LEVEL.split()) <= set(package.__all__)


@pytest.mark.parametrize("path", ["long_net", "core", "core.factory", "utils", "transformer"])
def test_every_module_can_be_imported_first(path: str) -> None:
    code = f"import dilated_attention_pytorch.{path}"
    subprocess.run([sys.executable, "-c", code], check=True)


PLACEHOLDERS = {
    "distributed_dilated_attention": ["DistributedMultiheadDilatedAttention"],
    "improved_distributed_dilated_attention": [
        "DistributedImprovedDilatedAttention",
        "DistributedImprovedMultiheadDilatedAttention",
        "DeepSpeedDilatedAttentionEngine",
        "create_distributed_model",
        "get_recommended_config",
    ],
    "ring_distributed_dilated_attention": ["RingDistributedDilatedAttention"],
    "block_sparse_ring_distributed_dilated_attention": [
        "BlockSparseRingDistributedDilatedAttention",
        "DistributedSparseConfig",
        "DistributedSparsePattern",
        "HierarchicalSparsePatternGenerator",
        "GradientCompressor",
    ],
    "block_sparse_ring_dilated_attention": [
        "BlockSparseRingDilatedAttention",
        "BlockSparseMemoryPool",
        "ContentAdaptiveSparsity",
        "SparsePatternGenerator",
    ],
    "block_sparse_ring_multihead_dilated_attention": [
        "BlockSparseRingMultiheadDilatedAttention",
        "create_block_sparse_multihead_attention",
        "create_adaptive_sparse_multihead_attention",
    ],
    "ring_dilated_attention": ["RingAttentionMemoryPool"],
    "core.factory": ["create_block_sparse_attention", "create_adaptive_sparse_attention"],
    "core.config": ["SparseAttentionConfig", "DistributedConfig", "MemoryPoolConfig"],
    "core.memory_pool": [
        "UnifiedMemoryPool",
        "get_global_memory_pool",
        "reset_global_memory_pool",
    ],
    "utils.attention_utils": [
        "create_4d_causal_mask",
        "apply_head_specific_masks",
        "compute_position_embeddings",
        "get_attention_backend_info",
    ],
    "utils.sparse_pattern_utils": [
        "PatternType",
        "PatternConfig",
        "PatternQualityMetrics",
        "PatternQualityAnalyzer",
        "PatternOptimizer",
        "PatternVisualizer",
        "SparsePatternGenerator",
        "save_sparse_pattern",
        "load_sparse_pattern",
        "analyze_pattern_statistics",
        "optimize_pattern_for_hardware",
    ],
}


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, names in PLACEHOLDERS.items() for name in names]
)
def test_placeholders_name_the_replacement(path: str, name: str) -> None:
    placeholder = getattr(module(path), name)
    pattern = rf"^dilated_attention_pytorch: {name}: not implemented \(.{{9,}}\)$"
    with pytest.raises(NotImplementedError, match=pattern) as caught:
        placeholder() if name == "reset_global_memory_pool" else placeholder(1, option=2)
    assert isinstance(caught.value, dilated.Unsupported)


def test_placeholders_can_be_subclassed_and_asked() -> None:
    class Mine(package.DistributedImprovedDilatedAttention):
        pass

    with pytest.raises(dilated.Unsupported, match=r"Mine: .*dilated\.distributed"):
        Mine()
    assert not isinstance(package.DilatedAttention([8], [1]), Mine)
