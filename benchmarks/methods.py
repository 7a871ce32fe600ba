"""The columns: ours, compositions (eager and compiled), dense attention, matrix product.

On a GPU compositions run on the dense kernels of torch's two back ends that are fast there.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurations import FORWARD_FLOPS_PER_PAIR_AND_DIM, Attention, Configuration
from gather import gather
from kernels import CUDNN, FLASH
from measure import Call, make_inputs
from strided import strided

OURS = "dilated"
DENSE_SEQLEN = 2048
_MM_SIZES = {"cpu": 2048, "cuda": 8192}
# Of the dense yardsticks on a GPU, in sequences of DENSE_SEQLEN: enough to fill it.
_DENSE_TOKENS = 131072


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


def grouped(make: Callable[[Configuration], Attention]) -> Callable[[Configuration], Attention]:
    """For fewer key heads: every key head is a head of a problem, its query heads are a batch."""

    def grouped(config: Configuration) -> Attention:
        if config.num_kv_heads is None:
            return make(config)
        heads = config.num_kv_heads
        group = config.num_heads // heads
        attention = make(dataclasses.replace(config, num_heads=heads, num_kv_heads=None))

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q = query.unflatten(2, (heads, group)).movedim(3, 1).flatten(0, 1)
            k, v = (x.expand(group, *x.shape[1:]) for x in (key, value))
            out = attention(q, k, v).unflatten(0, (1, group))
            merged: Tensor = out.movedim(1, 3).flatten(2, 3)
            return merged

        return attend

    return grouped


_KERNELS = {"cuDNN": CUDNN, "flash": FLASH}


def _strided_on(name: str) -> Callable[[Configuration], Attention]:
    return grouped(lambda config: strided(config, max_elements=_UNCUT, kernel=_KERNELS[name]))


def _gather_on_gpu(config: Configuration) -> Attention:
    return grouped(lambda part: gather(part, CUDNN))(config)


CUDA_COMPOSITIONS: tuple[Method, ...] = (
    *(Method(f"strided, {name}", _strided_on(name)) for name in _KERNELS),
    Method("gather, cuDNN", _gather_on_gpu),
)
CUDA_COMPILED_COMPOSITIONS: tuple[Method, ...] = (
    Method("gather, cuDNN", _compiled(_gather_on_gpu), True),
)


def methods(compiled: bool, device: str = "cpu") -> list[Method]:
    """Ours first, then every composition."""
    if device == "cuda":
        of_gpu = CUDA_COMPILED_COMPOSITIONS if compiled else ()
        return [Method(OURS, _ours), *CUDA_COMPOSITIONS, *of_gpu]
    return [Method(OURS, _ours), *COMPOSITIONS, *(COMPILED_COMPOSITIONS if compiled else ())]


def dense(is_causal: bool, backend: SDPBackend | None = None) -> Attention:
    """Dense scaled_dot_product_attention on (batch, seqlen, heads, head_dim)."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)

    return attention


def _flash_attention_4(is_causal: bool) -> Attention | None:
    """Of the package flash-attn, if this Python has it."""
    try:
        function = importlib.import_module("flash_attn.cute").flash_attn_func
    except ImportError:
        return None

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = function(query, key, value, causal=is_causal)
        return cast(Tensor, result[0] if isinstance(result, tuple) else result)

    return attention


@dataclass(frozen=True)
class Yardstick:
    """A column that every row has; `attention` None: not installed here."""

    label: str
    attention: Attention | None
    inputs: tuple[Tensor, ...]
    forward_flops: float


def yardsticks(config: Configuration, device: str) -> list[Yardstick]:
    """Dense attention of DENSE_SEQLEN keys with the row's heads, head_dim and mask."""
    batch = 1 if device == "cpu" else max(1, min(config.seqlen, _DENSE_TOKENS) // DENSE_SEQLEN)
    dtype = getattr(torch, config.dtype)
    inputs = make_inputs(
        DENSE_SEQLEN, config.num_heads, config.head_dim, batch=batch, dtype=dtype, device=device
    )
    flops = (
        FORWARD_FLOPS_PER_PAIR_AND_DIM
        * config.head_dim
        * config.num_heads
        * batch
        * dense_pairs(DENSE_SEQLEN, config.is_causal)
    )
    causal = config.is_causal
    columns: dict[str, Attention | None] = {f"dense SDPA n={DENSE_SEQLEN}": dense(causal)}
    if device == "cuda":
        columns = {
            f"dense cuDNN n={DENSE_SEQLEN}": dense(causal, SDPBackend.CUDNN_ATTENTION),
            f"dense flash n={DENSE_SEQLEN}": dense(causal, SDPBackend.FLASH_ATTENTION),
            f"FlashAttention-4 n={DENSE_SEQLEN}": _flash_attention_4(causal),
        }
    return [Yardstick(label, attention, inputs, flops) for label, attention in columns.items()]


def dense_pairs(seqlen: int, is_causal: bool) -> int:
    """Query-key pairs of one head."""
    return seqlen * (seqlen + 1) // 2 if is_causal else seqlen * seqlen


def matrix_product(device: str = "cpu") -> tuple[Call, int]:
    """torch.mm of two squares, float32 on the CPU and bfloat16 on a GPU, and its FLOP."""
    size = _MM_SIZES[device]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return lambda: (torch.mm(a, b),), 2 * size**3
