"""The columns: ours, compositions (eager and compiled), dense attention, matrix product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from configurations import Attention, Configuration
from gather import gather
from measure import Call
from strided import strided

OURS = "dilated"
DENSE_SEQLEN = 2048
_MM_SIZE = 2048


@dataclass(frozen=True)
class Method:
    """A way to compute a configuration; `make` may build it for any configuration."""

    name: str
    make: Callable[[Configuration], Attention]
    compiled: bool = False

    @property
    def label(self) -> str:
        """Name as in tables and JSON."""
        return f"{self.name} (compiled)" if self.compiled else self.name


def _ours(config: Configuration) -> Attention:
    import dilated

    options = config.options()
    return lambda query, key, value: dilated.dilated_attention(query, key, value, **options)


def _compiled(make: Callable[[Configuration], Attention]) -> Callable[[Configuration], Attention]:
    return lambda config: torch.compile(make(config), dynamic=False, fullgraph=True)


# Compiled without cutting into cache-sized pieces: compile time grows with the kernel calls.
_UNCUT = 1 << 62

COMPOSITIONS = (
    Method("strided", strided),
    Method("packed", lambda config: strided(config, packed=True)),
    Method("gather", gather),
)
COMPILED_COMPOSITIONS = (
    Method("strided", _compiled(lambda config: strided(config, max_elements=_UNCUT)), True),
    Method("packed", _compiled(lambda config: strided(config, True, _UNCUT)), True),
    Method("gather", _compiled(gather), True),
)


def methods(compiled: bool) -> list[Method]:
    """Ours first, then every composition."""
    return [Method(OURS, _ours), *COMPOSITIONS, *(COMPILED_COMPOSITIONS if compiled else ())]


def dense(is_causal: bool) -> Attention:
    """Dense scaled_dot_product_attention on (batch, seqlen, heads, head_dim)."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)

    return attention


def dense_pairs(seqlen: int, is_causal: bool) -> int:
    """Query-key pairs of one head."""
    return seqlen * (seqlen + 1) // 2 if is_causal else seqlen * seqlen


def matrix_product() -> tuple[Call, int]:
    """torch.mm of two float32 squares, and its FLOP."""
    a, b = (torch.randn(_MM_SIZE, _MM_SIZE) for _ in range(2))
    return lambda: (torch.mm(a, b),), 2 * _MM_SIZE**3
