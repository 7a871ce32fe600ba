"""SlideEncoder: GigaPath's names and numbers, slides of unequal size, memory of loading."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchscale_restated import gigapath_slide_encoder, layer_norm, position_rows

import dilated
from dilated.models import SlideEncoder, slide_positions, slide_segments

# Every branch, a segment that the slides are longer than, dilations that do not divide the heads.
SIZES: dict[str, Any] = {
    "in_chans": 12,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 6,
    "segments": [8, 16, 64],
    "dilations": [1, 2, 4],
    "slide_ngrids": 40,
    "tile_size": 256,
}


def make_encoder(**changes: Any) -> SlideEncoder:
    """Every parameter away from its start, norms and biases included."""
    encoder = SlideEncoder(**{**SIZES, **changes})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


def slide(tiles: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features and pixels inside of tiles."""
    return torch.randn(1, tiles, 12, dtype=dtype), torch.randint(40 * 256, (1, tiles, 2))


def published_shapes(
    depth: int = 12, dim: int = 768, ffn: int = 3072, in_chans: int = 1536
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published weights."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim)}

    def add(name: str, *shape: int) -> None:
        shapes[name + ".weight"] = shape
        shapes[name + ".bias"] = shape[:1]

    add("patch_embed.proj", dim, in_chans)
    for i in range(depth):
        layer = f"encoder.layers.{i}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"{layer}self_attn.{projection}", dim, dim)
        add(layer + "self_attn.inner_attn_ln", dim)
        add(layer + "self_attn_layer_norm", dim)
        add(layer + "final_layer_norm", dim)
        add(layer + "ffn.fc1", ffn, dim)
        add(layer + "ffn.fc2", dim, ffn)
        add(layer + "ffn.ffn_layernorm", ffn)
    add("encoder.layer_norm", dim)
    add("norm", dim)
    return shapes


@pytest.mark.parametrize(
    "sizes", [{}, {"depth": 24, "dim": 1024, "ffn": 4096}, {"dim": 384, "ffn": 1536}]
)
def test_names_and_shapes_are_the_published_ones(sizes: dict[str, int]) -> None:
    shapes = published_shapes(**sizes)
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    encoder = SlideEncoder.from_state_dict(weights)
    assert {name: tuple(w.shape) for name, w in encoder.state_dict().items()} == shapes
    if not sizes:
        assert len(shapes) == 247
        with torch.device("meta"):
            assert SlideEncoder().state_dict().keys() == shapes.keys()


def test_loading_is_strict_and_keeps_dtype_and_numbers() -> None:
    weights = {name: torch.randn(s).half() for name, s in published_shapes(2, 32, 64, 8).items()}
    encoder = SlideEncoder.from_state_dict(weights, num_heads=4)
    for name, loaded in encoder.state_dict().items():
        assert torch.equal(loaded, weights[name]), name
        assert loaded.dtype == torch.float16
        assert loaded.data_ptr() != weights[name].data_ptr()
    assert all(p.requires_grad for p in encoder.parameters())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"norm.bias\""):
        SlideEncoder.from_state_dict({n: w for n, w in weights.items() if n != "norm.bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"pos_embed\""):
        SlideEncoder.from_state_dict({**weights, "pos_embed": torch.zeros(1)})
    with pytest.raises(dilated.InvalidProblem) as caught:
        SlideEncoder.from_state_dict({"model": torch.zeros(1)})
    assert str(caught.value) == (
        "SlideEncoder.from_state_dict: state_dict: expected patch_embed.proj.weight, got names "
        "model (a published file holds the weights under its key 'model')"
    )


@pytest.mark.parametrize("tiles", [1, 6, 22, 41])
def test_equals_gigapath_restated(tiles: int) -> None:
    """X11: all hidden states and both ways to embed, 1e-5 in float32."""
    encoder = make_encoder()
    x, coords = slide(tiles)
    weights = {name: value.double() for name, value in encoder.state_dict().items()}
    states, last = gigapath_slide_encoder(weights, x[0].double(), coords[0], SIZES)
    with torch.no_grad():
        for pooled in (False, True):
            encoder.global_pool = pooled
            embed = lambda x: layer_norm(x[1:].mean(0) if pooled else x[0], weights, "norm", 1e-6)
            [actual] = encoder(x, coords)
            every = encoder(x, coords, all_layer_embed=True)
            assert len(every) == 4
            for found, exact in zip([actual, *every], [last, *states], strict=True):
                assert found.shape == (1, 24)
                assert (found[0] - embed(exact)).abs().max() < 1e-5


def test_segments_are_gigapaths() -> None:
    assert slide_segments(262144, 256) == [1024, 5792, 32768, 185363, 1048576]
    assert slide_segments(250000, 256) == [1024, 4870, 23170, 110217, 524288]
    with torch.device("meta"):
        encoder = SlideEncoder(max_wsi_size=250000)
    assert encoder.encoder.layers[0].self_attn.segments == (1024, 4870, 23170, 110217, 524288)


@pytest.mark.parametrize("dim", [256, 384, 768, 1024, 1536])
def test_positions_are_the_tables(dim: int) -> None:
    """Bit for bit, every number that the table of 1000 x 1000 cells holds."""
    axis = torch.arange(1000)
    cells = torch.stack([axis, axis.flip(0)], -1)  # half of the channels depend on each coordinate
    assert torch.equal(slide_positions(cells, 1000, dim), position_rows(cells, dim))


# --- slides of unequal size -----------------------------------------------------------------------


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=4),
    kind=st.sampled_from(["seqused", "cu_seqlens", "both"]),
    as_tensor=st.booleans(),
    pooled=st.booleans(),
    row_shift=st.booleans(),
)
def test_a_slide_has_the_bits_it_has_alone(
    lengths: list[int], kind: str, as_tensor: bool, pooled: bool, row_shift: bool
) -> None:
    """Padded or packed, whatever the padding holds: embeddings of all layers."""
    torch.manual_seed(0)
    # 3 does not divide 16 and 64: upstream shifts rows there.
    shifted = {"dilations": [1, 3, 3], "row_shift": True} if row_shift else {}
    encoder = make_encoder(global_pool=pooled, **shifted)
    slides = [slide(n) for n in lengths]
    convert = (lambda values: torch.tensor(values, dtype=torch.int64)) if as_tensor else list
    options: dict[str, Any] = {}
    room = max(lengths, default=0) + 5 if kind == "seqused" else None
    padding = {"cu_seqlens": 0, "both": 3}
    rows = [room if room is not None else n + padding[kind] for n in lengths]
    x = [torch.full((r, 12), torch.nan) for r in rows]
    coords = [torch.full((r, 2), -1) for r in rows]
    for i, (features, pixels) in enumerate(slides):
        x[i][: lengths[i]], coords[i][: lengths[i]] = features[0], pixels[0]
    if kind != "cu_seqlens":
        options["seqused"] = convert(lengths)
    if kind == "seqused":
        given_x = torch.stack(x) if x else torch.zeros(0, 5, 12)
        given_coords = torch.stack(coords) if x else torch.zeros(0, 5, 2)
    else:
        given_x = torch.cat([*x, torch.zeros(0, 12)])
        given_coords = torch.cat([*coords, torch.zeros(0, 2, dtype=torch.int64)])
        options["cu_seqlens"] = convert([0, *torch.tensor(rows).cumsum(0).tolist()])
    with torch.no_grad():
        found = encoder(given_x, given_coords, all_layer_embed=True, **options)
        alone = [encoder(*one, all_layer_embed=True) for one in slides]
    assert len(found) == 4
    for layer, embeddings in enumerate(found):
        assert embeddings.shape == (len(lengths), 24)
        assert bool(embeddings.isfinite().all())
        for i, one in enumerate(alone):
            assert torch.equal(embeddings[i], one[layer][0])


