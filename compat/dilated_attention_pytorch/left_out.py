"""Names that exist to say what to use instead: importable, but an error once used."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from dilated.errors import Unsupported

DISTRIBUTED = (
    "RingDilatedAttention and dilated.DilatedAttention take sequence_groups of dilated.distributed"
)
BLOCK_SPARSE = "planned as tables of active blocks; until then use dilated.DilatedAttention"
MEMORY_POOL = (
    "torch's allocator does it; dilated.plan(...).workspace_bytes is the scratch of a call"
)


def left_out(name: str, instead: str) -> NoReturn:
    """Raise the error of a name that is not implemented.

    Args:
        name: what was called.
        instead: what does its work.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(f"dilated_attention_pytorch: {name}: not implemented ({instead})")


class LeftOut:
    """Base of classes that cannot be constructed; `instead` names what to use.

    Raises:
        Unsupported: on construction.
    """

    _instead: ClassVar[str]

    def __init_subclass__(cls, instead: str | None = None) -> None:
        super().__init_subclass__()
        if instead is not None:
            cls._instead = instead

    def __new__(cls, *_: Any, **__: Any) -> LeftOut:
        """Raise."""
        left_out(cls.__name__, cls._instead)
