"""torchscale's modules on this operator: numbers, what conversion keeps, what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchscale_restated
from torch import Tensor, nn
from torchscale_restated import arguments

import dilated
from dilated.compat import torchscale

RESTATED = torchscale_restated.DilatedAttention


def upstream(subln: bool = True, heads: int = 4, **changes: Any) -> nn.Module:
    """A restated upstream module with every parameter away from its start."""
    torch.manual_seed(1)
    module = torchscale_restated.DilatedAttention(
        arguments(**changes), 4 * heads, heads, self_attention=True, subln=subln
    ).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def rows(batch: int, n: int, dim: int = 16) -> Tensor:
    return torch.randn(batch, n, dim, dtype=torch.float64)


class Encoder(nn.Module):
    """Layers with an attention each, as in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": upstream()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["self_attn"](x, x, x)[0]
        return x


NUMBERS: dict[str, dict[str, Any]] = {
    "two branches": {},
    "tuples of numpy integers": {
        "segment_length": (np.int64(4), np.int32(8)),
        "dilated_ratio": tuple(np.array([1, 2])),
    },
    "more ratios than segments": {"dilated_ratio": [1, 2, 4, 8]},
    "descending segments": {"segment_length": [8, 4], "dilated_ratio": [2, 1]},
    "no branch with r = 1": {"dilated_ratio": [2, 4]},
    "r does not divide the heads": {"segment_length": [4, 9], "dilated_ratio": [1, 3]},
    "shifted rows": {"segment_length": [5, 6], "dilated_ratio": [2, 4]},
    "xPos": {"xpos_rel_pos": True},
    "no inner norm": {"subln": False},
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [1, 2, 9, 23])
@pytest.mark.parametrize("name", NUMBERS)
def test_converted_modules_give_upstreams_numbers(name: str, n: int, is_causal: bool) -> None:
    module = upstream(**NUMBERS[name])
    x = rows(2, n)
    want, _ = module(x, x, x, is_causal=is_causal)
    converted = torchscale.convert(module, row_shift=True if name == "shifted rows" else None)
    out, weights = converted(x, x, x, is_causal=is_causal)
    assert weights is None
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("xpos", [False, True])
def test_our_class_takes_upstreams_state_dict(xpos: bool) -> None:
    theirs = upstream(xpos_rel_pos=xpos)
    texts = {"segment_length": "[4, 8]", "dilated_ratio": "(1, 2)"}
    args = arguments(xpos_rel_pos=xpos, **texts)
    ours = torchscale.DilatedAttention(args, 16, 4, self_attention=True, subln=True).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = rows(1, 9)
    torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x)[0], rtol=1e-10, atol=1e-10)


def test_conversion_keeps_objects_parameters_names_and_hooks() -> None:
    model = Encoder()
    x = rows(2, 9)
    want = model(x)
    modules, parameters = list(model.modules()), list(model.parameters())
    names = list(model.state_dict())
    seen = []
    model.layers[0]["self_attn"].register_forward_hook(lambda *_: seen.append(1))
    assert torchscale.convert(model) is model
    assert list(model.modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)
    assert seen
    for again in (copy.deepcopy(model.eval()), pickle.loads(pickle.dumps(model.layers[1]))):
        assert any(isinstance(m, torchscale.DilatedAttention) for m in again.modules())
    assert not any(module.training for module in model.modules())


