"""LongNetLM: parity with torchscale's formulas, gradients everywhere, copies, compile, batches of
sequences."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchscale_restated import torchscale_decoder

import dilated
from dilated import reference
from dilated.models import LongNetLM, apply_xpos, layers, xpos_tables

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "embed_dim": 32,
    "num_layers": 3,
    "num_heads": 4,
    "segments": [8, 16, 64],
    "dilations": [1, 2, 4],
}


def make_model(**changes: Any) -> LongNetLM:
    return LongNetLM(**{**SIZES, **changes})


def random_weights(model: LongNetLM) -> LongNetLM:
    """Every parameter away from its start, norms and biases included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("changes", "embed_scale"),
    [({}, 1.0), ({"scale_embedding": True}, math.sqrt(32)), ({"num_kv_heads": 2}, 1.0)],
)
def test_equals_torchscale_restated(changes: dict[str, Any], embed_scale: float) -> None:
    """X11: sub-LN, xPos on q and k, absolute positions; 1e-5 in float32."""
    model = random_weights(make_model(**changes)).eval()
    tokens = torch.randint(31, (2, 41))
    weights = {name: value.double() for name, value in model.state_dict().items()}
    with torch.no_grad():
        actual = model(tokens)
        for row in range(2):
            exact = torchscale_decoder(weights, tokens[row], {**SIZES, **changes}, embed_scale)
            assert (actual[row] - exact).abs().max() < 1e-5 * max(1.0, exact.abs().max())


def test_start_is_magnetos() -> None:
    """v, out, fc1, fc2 start sqrt(log(2 layers)) times wider than q and k (Xavier)."""
    model = make_model(embed_dim=256, num_layers=4)
    gamma = math.sqrt(math.log(8))
    for layer in model.layers:
        attn, ffn = layer.self_attn, layer.ffn
        for module, gain in (
            (attn.q_proj, 1.0), (attn.k_proj, 1.0), (attn.v_proj, gamma),
            (attn.out_proj, gamma), (ffn.fc1, gamma), (ffn.fc2, gamma),
        ):  # fmt: skip
            fan = sum(module.weight.shape)
            assert module.weight.std().item() == pytest.approx(gain * math.sqrt(2 / fan), rel=0.02)


def test_every_parameter_gets_a_gradient() -> None:
    """X11: no dead parameter."""
    model = make_model(num_kv_heads=2)
    model(torch.randint(31, (2, 40))).square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_causal() -> None:
    """A changed token changes no earlier logit, bit for bit."""
    model = make_model().eval()
    tokens = torch.randint(31, (1, 50))
    changed = tokens.clone()
    changed[0, 30] = (tokens[0, 30] + 1) % 31
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


