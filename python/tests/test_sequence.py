"""Real Gloo processes that share sequences: one process's bits, and failures that are loud. R3, R4,
R20, X6, X8, X10.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sequence_cases import Sharded, TinyModel, cases, longnet, multihead, training_data
from torch import Tensor

import dilated
from dilated.distributed import SequenceGroups

WORKER = Path(__file__).with_name("sequence_worker.py")
# A hang is a failure, not a wait.
GUARD = 120
FAILURES = {"killed": 3, "stopped": 3, "late": 2, "raising": 2, "unheard": 2}  # scenario: ranks
HEADER_BYTES = 13 * 8


class Ranks:
    """Processes that run one scenario; each leaves a file of results."""

    def __init__(self, scenario: str, size: int, folder: Path) -> None:
        self._name, self._folder = f"{scenario}-{size}", folder
        source = str(Path(dilated.__file__).parents[1])
        path = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH", "")) if p)
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), scenario, str(folder), str(rank), str(size)],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(size)
        ]

    def results(self, survivors: int) -> list[dict[str, Any]]:
        """Those of the first `survivors` ranks, which must end well."""
        waited = self._processes[:survivors]
        try:
            errors = [process.communicate(timeout=GUARD)[1] for process in waited]
        finally:
            for process in self._processes:
                process.kill()
                process.communicate()
        codes = [process.returncode for process in waited]
        assert not any(codes), f"{codes}\n" + "\n".join(errors)
        files = [self._folder / f"{self._name}-{rank}.pt" for rank in range(survivors)]
        return [torch.load(file) for file in files]


@pytest.fixture
def alone() -> Iterator[SequenceGroups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield SequenceGroups()
    finally:
        dist.destroy_process_group()


def _ulps(actual: Tensor, expected: Tensor) -> float:
    """Largest difference in units in the last place of the largest number."""
    if expected.numel() == 0:
        return 0.0
    unit = torch.finfo(expected.dtype).eps * expected.abs().max().item()
    return (actual - expected).abs().max().item() / unit if unit > 0 else 0.0


def _assert_equal(sharded: Sharded, parts: list[dict[str, Tensor]]) -> None:
    """dK and dV are sums in another order: 4 units in the last place of float32, rounded once."""
    # Nothing is wider than float64: the square root of up to 300 addends, one rounding each.
    at_most = 17 if sharded.dtype == torch.float64 else 4
    rows_dim = 0 if sharded.cu_seqlens is not None else 1
    expected = sharded.run(dilated.dilated_attention, lambda x, dim: x)
    for name in ("out", "lse", "dquery", "dkey", "dvalue"):
        got = torch.cat([part[name] for part in parts], -1 if name == "lse" else rows_dim)
        if name in ("dkey", "dvalue"):
            assert _ulps(got, expected[name]) <= at_most, (sharded, name)
        else:
            bits = [x.contiguous().view(torch.uint8) for x in (got, expected[name])]
            assert torch.equal(*bits), (sharded, name)


def test_one_rank_is_one_process(alone: SequenceGroups) -> None:
    attention = partial(dilated.distributed.dilated_attention, sequence_groups=alone)
    for sharded in cases(1):
        _assert_equal(sharded, [sharded.run(attention, lambda x, dim: x)])


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_ranks_have_the_bits_of_one_process(size: int, tmp_path: Path) -> None:
    results = Ranks("cases", size, tmp_path).results(size)
    for number, sharded in enumerate(cases(size)):
        _assert_equal(sharded, [result["cases"][number] for result in results])
    for result in results:
        # Nothing at all where no segment crosses a border; else a header per pass and peer, and
        # 2 (m / size) Hk d elements of the far branch for each peer, m = 24 size.
        assert result["volumes"]["local"] == []
        rows = 2 * 24 * 4 * 8 * 4
        message = [HEADER_BYTES] * (size - 1) + [rows] * (size - 1)
        assert result["volumes"]["far"] == message * 2
    _assert_volumes([result["volumes"] for result in results])
    _assert_transports_are_exact(results)


def _assert_volumes(volumes: list[dict[str, list[int]]]) -> None:
    """Bytes of a causal call of one far branch with m = 24 size rows: forward and backward."""
    size = len(volumes)
    rows = 2 * 24 * 4 * 8 * 4  # of one rank, K and V
    for rank, sent in enumerate(volumes):
        headers = [HEADER_BYTES] * (size - 1)
        later, earlier = [rows] * (size - 1 - rank), [rows] * rank
        assert sent["all_to_all"] == headers + later + headers + earlier
        assert sent["all_gather"] == headers + [rows] * (size - 1) + headers + earlier
        # Packets go on until the last rank: rank r passes its own and those of r before.
        passed = [rows] * (rank + 1 if rank < size - 1 else 0)
        assert sorted(sent["ring"]) == sorted(2 * (headers + passed) + earlier)


def _assert_transports_are_exact(results: list[dict[str, Any]]) -> None:
    size, ran = len(results), Counter[str]()
    for number, sharded in enumerate(cases(size)[::3]):
        by_rank = [result["transports"][number] for result in results]
        for transport in by_rank[0]:
            runs = [result[transport] for result in by_rank]
            if isinstance(runs[0], str):
                refused = {"local": "transport: expected", "halo": "transport: expected"}
                word = refused.get(transport, "merge" if "merge" in runs[0] else "lse_grad")
                assert transport not in ("all_to_all", "all_gather")
                assert all(word in text for text in runs)
                continue
            ran[transport] += 1
            for run in runs:
                for name, tensor in run[0].items():
                    assert torch.equal(tensor, run[1][name]), "two runs"
            first = [run[0] for run in runs]
            if transport != "ring":
                _assert_equal(sharded, first)
                continue
            whole = sharded.run(dilated.dilated_attention, lambda x, dim: x)
            rows_dim = 0 if sharded.cu_seqlens is not None else 1
            for name, expected in whole.items():
                got = torch.cat([part[name] for part in first], -1 if name == "lse" else rows_dim)
                finite = expected.isfinite()
                assert torch.equal(got.isfinite(), finite)
                # A merge per rank, each rounded, forth and back.
                assert _ulps(got[finite], expected[finite]) <= 4 * size, (sharded, name)
    assert all(ran[name] for name in ("halo", "all_to_all", "all_gather", "ring")), ran


def _assert_multihead_is_that_of_one_process(parts: list[dict[str, Tensor]]) -> None:
    layer = multihead()
    x = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(9))
    out, _ = layer(x, is_causal=True)
    out.square().sum().backward()
    assert _ulps(torch.cat([part["out"] for part in parts], 1), out.detach()) <= 4
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        # Sums over the rows in another order. A key bias moves no probability: what is left is
        # rounding of numbers as large as those of the value bias.
        at_most = x[..., 0].numel() * torch.finfo(x.dtype).eps
        scale = max(p.grad.abs().max().item() for p in layer.parameters() if p.grad is not None)
        for part in parts:
            assert (part[name] - parameter.grad).abs().max() <= at_most * scale, name


def _assert_longnet_is_that_of_one_process(parts: list[dict[str, Tensor]]) -> None:
    """Positions, padding, norms and recomputed layers; float32 after two layers forth and back."""
    model = longnet()
    real = torch.arange(37) < torch.tensor([[37], [20]])
    out = model(training_data()[0], seqused=[37, 20])
    out[real].square().sum().backward()
    got = torch.cat([part["out"] for part in parts], 1)
    assert _ulps(got[real], out.detach()[real]) <= out[real].shape[0]
    scale = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        at_most = out[real].shape[0] * torch.finfo(out.dtype).eps * scale
        for part in parts:
            assert (part[name] - parameter.grad).abs().max() <= at_most, name


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_step_on_shards_is_a_step_of_one_process(size: int, tmp_path: Path) -> None:
    results = Ranks("training", size, tmp_path).results(size)
    tokens, targets = training_data()
    model = TinyModel()
    out, losses = model(tokens, targets, dilated.dilated_attention)
    loss = losses.sum() / (targets >= 0).sum()
    loss.backward()
    for result in results:
        assert torch.equal(result["tokens"], tokens)
        assert _ulps(result["out"], out.detach()) <= 4  # products of other sizes round otherwise
        assert _ulps(result["loss"], loss.detach()) <= 4
        for name, parameter in model.named_parameters():
            got = result["gradients"][name]
            if parameter.grad is None:
                assert got is None
            else:
                assert torch.equal(got, results[0]["gradients"][name]), name
                # Sums over the tokens in another order.
                assert _ulps(got, parameter.grad) <= tokens.numel(), name
        # Added in float32: in bfloat16, 256 + 1 is 256.
        ranks = [256 * size, size, size * (size - 1) // 2]
        assert torch.equal(result["bfloat16"], torch.tensor(ranks).bfloat16())
        words = "other shapes, dtype or heads on ranks [0]"
        assert result["other"][0] == "InvalidProblem"
        assert size == 2 or words in result["other"][1]
        assert result["empty"][:2] == (
            "InvalidProblem",
            "mean_loss: count: expected a token on some rank, got none",
        )
    _assert_longnet_is_that_of_one_process([result["longnet"] for result in results])
    _assert_multihead_is_that_of_one_process([result["multihead"] for result in results])
    for rank, result in enumerate(results):
        kind, text, seconds = result["masked"]
        assert kind == ("Unsupported" if rank else "DistributedAttentionError")
        assert ("key_mask: expected none over ranks" if rank else "an error from ranks [1") in text
        assert seconds < 2
    kinds, texts, seconds = zip(*(result["recorded"] for result in results), strict=True)
    assert kinds == ("DistributedAttentionError",) + ("InvalidProblem",) * (size - 1)
    assert "an error from ranks [1" in texts[0]
    assert all("expected a tensor that records no gradient" in text for text in texts[1:])
    assert max(seconds) < 2


@pytest.fixture(scope="module")
def mismatches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return Ranks("mismatches", 3, tmp_path_factory.mktemp("mismatches")).results(3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("option", "other options on ranks [2]"),
        ("branches", "other segments, dilations or offsets on ranks [2]"),
        ("dtype", "other shapes, dtype or heads on ranks [2]"),
        ("shards", "other shards or cu_seqlens on ranks [2]"),
        ("seqused", "another seqused on ranks [2]"),
        ("calls", "another number of calls on ranks [2]; another pass on ranks [2]"),
    ],
)
def test_other_calls_are_the_same_error_on_all_ranks(
    name: str, words: str, mismatches: list[dict[str, Any]]
) -> None:
    expected = "dilated_attention: sequence_groups: expected the same call on all ranks"
    for errors in mismatches:
        kind, text, seconds = errors[name]
        assert (kind, text) == ("InvalidProblem", f"{expected}, got {words}")
        assert seconds < 2


def test_an_error_of_one_rank_is_told_to_the_others(mismatches: list[dict[str, Any]]) -> None:
    kinds, texts, seconds = zip(*(errors["error"] for errors in mismatches), strict=True)
    assert kinds == ("DistributedAttentionError",) * 2 + ("InvalidProblem",)
    assert "dilations[1]: expected 1 <= dilation" in texts[2]
    words = "call 1 over 3 ranks: expected a call of every rank, got an error from ranks [2] of"
    assert all(words in text for text in texts[:2])
    assert max(seconds) < 2


@pytest.mark.parametrize(
    ("moment", "kind", "operation"),
    [
        ("data", "ZeroDivisionError", "call 1"),
        ("loss", "ZeroDivisionError", "backward of call 2"),
        ("backward", "ZeroDivisionError", "backward of call 2"),
        ("module", "InvalidProblem", "call 1"),
    ],
)
def test_what_one_rank_throws_is_an_error_of_the_others(
    moment: str, kind: str, operation: str, mismatches: list[dict[str, Any]]
) -> None:
    results = [errors[f"throws:{moment}"] for errors in mismatches]
    assert results[2][0] == kind
    for other, text, _ in results[:2]:
        assert other == "DistributedAttentionError"
        words = "expected a call of every rank, got an error from ranks [2] of group '"
        assert f"{operation} over 3 ranks: {words}" in text
    assert max(seconds for _, _, seconds in results) < 5


def test_no_call_follows_a_failed_one(mismatches: list[dict[str, Any]]) -> None:
    for errors in mismatches:
        kind, text, _ = errors["after"]
        assert kind == "DistributedAttentionError"
        assert "no call after a failed one (another number of calls" in text


@pytest.mark.parametrize("scenario", FAILURES)
def test_a_rank_that_does_not_answer_is_an_error_of_the_others(
    scenario: str, tmp_path: Path
) -> None:
    size = FAILURES[scenario]
    for errors in Ranks(scenario, size, tmp_path).results(size - 1):
        kind, text, seconds = errors["call"]
        assert kind == "DistributedAttentionError", text
        assert f"call 2 over {size} ranks: expected an answer within 3 s" in text
        assert f"{size - 1}]" in text
        assert seconds < 5


def test_groups_know_shards_and_positions(alone: SequenceGroups) -> None:
    assert alone.shards(7) == [7]
    assert alone.positions([5]).tolist() == [0, 1, 2, 3, 4]
    x = torch.arange(6).reshape(1, 6)
    assert torch.equal(alone.shard(x), x)
    with pytest.raises(dilated.InvalidProblem, match="shards: expected one number of rows per"):
        alone.positions([1, 2])
    with pytest.raises(dilated.InvalidProblem, match="timeout: expected seconds > 0, got -1"):
        SequenceGroups(timeout=-1)


def test_groups_need_processes() -> None:
    with pytest.raises(dilated.InvalidProblem, match=r"an initialised torch\.distributed"):
        SequenceGroups()