def test_every_parameter_gets_a_gradient() -> None:
    module = torchscale.convert(upstream(xpos_rel_pos=True))
    x = rows(2, 9)
    module(x, x, x)[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        # A bias of keys moves all scores of a query alike, but for the phantom keys'.
        assert parameter.grad.abs().max() > 0, name


def test_shifted_rows_need_a_decision() -> None:
    lists = {"segment_length": [5, 6], "dilated_ratio": [2, 3]}
    module = torchscale.convert(upstream(**lists))
    x = rows(1, 5)
    module(x, x, x)
    x = rows(1, 6)
    with pytest.raises(dilated.Unsupported) as caught:
        module(x, x, x)
    assert str(caught.value) == (
        "compat.torchscale: args.dilated_ratio: expected ratios that divide their segments in "
        "sequences longer than these, got segment 5 with ratio 2 at 6 positions (upstream shifts "
        "the rows of later segments there: convert(model, row_shift=True) computes that, for "
        "weights trained so; row_shift=False computes every row in its place)"
    )
    shifted = torchscale.convert(module, row_shift=True)(x, x, x)[0]
    in_place = torchscale.convert(module, row_shift=False)(x, x, x)[0]
    assert not torch.allclose(shifted, in_place)
    assert "row_shift=False" in repr(module)


@pytest.mark.parametrize("row_shift", [None, True])
def test_padding_shortens_the_sequence(row_shift: bool | None) -> None:
    """Rows of a padded batch are those alone; what is padded is never read, and gives 0."""
    lists = {"segment_length": [5, 9], "dilated_ratio": [2, 4]} if row_shift else {}
    module = torchscale.convert(upstream(subln=False, **lists), row_shift=row_shift)
    lengths = [11, 4, 0, 6]
    x = rows(4, 11)
    padding = torch.arange(11) >= torch.tensor(lengths)[:, None]
    padded = x.masked_fill(padding[..., None], torch.nan)
    out, _ = module(padded, padded, padded, key_padding_mask=padding)
    for row, alone, length in zip(out, x, lengths, strict=True):
        one = alone[None, :length]
        torch.testing.assert_close(
            row[:length], module(one, one, one)[0][0], rtol=1e-12, atol=1e-12
        )
        assert torch.equal(row[length:], module.out_proj.bias.expand(11 - length, -1))
    whole, _ = module(x, x, x, key_padding_mask=torch.zeros(4, 11, dtype=torch.bool))
    assert torch.equal(whole, module(x, x, x)[0])


def test_padding_elsewhere_leaves_keys_out() -> None:
    module = torchscale.convert(upstream(subln=False))
    x = rows(2, 9)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[:, 0] = padding[1, 4:6] = padding[1, 8] = True
    out, _ = module(x, x, x, key_padding_mask=padding)
    q, k, v = module._project(x, x, x)
    want = dilated.dilated_attention(
        q, k, v, segments=[4, 8], dilations=[1, 2], preset="torchscale", seqused=[9, 8],
        key_mask=~padding,
    )  # fmt: skip
    torch.testing.assert_close(out, module.out_proj(want.flatten(-2)))
    as_float = torch.zeros(2, 9).masked_fill(padding, -torch.inf)
    assert torch.equal(module(x, x, x, key_padding_mask=as_float)[0], out)


@pytest.mark.parametrize("xpos", [False, True])
def test_cached_decoding_gives_the_rows_of_one_call(xpos: bool) -> None:
    """Prompt, then one or three tokens at a time; the cache may be reordered, as in beam search."""
    module = torchscale.convert(upstream(xpos_rel_pos=xpos))
    x = rows(2, 21)
    causal = torch.full((21, 21), -torch.inf, dtype=torch.float64).triu(1)
    want, _ = module(x, x, x, attn_mask=causal)
    state: dict[str, Tensor] = {}
    done, outs = 0, []
    for step in (7, 1, 1, 3, 1, 8):
        part = x[:, done : done + step]
        first = done == 0
        outs.append(module(part, part, part, state, is_first_step=first, is_causal=True)[0])
        done += step
        state = {name: rows.flip(0).flip(0) for name, rows in state.items()}
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-10, atol=1e-10)
    assert state["prev_key"].shape == (2, 4, 21, 4)


def test_dropout_acts_in_training_and_in_eval_only_if_asked() -> None:
    module = torchscale.convert(upstream())
    module.dropout = 0.5
    x = rows(2, 9)

    def twice() -> bool:
        return torch.equal(module(x, x, x)[0], module(x, x, x)[0])

    assert not twice()
    module.eval()
    assert twice()
    torchscale.convert(module, dropout_in_eval=True)
    assert not twice()
    assert "dropout_in_eval=True" in repr(module)


def test_multiway_has_two_copies_and_splits_positions() -> None:
    args = arguments(multiway=True)
    module = torchscale.DilatedAttention(args, 16, 4, self_attention=True, subln=True).double()
    assert "q_proj.A.weight" in module.state_dict()
    assert "inner_attn_ln.B.bias" in module.state_dict()
    x = rows(1, 6)
    whole = module(x, x, x)[0]
    for part in module.modules():
        if hasattr(part, "split_position"):
            part.split_position = 2
    torch.testing.assert_close(module.q_proj(x)[:, :2], module.q_proj.A(x)[:, :2])
    torch.testing.assert_close(module.q_proj(x)[:, 2:], module.q_proj.B(x)[:, 2:])
    assert not torch.allclose(module(x, x, x)[0], whole)


def test_thirty_thousand_sequences_of_one_position() -> None:
    module = torchscale.convert(upstream()).float()
    x = torch.randn(30_000, 1, 16)
    out, _ = module(x, x, x)
    torch.testing.assert_close(out[-1:], module(*[x[-1:]] * 3)[0])