def test_gradients_of_a_pack_are_those_of_its_slides() -> None:
    encoder = make_encoder()
    slides = [slide(n) for n in (30, 0, 7)]
    sum(encoder(*one)[0].square().sum() for one in slides).backward()
    alone = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    x, coords = (torch.cat(parts, dim=1)[0] for parts in zip(*slides, strict=True))
    encoder(x, coords, cu_seqlens=[0, 30, 30, 37])[0].square().sum().backward()
    for parameter, expected in zip(encoder.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_whole_pixels_keep_their_tile(default: torch.dtype) -> None:
    """Integers are divided exactly, whatever torch's default dtype is."""
    encoder = SlideEncoder(4, 16, 1, 4, slide_ngrids=1000)
    pixels = torch.tensor([[0, 255], [256 * 777, 256 * 777 - 1], [255_999, 256 * 515]])
    torch.set_default_dtype(default)
    try:
        for given in (pixels, pixels.int(), pixels.float(), pixels.double()):
            assert torch.equal(encoder._cells(given[None]), pixels[None] // 256)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_masked_tile_reaches_nothing(pooled: bool) -> None:
    encoder = make_encoder(global_pool=pooled)
    x, coords = (part.expand(2, -1, -1).clone() for part in slide(30))
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 20:] = False
    x[1, 20:], coords[1, 20:] = torch.nan, -1
    [found] = encoder(x, coords, key_mask=mask)
    [whole] = encoder(x[:1], coords[:1])
    assert torch.equal(found[:1], whole) or torch.allclose(found[:1], whole, atol=1e-6)
    assert not torch.allclose(found[1:], whole, atol=1e-4)
    found[1].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in encoder.parameters())


