"""Cases of test_sequence.py, the same in every process: shapes, options and shards, with data."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from support import Case
from torch import Tensor

import dilated
from dilated.models import LongNetLM


@dataclass
class Sharded:
    """One call over `len(shards)` ranks."""

    case: Case
    shards: list[int]
    dtype: torch.dtype = torch.float32
    cu_seqlens: list[int] | None = None
    seqused: list[int] | None = None
    call: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Whole query, key, value, dout and dlse; packed ones without a batch."""
        data = self.case.tensors(self.dtype)
        del data["key_mask"]
        data["dlse"] = data["dlse"].to(
            torch.float64 if self.dtype == torch.float64 else torch.float32
        )
        if self.cu_seqlens is not None:
            data = {name: tensor.squeeze(0) for name, tensor in data.items()}
        return data

    def options(self) -> dict[str, Any]:
        packed = {} if self.cu_seqlens is None else {"layout": "shd", "cu_seqlens": self.cu_seqlens}
        used = {} if self.seqused is None else {"seqused": self.seqused}
        lists = {"segments": self.case.segments, "dilations": self.case.dilations}
        return {**lists, **self.case.options, **packed, **used}

    def run(self, attention: Any, cut: Any, **more: Any) -> dict[str, Tensor]:
        """Results and gradients of one process, which holds `cut(tensor, dim)`."""
        rows_dim = 0 if self.cu_seqlens is not None else 1
        data = {
            name: cut(tensor, -1 if name == "dlse" else rows_dim).clone()
            for name, tensor in self.tensors().items()
        }
        inputs = [data[name].requires_grad_() for name in ("query", "key", "value")]
        out, lse = attention(*inputs, return_lse=True, **self.options(), **more)
        gradients = torch.autograd.grad([out, lse], inputs, [data["dout"], data["dlse"]])
        names = ("out", "lse", "dquery", "dkey", "dvalue")
        return dict(zip(names, (out.detach(), lse.detach(), *gradients), strict=True))


def _shards(draw: random.Random, total: int, ranks: int) -> list[int]:
    cuts = sorted(draw.randint(0, total) for _ in range(ranks - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def random_case(draw: random.Random, ranks: int) -> Sharded:
    """Any call, cut anywhere."""
    kv_heads = draw.choice([1, 2])
    heads = kv_heads * draw.choice([1, 2, 3])
    branches = draw.randint(1, 3)
    packed = draw.random() < 0.3
    case = Case(
        n=draw.randint(0, 90),
        batch=1 if packed else draw.choice([1, 2]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw.choice([1, 4, 9]),
        segments=[draw.randint(1, 100) for _ in range(branches)],
        dilations=[draw.randint(1, 9) for _ in range(branches)],
        options={
            "is_causal": draw.random() < 0.5,
            "merge": draw.choice(["lse", "lse", "sum", "mean"]),
            "tail": draw.choice(["mask", "phantom"]),
            "offsets": draw.choice(["paper", "torchscale", "zero"]),
            "gqa_offset": draw.choice(["kv", "q"]),
        },
        seed=draw.randint(0, 1000),
    )
    if case.options["merge"] == "lse":
        case.options["lse_grad"] = draw.random() < 0.5
    if draw.random() < 0.3:
        case.options.update(dropout_p=0.4, dropout_seed=draw.randint(0, 99))
    cu = None
    if packed:
        cu = [0, *sorted(draw.randint(0, case.n) for _ in range(3)), case.n]
    used = None
    if draw.random() < 0.3:
        lengths = (
            [case.n] * case.batch if cu is None else [b - a for a, b in itertools.pairwise(cu)]
        )
        used = [draw.randint(0, length) for length in lengths]
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    return Sharded(case, _shards(draw, case.n, ranks), dtype, cu, used)


def cases(ranks: int) -> list[Sharded]:
    """Named corners and random ones."""
    paper = {"segments": [16, 64, 512], "dilations": [1, 3, 12]}
    torchscale = {"preset": "torchscale", "is_causal": False}
    even = [96 // ranks + (rank < 96 % ranks) for rank in range(ranks)]
    first_only = [96] + [0] * (ranks - 1)
    corners = [
        Sharded(Case(n=96, **paper), even),
        Sharded(Case(n=96, **paper, options={"is_causal": True}), even, torch.bfloat16),
        Sharded(Case(n=96, heads=1, kv_heads=1, **paper), first_only),
        Sharded(Case(n=96, segments=[18], dilations=[2]), even),  # borders are crossed once
        Sharded(Case(n=96, segments=[16, 96], dilations=[2, 4], options=torchscale), even),
        Sharded(Case(n=96, segments=[200], dilations=[90]), even),
    ]
    draw = random.Random(ranks)
    return corners + [random_case(draw, ranks) for _ in range(25)]


class TinyModel(torch.nn.Module):
    """Embedding, attention, output; the same weights in every process, some used by few or none."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        self.embedding = torch.nn.Parameter(torch.randn(11, 24, generator=draw))
        self.mixing = torch.nn.Parameter(torch.randn(24, 72, generator=draw) / 5)
        self.first = torch.nn.Parameter(torch.ones(24))  # used where position 0 is
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(
        self, tokens: Tensor, targets: Tensor, attention: Any, begins: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Output rows and the losses of all tokens; `begins`: the first is position 0."""
        x = self.embedding[tokens]
        if begins:
            x = torch.cat([x[:, :1] * self.first, x[:, 1:]], dim=1)
        q, k, v = (x @ self.mixing).unflatten(-1, (3, 4, 6)).unbind(-3)
        out = attention(q, k, v, segments=[8, 40], dilations=[1, 2], is_causal=True).flatten(-2)
        logits = (out + x) @ self.embedding.T
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none"
        )
        return out, losses


def training_data() -> tuple[Tensor, Tensor]:
    """Tokens and targets (2, 37); a target of -1 is none."""
    draw = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, 11, (2, 37), generator=draw)
    return tokens, torch.randint(-1, 11, (2, 37), generator=draw)


def multihead() -> dilated.MultiheadDilatedAttention:
    """The same in every process."""
    torch.manual_seed(6)
    return dilated.MultiheadDilatedAttention(24, 4, [8, 40], [1, 2], num_kv_heads=2)


def longnet() -> LongNetLM:
    """The same in every process."""
    torch.manual_seed(5)
    lists = {"segments": [8, 40], "dilations": [1, 2]}
    return LongNetLM(11, 32, 2, 4, **lists, activation_checkpointing=True)