def test_half_types_and_autocast() -> None:
    module = torchscale.convert(upstream()).float()
    x = torch.randn(2, 9, 16)
    want, _ = module(x, x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = module(x, x, x)
    torch.testing.assert_close(out.float(), want, rtol=0.1, atol=0.1)
    with pytest.raises(dilated.InvalidProblem, match=r"query: expected torch\.float32, as"):
        module(*[x.half()] * 3)
    module.half()
    out, _ = module(*[x.half()] * 3)
    torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05)


def test_compiles_in_one_graph() -> None:
    module = torchscale.convert(upstream())
    x = rows(2, 9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x)[0], module(x, x, x)[0])
    padding = torch.arange(9) >= torch.tensor([[9], [5]])
    torch.testing.assert_close(
        compiled(x, x, x, key_padding_mask=padding)[0], module(x, x, x, key_padding_mask=padding)[0]
    )


def test_install_replaces_the_class_wherever_it_was_imported() -> None:
    """GigaPath's model module lies in another package than the class that it imports."""
    component, model = ModuleType("scaled.component"), ModuleType("slides.model")
    component.DilatedAttention = torchscale_restated.DilatedAttention  # type: ignore[attr-defined]
    model.DilatedAttention = component.DilatedAttention  # type: ignore[attr-defined]
    modules = {"scaled": ModuleType("scaled"), component.__name__: component, model.__name__: model}
    pickled = pickle.dumps(upstream())
    sys.modules.update(modules)
    try:
        for package in ("scaled", modules["scaled"]):
            places = torchscale.install(package)
            assert {"scaled.component.DilatedAttention", "slides.model.DilatedAttention"} <= set(
                places
            )
        assert model.DilatedAttention is torchscale.DilatedAttention
        # The restatement itself is among what imported the class.
        assert torchscale_restated.DilatedAttention is torchscale.DilatedAttention
        x = rows(1, 9)
        want = torchscale.convert(upstream())(x, x, x)[0]
        torch.testing.assert_close(pickle.loads(pickled)(x, x, x)[0], want)
    finally:
        torchscale_restated.DilatedAttention = RESTATED  # type: ignore[misc]
        for name in modules:
            del sys.modules[name]


def test_install_takes_no_other_class_of_that_name() -> None:
    for package in ("scaled", "dilated"):
        with pytest.raises(dilated.InvalidProblem) as caught:
            torchscale.install(package)
        assert str(caught.value) == (
            "compat.torchscale.install: package: expected a package whose imported modules have "
            f"torchscale's class DilatedAttention, got '{package}' (import the modules that build "
            "the model first)"
        )
    with pytest.raises(dilated.InvalidProblem, match="package: expected a package or its name, go"):
        torchscale.install(3)  # type: ignore[arg-type]


def test_projections_without_parameters() -> None:
    """As quantised ones are: what they hold are no parameters."""
    module = torchscale.convert(upstream()).float()
    weight, bias = module.q_proj.weight.detach(), module.q_proj.bias.detach()
    x = torch.randn(1, 9, 16)
    want, _ = module(x, x, x)

    class Frozen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, weight, bias)

    module.q_proj = Frozen()
    torch.testing.assert_close(module(x, x, x)[0], want)


class Derived(torchscale_restated.DilatedAttention):
    """Somebody's own."""


def test_what_cannot_be_converted_is_named() -> None:
    with pytest.raises(
        dilated.InvalidProblem, match="model: expected a model with modules of torch"
    ):
        torchscale.convert(nn.Sequential(dilated.DilatedAttention([4], [1])))
    derived = Derived(arguments(), 16, 4, self_attention=True)
    with pytest.raises(dilated.Unsupported, match=r"model\.1: expected an unchanged Dilated.*, "
                       "got Derived, a class derived from it"):  # fmt: skip
        torchscale.convert(nn.Sequential(upstream(), derived))
    patched = upstream()
    patched.forward = patched.forward
    with pytest.raises(dilated.Unsupported, match="got an object with a forward of its own"):
        torchscale.convert(patched)
    model = nn.Sequential(upstream(), upstream(segment_length="[4, x]"))
    with pytest.raises(
        dilated.InvalidProblem, match=r"args.segment_length: expected a list of integ"
    ):
        torchscale.convert(model)
    assert type(model[0]) is torchscale_restated.DilatedAttention  # nothing was changed
    model[1] = upstream(segment_length=[4, 0])
    with pytest.raises(dilated.InvalidProblem, match=r"segments\[1\]: expected 1 <= segment"):
        torchscale.convert(model)
    assert type(model[0]) is torchscale_restated.DilatedAttention
    with pytest.raises(dilated.InvalidProblem, match="model: expected a module, got list"):
        torchscale.convert([model])  # type: ignore[type-var]
    broken = upstream()
    del broken.args.seq_parallel
    with pytest.raises(dilated.InvalidProblem, match=r"args: expected the attributes .*seq_par"):
        torchscale.convert(broken)


