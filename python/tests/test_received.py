"""attention_received against weights read off the forward pass, and heat maps of them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from test_torchscale import upstream
from torch import Tensor, nn

import dilated
from dilated import functional
from dilated.compat import torchscale
from dilated.models import LongNet, SlideEncoder, heat_map, heat_map_figure

N, D = 23, 24
LISTS: dict[str, Any] = {"segments": [8, 32], "dilations": [1, 4]}


class Attend(nn.Module):
    """The operator with its options, as a layer."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dilated.dilated_attention(q, k, v, **{**LISTS, **self.options})


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "torchscale": {"preset": "torchscale"},
    "shifted": {"preset": "torchscale", "row_shift": True, "segments": [6, 32]},
    "shifted, unequal": {
        "preset": "torchscale", "row_shift": True, "segments": [6, 32], "seqused": [23, 5],
    },
    "sum": {"merge": "sum", "out_scale": 0.5},
    "groups": {"preset": "fork"},
    "unequal": {"seqused": [9, 23]},
    "masked": {"key_mask": torch.arange(2 * N).view(2, N) % 3 > 0},
    "head first": {"layout": "bhsd"},
}  # fmt: skip


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("queries", [None, [0], [2, 0, 2]], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_weights_of_forward(name: str, queries: list[int] | None, kv_heads: int) -> None:
    """Values that are unit vectors show every weight in the output."""
    options = OPTIONS[name]
    torch.manual_seed(0)
    q = torch.randn(2, N, 4, D, dtype=torch.float64)
    k, v = torch.randn(2, 2, N, kv_heads, D, dtype=torch.float64).unbind(0)
    units = torch.eye(N, D, dtype=torch.float64)[:, None].expand_as(k)
    flip = options.get("layout") == "bhsd"
    q, k, v, units = (x.transpose(1, 2) if flip else x for x in (q, k, v, units))
    layer = Attend(options)
    with dilated.attention_received(layer, queries) as received:
        layer(q, k, v)
    [weights] = received
    seen = layer(q, k, units)[..., :N]  # (batch, query, head, key)
    seen = seen if flip else seen.transpose(1, 2)
    lengths = options.get("seqused", [N, N])
    for got, all_of, length in zip(weights, seen, lengths, strict=True):
        chosen = range(length) if queries is None else queries
        torch.testing.assert_close(got, all_of[:, list(chosen)].mean(1), rtol=1e-12, atol=1e-12)
    assert weights.shape == (2, 4, N)
    assert not weights.requires_grad


@pytest.mark.parametrize("queries", [None, [4]], ids=str)
def test_packed_sequences(queries: list[int] | None) -> None:
    layer = Attend({"layout": "shd", "cu_seqlens": [0, 8, 23]})
    q, k, v = torch.randn(3, N, 4, 8).unbind(0)
    with dilated.attention_received(layer, queries) as received:
        layer(q, k, v)
    for start, end in ((0, 8), (8, 23)):
        alone = Attend({})
        with dilated.attention_received(alone, queries) as one:
            alone(*(x[None, start:end] for x in (q, k, v)))
        torch.testing.assert_close(received[0][:, start:end], one[0][0])


def test_more_query_heads_than_channels() -> None:
    layer = Attend({})
    q, k = torch.randn(1, 9, 6, 2), torch.randn(1, 9, 2, 2)
    with dilated.attention_received(layer, [3]) as received:
        layer(q, k, k)
    torch.testing.assert_close(received[0].sum(-1), torch.ones(1, 6))


def test_layers_models_half_types_and_dropout() -> None:
    """Any module that attends; one tensor a call; computed in float32, without dropout."""
    x = torch.randn(2, 40, 32)
    layers = {
        "multihead": dilated.MultiheadDilatedAttention(32, 4, **LISTS, dropout=0.5),
        "LongNet": LongNet(32, 3, 4, **LISTS, attention_dropout=0.5),
    }
    for name, layer in layers.items():
        with dilated.attention_received(layer, [0]) as received:
            layer(x)
        assert len(received) == (3 if name == "LongNet" else 1)
        for weights in received:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))
    half = layers["multihead"].bfloat16()
    with dilated.attention_received(half) as received:
        half(x.bfloat16())
    torch.testing.assert_close(received[0].sum(-1), torch.ones(2, 4))
    half(x.bfloat16())
    assert len(received) == 1  # the watch has ended


def test_converted_torchscale_layers() -> None:
    layer = torchscale.convert(upstream())
    x = torch.randn(1, 23, 16, dtype=torch.float64)
    with dilated.attention_received(layer) as received, torch.no_grad():
        layer(x, x, x)
    total = received[0].sum(-1)
    assert received[0].dtype == torch.float64
    assert ((total > 0.3) & (total < 1.0)).all()  # phantom keys keep their part


