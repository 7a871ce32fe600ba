# ruff: noqa: E501 - whole messages, unbroken where possible
"""Every message whole: "op: argument: expected …, got … (hint)", the same for eager and fake
tensors. R15.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dilated
from dilated import InvalidProblem, Unsupported

ONE: dict[str, Any] = {"segments": [4], "dilations": [1]}
OVERRIDE = "leave out preset, or override offsets, tail or lse_grad"
LIKE_QUERY = "batch, seqlen and head_dim as query; key and value have the same heads"

OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"segments": [], "dilations": []}, InvalidProblem,
     "segments: expected at least one branch, got none"),
    ({"segments": [4], "dilations": [1, 2]}, InvalidProblem,
     "dilations: expected as many entries as segments, 1, got 2"),
    ({"segments": [0], "dilations": [1]}, InvalidProblem,
     "segments[0]: expected 1 <= segment <= 2^40, got 0 (a segment longer than the sequence acts as one)"),
    ({"segments": [4, 2**40 + 1], "dilations": [1, 1]}, InvalidProblem,
     "segments[1]: expected 1 <= segment <= 2^40, got 1099511627777 "
     "(a segment longer than the sequence acts as one)"),
    ({"segments": [4], "dilations": [-1]}, InvalidProblem,
     "dilations[0]: expected 1 <= dilation <= 2^40, got -1"),
    ({"segments": "[4]", "dilations": [1]}, InvalidProblem,
     "segments: expected a sequence of integers, got '[4]'"),
    ({"segments": [4], "dilations": [1.5]}, InvalidProblem,
     "dilations[0]: expected an integer, got 1.5"),
    ({"segments": 4, "dilations": [1]}, InvalidProblem,
     "segments: expected a sequence of integers, got 4"),
    ({"offsets": [[0, 0, 0, 1]]}, InvalidProblem,
     "offsets[0][3]: expected < dilations[0] = 1, got 1 (-1 leaves the head out)"),
    ({"offsets": [[0, -2, 0, 0]]}, InvalidProblem,
     "offsets[0][1]: expected >= -1, got -2 (-1 leaves the head out)"),
    ({"offsets": [[0, 0, 0]]}, InvalidProblem,
     "offsets: expected a table of 1 branches x 4 heads, got 3 entries"),
    ({"offsets": [[0], [0], [0], [0]]}, InvalidProblem,
     "offsets: expected a table of 1 equal rows, got rows of lengths [1, 1, 1, 1] "
     "(one row per branch, one entry per query head)"),
    ({"offsets": 3}, InvalidProblem,
     "offsets: expected a builder's name or a table (branches, heads), got 3"),
    ({"offsets": "even"}, InvalidProblem,
     "offsets: expected one of paper, torchscale, branch, zero, got even"),
    ({"offsets": [[0] * 4], "gqa_offset": "kv"}, InvalidProblem,
     "gqa_offset: expected no value together with a table of offsets, got kv "
     "(a table is per query head already)"),
    ({"groups": "some"}, InvalidProblem,
     "groups: expected one of none, cumulative, literal, got some"),
    ({"merge": "max"}, InvalidProblem, "merge: expected one of lse, sum, mean, got max"),
    ({"tail": "cut"}, InvalidProblem, "tail: expected one of mask, phantom, got cut"),
    ({"gqa_offset": "v"}, InvalidProblem, "gqa_offset: expected one of kv, q, got v"),
    ({"preset": "gigapath"}, InvalidProblem,
     "preset: expected one of longnet, torchscale, head_groups, fork, fkodom, got gigapath"),
    ({"backend": "tpu"}, InvalidProblem, "backend: expected one of cuda, cpu, reference, got tpu"),
    ({"layout": "sbhd"}, InvalidProblem, "layout: expected one of bshd, bhsd, shd, got sbhd"),
    ({"preset": "fork", "merge": "lse"}, InvalidProblem,
     f"merge: expected no value together with preset, got lse (preset 'fork' fixes it; {OVERRIDE})"),
    ({"preset": "fork", "out_scale": 2.0}, InvalidProblem,
     f"out_scale: expected no value together with preset, got 2 (preset 'fork' fixes it; {OVERRIDE})"),
    ({"preset": "longnet", "groups": "none"}, InvalidProblem,
     f"groups: expected no value together with preset, got none (preset 'longnet' fixes it; {OVERRIDE})"),
    ({"preset": "fkodom", "merge": "sum"}, InvalidProblem,
     f"merge: expected no value together with preset, got sum (preset 'fkodom' fixes it; {OVERRIDE})"),
    ({"preset": "fork", "segments": [4] * 5, "dilations": [1] * 5}, InvalidProblem,
     "num_heads: expected >= number of branches = 5 with preset 'fork', got 4"),
    ({"preset": "torchscale", "segments": [6], "dilations": [4]}, Unsupported,
     "preset: expected a dilation that divides its segment wherever a sequence is longer than the segment, "
     "got segments[0] = 6, dilations[0] = 4, sequence length 9 (torchscale shifts the rows of later segments "
     "there: leave out preset to compute the unshifted operator, or pass row_shift=True for weights trained "
     "that way)"),
    ({"row_shift": True}, InvalidProblem,
     "row_shift: expected False, or preset 'torchscale', got preset None"),
    ({"row_shift": True, "preset": "torchscale", "tail": "mask"}, Unsupported,
     "row_shift: expected unpacked tensors and tail 'phantom', got tail 'mask' "
     "(upstream knows neither packed sequences nor masked tails)"),
    ({"row_shift": True, "preset": "torchscale", "merge": "sum"}, InvalidProblem,
     f"merge: expected no value together with preset, got sum (preset 'torchscale' fixes it; {OVERRIDE})"),
    ({"lse_grad": False, "merge": "sum"}, InvalidProblem,
     "lse_grad: expected true with merge = sum, got false (only merge = lse has weights to detach)"),
    ({"dropout_p": 1.5}, InvalidProblem, "dropout_p: expected 0 <= dropout_p <= 1, got 1.5"),
    ({"dropout_p": -0.5}, InvalidProblem, "dropout_p: expected 0 <= dropout_p <= 1, got -0.5"),
    ({"dropout_p": 0.5, "dropout_seed": 1.5}, InvalidProblem,
     "dropout_seed: expected an int64 tensor (seed, offset), or an integer, got 1.5"),
    ({"dropout_p": 0.5, "dropout_seed": torch.tensor([1])}, InvalidProblem,
     "dropout_seed: expected a 1-D int64 tensor (seed, offset) on cpu, got int64 (1,) on cpu"),
    ({"scale": float("inf")}, InvalidProblem, "scale: expected a finite number, got inf"),
    ({"out_scale": float("nan")}, InvalidProblem, "out_scale: expected a finite number, got nan"),
    ({"key_mask": torch.ones(9, 9, dtype=torch.bool)}, Unsupported,
     "key_mask: expected bool of shape (2, 9), got bool of shape (9, 9) "
     "(True = key takes part; no other form of mask is supported)"),
    ({"key_mask": torch.zeros(2, 9)}, Unsupported,
     "key_mask: expected bool of shape (2, 9), got float32 of shape (2, 9) "
     "(True = key takes part; no other form of mask is supported)"),
    ({"key_mask": torch.ones(2, 4, 9, 9, dtype=torch.bool)}, Unsupported,
     "key_mask: expected bool of shape (2, 9), got bool of shape (2, 4, 9, 9) "
     "(True = key takes part; no other form of mask is supported)"),
    ({"seqused": [1]}, InvalidProblem,
     "seqused: expected a 1-D int64 tensor on cpu with one length per sequence, 2, got int64 (1,) on cpu"),
    ({"seqused": torch.tensor([1.0, 2.0])}, InvalidProblem,
     "seqused: expected integers, got dtype torch.float32"),
    ({"cu_seqlens": [0, 9]}, InvalidProblem,
     "layout: expected 'shd' together with cu_seqlens, got 'bshd' "
     "(packed tensors are (total, heads, head_dim))"),
    ({"backend": "cuda"}, Unsupported,
     "backend: expected a back end that can run this problem, got cuda "
     "(this build contains no CUDA kernels)"),
]  # fmt: skip

PACKED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cu_seqlens": [0, 5, 4, 9]}, InvalidProblem,
     "cu_seqlens[2]: expected >= cu_seqlens[1] = 5, got 4 (equal neighbours are an empty sequence)"),
    ({"cu_seqlens": [1, 9]}, InvalidProblem, "cu_seqlens[0]: expected 0, got 1"),
    ({"cu_seqlens": [0, 8]}, InvalidProblem,
     "cu_seqlens[1]: expected the number of tokens, 9, got 8"),
    ({"cu_seqlens": []}, InvalidProblem,
     "cu_seqlens: expected a 1-D int64 CPU tensor with at least one entry, got int64 (0,) on cpu"),
    ({"cu_seqlens": [0, 9], "preset": "fkodom"}, Unsupported,
     "cu_seqlens: expected none with preset 'fkodom', got 1 sequences "
     "(its column sums run over one sequence; call once per sequence)"),
    ({"cu_seqlens": [0, 9], "preset": "torchscale", "row_shift": True}, Unsupported,
     "row_shift: expected unpacked tensors and tail 'phantom', got layout 'shd' "
     "(upstream knows neither packed sequences nor masked tails)"),
    ({"key_mask": torch.ones(1, 9, dtype=torch.bool)}, Unsupported,
     "key_mask: expected bool of shape (9,), got bool of shape (1, 9) "
     "(True = key takes part; no other form of mask is supported)"),
]  # fmt: skip

X = torch.zeros(2, 9, 4, 8)
TENSORS: list[tuple[tuple[torch.Tensor, ...], dict[str, Any], str]] = [
    ((X[0], X, X), {}, "query: expected 4 dimensions (batch, seqlen, heads, head_dim), got shape (9, 4, 8)"),
    ((X, X[..., None], X), {"layout": "bhsd"},
     "key: expected 4 dimensions (batch, heads, seqlen, head_dim), got shape (2, 9, 4, 8, 1)"),
    ((X, X, X), {"layout": "shd"},
     "query: expected 3 dimensions (total, heads, head_dim), got shape (2, 9, 4, 8)"),
    ((X, X[:, :8], X), {}, f"key: expected shape (2, 9, 4, 8), got (2, 8, 4, 8) ({LIKE_QUERY})"),
    ((X, X, X[:, :, :2]), {}, f"value: expected shape (2, 9, 4, 8), got (2, 9, 2, 8) ({LIKE_QUERY})"),
    ((X, X[:1], X), {}, f"key: expected shape (2, 9, 4, 8), got (1, 9, 4, 8) ({LIKE_QUERY})"),
    ((X, X[:, :, :3], X[:, :, :3]), {},
     "num_kv_heads: expected a divisor of num_heads = 4, got 3 "
     "(query head h reads key/value head h / (num_heads / num_kv_heads))"),
    ((X, X.half(), X), {}, "key: expected query's dtype float32, got float16"),
    ((X, X, X.double()), {}, "value: expected query's dtype float32, got float64"),
    ((X.int(),) * 3, {}, "query: expected dtype float32, float64, bfloat16 or float16, got int32"),
    ((X[..., ::2],) * 3, {}, "query: expected a contiguous last dimension, got stride 2 (call .contiguous())"),
    ((X, X, X[..., :1].expand(2, 9, 4, 8)), {},
     "value: expected a contiguous last dimension, got stride 0 (call .contiguous())"),
    ((X[..., :0],) * 3, {}, "head_dim: expected >= 1, got 0"),
]  # fmt: skip


def _check(kind: type[Exception], text: str, tensors: Any, options: dict[str, Any]) -> None:
    with pytest.raises(kind) as caught:
        dilated.dilated_attention(*tensors, **{**ONE, **options})
    assert str(caught.value) == f"dilated_attention: {text}"
    assert (caught.value.__cause__ is None and caught.value.__suppress_context__ is True) or (
        caught.value.__context__ is None
    )


@pytest.mark.parametrize(("options", "kind", "text"), OPTIONS, ids=lambda x: str(x)[:60])
def test_options(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    _check(kind, text, (X, X, X), options)


@pytest.mark.parametrize(("options", "kind", "text"), OPTIONS, ids=lambda x: str(x)[:60])
def test_options_with_fake_tensors(
    options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """The same line at trace time: nothing waits for the first real call."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(X)
        _check(kind, text, (fake, fake, fake), options)


