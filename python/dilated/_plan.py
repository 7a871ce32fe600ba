"""What the core decides about a configuration, without a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from . import _ops
from ._options import DTYPES, Options, attention_options, flag, integer, integers, text_of
from .errors import InvalidProblem, message

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import AttentionOptions, Integers

_DEVICES = ("cpu", "cuda")


class WorkspaceBytes(NamedTuple):
    """Scratch memory of one call, in bytes.

    Example:
        >>> import dilated
        >>> dilated.plan(1000, 8, segments=[64], dilations=[1]).workspace_bytes.forward > 0
        True
    """

    forward: int
    backward: int


@dataclass(frozen=True)
class Plan:
    """A configuration that the core accepted; ``str`` shows all that was decided.

    Made by :func:`dilated.plan`; equal for equal configurations.

    Example:
        >>> import dilated
        >>> plan = dilated.plan(8, 1, segments=[4, 8], dilations=[1, 2])
        >>> plan.pair_counts, plan.offsets
        ([32, 16], [[0], [0]])
    """

    seqlen: int
    num_heads: int
    _shapes: tuple[int, ...]
    _options: tuple[Any, ...]

    def _ask(self, name: str, *arguments: Any) -> Any:
        operator = getattr(_ops.ops, name)
        return _ops.ask(operator, list(self._shapes), *arguments, *self._options)

    def __str__(self) -> str:
        """The resolved problem, its back end, what that decided, derived sizes."""
        return text_of(self._ask("print_plan"))

    def explain(self) -> str:
        """Several lines: the back end that runs this, and why each other one does not."""
        return text_of(self._ask("explain"))

    @property
    def workspace_bytes(self) -> WorkspaceBytes:
        """Scratch memory of forward and backward."""
        return WorkspaceBytes(*self._ask("workspace_bytes"))

    @property
    def pair_counts(self) -> list[int]:
        """Query-key pairs the mathematics needs, per branch, over batch and heads, unmasked."""
        return list(self._ask("count_pairs"))

    @property
    def offsets(self) -> list[list[int]]:
        """Residue kept per branch and query head, -1 where the head does not run the branch."""
        heads = self.num_heads
        flat = _ops.ask(_ops.ops.offsets, heads, self._shapes[6], *self._options)
        branches = range(len(Options(*self._options).segments))
        return [list(flat[b * heads : (b + 1) * heads]) for b in branches]

    def pattern(self, head: SupportsIndex = 0) -> Tensor:
        """int32 (seqlen, seqlen): in how many branches query p (row) of `head` sees key j (column).

        Raises:
            InvalidProblem: seqlen is above 4096, or ``head`` out of range.
        """
        table: Tensor = self._ask("attention_pattern", integer("head", head))
        return table


def plan(
    seqlen: SupportsIndex,
    num_heads: SupportsIndex = 1,
    *,
    segments: Integers,
    dilations: Integers,
    num_kv_heads: SupportsIndex | None = None,
    head_dim: SupportsIndex = 64,
    batch: SupportsIndex = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    threads: SupportsIndex | None = None,
    cu_seqlens: Integers = (),
    has_key_mask: bool = False,
    has_seqused: bool = False,
    **options: Unpack[AttentionOptions],
) -> Plan:
    """Plan calls of :func:`dilated.dilated_attention` with these shapes and options.

    Args:
        seqlen: Length of the sequences; packed, of all of them together.
        num_heads: Number of query heads.
        segments: Segment length of every branch.
        dilations: Dilation of every branch.
        num_kv_heads: Number of key/value heads; None means num_heads.
        head_dim: Width of a head.
        batch: Number of sequences.
        dtype: Of the tensors.
        device: Of the tensors, "cpu" or "cuda".
        threads: Threads of a call on the CPU; None means torch's number.
        cu_seqlens: Starts of packed sequences and their end.
        has_key_mask: Whether calls give a key mask.
        has_seqused: Whether calls give true lengths.
        **options: Options of :func:`dilated.dilated_attention`.

    Returns:
        A value to print and to ask.

    Raises:
        InvalidProblem: the configuration breaks a rule.
        Unsupported: no back end can run it; the message holds every back end's reason.

    Example:
        >>> import dilated
        >>> print(str(dilated.plan(8, segments=[4], dilations=[2]))[:17])
        device        cpu
        >>> dilated.plan(4, segments=[2, 4], dilations=[1, 2]).pattern().tolist()
        [[2, 1, 1, 0], [1, 1, 0, 0], [1, 0, 2, 1], [0, 0, 1, 1]]
    """
    kind = str(device).partition(":")[0]
    if kind not in _DEVICES:
        raise InvalidProblem(message("device", "device cpu or cuda", str(device)))
    if dtype not in DTYPES:
        expected = "dtype float32, float64, bfloat16 or float16"
        raise InvalidProblem(message("dtype", expected, str(dtype).removeprefix("torch.")))
    heads = integer("num_heads", num_heads)
    units = torch.get_num_threads() if threads is None else integer("threads", threads)
    if units < 1:
        raise InvalidProblem(message("threads", ">= 1", str(units)))
    shapes = (
        _DEVICES.index(kind),
        units if kind == "cpu" else 0,
        DTYPES.index(dtype),
        integer("batch", batch),
        integer("seqlen", seqlen),
        heads,
        heads if num_kv_heads is None else integer("num_kv_heads", num_kv_heads),
        integer("head_dim", head_dim),
        int(flag("has_key_mask", has_key_mask)),
        int(flag("has_seqused", has_seqused)),
        *integers("cu_seqlens", cu_seqlens),
    )
    checked = attention_options(segments=segments, dilations=dilations, **options)
    made = Plan(shapes[4], heads, shapes, (*checked[:3], tuple(checked.packed)))
    made.workspace_bytes  # noqa: B018 - raises what the core would raise
    return made
