"""Memory pools: placeholders. Operators keep nothing between calls, so there is nothing to pool."""

from __future__ import annotations

from typing import Any

from ..left_out import MEMORY_POOL, LeftOut, left_out


class UnifiedMemoryPool(LeftOut, instead=MEMORY_POOL):
    """A pool of buffers."""


def get_global_memory_pool(*_: Any, **__: Any) -> UnifiedMemoryPool:
    """Left out: raises Unsupported."""
    left_out("get_global_memory_pool", MEMORY_POOL)


def reset_global_memory_pool() -> None:
    """Left out: raises Unsupported."""
    left_out("reset_global_memory_pool", MEMORY_POOL)