@pytest.mark.parametrize(("options", "kind", "text"), PACKED, ids=lambda x: str(x)[:60])
def test_packed(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    _check(kind, text, (X[0],) * 3, {"layout": "shd", **options})


@pytest.mark.parametrize(("tensors", "options", "text"), TENSORS, ids=lambda x: str(x)[:60])
def test_tensors(tensors: Any, options: dict[str, Any], text: str) -> None:
    _check(InvalidProblem, text, tensors, options)


@pytest.mark.parametrize(("tensors", "options", "text"), TENSORS, ids=lambda x: str(x)[:60])
def test_fake_tensors(tensors: Any, options: dict[str, Any], text: str) -> None:
    with FakeTensorMode() as mode:
        _check(InvalidProblem, text, [mode.from_tensor(t) for t in tensors], options)


def test_mixed_devices() -> None:
    """R11: the disagreeing tensor is named."""
    _check(InvalidProblem, "key: expected query's device cpu, got meta", (X, X.to("meta"), X), {})


def test_no_back_end_names_every_reason() -> None:
    x = torch.zeros(1, 4, 1, 257, dtype=torch.float16)
    _check(
        Unsupported,
        "backend: expected a back end that can run this problem, got float16 on cpu "
        "(cuda: this build contains no CUDA kernels; cpu: head_dim 257 is not in 1..256; "
        "reference: dtype float16 is not float32 or float64)",
        (x, x, x),
        {},
    )
    y = torch.zeros(1, 4, 1, 8, dtype=torch.float64)
    _check(
        Unsupported,
        "backend: expected a back end that can run this problem, got cpu "
        "(dtype float64 is left to the reference back end)",
        (y, y, y),
        {"backend": "cpu"},
    )


def test_back_end_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """R7: a forced back end that cannot run is an error; the argument goes before the variable."""
    monkeypatch.setenv("DILATED_BACKEND", "cuda")
    text = (
        "DILATED_BACKEND: expected a back end that can run this problem, got cuda "
        "(this build contains no CUDA kernels)"
    )
    _check(Unsupported, text, (X, X, X), {})
    dilated.dilated_attention(X, X, X, **ONE, backend="cpu")
    monkeypatch.setenv("DILATED_BACKEND", "reference")
    assert "reference runs this" in dilated.plan(9, 4, **ONE).explain()
    monkeypatch.setenv("DILATED_BACKEND", "best")
    _check(
        InvalidProblem,
        "DILATED_BACKEND: expected one of cuda, cpu, reference, got best",
        (X, X, X),
        {},
    )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: dilated.plan(5000, **ONE).pattern(),
         "attention_pattern: seqlen: expected <= 4096, neither packed nor windows, got 5000 (the table has seqlen^2 entries)"),
        (lambda: dilated.plan(5, 2, **ONE).pattern(2),
         "attention_pattern: head: expected 0 <= head < num_heads = 2, got 2"),
        (lambda: dilated.plan(-1, **ONE), "dilated_attention: seqlen: expected >= 0, got -1"),
        (lambda: dilated.plan(5, device="tpu", **ONE),
         "dilated_attention: device: expected device cpu or cuda, got tpu"),
        (lambda: dilated.plan(5, segments=[1, 2], dilations=[1]),
         "dilated_attention: dilations: expected as many entries as segments, 2, got 1"),
    ],
)  # fmt: skip
def test_questions(call: Any, text: str) -> None:
    with pytest.raises(InvalidProblem) as caught:
        call()
    assert str(caught.value) == text


def test_kinds_are_the_builtin_ones() -> None:
    assert issubclass(InvalidProblem, ValueError)
    assert issubclass(Unsupported, NotImplementedError)
