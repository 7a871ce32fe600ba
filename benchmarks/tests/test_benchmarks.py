"""The benchmark's columns compute the same thing, and its numbers mean what they say."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dilated
from configurations import GPU_ROWS, QUICK_ROWS, ROWS, Configuration
from dilated import reference
from measure import (
    CompileBudgetExceeded,
    Watch,
    make_inputs,
    peak_extra_bytes,
    summary,
    time_limit,
)
from methods import COMPOSITIONS, Method, dense_pairs, grouped
from run import main
from runner import run_row
from strided import pieces, strided
from sweep import length_sweep
from tables import cells, markdown

PAPER = Configuration(48, 12, 8, (6, 12, 24, 32, 48), (1, 2, 4, 6, 12))
GIGAPATH = Configuration(37, 16, 8, (8, 22, 64, 100, 256), (1, 2, 4, 8, 16), preset="torchscale")
CONFIGURATIONS = [
    PAPER,
    Configuration(48, 12, 8, PAPER.segments, PAPER.dilations, is_causal=True),
    Configuration(53, 5, 8, (6, 16, 40), (1, 2, 4)),
    Configuration(53, 5, 8, (6, 16, 40), (1, 2, 4), is_causal=True),
    Configuration(21, 2, 8, (10, 15), (4, 7)),
    Configuration(10, 4, 8, (64, 128), (1, 3)),
    GIGAPATH,
    Configuration(37, 16, 8, (8, 22, 64), (1, 2, 4), is_causal=True, preset="torchscale"),
    Configuration(24, 3, 8, (4, 24), (1, 8), preset="torchscale"),
    Configuration(29, 6, 8, (8, 24), (1, 4), preset="torchscale"),
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", COMPOSITIONS, ids=lambda method: method.name)
@pytest.mark.parametrize(
    "config", CONFIGURATIONS, ids=lambda config: f"{config.preset}-{config.seqlen}"
)
def test_composition_equals_the_definition(config, method, batch):
    torch.manual_seed(1)
    shape = (batch, config.seqlen, config.num_heads, config.head_dim)
    query, key, value = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    grad = torch.randn(shape, dtype=torch.float64)
    table = {"segments": config.segments, "dilations": config.dilations}
    expected, _ = reference.dilated_attention(
        query,
        key,
        value,
        **table,
        offsets=dilated.plan(1, config.num_heads, **table, preset=config.preset).offsets,
        is_causal=config.is_causal,
        tail="phantom" if config.torchscale else "mask",
        lse_grad=not config.torchscale,
    )
    out = method.make(config)(query, key, value)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    actual_grads = torch.autograd.grad(out, (query, key, value), grad)
    expected_grads = torch.autograd.grad(expected, (query, key, value), grad)
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dilations", [(1, 2, 4), (1, 3, 7)])
def test_composition_for_fewer_key_heads_equals_the_definition(dilations):
    config = Configuration(53, 6, 8, (6, 16, 40), dilations, is_causal=True, num_kv_heads=2)
    table = {"segments": config.segments, "dilations": config.dilations}
    shapes = [(1, 53, heads, 8) for heads in (6, 2, 2)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    expected, _ = reference.dilated_attention(
        *inputs,
        **table,
        offsets=dilated.plan(1, 6, num_kv_heads=2, **table).offsets,
        is_causal=True,
    )
    out = grouped(strided)(config)(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = torch.randn(shapes[0], dtype=torch.float64)
    for actual, wanted in zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_a_step_is_timed_in_two_parts():
    watch = Watch()

    def call():
        time.sleep(0.02)
        watch.lap()
        time.sleep(0.04)
        return ()

    whole = watch.seconds_of(call)
    assert watch.after_lap is not None
    assert 0.04 <= watch.after_lap <= whole - 0.02
    watch.seconds_of(tuple)
    assert watch.after_lap is None


@pytest.mark.parametrize("max_elements", [1, 300, 1 << 62])
def test_pieces_cut_differently_are_the_same_attention(max_elements):
    inputs = make_inputs(PAPER.seqlen, PAPER.num_heads, PAPER.head_dim)[:3]
    expected = strided(PAPER)(*inputs)
    torch.testing.assert_close(strided(PAPER, True, max_elements)(*inputs), expected)


@pytest.mark.parametrize(
    "config", [PAPER, GIGAPATH, *ROWS.values(), GPU_ROWS["P64"], GPU_ROWS["S48"]]
)
def test_pieces_cover_exactly_the_pairs_that_the_core_counts(config):
    pairs = 0
    for piece in pieces(config):
        of_one = piece.rows * (piece.rows + 1) // 2 if config.is_causal else piece.rows**2
        pairs += piece.num_segments * piece.num_residues * len(piece.heads) * of_one
    assert config.forward_flops() == 4 * config.head_dim * pairs


def test_rows_are_the_yardstick_of_the_specification():
    # semantics §10: pairs per token and head
    published = {"paper-d64-full": 4266.7, "paper-d64-causal": 2134.3, "gigapath-d48": 3107.1}
    for name, expected in published.items():
        config = ROWS[name]
        pairs = config.forward_flops() / (4 * config.head_dim)
        assert pairs / (config.seqlen * config.num_heads) == pytest.approx(expected, abs=0.05)


def test_dense_pairs():
    assert dense_pairs(4, is_causal=False) == 16
    assert dense_pairs(4, is_causal=True) == 10


def test_peak_memory_sees_temporaries_but_not_results():
    temporary, result = 64 << 20, 32 << 20

    def call():
        block = torch.ones(temporary, dtype=torch.uint8)
        return (torch.full((result,), int(block[-1]), dtype=torch.uint8),)

    results, extra, _ = peak_extra_bytes(call)
    assert results[0].numel() == result
    assert extra is not None, "needs Linux with a writable /proc/self/clear_refs"
    assert extra == pytest.approx(temporary, rel=0.1)


def test_peak_memory_does_not_remember_an_earlier_peak():
    torch.ones(128 << 20, dtype=torch.uint8)
    _, extra, _ = peak_extra_bytes(lambda: (torch.ones(1),))
    assert extra is not None
    assert extra < 16 << 20


def test_summary_is_torchs() -> None:
    assert summary([3.0]) == {"seconds": [3.0], "seconds_median": 3.0, "seconds_iqr": 0.0}
    measured = summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (measured["seconds_median"], measured["seconds_iqr"]) == (3.0, 2.0)


def test_time_limit_stops_a_slow_compilation_and_nothing_else():
    with pytest.raises(CompileBudgetExceeded), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_a_column_that_computes_something_else_stops_the_run():
    wrong = Method("wrong", lambda config: lambda query, key, value: query + 0 * key + 0 * value)
    columns = [COMPOSITIONS[0], wrong]
    with pytest.raises(
        RuntimeError, match=r"bench: wrong: expected the results of strided, got a difference"
    ):
        run_row("row", GIGAPATH, repeats=1, columns=columns)


def test_a_composition_that_cannot_be_compiled_is_reported_and_left_out():
    def refuse(config):
        def attention(query, key, value):
            raise ValueError("no such kernel")

        return attention

    columns = [COMPOSITIONS[0], Method("packed", refuse, compiled=True)]
    row = run_row("row", GIGAPATH, repeats=1, columns=columns)
    assert row["not_compiled"] == {
        "packed (compiled)": "torch.compile failed: ValueError: no such kernel"
    }
    assert list(row["passes"]["forward"]["methods"]) == ["strided"]


def test_compilation_beyond_its_budget_is_reported_and_left_out():
    def sleepy(config):
        def attention(query, key, value):
            time.sleep(5)
            return query

        return attention

    columns = [COMPOSITIONS[0], Method("gather", sleepy, compiled=True)]
    row = run_row("row", GIGAPATH, repeats=1, columns=columns, compile_budget=0.05)
    assert row["not_compiled"] == {
        "gather (compiled)": "compiling took more than 0 s, eager stands"
    }


def test_main_writes_every_repeat_and_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(QUICK_ROWS, "tiny", GIGAPATH)
    output = tmp_path / "results" / "tiny.json"
    arguments = [
        "--quick",
        "--rows",
        "tiny",
        "--repeats",
        "3",
        "--threads",
        "1",
        "--output",
        str(output),
    ]
    threads = torch.get_num_threads()
    assert main(arguments) == 0
    assert torch.get_num_threads() == threads
    result = json.loads(output.read_text())
    assert result["command"] == "python benchmarks/run.py " + " ".join(arguments)
    assert result["threads"] == 1
    assert result["machine"]["torch"] == torch.__version__
    (row,) = result["rows"]
    assert row["configuration"]["seqlen"] == GIGAPATH.seqlen
    for kind, factor in (("forward", 1.0), ("forward_backward", 3.5)):
        measured = row["passes"][kind]
        ours = measured["methods"]["dilated"]
        best = measured["methods"][measured["best_composition"]]
        assert len(ours["seconds"]) == len(best["seconds"]) == 3
        assert ours["seconds_median"] == np.median(ours["seconds"])
        assert ours["gflops_per_second"] == pytest.approx(
            factor * row["forward_flops"] / ours["seconds_median"] / 1e9
        )
        assert measured["speed_ratio"] == best["seconds_median"] / ours["seconds_median"]
        assert set(measured["yardsticks"]) == {"torch.mm", "dense SDPA n=2048"}
    table = markdown(result)
    assert capsys.readouterr().out == f"{table}\nwritten to {output}\n"
    assert len({line.count("|") for line in table.splitlines()[:4]}) == 1
    assert main(["--markdown", str(output)]) == 0
    assert capsys.readouterr().out == table + "\n"
    assert [row[:2] for row in cells(result)] == [
        ("tiny", "forward"),
        ("tiny", "forward + backward"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device: expected a CUDA device"),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--rows", "paper"], "--rows: expected some of paper-d64-full, .*, got paper"),
        (["--markdown", "/none.json"], "--markdown: expected a result file, got /none.json"),
        (["--output", "/proc/none/x.json"], "--output: cannot write /proc/none/x.json: "),
    ],
)
def test_main_refuses_bad_arguments(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_length_sweep_measures_three_methods_and_two_passes_per_length():
    seen = []
    rows = length_sweep([128, 64], 2, 8, [16, 64], [1, 2], repeats=2, progress=seen.append)
    assert [row["seqlen"] for row in rows] == [64] * 6 + [128] * 6
    assert {row["method"] for row in rows} == {"dilated", "dense_sdpa", "composition"}
    assert seen == [
        f"{n} tokens, {kind}" for n in (64, 128) for kind in ("forward", "forward_backward")
    ]
    for row in rows:
        assert min(row["seconds"]) <= row["seconds_median"] <= max(row["seconds"])
        assert 0 <= row["seconds_iqr"] <= max(row["seconds"]) - min(row["seconds"])
        assert row["peak_extra_bytes"] >= 0
    dense = [row["flops"] for row in rows if row["method"] == "dense_sdpa"]
    assert dense[:2] == [4 * 8 * 2 * 64 * 65 // 2, 3.5 * 4 * 8 * 2 * 64 * 65 // 2]


def test_length_sweep_says_what_it_did_not_run(monkeypatch):
    monkeypatch.setattr("sweep._LONGEST_CALL", 1e-9)
    rows = length_sweep([64, 128], 1, 8, [16], [1], repeats=1)
    skipped = [row for row in rows if row["seconds_median"] is None]
    assert [(row["method"], row["seqlen"]) for row in skipped] == [("dense_sdpa", 128)] * 2
    for row in skipped:
        assert re.fullmatch(r"not run: about \d+ s per call, from 64 tokens", row["note"])
        assert row["peak_extra_bytes"] is None


def test_committed_results_print(capsys):
    """What was measured by earlier versions stays readable."""
    files = sorted((Path(__file__).parents[1] / "results").glob("cpu-*.json"))
    assert files
    for file in files:
        assert main(["--markdown", str(file)]) == 0
        assert "dense SDPA" in capsys.readouterr().out
