"""MultiheadDilatedAttention as self_attn of torch's encoder layers, which look for fused weights
and hand masks on in forms of their own.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dilated

N, WIDTH = 20, 32
PADDING = torch.arange(N) >= torch.tensor([[N], [13], [1]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(N)


def _layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True, **options)
    layer.self_attn = dilated.MultiheadDilatedAttention(WIDTH, 4, [8, 32], [1, 4])
    return layer


def _by_hand(layer: nn.TransformerEncoderLayer, x: Tensor, **call: Any) -> Tensor:
    """A post-norm layer, written out."""
    x = layer.norm1(x + layer.self_attn(x, **call)[0])
    return layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))


MASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "padding": ({"src_key_padding_mask": PADDING}, {"key_padding_mask": PADDING}),
    "float padding": (
        {"src_key_padding_mask": torch.zeros(3, N).masked_fill(PADDING, -torch.inf)},
        {"key_padding_mask": PADDING},
    ),
    "causal": ({"is_causal": True, "mask": CAUSAL}, {"is_causal": True}),
    "causal without a hint": ({"mask": CAUSAL}, {"is_causal": True}),
    "bool causal": ({"mask": CAUSAL < 0}, {"is_causal": True}),
    "both": (
        {"is_causal": True, "mask": CAUSAL, "src_key_padding_mask": PADDING},
        {"is_causal": True, "key_padding_mask": PADDING},
    ),
}


def _for_layer(masks: dict[str, Any]) -> dict[str, Any]:
    """An encoder calls mask what its layer calls src_mask."""
    return {("src_mask" if name == "mask" else name): value for name, value in masks.items()}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_layer_and_encoder_call_this_attention(name: str, training: bool, grad: bool) -> None:
    """The same bits as the layer written out: torch's fused path would attend to all keys."""
    given, meant = MASKS[name]
    x = torch.randn(3, N, WIDTH)
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")  # torch says why it does not fuse
        layer = _layer().train(training)
        assert torch.equal(layer(x, **_for_layer(given)), _by_hand(layer, x, **meant))
        before = nn.TransformerEncoder(layer, 2).train(training)
        after = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True), 2
        ).train(training)
        for index in range(2):
            after.layers[index].self_attn = _layer().self_attn
        for encoder in (before, after):
            want = x
            for stacked in encoder.layers:
                want = _by_hand(stacked, want, **meant)
            assert torch.equal(encoder(x, **given), want)


def test_encoder_learns_and_compiles() -> None:
    torch._dynamo.reset()
    layer = _layer()
    x = torch.randn(3, N, WIDTH)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    padding = torch.zeros(3, N).masked_fill(PADDING, -torch.inf)  # torch warns of mixed dtypes
    masks = {"src_mask": CAUSAL, "is_causal": True, "src_key_padding_mask": padding}
    torch.testing.assert_close(compiled(x, **masks), layer(x, **masks))
    compiled(x, **masks).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    with pytest.raises(RuntimeError, match="attn_mask: expected None, or the causal mask"):
        compiled(x, **{**masks, "src_mask": CAUSAL.t().contiguous()})


def test_other_masks_are_refused_in_the_layer() -> None:
    layer, x = _layer(), torch.randn(3, N, WIDTH)
    band = torch.zeros(N, N).masked_fill(torch.ones(N, N).triu(2) > 0, -torch.inf)
    for mask in (band, torch.zeros(N, N)):
        for is_causal in (True, False):
            with pytest.raises(dilated.Unsupported, match="attn_mask: expected None"):
                layer.eval()(x, src_mask=mask, is_causal=is_causal)
