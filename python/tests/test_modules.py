"""Modules: copies, state, refusals, masks, equality with plain torch. R9, R10, R11, X3, X9."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from public_modules import LISTS, MODULES, inputs, output
from torch import Tensor, nn

import dilated
from dilated import InvalidProblem, Unsupported, models


def _multihead(**options: Any) -> dilated.MultiheadDilatedAttention:
    return dilated.MultiheadDilatedAttention(32, 4, **LISTS, **options)


def _through_bytes(value: Any, save: Any, load: Any) -> Any:
    buffer = io.BytesIO()
    save(value, buffer)
    buffer.seek(0)
    return load(buffer)


def _into_new(name: str, state: dict[str, Tensor]) -> nn.Module:
    module = MODULES[name]()
    module.load_state_dict(state)
    return module


COPIES: dict[str, Callable[[str, nn.Module], nn.Module]] = {
    "deepcopy": lambda _, m: copy.deepcopy(m),
    "pickle": lambda _, m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda _, m: _through_bytes(
        m, torch.save, lambda b: torch.load(b, weights_only=False)
    ),
    "weights_only": lambda name, m: _into_new(
        name,
        _through_bytes(m.state_dict(), torch.save, lambda b: torch.load(b, weights_only=True)),
    ),
    "safetensors": lambda name, m: _into_new(
        name, safetensors.torch.load(safetensors.torch.save(m.state_dict()))
    ),
}


def _train(name: str, module: nn.Module, steps: int = 3) -> list[Tensor]:
    """Losses of the steps, then the parameters."""
    torch.manual_seed(5)
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1) if parameters else None
    record = [_step(name, module, optimizer) for _ in range(steps)]
    return record + [p.detach().clone() for p in parameters]


def _step(name: str, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> Tensor:
    loss = output(module, inputs(name)).square().mean()
    if optimizer is not None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def test_the_table_holds_every_public_module() -> None:
    public = {
        name
        for package in (dilated, models)
        for name in package.__all__
        if isinstance(getattr(package, name), type)
        and issubclass(getattr(package, name), nn.Module)
    }
    assert public <= MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_trains_like_the_original(name: str, how: str) -> None:
    """R9: also a copy made after use."""
    original = MODULES[name]()
    _train(name, copy.deepcopy(original))
    duplicate = COPIES[how](name, original)
    assert type(duplicate) is type(original)
    for a, b in zip(_train(name, original), _train(name, duplicate), strict=True):
        assert torch.equal(a, b)
    again = copy.deepcopy(original)
    for a, b in zip(_train(name, original), _train(name, again), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "DilatedAttention"])
def test_training_resumes_bit_for_bit(name: str) -> None:
    """R9: weights, optimizer and generator through a file that holds tensors only."""
    module = MODULES[name]()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    for _ in range(2):
        _step(name, module, optimizer)
    saved = {
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": torch.get_rng_state(),
    }
    loaded = _through_bytes(saved, torch.save, lambda b: torch.load(b, weights_only=True))
    expected = [_step(name, module, optimizer) for _ in range(2)]
    resumed = _into_new(name, loaded["module"])
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.01)
    optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["generator"])
    assert [_step(name, resumed, optimizer) for _ in range(2)] == expected
    for a, b in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODULES)
def test_half_types(name: str) -> None:
    """R11: a module in a half type, and under autocast: dtype and size of the error.

    A wrong cast or a lost mask errs by the size of the output; rounding errs in proportion to the
    unit roundoff, 2^-8 and 2^-11.
    """
    module = MODULES[name]().eval()
    given = inputs(name)
    exact = output(module, given).detach()
    errors = {}
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(module).to(dtype)
        halves = tuple(x.to(dtype) if x.is_floating_point() else x for x in given)
        out = output(cast, halves)
        assert out.dtype == dtype
        errors[dtype] = [float((out.detach().float() - exact).abs().max())]
        with torch.autocast("cpu", dtype):
            errors[dtype].append(
                float((output(module, given).detach().float() - exact).abs().max())
            )
        if list(cast.parameters()):
            out.float().square().mean().backward()
        trained = [p for p in cast.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.dtype == dtype for p in trained)
    for way in range(2):
        assert errors[torch.bfloat16][way] < 0.1 * float(exact.abs().max())
        assert errors[torch.float16][way] < errors[torch.bfloat16][way] / 2


MIXED = [name for name in MODULES if name not in ("LongNetLM", "stack")]


@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes_are_named(name: str) -> None:
    """R11."""
    given = inputs(name, dtype=torch.float64)
    wanted = r"(query|x): expected .*torch.float32, as the parameters, got torch.float64"
    if name == "DilatedAttention":
        given = (given[0].float(), *given[1:])
        wanted = "key: expected .*float32.*got .*float64"
    with pytest.raises(InvalidProblem, match=wanted):
        MODULES[name]()(*given)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "DilatedAttention"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    """X9; but a key bias may shift all scores of a row alike, without any effect."""
    module = MODULES[name]().eval()
    output(module, inputs(name)).square().sum().backward()
    for parameter, values in module.named_parameters():
        if values.requires_grad:
            assert values.grad is not None, parameter
            assert parameter.endswith("k_proj.bias") or bool(values.grad.any()), parameter


def test_state_dict_names_and_weights_only_load() -> None:
    module = _multihead(num_kv_heads=2)
    names = {f"{p}_proj.{x}" for p in ("q", "k", "v", "out") for x in ("weight", "bias")}
    assert set(module.state_dict()) == names
    loaded = _through_bytes(
        module,
        lambda m, b: torch.save(m.state_dict(), b),
        lambda b: torch.load(b, weights_only=True),
    )
    module.load_state_dict(loaded)


def test_equals_torch_multihead_attention_when_dense() -> None:
    """M1 through the module, with a key padding mask; weights are nn.MultiheadAttention's."""
    torch_module = nn.MultiheadAttention(32, 4, batch_first=True)
    module = dilated.MultiheadDilatedAttention(32, 4, segments=[64], dilations=[1])
    chunks = zip(
        (module.q_proj, module.k_proj, module.v_proj),
        torch_module.in_proj_weight.chunk(3),
        torch_module.in_proj_bias.chunk(3),
        strict=True,
    )
    with torch.no_grad():
        for projection, weight, bias in chunks:
            projection.weight.copy_(weight)
            projection.bias.copy_(bias)
        module.out_proj.load_state_dict(torch_module.out_proj.state_dict())
    x = torch.randn(2, 11, 32)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[0, 7:] = True
    wanted, _ = torch_module(x, x, x, key_padding_mask=padding, need_weights=False)
    got, weights = module(x, x, x, key_padding_mask=padding, need_weights=False)
    assert weights is None
    torch.testing.assert_close(got, wanted)


