"""choose_branches: the paper's and GigaPath's lists, and what its reasons promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dilated
from dilated.models import LongNet, choose_branches


@pytest.mark.parametrize(
    ("longest", "heads", "local", "segments", "dilations"),
    [
        (32_768, 12, 2048, (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12)),  # the paper
        (16_384, 16, 1024, (1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16)),  # torchscale
        (16_384, 4, 512, (512, 2048, 16384), (1, 2, 4)),  # few heads: fewer, longer steps
        (2048, 12, 2048, (2048,), (1,)),
        (10_000, 1, 64, (10_000,), (1,)),
        (2**40 + 1, 2, 2**40, (2**40, 2**41), (1, 2)),
    ],
)
def test_lists(
    longest: int, heads: int, local: int, segments: tuple[int, ...], dilations: tuple[int, ...]
) -> None:
    chosen = choose_branches(longest, heads, local=local)
    assert (chosen.segments, chosen.dilations) == (segments, dilations)
    assert str(chosen).splitlines()[0] == f"segments {list(segments)}, dilations {list(dilations)}"
    assert len(str(chosen).splitlines()) == 1 + len(chosen.reasons) > 1


@given(
    longest=st.integers(1, 300),
    kv_heads=st.integers(1, 12),
    repeats=st.integers(1, 2),
    local=st.integers(1, 64),
)
def test_promises(longest: int, kv_heads: int, repeats: int, local: int) -> None:
    """The longest segment holds the sequence, every position of it is kept by some head in every
    branch, a model can be made of it, and no branch costs more than the local one.
    """
    heads = kv_heads * repeats
    chosen = choose_branches(longest, heads, num_kv_heads=kv_heads, local=local)
    assert chosen.segments[-1] >= longest or chosen.segments == (local,)
    assert chosen.segments[-1] >= longest
    lists = {"segments": chosen.segments, "dilations": chosen.dilations}
    offsets = dilated.plan(longest, heads, num_kv_heads=kv_heads, head_dim=4, **lists).offsets
    for row, dilation in zip(offsets, chosen.dilations, strict=True):
        assert set(row) == set(range(dilation))
    assert list(chosen.dilations) == sorted(set(chosen.dilations))
    assert list(chosen.segments) == sorted(chosen.segments)
    LongNet(4 * heads, 1, heads, num_kv_heads=kv_heads, **lists)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"longest": 0, "num_heads": 1}, "longest: expected >= 1, got 0"),
        (
            {"longest": 9, "num_heads": 4, "num_kv_heads": 3},
            "num_kv_heads: expected a divisor of num_heads = 4, got 3",
        ),
    ],
)
def test_errors(arguments: dict[str, int], text: str) -> None:
    with pytest.raises(dilated.InvalidProblem) as caught:
        choose_branches(**arguments)
    assert str(caught.value) == f"choose_branches: {text}"
