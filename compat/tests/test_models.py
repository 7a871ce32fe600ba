"""Layers and models: numbers, names in state dicts, stacks of torch's containers, causality."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from restated import DILATIONS, MODULES, SEGMENTS, inputs, moved, multihead
from torch import Tensor, nn
from torch.nn import functional

import dilated
from dilated_attention_pytorch import (
    DilatedTransformerDecoderLayer,
    DilatedTransformerEncoderLayer,
    LongNet,
    LongNetLM,
)

# float64: sums of 50 terms of size 1, up to five norms in a row.
ROUNDING = 1e-10
ATTENTION = [f"{name}_proj" for name in ("q", "k", "v", "out")]
NORMS = ["q_ln", "k_ln"]


def feed_forward(
    layer: nn.Module, x: Tensor, outer: str, inner: str, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    state = layer.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(x, (x.shape[-1],), weight, bias)

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    return linear(norm(activation(linear(norm(x, outer), "linear1")), inner), "linear2")


def encoder_layer(layer: nn.Module, x: Tensor, is_causal: bool) -> Tensor:
    y = layer.norm1(x)
    x = x + multihead(layer.self_attn, y, y, y, is_causal=is_causal)
    return x + feed_forward(layer, x, "norm2", "norm3", torch.relu)


def decoder_layer(layer: nn.Module, x: Tensor, memory: Tensor, causal: tuple[bool, bool]) -> Tensor:
    y = layer.norm1(x)
    x = x + multihead(layer.self_attn, y, y, y, is_causal=causal[0])
    y = layer.norm2(x)
    x = x + multihead(layer.multihead_attn, y, memory, memory, is_causal=causal[1])
    return x + feed_forward(layer, x, "norm3", "norm4", functional.gelu)


@pytest.mark.parametrize("is_causal", [True, False])
def test_encoder_layer_and_its_stack(is_causal: bool) -> None:
    layer = moved(DilatedTransformerEncoderLayer(32, 4, SEGMENTS, DILATIONS, 48).double().eval())
    x = torch.randn(2, 32, 32, dtype=torch.float64)
    expected = encoder_layer(layer, x, is_causal)
    torch.testing.assert_close(layer(x, is_causal=is_causal), expected, rtol=0, atol=ROUNDING)

    stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    for _ in range(2):
        expected = encoder_layer(layer, expected, is_causal)
    out = stack(x, is_causal=is_causal)
    torch.testing.assert_close(out, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("causal", [(True, True), (True, False), (False, True)])
def test_decoder_layer_and_its_stack(causal: tuple[bool, bool]) -> None:
    layer = DilatedTransformerDecoderLayer(
        32, 4, SEGMENTS, DILATIONS, 48, activation="gelu", dtype=torch.float64
    )
    moved(layer).eval()
    x, memory = torch.randn(2, 2, 32, 32, dtype=torch.float64)
    options = {"tgt_is_causal": causal[0], "memory_is_causal": causal[1]}
    expected = decoder_layer(layer, x, memory, causal)
    torch.testing.assert_close(layer(x, memory, **options), expected, rtol=0, atol=ROUNDING)

    stack = nn.TransformerDecoder(layer, 2).eval()
    expected = decoder_layer(layer, expected, memory, causal)
    torch.testing.assert_close(stack(x, memory, **options), expected, rtol=0, atol=ROUNDING)


def test_stacks_hand_padding_on() -> None:
    """What padded positions hold reaches nobody else."""
    layer = DilatedTransformerEncoderLayer(32, 4, SEGMENTS, DILATIONS, 48)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 32, 32)
    padding = torch.zeros(2, 32, dtype=torch.bool)
    padding[:, 27:] = True
    out = stack(x, src_key_padding_mask=padding)
    x[:, 27:] += 1
    changed = stack(x, src_key_padding_mask=padding)
    assert torch.equal(out[:, :27], changed[:, :27])
    assert not torch.equal(out, stack(x))
    with pytest.raises(dilated.Unsupported, match="attn_mask"):
        stack(x, mask=nn.Transformer.generate_square_subsequent_mask(32))


@pytest.mark.parametrize("is_causal", [True, False])
def test_long_net_is_an_encoder_and_a_decoder(is_causal: bool) -> None:
    lm = LongNetLM(50, 32, 4, 2, 2, 48, SEGMENTS, DILATIONS, activation="gelu")
    moved(lm.double()).eval()
    for layer in lm.long_net.encoder.layers:
        layer.activation = torch.relu  # the restatement's
    tokens = torch.randint(50, (2, 32))
    x = memory = lm.token_embedding(tokens)
    for layer in lm.long_net.encoder.layers:
        memory = encoder_layer(layer, memory, is_causal)
    for layer in lm.long_net.decoder.layers:
        x = decoder_layer(layer, x, memory, (is_causal, is_causal))
    expected = lm.out(lm.norm(x))
    torch.testing.assert_close(lm(tokens, is_causal=is_causal), expected, rtol=0, atol=ROUNDING)


def test_causal_models_see_no_later_token() -> None:
    """X6, for every pair of positions."""
    lm = LongNetLM(50, 32, 4, 1, 1, 48, SEGMENTS, DILATIONS).eval()
    tokens = torch.randint(50, (1, 32))
    logits = lm(tokens)
    for position in range(1, 32):
        other = tokens.clone()
        other[0, position] = (tokens[0, position] + 1) % 50
        assert torch.equal(lm(other)[:, :position], logits[:, :position])
    assert not torch.equal(lm(tokens, is_causal=False), logits)


def test_state_dict_names() -> None:
    def names(parts: list[str]) -> set[str]:
        return {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}

    encoder = names([f"self_attn.{part}" for part in ATTENTION + NORMS]) | names(
        ["norm1", "norm2", "linear1", "norm3", "linear2"]
    )
    decoder = (
        names([f"self_attn.{part}" for part in ATTENTION])
        | names([f"multihead_attn.{part}" for part in ATTENTION + NORMS])
        | names(["norm1", "norm2", "norm3", "linear1", "norm4", "linear2"])
    )
    assert set(MODULES["DilatedTransformerEncoderLayer"]().state_dict()) == encoder
    assert set(MODULES["DilatedTransformerDecoderLayer"]().state_dict()) == decoder
    model = names(["norm", "out"]) | {"token_embedding.weight"}
    for kind, count, layer in (("encoder", 2, encoder), ("decoder", 1, decoder)):
        model |= {f"long_net.{kind}.layers.{i}.{x}" for i in range(count) for x in layer}
    assert set(MODULES["LongNetLM"]().state_dict()) == model


def test_gains_are_those_of_magneto() -> None:
    """Figure 2 of arXiv 2210.06423 for 6 encoder and 3 decoder layers, computed by hand."""
    net = LongNet(32, 4, 6, 3, 48, SEGMENTS, DILATIONS)
    assert [x.gamma_init for x in net.encoder.layers] == pytest.approx([1.3491] * 6, abs=1e-4)
    assert [x.gamma_init for x in net.decoder.layers] == pytest.approx([1.4823] * 3, abs=1e-4)
    first = net.decoder.layers[0]
    assert first.multihead_attn.gamma_init == first.self_attn.gamma_init == first.gamma_init


def test_strict_lengths_reaches_every_layer() -> None:
    (tokens,) = inputs("LongNetLM")
    with pytest.raises(dilated.InvalidProblem, match="Sequence length must be divisible by"):
        MODULES["LongNetLM"]()(tokens[:, :21])
    loose = LongNetLM(50, 32, 4, 1, 1, 48, SEGMENTS, DILATIONS, strict_lengths=False)
    assert loose(tokens[:, :21]).shape == (2, 21, 50)