def test_xpos_depends_on_distance_only() -> None:
    """The products of q and k at equal distance are equal; far ones fade."""
    tables = xpos_tables(200, 16, dtype=torch.float64)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)
    query = apply_xpos(q.expand(1, 200, 1, 16), tables.query)[0, :, 0]
    key = apply_xpos(k.expand(1, 200, 1, 16), tables.key)[0, :, 0]
    scores = query @ key.T
    for distance in (0, 1, 7, 100):
        diagonal = scores.diagonal(-distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_xpos_in_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(1, 4096, 2, 16).to(dtype)
    table = xpos_tables(4096, 16, dtype=dtype).query
    assert table.dtype == torch.float32
    exact = apply_xpos(x.double(), table.double())
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
    pair = exact.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    cancellation = 4 * torch.finfo(torch.float32).eps * pair  # of a cos - b sin in float32
    assert ((apply_xpos(x, table).double() - exact).abs() <= rounding + cancellation).all()


def test_copies_keep_the_function() -> None:
    model = make_model().eval()
    tokens = torch.randint(31, (1, 20))
    expected = model(tokens)
    other = make_model().eval()
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(twin(tokens), expected)


def test_compile_gives_one_graph() -> None:
    model = make_model(num_layers=1).eval()
    tokens = torch.randint(31, (1, 24))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert (compiled(tokens) - model(tokens)).abs().max() < 1e-5


def test_activation_checkpointing_changes_nothing() -> None:
    tokens = torch.randint(31, (1, 40))
    plain, saving = make_model(dropout=0.1), make_model(dropout=0.1, activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    losses = []
    for model in (plain, saving):
        torch.manual_seed(1)
        losses.append(model(tokens).square().mean())
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_bfloat16_autocast_runs() -> None:
    model = make_model().eval()
    tokens = torch.randint(31, (1, 40))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(tokens)
    assert (half.float() - model(tokens)).abs().max() < 0.2


def test_ten_optimiser_steps_equal_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient of ten AdamW steps: the operator against dilated.reference."""

    def definition(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        table = [[h % r for h in range(4)] for r in options["dilations"]]
        chosen = {name: options[name] for name in ("segments", "dilations", "is_causal")}
        return reference.dilated_attention(q, k, v, offsets=table, **chosen)[0]

    backend = "cpu"
    text = dilated.plan(64, 4, head_dim=8, segments=SIZES["segments"],
                        dilations=SIZES["dilations"], is_causal=True).explain()  # fmt: skip
    assert f"{backend}       runs this" in text, text
    tokens = torch.randint(31, (10, 2, 65))
    runs = []
    initial = make_model().state_dict()
    for attend in (dilated.dilated_attention, definition):
        monkeypatch.setattr(layers, "dilated_attention", attend)
        model = make_model()
        model.load_state_dict(initial)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        record = []
        for batch in tokens:
            logits = model(batch[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            record.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
            optimizer.step()
        runs.append(record)
    for step, ((ours, grads), (exact, exact_grads)) in enumerate(zip(*runs, strict=True)):
        assert abs(ours - exact) < 1e-5, step
        scale = max(g.abs().max().item() for g in exact_grads)
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            assert (grad - exact_grad).abs().max() < 1e-4 * scale, step


# --- sequences of different lengths ---------------------------------------------------------------


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    packed=st.booleans(),
    as_tensor=st.booleans(),
    padding=st.integers(-5, 40),
)
def test_a_batch_is_its_sequences_alone(
    lengths: list[int], packed: bool, as_tensor: bool, padding: int
) -> None:
    """Packed or padded, each sequence gets the logits and gives the gradients it has alone."""
    torch.manual_seed(0)
    model, twin = make_model(num_layers=2).double(), make_model(num_layers=2).double()
    twin.load_state_dict(model.state_dict())
    sequences = [torch.randint(31, (n,)) for n in lengths]
    convert = torch.tensor if as_tensor else list
    if packed:
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        logits = model(torch.cat(sequences), cu_seqlens=convert(starts)).split(lengths)
    else:
        tokens = torch.full((len(lengths), 41), padding)  # padding need not be a token
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = sequence
        rows = model(tokens, seqused=convert(lengths))
        logits = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    alone = [twin(sequence[None])[0] for sequence in sequences]
    for actual, expected in zip(logits, alone, strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-11)
    for every in (logits, alone):
        sum(part.square().sum() for part in every).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-10)


def test_masked_keys_reach_nobody() -> None:
    """A token whose key is masked changes its own logits only."""
    model = make_model().eval()
    tokens = torch.randint(31, (2, 40))
    changed = tokens.clone()
    changed[1, 7] = (tokens[1, 7] + 1) % 31
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 7] = False
    with torch.no_grad():
        before, after = model(tokens, key_mask=mask), model(changed, key_mask=mask)
        assert not torch.equal(model(tokens)[1, 8:], before[1, 8:])
    others = mask.clone()
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


def test_packed_length_limit_is_that_of_one_sequence() -> None:
    """xPos in float16 bounds a sequence, not the pack of many."""
    model = make_model(num_layers=1).half().eval()
    pack = torch.zeros(6000, dtype=torch.int64)
    assert model(pack, cu_seqlens=[0, 3000, 6000]).isfinite().all()
    with pytest.raises(dilated.InvalidProblem, match=r"^xpos_tables: seqlen: expected <= 4532 for"):
        model(pack, cu_seqlens=[0, 6000])


@pytest.mark.parametrize("kind", ["key_mask", "seqused", "cu_seqlens"])
def test_compiles_with_sequences(kind: str) -> None:
    model = make_model(num_layers=1).eval()
    tokens = torch.randint(31, (24,) if kind == "cu_seqlens" else (2, 24))
    value = {
        "key_mask": torch.arange(24).expand(2, 24) % 5 > 0,
        "seqused": torch.tensor([24, 7]),
        "cu_seqlens": torch.tensor([0, 10, 24]),
    }[kind]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = {kind: value}
    assert (compiled(tokens, **options) - model(tokens, **options)).abs().max() < 1e-5


@pytest.mark.parametrize("preset", dilated.presets())
def test_every_preset_is_causal_or_refused(preset: str) -> None:
    if preset == "fkodom":
        text = "LongNetLM: preset: expected a causal one, got 'fkodom' .*later ones included"
        with pytest.raises(dilated.Unsupported, match=text):
            make_model(preset=preset)
        return
    model = make_model(preset=preset).eval()
    tokens = torch.randint(31, (1, 50))
    changed = torch.cat((tokens[:, :30], (tokens[:, 30:] + 1) % 31), dim=1)
    with torch.no_grad():
        assert torch.equal(model(tokens)[:, :30], model(changed)[:, :30])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: make_model(embed_dim=36),
            "LongNetLM: embed_dim: expected a multiple of 2 * num_heads = 8, got 36 "
            "(xPos rotates pairs of head_dim = embed_dim / num_heads)",
        ),
        (
            lambda: make_model(num_kv_heads=3),
            "LongNetLM: num_kv_heads: expected a divisor of num_heads = 4, got 3",
        ),
        (lambda: make_model(num_layers=0), "LongNetLM: num_layers: expected >= 1, got 0"),
        (
            lambda: make_model(colour=1),
            "LongNetLM: colour: expected one of backend, gqa_offset, groups, lse_grad, merge, "
            "offsets, out_scale, preset, row_shift, scale, tail, got an unknown option",
        ),
        (
            lambda: xpos_tables(8, 7),
            "xpos_tables: head_dim: expected an even number, got 7 (pairs are rotated)",
        ),
        (
            lambda: xpos_tables(8192, 16, dtype=torch.float16),
            "xpos_tables: seqlen: expected <= 4532 for torch.float16 with scale_base = 512, "
            "got 8192 (use scale_base >= 926 or a wider dtype)",
        ),
        (lambda: make_model(dropout=1.5), "LongNetLM: dropout: expected 0 to 1, got 1.5"),
        (
            lambda: make_model()(torch.zeros(3, dtype=torch.int64)),
            "LongNetLM: tokens: expected integers (batch, seqlen), got torch.int64 of shape (3,)",
        ),
        (
            lambda: make_model()(torch.zeros(1, 3)),
            "LongNetLM: tokens: expected integers (batch, seqlen), got torch.float32 of shape "
            "(1, 3)",
        ),
        (
            lambda: make_model()(torch.zeros(1, 3, dtype=torch.int64), cu_seqlens=[0, 3]),
            "LongNetLM: tokens: expected integers (total,) with cu_seqlens, got torch.int64 of "
            "shape (1, 3)",
        ),
        (
            lambda: make_model()(torch.zeros(1, 3, dtype=torch.int64), seqused=[1, 2]),
            "LongNetLM: seqused: expected one length for each of 1 sequences, got shape (2,)",
        ),
        (
            lambda: make_model()(torch.zeros(3, dtype=torch.int64), cu_seqlens=[]),
            "LongNetLM: cu_seqlens: expected 0, ..., total, got shape (0,)",
        ),
    ],
)
def test_errors_whole(call: Any, text: str) -> None:
    with pytest.raises(dilated.InvalidProblem) as caught:
        call()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "options", [{"merge": "median"}, {"offsets": "nowhere"}, {"segments": [8]}, {"backend": "gpu"}]
)
def test_options_are_checked_when_built(options: dict[str, Any]) -> None:
    with pytest.raises((dilated.InvalidProblem, dilated.Unsupported)):
        make_model(**options)


@pytest.mark.parametrize("bounds", [[0, 2], [1, 3], [0, 5], [0, 2, 1, 3], [0, -1, 3]])
def test_bounds_that_do_not_fit_are_the_operators_error(bounds: list[int]) -> None:
    with pytest.raises(dilated.InvalidProblem, match="cu_seqlens"):
        make_model()(torch.zeros(3, dtype=torch.int64), cu_seqlens=bounds)
