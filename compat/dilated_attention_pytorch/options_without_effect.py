"""Options that change no result here, in one table: a value other than the default warns, once."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple


class _Option(NamedTuple):
    default: Any
    why: str


_OPTIONS = {
    "use_tf32": _Option(True, "precision is what torch.backends says, for the whole process"),
    "block_size": _Option(1024, "the operator chooses its tiles: see dilated.plan(...)"),
    "ring_size": _Option(None, "calls take the ranks: sequence_groups of dilated.distributed"),
    "use_checkpointing": _Option(True, "attention saves only its output and one number per row"),
    "use_memory_pool": _Option(True, "torch's allocator keeps the memory"),
    "max_cached_buffers": _Option(50, "torch's allocator keeps the memory"),
    "use_flash_attention": _Option(True, "the operator is the only implementation"),
    "compile_model": _Option(False, "call torch.compile(model)"),
    "average_attn_weights": _Option(True, "no weights are formed"),
}

_warned: set[str] = set()


def warn_if_given(**given: Any) -> None:
    """Warn about each option that is in the table and has not its default, once per process.

    Args:
        **given: names of the table and the values that a caller gave.
    """
    for name, value in given.items():
        option = _OPTIONS[name]
        if value != option.default and name not in _warned:
            _warned.add(name)
            text = f"dilated_attention_pytorch: {name}={value!r} has no effect ({option.why})"
            warnings.warn(text, stacklevel=3)