UNSUPPORTED, INVALID = dilated.Unsupported, dilated.InvalidProblem
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rel_pos": torch.zeros(1)}, UNSUPPORTED, "rel_pos: expected None, got a tensor"),
    ({"attn_mask": torch.zeros(9, 9)}, UNSUPPORTED, "attn_mask: expected None, or the causal"),
    ({"key": rows(2, 8)}, UNSUPPORTED, r"key: expected shape \(2, 9, 16\), got shape \(2, 8"),
    ({"query": rows(2, 9, 12)}, INVALID, r"query: expected \(batch, seqlen, 16\)"),
    (
        {"key_padding_mask": torch.zeros(2, 8, dtype=torch.bool)},
        INVALID,
        r"key_padding_mask: expected shape \(2, 9\), got shape \(2, 8\)",
    ),
    ({"key": None}, INVALID, "key: expected a tensor, got NoneType"),
    ({"key_padding_mask": [[True]]}, INVALID, "key_padding_mask: expected a tensor, got list"),
    (
        {"incremental_state": {"prev_key": torch.zeros(3, 4, 5, 4)}},
        INVALID,
        r"incremental_state\['prev_key'\]: expected shape \(2, 4, positions, 4\), got shape \(3, 4",
    ),
    ({"key_padding_mask": torch.full((2, 9), 0.5)}, UNSUPPORTED, "key_padding_mask: expected 0"),
]


@pytest.mark.parametrize(("changes", "error", "text"), REFUSED, ids=lambda x: str(x)[:30])
def test_calls_that_cannot_be_honoured(
    changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    module = torchscale.convert(upstream())
    x = rows(2, 9)
    with pytest.raises(error, match=text):
        module(**{"query": x, "key": x, "value": x, **changes})


def test_constructor_arguments() -> None:
    with pytest.raises(
        dilated.InvalidProblem, match="self_attention: expected exactly one of it and"
    ):
        torchscale.DilatedAttention(arguments(), 16, 4)
    with pytest.raises(
        dilated.InvalidProblem, match="num_heads: expected a divisor of embed_dim = 16"
    ):
        torchscale.DilatedAttention(arguments(), 16, 3, self_attention=True)


_RANKS = """
import os, sys
import torch
from dilated import Unsupported
from dilated.compat import torchscale
from torchscale_restated import arguments
store, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
x = torch.randn(1, 8, 16)
for parallel in (False, True):
    args = arguments(seq_parallel=parallel)
    module = torchscale.DilatedAttention(args, 16, 4, self_attention=True)
    try:
        module(x, x, x)
        print("ran")
    except Unsupported as error:
        print(error)
torch.distributed.barrier()  # a rank that ends early breaks the other's connection
torch.distributed.destroy_process_group()
"""


def test_several_ranks_are_not_taken_for_one(tmp_path: Any) -> None:
    """Upstream's seq_parallel gathers keys of other ranks; that is not there yet."""
    init = f"file://{tmp_path / 'store'}"
    path = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", path + _RANKS, init, str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert out.splitlines() == [
            "ran",
            "compat.torchscale: args.seq_parallel: expected False with several ranks, got True "
            "with 2 (one sequence over several ranks is not implemented yet)",
        ]


def test_a_call_that_fails_leaves_the_cache_as_it_was() -> None:
    """The next call works, and gives what it would have given."""
    module = torchscale.convert(upstream())
    x = rows(2, 9)
    want, _ = module(x, x, x, is_causal=True)
    state: dict[str, Tensor] = {}
    outs = []
    for part in (x[:, :6], x[:, 6:]):
        before = dict(state)
        with pytest.raises(dilated.InvalidProblem, match="key_padding_mask: expected shape"):
            module(part, part, part, state, torch.zeros(2, 1, dtype=torch.bool), is_causal=True)
        assert state == before
        outs.append(module(part, part, part, state, is_causal=True)[0])
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-10, atol=1e-10)