def test_key_padding_mask_acts() -> None:
    """R10, X4: padded tokens change no bit of the others."""
    module = _multihead()
    x = torch.randn(2, 20, 32)
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[:, 15:] = True
    other = x.clone()
    other[:, 15:] = 1e6
    a, _ = module(x, key_padding_mask=padding)
    b, _ = module(other, key_padding_mask=padding)
    assert torch.equal(a[:, :15], b[:, :15])
    assert not torch.equal(a, module(x)[0])


def test_causal_by_call_or_by_constructor() -> None:
    x = torch.randn(1, 20, 32)
    module, causal = _multihead(), _multihead(is_causal=True)
    causal.load_state_dict(module.state_dict())
    assert torch.equal(module(x, is_causal=True)[0], causal(x)[0])
    assert not torch.equal(module(x)[0], causal(x)[0])


def test_factory_arguments_and_meta_initialisation() -> None:
    """R11: constructors choose no device and no dtype."""
    assert {p.device.type for p in _multihead().parameters()} == {"cpu"}
    module = _multihead(dtype=torch.float64, bias=False)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert module.q_proj.bias is None
    module(torch.randn(1, 9, 32, dtype=torch.float64))
    meta = _multihead(device="meta")
    assert meta(torch.empty(1, 9, 32, device="meta"))[0].shape == (1, 9, 32)
    meta.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in meta.parameters():
            parameter.fill_(torch.nan)  # what unwritten memory may hold
    meta.reset_parameters()
    assert bool(torch.isfinite(meta(torch.randn(1, 9, 32))[0]).all())