# --- training, memory, errors ---------------------------------------------------------------------


def test_every_parameter_gets_a_gradient() -> None:
    """X9, but for key biases, which shift all scores of a row alike: only phantom keys feel it."""
    encoder = make_encoder(drop_path_rate=0.0).train()
    encoder(*slide(40))[0].square().sum().backward()
    dead = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_activation_checkpointing_changes_nothing() -> None:
    plain = make_encoder(dropout=0.2, drop_path_rate=0.4).train()
    saving = make_encoder(dropout=0.2, drop_path_rate=0.4, activation_checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    x, coords = slide(40)
    losses = []
    for encoder in (plain, saving):
        torch.manual_seed(1)
        losses.append(encoder(x, coords)[0].square().sum())
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_drop_path_grows_with_depth_and_is_per_slide() -> None:
    encoder = SlideEncoder(**{**SIZES, "dropout": 0.0, "drop_path_rate": 1.0}).train()
    assert [layer.drop_path.p for layer in encoder.encoder.layers] == [0.0, 0.5, 1.0]
    x, coords = (part.expand(64, -1, -1) for part in slide(5))
    first, second, third, fourth = encoder(x, coords, all_layer_embed=True)
    assert torch.equal(third, fourth)  # the last layer is always left out
    assert bool((second == second[:1]).all())
    # Two residuals, each left out or doubled: four kinds of slides.
    assert len(third.detach().round(decimals=4).unique(dim=0)) == 4
    assert not torch.equal(first, second)


def test_compiles_to_one_graph() -> None:
    encoder = make_encoder(depth=1)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    x, coords = slide(20)
    for options in ({}, {"key_mask": torch.arange(20)[None] < 15}):
        assert (
            compiled(x, coords, **options)[0] - encoder(x, coords, **options)[0]
        ).abs().max() < 1e-5


LOADING = """
import resource, sys, torch
sys.path.insert(0, sys.argv[1])
from test_slide_encoder import published_shapes
from dilated.models import SlideEncoder
weights = {name: torch.randn(shape) for name, shape in published_shapes().items()}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
SlideEncoder.from_state_dict(weights)
print((peak() - before) / 2**20)
"""


def test_loading_takes_one_copy_of_the_weights() -> None:
    """329 MiB of weights. Upstream's table of positions needs 15 GB while it is made."""
    source = str(Path(dilated.__file__).parents[1])
    path = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH", "")) if p)
    result = subprocess.run(
        [sys.executable, "-c", LOADING, str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    numbers = sum(math.prod(shape) for shape in published_shapes().values())
    assert float(result.stdout) < 1.5 * 4 * numbers / 2**20


INSIDE = torch.zeros(1, 3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: make_encoder(embed_dim=30), "embed_dim: expected a multiple of 4, got 30 "
         "(positions are sine and cosine of two axes)"),
        (lambda: make_encoder(tile_size=0), "tile_size: expected >= 1, got 0"),
        (lambda: make_encoder()(torch.zeros(3, 12), INSIDE[0]),
         "x: expected (slides, tiles, 12), got shape (3, 12)"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12), INSIDE, cu_seqlens=[0, 3]),
         "x: expected (total, 12) with cu_seqlens, got shape (1, 3, 12)"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12), INSIDE[:, :2]),
         "coords: expected shape (1, 3, 2), as x, got shape (1, 2, 2)"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12), INSIDE - 1),
         "coords: expected 0 <= coords < slide_ngrids * tile_size = 10240, got [-1, -1] at tile 0 "
         "(pixels of the level that was tiled; a larger slide needs a larger slide_ngrids)"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12), INSIDE + torch.tensor([[0], [0], [10240]])),
         "coords: expected 0 <= coords < slide_ngrids * tile_size = 10240, got [10240, 10240] at "
         "tile 2 (pixels of the level that was tiled; a larger slide needs a larger slide_ngrids)"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12), INSIDE * torch.nan),
         "coords: expected 0 <= coords < slide_ngrids * tile_size = 10240, got [nan, nan] at "
         "tile 0 (pixels of the level that was tiled; a larger slide needs a larger slide_ngrids)"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12), INSIDE, key_mask=torch.ones(3)),
         "key_mask: expected bool of shape (1, 3), got torch.float32 of shape (3,)"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12), INSIDE, seqused=[4]),
         "seqused: expected 1 lengths, each at most its slide's, got [4]"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12), INSIDE, seqused=[1, 2]),
         "seqused: expected 1 lengths, each at most its slide's, got [1, 2]"),
        (lambda: make_encoder()(torch.zeros(3, 12), INSIDE[0], cu_seqlens=[0, 2]),
         "cu_seqlens: expected 0, ..., 3, ascending, got [0, 2]"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12), INSIDE.half()),
         "coords: expected integers, float32 or float64, got torch.float16 (other floats round "
         "pixels)"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12), [[0, 0]] * 3),  # type: ignore[arg-type]
         "coords: expected a tensor, got list"),
        (lambda: make_encoder(is_causal=True),
         "is_causal: expected no such option, got True (tiles have places, not an order, and the "
         "class token comes first)"),
        (lambda: make_encoder(xpos_scale_base=512),
         "xpos_scale_base: expected no such option, got 512 (tiles have places, not an order, and "
         "the class token comes first)"),
        (lambda: make_encoder()(torch.zeros(1, 3, 12).double(), INSIDE),
         "x: expected torch.float32, as the parameters, got torch.float64"),
    ],
)  # fmt: skip
def test_errors_whole(call: Any, text: str) -> None:
    with pytest.raises(dilated.InvalidProblem) as caught:
        call()
    assert str(caught.value) == f"SlideEncoder: {text}"


def test_shifted_rows_are_asked_for_by_name() -> None:
    """GigaPath's own segments shift from 185,364 positions on; here 3 does not divide 8."""
    encoder = make_encoder(dilations=[3, 1, 1])
    encoder(*slide(7))
    with pytest.raises(dilated.Unsupported, match="row_shift"):
        encoder(*slide(8))
