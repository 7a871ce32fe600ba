"""Attention without projections: the numbers of the classes, which are those of preset "fork"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from restated import DILATIONS, SEGMENTS, attention

import dilated
from dilated.distributed import SequenceGroups
from dilated_attention_pytorch import (
    DilatedAttention,
    ImprovedDilatedAttention,
    RingDilatedAttention,
    UnfoldRingDilatedAttention,
)

CLASSES = [DilatedAttention, ImprovedDilatedAttention, RingDilatedAttention]
# float64 sums of at most 50 terms of size 1.
ROUNDING = 1e-13


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 4))
    return {
        "segments": draw(st.lists(st.integers(1, 20), min_size=groups, max_size=groups)),
        "dilations": draw(st.lists(st.integers(1, 6), min_size=groups, max_size=groups)),
        "heads": draw(st.integers(groups, 7)),
        "n": draw(st.integers(0, 50)),
        "is_causal": draw(st.booleans()),
        "masked": draw(st.booleans()),
        "cls": draw(st.sampled_from(CLASSES)),
    }


@given(problem=problems())
@settings(settings.get_profile("compat"))
def test_any_problem_is_what_the_restatement_says(problem: dict[str, Any]) -> None:
    """Output and gradients; lengths that nothing divides, rows that no group covers."""
    lists = problem["segments"], problem["dilations"]
    shape = (3, 2, problem["n"], problem["heads"], 5)
    ours = [x.requires_grad_() for x in torch.randn(shape, dtype=torch.float64).unbind()]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    key_mask = torch.rand(2, problem["n"]) > 0.4 if problem["masked"] else None
    options = {"is_causal": problem["is_causal"], "key_mask": key_mask}

    out = problem["cls"](*lists, strict_lengths=False)(*ours, **options)
    expected = attention(*theirs, *lists, **options)
    dout = torch.randn_like(out)
    for result, exact in zip(
        (out, *torch.autograd.grad(out, ours, dout)),
        (expected, *torch.autograd.grad(expected, theirs, dout)),
    ):
        torch.testing.assert_close(result, exact, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_has_the_bits_of_preset_fork(cls: type[torch.nn.Module]) -> None:
    q, k, v = torch.randn(3, 2, 32, 5, 24).unbind()
    expected = dilated.dilated_attention(
        q, k, v, segments=SEGMENTS, dilations=DILATIONS, preset="fork", is_causal=True
    )
    assert torch.equal(cls(SEGMENTS, DILATIONS)(q, k, v, is_causal=True), expected)


def test_softmax_scale_acts() -> None:
    q, k, v = torch.randn(3, 2, 32, 5, 24, dtype=torch.float64).unbind()
    out = DilatedAttention(SEGMENTS, DILATIONS, softmax_scale=0.7)(q, k, v)
    expected = attention(q, k, v, SEGMENTS, DILATIONS, scale=0.7)
    torch.testing.assert_close(out, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("cls", CLASSES)
def test_dropout_acts_once_and_in_training_only(cls: Any) -> None:
    """Once: with all values 1 a row is 1 / groups times a sum of kept weights over 1 - p. Among 64
    equal keys that is a multiple of 1/32; the package dropped whole outputs besides.
    """
    option = "attention_dropout" if cls is DilatedAttention else "dropout"
    module = cls([64], [1], **{option: 0.5})
    q, v = torch.zeros(1, 64, 64, 8), torch.ones(1, 64, 64, 8)
    assert torch.equal(module.eval()(q, q, v), v)
    out = module.train()(q, q, v)
    assert not torch.equal(out, v)
    torch.testing.assert_close(out * 32, (out * 32).round(), rtol=0, atol=1e-4)
    assert (out > 0).all()
    with torch.no_grad():
        assert not torch.equal(module(q, q, v), v)


@pytest.mark.parametrize("cls", CLASSES)
def test_strict_lengths_is_a_switch(cls: Any) -> None:
    x = torch.randn(1, 33, 4, 8)
    with pytest.raises(dilated.InvalidProblem, match="Sequence length must be divisible by"):
        cls(SEGMENTS, DILATIONS)(x, x, x)
    assert cls(SEGMENTS, DILATIONS, strict_lengths=False)(x, x, x).shape == x.shape
    assert cls(SEGMENTS, DILATIONS)(x[:, :0], x[:, :0], x[:, :0]).shape == (1, 0, 4, 8)


def test_attributes_are_the_options() -> None:
    for cls in CLASSES:
        module = cls(SEGMENTS, tuple(DILATIONS))
        assert (module.segment_lengths, module.dilation_rates) == (SEGMENTS, DILATIONS)
        assert (module.dropout, module.num_groups) == (0.0, 2)
        with pytest.raises(AttributeError):  # nothing would read what is set
            module.dropout = 0.5
    assert DilatedAttention([4], [1], 0.3).softmax_scale == 0.3
    assert UnfoldRingDilatedAttention is RingDilatedAttention


def test_compiles_without_breaks() -> None:
    q, k, v = torch.randn(3, 1, 32, 4, 8).unbind()
    module = DilatedAttention(SEGMENTS, DILATIONS)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, is_causal=True), module(q, k, v, is_causal=True))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_takes_ranks(cls: Any) -> None:
    """One rank stands for many: what travels is dilated.distributed's."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups = SequenceGroups()
        q, k, v = torch.randn(3, 1, 64, 4, 8).unbind(0)
        module = cls([16, 64], [1, 4])
        out = module(q, k, v, is_causal=True, sequence_groups=groups, shards=[64])
        assert torch.equal(out, module(q, k, v, is_causal=True))
        with pytest.raises(dilated.InvalidProblem, match="a multiple of 64 positions"):
            module(q[:, :60], k[:, :60], v[:, :60], sequence_groups=groups, shards=[60])
        with pytest.raises(dilated.InvalidProblem, match="shards: expected rows of every rank"):
            module(q, k, v, sequence_groups=groups)
    finally:
        dist.destroy_process_group()