def test_the_watch_survives_errors() -> None:
    layer = Attend({})
    x = torch.randn(1, 9, 4, 8)
    with dilated.attention_received(layer) as received:
        with pytest.raises(dilated.InvalidProblem):
            layer(x, x, x[..., :4])
        layer(x, x, x)
    assert len(received) == 1
    for call, text in (
        ({"queries": [9]}, "queries: expected below the length of every sequence, 9, got 9"),
        (
            {"queries": [-1]},
            r"queries: expected positions >= 0, at least one, or None for all, got \[",
        ),
        ({"queries": []}, "queries: expected positions >= 0"),
    ):
        with (
            pytest.raises(dilated.InvalidProblem, match=text),
            dilated.attention_received(layer, **call),
        ):
            layer(x, x, x)
    with (
        pytest.raises(dilated.InvalidProblem, match="layer: expected a module, got int"),
        dilated.attention_received(3),  # type: ignore[arg-type]
    ):
        pass
    fkodom = Attend({"preset": "fkodom"})
    with (
        pytest.raises(
            dilated.Unsupported, match="preset: expected one whose output is a weighted sum"
        ),
        dilated.attention_received(fkodom),
    ):
        fkodom(x, x, x)
    layer(x, x, x)


def test_a_slides_heat_map() -> None:
    encoder = SlideEncoder(12, 32, 2, 4, **LISTS, slide_ngrids=40).eval()
    coords = 256 * torch.cartesian_prod(torch.arange(5, 9), torch.arange(6))
    with dilated.attention_received(encoder.encoder.layers[-1], [0]) as received:
        encoder(torch.randn(2, 24, 12), coords.expand(2, -1, -1), seqused=[24, 10])
    whole, short = received  # slides of unequal size are encoded one by one
    assert (whole.shape, short.shape) == ((1, 4, 25), (1, 4, 11))
    tiles = whole[0].mean(0)[1:]
    picture = heat_map(tiles, coords)
    assert picture.shape == (6, 4)  # rows are y, columns x
    assert picture[2, 1] == tiles[6 + 2]
    torch.testing.assert_close(picture.sum(), tiles.sum())
    hole = heat_map(tiles[:-1], coords[:-1])
    assert hole.isnan().nonzero().tolist() == [[5, 3]]
    figure = heat_map_figure(tiles, coords, title="attention of the class token")
    assert figure.axes[0].get_images()[0].get_array().shape == (6, 4)
    for call, text in (
        ((tiles, coords, 0), "tile_size: expected >= 1, got 0"),
        ((tiles[:0], coords), r"weights: expected \(tiles,\), one or more, got shape \(0,\)"),
        ((tiles, coords[:3]), r"coords: expected shape \(24, 2\), got shape \(3, 2\)"),
    ):
        with pytest.raises(dilated.InvalidProblem, match=text):
            heat_map(*call)


def watched(layer: nn.Module, x: Tensor) -> list[Tensor]:
    with dilated.attention_received(layer, [0]) as received:
        layer(x)
    return received


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_without_gradients(mode: Any) -> None:
    layer, x = LongNet(32, 2, 4, **LISTS), torch.randn(2, N, 32)
    want = watched(layer, x)
    with mode():
        torch.testing.assert_close(watched(layer, x.clone()), want, rtol=0, atol=0)


def test_activation_checkpointing_keeps_gradients_and_records_once() -> None:
    plain, x = LongNet(32, 2, 4, **LISTS), torch.randn(2, N, 32)
    again = LongNet(32, 2, 4, **LISTS, activation_checkpointing=True)
    again.load_state_dict(plain.state_dict())
    with (
        dilated.attention_received(plain, [0]) as want,
        dilated.attention_received(again, [0]) as received,
        dilated.attention_received(again.layers[1], [0]) as last,
    ):
        plain(x).square().sum().backward()
        y = again(x)
        again(x).square().sum().backward()
    torch.testing.assert_close(received, want + want, rtol=0, atol=0)
    torch.testing.assert_close(last, [want[1]] * 2, rtol=0, atol=0)
    for a, b in zip(again.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    y.sum().backward()  # after the watch


def test_watched_layers_may_contain_each_other() -> None:
    model, x = LongNet(32, 2, 4, **LISTS), torch.randn(1, N, 32)
    with (
        dilated.attention_received(model) as outer,
        dilated.attention_received(model.layers[0]) as inner,
        dilated.attention_received(model.layers[0]) as twin,
    ):
        model(x)
    assert len(outer) == 2
    assert torch.equal(outer[0], inner[0])
    assert torch.equal(outer[0], twin[0])
    assert not functional.observers


def test_other_threads_are_not_recorded() -> None:
    other, x = LongNet(32, 1, 4, **LISTS), torch.randn(1, N, 32)

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=other, args=(x,))
            thread.start()
            thread.join()
            return x

    assert watched(Waits(), x) == []


def test_an_interrupted_watch_ends() -> None:
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched(Interrupted(), torch.zeros(1))
    assert not functional.observers


def test_what_cannot_be_watched_is_named() -> None:
    layer, x = LongNet(32, 1, 4, **LISTS), torch.randn(2, N, 32)
    text = "expected a call without transforms, got one inside torch.func"
    with (
        dilated.attention_received(layer),
        pytest.raises(dilated.Unsupported, match=text),
    ):
        torch.vmap(lambda row: layer(row[None]))(x)
    cached = torchscale.convert(upstream())
    row = torch.randn(1, 2, 16, dtype=torch.float64)
    state: dict[str, Tensor] = {}
    with dilated.attention_received(cached) as received:
        cached(row, row, row, state)
        with pytest.raises(dilated.Unsupported, match="all queries and keys, got a window"):
            cached(row, row, row, state)
    assert len(received) == 1