CONSTRUCTOR: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batch_first": False}, Unsupported,
     "batch_first: expected True, got False (transpose (seqlen, batch, embed_dim) inputs)"),
    ({"add_bias_kv": True}, Unsupported,
     "add_bias_kv: expected False, got True (an extra key has no position)"),
    ({"add_zero_attn": True}, Unsupported,
     "add_zero_attn: expected False, got True (an extra key has no position)"),
    ({"kdim": 16}, Unsupported, "kdim: expected embed_dim = 32, got 16 (self-attention only)"),
    ({"vdim": 16}, Unsupported, "vdim: expected embed_dim = 32, got 16 (self-attention only)"),
    ({"layout": "bhsd"}, Unsupported,
     "layout: expected none, got 'bhsd' (inputs are (batch, seqlen, embed_dim))"),
    ({"dropout_p": 0.1}, Unsupported,
     "dropout_p: expected none, got 0.1 (the argument is dropout)"),
    ({"preset": "fkodom", "is_causal": True}, Unsupported,
     "is_causal: expected False with preset 'fkodom', got True "
     "(it divides by sums over all positions, later ones too)"),
    ({"num_kv_heads": 3}, InvalidProblem,
     "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
    ({"segments": "[8]", "dilations": [1]}, InvalidProblem,
     "segments: expected a sequence of integers, got '[8]'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "text"), CONSTRUCTOR, ids=lambda x: str(x)[:40])
def test_constructor_refuses(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        dilated.MultiheadDilatedAttention(32, 4, **{**LISTS, **options})
    assert str(caught.value) == f"dilated_attention: {text}"


def test_constructor_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(
        InvalidProblem, match="num_heads: expected a divisor of embed_dim = 32, got 5"
    ):
        dilated.MultiheadDilatedAttention(32, 5, **LISTS)


CALL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"need_weights": True}, Unsupported,
     "need_weights: expected False, got True (weights are never formed)"),
    ({"attn_mask": torch.zeros(20, 20)}, Unsupported,
     "attn_mask: expected None, or the causal mask, got another mask "
     "(use is_causal or key_padding_mask)"),
    ({"attn_mask": torch.zeros(8, 20, 20)}, Unsupported,
     "attn_mask: expected None, or the causal mask, got shape (8, 20, 20) "
     "(use is_causal or key_padding_mask)"),
    ({"attn_mask": torch.ones(20, 20).tril().log(), "is_causal": False,
      "key_padding_mask": torch.full((2, 20), -1.0)}, Unsupported,
     "key_padding_mask: expected 0 and -inf, got other numbers "
     "(biases of scores are not supported)"),
    ({"key_padding_mask": torch.zeros(2, 20, dtype=torch.int64)}, Unsupported,
     "key_padding_mask: expected bool or float, got torch.int64 (True or -inf: key is ignored)"),
    ({"key_padding_mask": torch.zeros(20, dtype=torch.bool)}, Unsupported,
     "key_mask: expected bool of shape (2, 20), got bool of shape (20,) "
     "(True = key takes part; no other form of mask is supported)"),
    ({"query": torch.zeros(20, 32)}, InvalidProblem,
     "query: expected 3 dimensions (batch, seqlen, embed_dim), got shape (20, 32)"),
    ({"key": torch.zeros(2, 19, 32)}, InvalidProblem,
     "key: expected shape (2, 20, 4, 8), got (2, 19, 4, 8) "
     "(batch, seqlen and head_dim as query; key and value have the same heads)"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "text"), CALL, ids=lambda x: str(x)[:40])
def test_call_refuses(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        _multihead()(**{"query": torch.zeros(2, 20, 32), **options})
    assert str(caught.value) == f"dilated_attention: {text}"


def test_lse_and_masks_through_the_operator_module() -> None:
    module = dilated.DilatedAttention(**LISTS, merge="mean", layout="shd")
    x = torch.randn(12, 4, 8)
    out, lse = module(x, x, x, cu_seqlens=[0, 5, 12], seqused=[4, 7], return_lse=True)
    wanted = dilated.dilated_attention(
        x, x, x, **LISTS, merge="mean", layout="shd", cu_seqlens=[0, 5, 12], seqused=[4, 7]
    )
    assert torch.equal(out, wanted)
    assert lse.shape == (4, 12)
    assert "segments=(8, 32)" in repr(module)


def test_a_causal_call_refuses_a_preset_that_sees_the_future() -> None:
    module = _multihead(preset="fkodom")
    x = torch.randn(1, 20, 32)
    module(x)
    with pytest.raises(Unsupported, match="is_causal: expected False with preset 'fkodom'"):
        module(x, is_causal=True)


def test_repr_shows_values_that_are_false() -> None:
    """Options that differ from their defaults, 0.0 and False too; no others."""
    module = dilated.DilatedAttention(**LISTS, scale=0.0, lse_grad=False, dropout_p=0.0)
    text = "segments=(8, 32), dilations=(1, 4), scale=0.0, lse_grad=False"
    assert module.extra_repr() == text
