"""Questions to the core: back ends, plans, counts, patterns. No tensor is needed to ask them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _ops
from .errors import typed


class Backend(NamedTuple):
    """An implementation of the operator: name, description (SIMD target, or why not), available.

    Example:
        >>> import dilated
        >>> dilated.backends()[-1].available
        True
    """

    name: str
    description: str
    available: bool


def _ask(name: str, *arguments: Any) -> Any:
    try:
        return getattr(_ops.ops, name)(*arguments)
    except (ValueError, RuntimeError) as error:
        raise typed(error) from None


def backends() -> list[Backend]:
    """Every implementation; one that is not available says why in its description.

    Example:
        >>> import dilated
        >>> [b.name for b in dilated.backends()]
        ['cuda', 'cpu', 'reference']
    """
    names, descriptions, available = _ask("backends")
    rows = zip(names, descriptions, available, strict=True)
    return [Backend(name, description, bool(usable)) for name, description, usable in rows]


def presets() -> list[str]:
    """Names accepted as ``preset``.

    Example:
        >>> import dilated
        >>> dilated.presets()
        ['longnet', 'torchscale', 'head_groups', 'fork', 'fkodom']
    """
    return list(_ask("presets"))


class _Configuration(NamedTuple):
    """Shapes, in the order of the operators' schema."""

    device: str
    dtype: str
    batch: int
    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    cu_seqlens: list[int]
    has_key_mask: bool
    has_seqused: bool


def _configuration(
    seqlen: int,
    num_heads: int = 1,
    *,
    num_kv_heads: int | None = None,
    head_dim: int = 64,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    cu_seqlens: Sequence[int] = (),
    has_key_mask: bool = False,
    has_seqused: bool = False,
    **options: Any,
) -> tuple[_Configuration, _ops.Options]:
    shapes = _Configuration(
        device,
        str(dtype).removeprefix("torch."),
        batch,
        seqlen,
        num_heads,
        num_heads if num_kv_heads is None else num_kv_heads,
        head_dim,
        _ops.integers("cu_seqlens", cu_seqlens),
        has_key_mask,
        has_seqused,
    )
    return shapes, _ops.make_options(**options)


def explain(
    seqlen: int, num_heads: int = 1, *, backend: str | None = None, **configuration: Any
) -> str:
    """Several lines: the back end that would run this, and why each other one does not.

    Args:
        seqlen: Length of the sequences.
        num_heads: Number of query heads.
        backend: Name of a back end to force.
        **configuration: Shapes (``num_kv_heads``, ``head_dim``, ``batch``, ``dtype``, ``device``,
            ``cu_seqlens``, ``has_key_mask``, ``has_seqused``) and the options of
            :func:`dilated.dilated_attention`.

    Returns:
        Text to print.

    Raises:
        InvalidProblem: the configuration breaks a rule.

    Example:
        >>> import dilated
        >>> text = dilated.explain(1000, 4, head_dim=32, segments=[64, 256], dilations=[1, 4])
        >>> "cuda" in text
        True
    """
    shapes, options = _configuration(seqlen, num_heads, **configuration)
    return str(_ask("explain", *shapes, backend or "", *options))


def print_plan(
    seqlen: int, num_heads: int = 1, *, backend: str | None = None, **configuration: Any
) -> str:
    """Several lines: the resolved problem, its back end, derived sizes; arguments of `explain`.

    Example:
        >>> import dilated
        >>> print(dilated.print_plan(8, segments=[4], dilations=[2])[:25])
        device        cpu
        dtype
    """
    shapes, options = _configuration(seqlen, num_heads, **configuration)
    return str(_ask("print_plan", *shapes, backend or "", *options))


def workspace_bytes(
    seqlen: int,
    num_heads: int = 1,
    *,
    threads: int | None = None,
    backend: str | None = None,
    **configuration: Any,
) -> tuple[int, int]:
    """Scratch memory of (forward, backward) in bytes; ``threads`` defaults to torch's number.

    Example:
        >>> import dilated
        >>> forward, backward = dilated.workspace_bytes(1000, 8, segments=[64], dilations=[1])
    """
    shapes, options = _configuration(seqlen, num_heads, **configuration)
    count = torch.get_num_threads() if threads is None else threads
    forward, backward = _ask("workspace_bytes", *shapes, backend or "", count, *options)
    return forward, backward


def count_pairs(seqlen: int, num_heads: int = 1, **configuration: Any) -> list[int]:
    """Query-key pairs the mathematics needs, per branch, over batch and heads, without masks.

    Example:
        >>> import dilated
        >>> dilated.count_pairs(8, 1, segments=[4, 8], dilations=[1, 2])
        [32, 16]
    """
    shapes, options = _configuration(seqlen, num_heads, **configuration)
    return list(_ask("count_pairs", *shapes, *options))


def attention_pattern(
    seqlen: int, num_heads: int = 1, *, head: int = 0, **configuration: Any
) -> Tensor:
    """int32 (seqlen, seqlen): in how many branches query p (row) of ``head`` sees key j (column).

    Raises:
        InvalidProblem: seqlen is above 4096, or ``head`` out of range.

    Example:
        >>> import dilated
        >>> dilated.attention_pattern(4, segments=[2, 4], dilations=[1, 2]).tolist()
        [[2, 1, 1, 0], [1, 1, 0, 0], [1, 0, 2, 1], [0, 0, 1, 1]]
    """
    shapes, options = _configuration(seqlen, num_heads, **configuration)
    table: Tensor = _ask("attention_pattern", *shapes, head, *options)
    return table


def offset_table(
    num_heads: int, *, num_kv_heads: int | None = None, **options: Any
) -> list[list[int]]:
    """Residue kept per branch and query head, -1 where the head does not run the branch.

    Example:
        >>> import dilated
        >>> dilated.offset_table(4, segments=[4, 8], dilations=[1, 2])
        [[0, 0, 0, 0], [0, 1, 0, 1]]
    """
    chosen = _ops.make_options(**options)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    flat = list(_ask("offsets", num_heads, kv_heads, *chosen))
    branches = range(len(chosen.segments))
    return [flat[b * num_heads : (b + 1) * num_heads] for b in branches]


def versions() -> dict[str, str]:
    """Versions and paths that a bug report needs.

    Example:
        >>> import dilated
        >>> sorted(dilated.versions())
        ['dilated', 'library', 'machine', 'numpy', 'python', 'torch']
    """
    from . import __version__

    return {
        "dilated": __version__,
        "library": str(_ops.LIBRARY_PATH),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
