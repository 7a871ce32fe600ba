"""What the benchmark computes: configurations, the yardstick's rows, their work (semantics §10).

    forward FLOP = 4 * head_dim * pairs      backward = 2.5 * forward      both = 3.5 * forward
Pairs come from the core (`dilated.plan`): those the mathematics needs, never padded tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

FORWARD_FLOPS_PER_PAIR_AND_DIM = 4
PASSES = {"forward": 1.0, "forward_backward": 3.5}  # times the forward FLOP


@dataclass(frozen=True)
class Configuration:
    """One dilated self-attention over (1, seqlen, num_heads, head_dim).

    `preset` is "longnet" (paper offsets, exact gradient, no phantom keys) or "torchscale" (its
    offsets, zero keys beyond a ragged end, merge weights constant in backward).
    """

    seqlen: int
    num_heads: int
    head_dim: int
    segments: tuple[int, ...]
    dilations: tuple[int, ...]
    is_causal: bool = False
    preset: str = "longnet"
    num_kv_heads: int | None = None  # default: num_heads
    dtype: str = "float32"

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `dilated.dilated_attention`."""
        return {
            "segments": self.segments,
            "dilations": self.dilations,
            "is_causal": self.is_causal,
            "preset": self.preset,
        }

    @property
    def torchscale(self) -> bool:
        """Whether the preset is torchscale's."""
        return self.preset == "torchscale"

    @property
    def branches(self) -> list[tuple[int, int]]:
        """(segment cut to the sequence, dilation) of every branch, densest first."""
        pairs = zip(self.segments, self.dilations, strict=True)
        return sorted(((min(w, self.seqlen), r) for w, r in pairs), key=lambda branch: branch[1])

    def heads_of(self, dilation: int, residue: int) -> range:
        """Heads that keep `residue`: paper h mod r, torchscale floor(h / ceil(H / r))."""
        if not self.torchscale:
            return range(residue, self.num_heads, dilation)
        together = -(-self.num_heads // dilation)
        return range(
            min(self.num_heads, residue * together), min(self.num_heads, (residue + 1) * together)
        )

    def forward_flops(self) -> int:
        """Useful floating-point operations of one forward pass, by the core's pair counts."""
        import dilated

        plan = dilated.plan(
            self.seqlen,
            self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim,
            **self.options(),
        )
        counts = plan.pair_counts
        return FORWARD_FLOPS_PER_PAIR_AND_DIM * self.head_dim * sum(counts)


_PAPER: dict[str, Any] = {
    "segments": (2048, 4096, 8192, 16384, 32768),
    "dilations": (1, 2, 4, 6, 12),
}
_GIGAPATH: dict[str, Any] = {
    "segments": (1024, 5792, 32768, 185363, 1048576),
    "dilations": (1, 2, 4, 8, 16),
    "preset": "torchscale",
}

ROWS = {
    "paper-d64-full": Configuration(32768, 12, 64, **_PAPER),
    "paper-d64-causal": Configuration(32768, 12, 64, is_causal=True, **_PAPER),
    "paper-d128-full": Configuration(32768, 12, 128, **_PAPER),
    "paper-d128-causal": Configuration(32768, 12, 128, is_causal=True, **_PAPER),
    "gigapath-d48": Configuration(10001, 16, 48, **_GIGAPATH),
    "gigapath-d24": Configuration(10001, 16, 24, **_GIGAPATH),
}

_GPU: dict[str, Any] = {"dtype": "bfloat16"}
_GEOMETRIC: dict[str, Any] = {"segments": _PAPER["segments"], "dilations": (1, 2, 4, 8, 16)}
_SLIDE: dict[str, Any] = {"segments": (1024, 5792, 32768, 65536), "dilations": (1, 2, 4, 8)}

# One GPU: `--device cuda`.
GPU_ROWS = {
    "P64": Configuration(131072, 12, 64, is_causal=True, **_PAPER, **_GPU),
    "P64-8k": Configuration(8192, 12, 64, is_causal=True, **_PAPER, **_GPU),
    "P64-1M": Configuration(1048576, 12, 64, is_causal=True, **_PAPER, **_GPU),
    "G128c": Configuration(131072, 16, 128, is_causal=True, **_GEOMETRIC, **_GPU),
    "G128f": Configuration(131072, 16, 128, **_GEOMETRIC, **_GPU),
    "GQA": Configuration(131072, 16, 128, is_causal=True, num_kv_heads=4, **_GEOMETRIC, **_GPU),
    "M64": Configuration(
        1048576, 16, 64, (2048, 8192, 32768, 131072, 524288), (1, 4, 16, 16, 16), **_GPU
    ),
    "S48": Configuration(65536, 16, 48, **_SLIDE, **_GPU),
    "L24": Configuration(65536, 16, 24, **_SLIDE, **_GPU),
}

# The same kinds of problem, small: for checking the tool, not for conclusions.
QUICK_ROWS = {
    "paper/8-d64-full": Configuration(4096, 12, 64, (256, 512, 1024, 2048, 4096), (1, 2, 4, 6, 12)),
    "paper/8-d64-causal": Configuration(
        4096, 12, 64, (256, 512, 1024, 2048, 4096), (1, 2, 4, 6, 12), is_causal=True
    ),
    "gigapath-2501-d48": Configuration(2501, 16, 48, **_GIGAPATH),
}
