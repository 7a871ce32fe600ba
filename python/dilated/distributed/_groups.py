"""The ranks that hold one sequence, and who holds which positions of it."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from .._options import integer, integers, number
from ..errors import InvalidProblem, message

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ._plans import ExchangePlan

_OP = "SequenceGroups"


_numbers = itertools.count()
_named: weakref.WeakValueDictionary[str, SequenceGroups] = weakref.WeakValueDictionary()


def groups_named(name: str) -> SequenceGroups:
    """The groups of a compiled graph, which must still exist.

    Raises:
        InvalidProblem: they do not.
    """
    groups = _named.get(name)
    if groups is None:
        raise InvalidProblem(message("sequence_groups", "groups that exist", name, op=_OP))
    return groups


class SequenceGroups:
    """Ranks that hold contiguous shards of every sequence, in the order of their numbers.

    Made once and given to every call. It uses the communicator that the user made, creates none,
    and its constructor does not communicate. As a context manager it tells the other ranks of an
    exception that leaves the block.

    Args:
        group: The process group of these ranks, or a DeviceMesh of one dimension. None: all ranks.
        timeout: Seconds after which a rank that does not answer is an error.

    Attributes:
        group: The process group.
        rank: This rank's number in it.
        size: Number of ranks.
        timeout: As given.

    Raises:
        InvalidProblem: torch.distributed is not initialised, this rank is not in the group, the
            mesh has several dimensions, or timeout is not positive.

    Example:
        >>> import torch.distributed as dist, dilated.distributed
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> groups = dilated.distributed.SequenceGroups()
        >>> groups.size, groups.shards(10)
        (1, [10])
        >>> dist.destroy_process_group()
    """

    def __init__(
        self, group: dist.ProcessGroup | DeviceMesh | None = None, *, timeout: float = 120.0
    ) -> None:
        if not dist.is_initialized():
            hint = "call torch.distributed.init_process_group first"
            expected = "an initialised torch.distributed"
            raise InvalidProblem(message("group", expected, "none", hint, op=_OP))
        if group is not None and not isinstance(group, dist.ProcessGroup):
            group = _group_of(group)
        self.group: dist.ProcessGroup = dist.group.WORLD if group is None else group  # type: ignore[assignment]
        self.timeout = number("timeout", timeout)
        if not 0 < self.timeout < float("inf"):
            raise InvalidProblem(message("timeout", "seconds > 0", str(timeout), op=_OP))
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        #: What compiled graphs call these groups by, in this process.
        self.name = f"{self.group.group_name}/{next(_numbers)}"
        _named[self.name] = self
        #: Calls so far: ranks that lose step are told apart by it.
        self.calls = 0
        #: Why no call is possible any more.
        self.failure: str | None = None
        #: Plans by call and shards; the oldest leaves.
        self.plans: dict[Any, ExchangePlan] = {}

    def __repr__(self) -> str:
        return f"SequenceGroups(rank={self.rank}, size={self.size}, timeout={self.timeout})"

    def __enter__(self) -> SequenceGroups:
        """Errors in the block reach the other ranks.

        An exception that leaves the block, whatever raised it, is an error on every rank that is in
        a call with these groups, or makes its next one: :class:`DistributedAttentionError`. Calls
        and modules do so themselves; put a training step in a block, for its losses and data.
        """
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        from ._agreement import tell_failure
        from ._messages import has_messages

        if error is None or issubclass(error, _StopRecomputationError):
            return  # activation checkpointing ends so where it has recomputed enough
        told = self.failure is not None  # by an inner block, or by the others
        if not told and self.size > 1 and has_messages(self):
            tell_failure(self, error)

    def shards(self, seqlen: SupportsIndex) -> list[int]:
        """Rows of every rank if `seqlen` rows are spread evenly: the first ranks hold one more."""
        rows, more = divmod(integer("seqlen", seqlen), self.size)
        return [rows + (rank < more) for rank in range(self.size)]

    def positions(self, shards: Sequence[SupportsIndex], rank: int | None = None) -> Tensor:
        """Positions that a rank holds, this one by default: int64 (rows,), for rotary and xPos.

        Args:
            shards: Rows of every rank.
            rank: Which rank.

        Raises:
            InvalidProblem: not one entry per rank.
        """
        begin, end = self._bounds(shards, rank)
        return torch.arange(begin, end)

    def shard(
        self, whole: Tensor, dim: int = 1, shards: Sequence[SupportsIndex] | None = None
    ) -> Tensor:
        """This rank's part of a tensor that every rank has whole: a view.

        Args:
            whole: Any tensor.
            dim: Its dimension of positions.
            shards: Rows of every rank; None: spread evenly.

        Raises:
            InvalidProblem: shards do not add up to the dimension.
        """
        rows = self.shards(whole.shape[dim]) if shards is None else integers("shards", shards)
        if sum(rows) != whole.shape[dim]:
            expected = f"{whole.shape[dim]} rows together"
            raise InvalidProblem(message("shards", expected, str(sum(rows)), op=_OP))
        begin, end = self._bounds(rows, None)
        return whole.narrow(dim, begin, end - begin)

    def _bounds(self, shards: Sequence[SupportsIndex], rank: int | None) -> tuple[int, int]:
        rows = integers("shards", shards)
        if len(rows) != self.size:
            expected = f"one number of rows per rank, {self.size}"
            raise InvalidProblem(message("shards", expected, str(len(rows)), op=_OP))
        at = self.rank if rank is None else rank
        if not 0 <= at < self.size:
            expected = f"0 <= rank < {self.size}"
            raise InvalidProblem(message("rank", expected, str(at), op=_OP))
        return sum(rows[:at]), sum(rows[: at + 1])


def _group_of(mesh: Any) -> dist.ProcessGroup:
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        got = f"a mesh of {mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else repr(mesh)
        hint = 'take one dimension of a mesh: mesh["sequence"]'
        expected = "a process group that holds this rank, or a DeviceMesh of one dimension"
        raise InvalidProblem(message("group", expected, got, hint, op=_OP))
    return mesh.get_group()
