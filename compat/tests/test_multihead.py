"""Multi-head modules: numbers, what a call returns, names in state dicts, masks, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from restated import DILATIONS, SEGMENTS, moved, multihead, output
from torch import nn

import dilated
from dilated_attention_pytorch import (
    ImprovedMultiheadDilatedAttention,
    MultiheadDilatedAttention,
    RingMultiheadDilatedAttention,
)

CLASSES = [
    MultiheadDilatedAttention,
    ImprovedMultiheadDilatedAttention,
    RingMultiheadDilatedAttention,
]
SEPARATE = ["q_proj", "k_proj", "v_proj", "out_proj"]
FUSED = ["qkv_proj", "out_proj"]
# float64: sums of 40 terms of size 1, two norms.
ROUNDING = 1e-11


def make(cls: Any, **options: Any) -> nn.Module:
    """5 heads of 8."""
    module = cls(
        40, 5, segment_lengths=SEGMENTS, dilation_rates=DILATIONS, dtype=torch.float64, **options
    )
    return moved(module)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_numbers(cls: Any, is_causal: bool, layer_norm: bool) -> None:
    """One input, and three different ones."""
    module = make(cls, layer_norm=layer_norm)
    x, y, z = torch.randn(3, 2, 32, 40, dtype=torch.float64).unbind()
    for given, all_three in (((x,), (x, x, x)), ((x, y), (x, y, x)), ((x, y, z), (x, y, z))):
        result = module(*given, is_causal=is_causal)
        out = result[0] if isinstance(result, tuple) else result
        expected = multihead(module, *all_three, is_causal=is_causal)
        torch.testing.assert_close(out, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("cls", CLASSES)
def test_key_padding_mask_acts(cls: Any) -> None:
    """True = ignored, as a bool or as torch's -inf; the content of ignored keys does not matter."""
    module = make(cls)
    x = torch.randn(2, 32, 40, dtype=torch.float64)
    padding = torch.zeros(2, 32, dtype=torch.bool)
    padding[0, 20:], padding[1, :3] = True, True
    expected = multihead(module, x, x, x, key_mask=~padding)
    as_float = torch.zeros(2, 32).masked_fill(padding, -torch.inf)
    for mask in (padding, as_float):
        result = module(x, key_padding_mask=mask)
        out = result[0] if isinstance(result, tuple) else result
        torch.testing.assert_close(out, expected, rtol=ROUNDING, atol=ROUNDING)
    with pytest.raises(dilated.Unsupported, match="key_padding_mask: expected 0 and -inf"):
        module(x, key_padding_mask=torch.ones(2, 32))


def test_what_a_call_returns() -> None:
    x = torch.randn(1, 16, 40, dtype=torch.float64)
    module = make(MultiheadDilatedAttention)
    assert isinstance(module(x, x, x), torch.Tensor)
    for cls in CLASSES:
        out, weights = make(cls)(x, x, x, need_weights=True)
        assert out.shape == x.shape
        assert weights is None
    for cls in CLASSES[1:]:
        assert make(cls)(x, x, x)[1] is None


@pytest.mark.parametrize(
    ("cls", "projections"), list(zip(CLASSES, [SEPARATE, FUSED, FUSED])), ids=lambda x: str(x)[-30:]
)
def test_state_dict_names_and_shapes(cls: Any, projections: list[str]) -> None:
    module = make(cls)
    expected = {f"{name}.{kind}" for name in [*projections, "q_ln", "k_ln"]
                for kind in ("weight", "bias")}  # fmt: skip
    state = module.state_dict()
    assert set(state) == expected
    for name, tensor in state.items():
        rows = 120 if name.startswith("qkv") else 40
        norm_or_bias = "_ln" in name or name.endswith("bias")
        assert tensor.shape == ((rows,) if norm_or_bias else (rows, 40)), name
    plain = make(cls, layer_norm=False, bias=False)
    assert set(plain.state_dict()) == {f"{name}.weight" for name in projections}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_parameter_learns_or_is_frozen(cls: Any) -> None:
    """X9: DDP needs no find_unused_parameters. The norm that the package never read is frozen."""
    module = make(cls)
    out = output(module, torch.randn(2, 32, 40, dtype=torch.float64))
    (out * torch.randn_like(out)).sum().backward()
    learns = {name for name, p in module.named_parameters() if p.grad is not None}
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert learns | frozen == set(module.state_dict())
    assert frozen == (set() if cls is MultiheadDilatedAttention else {"k_ln.weight", "k_ln.bias"})
    for name in learns - {"k_ln.bias"}:  # adds the same to all scores of a query: 0 by symmetry
        gradient = dict(module.named_parameters())[name].grad
        assert gradient is not None
        assert gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("cls", CLASSES)
def test_attributes(cls: Any) -> None:
    module = make(cls, dropout=0.25, gamma_init=2.0)
    assert (module.embed_dim, module.num_heads, module.head_dim) == (40, 5, 8)
    assert module.gamma_init == module.multihead_config.gamma_init == 2.0
    assert module.attention_config.dropout == module.attention.dropout == 0.25
    assert module.attention_config.segment_lengths == module.attention.segment_lengths == SEGMENTS
    assert (module.attention.dilation_rates, module.attention.num_groups) == (DILATIONS, 2)


@pytest.mark.parametrize("cls", CLASSES)
def test_initial_values_are_those_of_magneto(cls: Any) -> None:
    """Xavier-normal: standard deviation gain / sqrt(embed_dim); values and output have gamma."""
    module = cls(256, 8, segment_lengths=[8], dilation_rates=[1], gamma_init=3.0)
    state = module.state_dict()
    if "qkv_proj.weight" in state:
        q, k, v = state["qkv_proj.weight"].chunk(3)
    else:
        q, k, v = (state[f"{name}_proj.weight"] for name in "qkv")
    for weight, gain in ((q, 1), (k, 1), (v, 3), (state["out_proj.weight"], 3)):
        # The deviation of 65,536 draws is known to 0.3 % (one standard error): 5 of them.
        assert float(weight.std()) == pytest.approx(gain / 16, rel=0.015)
    assert all((state[name] == 0).all() for name in state if name.endswith("bias"))


def test_mixed_inputs_are_named() -> None:
    module = make(MultiheadDilatedAttention)
    with pytest.raises(ValueError, match="embedding dimension 40"):
        module(torch.randn(1, 16, 32))
    x = torch.randn(1, 16, 40, dtype=torch.float64)
    with pytest.raises(dilated.InvalidProblem, match=r"key: .*Shape mismatch at dimension 1"):
        module(x, torch.cat((x, x), 1), x)
