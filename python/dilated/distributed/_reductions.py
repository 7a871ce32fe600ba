"""What training on shards needs besides attention: whole tensors, sums over ranks, one loss.

A loss is normalised by the tokens of all ranks, gradients of parameters are sums over ranks. Sums
are in rank order: the same bits on every rank and in every run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._options import integer, integers
from ..errors import InvalidProblem, Unsupported, message
from ._agreement import Header, agree
from ._groups import SequenceGroups
from ._messages import ROWS_TAG, Exchange, require_usable

# Passes of headers; 0 and 1 are attention's.
_UNSHARD, _SUM = 2, 3
_T = TypeVar("_T")


def _fingerprint(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def _checked(groups: SequenceGroups, check: Callable[[], _T]) -> _T:
    """The next call of these groups; errors of its arguments reach the others."""
    with groups:
        require_usable(groups)
        groups.calls += 1
        return check()


def _require_cpu(op: str, name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise Unsupported(message(name, "a tensor on the CPU", str(tensor.device), op=op))


def unshard(
    shard: Tensor,
    *,
    sequence_groups: SequenceGroups,
    dim: int = 1,
    shards: Sequence[SupportsIndex] | None = None,
) -> Tensor:
    """The whole tensor on every rank, the inverse of :meth:`SequenceGroups.shard`.

    Args:
        shard: This rank's rows, any dtype; no gradient passes.
        sequence_groups: The ranks.
        dim: Dimension of the rows.
        shards: Rows of every rank. None: ranks tell each other.

    Returns:
        A new tensor like shard, with the rows of all ranks in their order.

    Raises:
        InvalidProblem: shard records a gradient, shards do not fit, or ranks make different calls:
            then on all ranks.
        Unsupported: shard is not on the CPU.
        DistributedAttentionError: a rank raised an error of its own, or did not answer within the
            timeout of ``sequence_groups``.

    Example:
        >>> import torch, torch.distributed as dist, dilated.distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> groups = dilated.distributed.SequenceGroups()
        >>> dilated.distributed.unshard(torch.arange(6).view(1, 6), sequence_groups=groups)
        tensor([[0, 1, 2, 3, 4, 5]])
        >>> dist.destroy_process_group()
    """
    groups = sequence_groups

    def check() -> tuple[int, Header]:
        _require_cpu("unshard", "shard", shard)
        if torch.is_grad_enabled() and shard.requires_grad:
            expected = "a tensor that records no gradient"
            raise InvalidProblem(
                message("shard", expected, "requires_grad", "call .detach()", op="unshard")
            )
        if not -shard.ndim <= dim < shard.ndim:
            expected = f"a dimension of {shard.ndim}"
            raise InvalidProblem(message("dim", expected, str(dim), op="unshard"))
        at = dim % shard.ndim
        rows = shard.shape[at]
        given = None if shards is None else integers("shards", shards)
        if given is not None and (len(given) != groups.size or given[groups.rank] != rows):
            expected = f"{groups.size} numbers of rows, {rows} of them for rank {groups.rank}"
            raise InvalidProblem(message("shards", expected, str(given), op="unshard"))
        shape = [n for i, n in enumerate(shard.shape) if i != at]
        shapes = _fingerprint(str(shard.dtype), at, shape)
        return at, Header(0, groups.calls, _UNSHARD, shapes, shards=_fingerprint(given), rows=rows)

    operation = f"unshard, call {groups.calls + 1}"
    at, header = _checked(groups, check)
    rows = [other.rows for other in agree(groups, header, operation)]
    mine = shard.detach().movedim(at, 0).contiguous()
    parts = [mine.new_empty(n, *mine.shape[1:]) for n in rows]
    parts[groups.rank] = mine
    others = [rank for rank in range(groups.size) if rank != groups.rank]
    sends = dict.fromkeys(others if mine.numel() else [], mine)
    receives = {rank: parts[rank] for rank in others if parts[rank].numel()}
    Exchange(groups, sends, receives, ROWS_TAG, operation).finish()
    return torch.cat(parts).movedim(0, at).contiguous()


def _sum(groups: SequenceGroups, flat: Tensor, operation: str) -> Tensor:
    """Every rank adds its part of the numbers up in rank order and sends the sum to the others."""
    header = Header(0, groups.calls, _SUM, _fingerprint(str(flat.dtype), flat.numel()))
    agree(groups, header, operation)
    others = [rank for rank in range(groups.size) if rank != groups.rank]
    parts = list(flat.tensor_split(groups.size))
    mine = parts[groups.rank]
    arrived = {rank: torch.empty_like(mine) for rank in others if mine.numel()}
    sends = {rank: parts[rank] for rank in others if parts[rank].numel()}
    Exchange(groups, sends, arrived, ROWS_TAG, operation).finish()
    total = torch.zeros_like(mine)
    for rank in range(groups.size):
        total += arrived.get(rank, mine)
    parts = [total if rank == groups.rank else torch.empty_like(p) for rank, p in enumerate(parts)]
    sends = dict.fromkeys(others if mine.numel() else [], total)
    receives = {rank: parts[rank] for rank in others if parts[rank].numel()}
    Exchange(groups, sends, receives, ROWS_TAG, operation).finish()
    return torch.cat(parts)


def _local(x: Tensor) -> Tensor:
    """This rank's part of what FSDP shards, everything of other tensors."""
    local: Tensor = x.to_local() if isinstance(x, DTensor) else x
    return local.detach()


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_over_ranks(tensor: Tensor, *, sequence_groups: SequenceGroups) -> Tensor:
    """The sum of the ranks' tensors, without gradient: for losses and counts that are reported.

    Args:
        tensor: Any shape, the same on all ranks; floating dtypes below float32 are added in
            float32 and rounded once.
        sequence_groups: The ranks.

    Returns:
        A new tensor like `tensor`, with the same bits on all ranks.

    Raises:
        InvalidProblem: ranks make different calls: on all ranks.
        Unsupported: tensor is not on the CPU.
        DistributedAttentionError: a rank raised an error of its own, or did not answer within the
            timeout of ``sequence_groups``.

    Example:
        >>> import torch, torch.distributed as dist, dilated.distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> groups = dilated.distributed.SequenceGroups()
        >>> dilated.distributed.sum_over_ranks(torch.tensor([2, 3]), sequence_groups=groups)
        tensor([2, 3])
        >>> dist.destroy_process_group()
    """
    groups = sequence_groups
    operation = f"sum_over_ranks, call {groups.calls + 1}"

    def check() -> Tensor:
        _require_cpu("sum_over_ranks", "tensor", tensor)
        flat = tensor.detach().flatten()
        return flat.to(_accumulator(tensor.dtype)) if tensor.is_floating_point() else flat

    flat = _checked(groups, check)
    return _sum(groups, flat, operation).to(tensor.dtype).reshape(tensor.shape)


def mean_loss(total: Tensor, count: SupportsIndex, *, sequence_groups: SequenceGroups) -> Tensor:
    """This rank's share of the mean loss: the shares of all ranks add up to the mean.

    Gradients of the shares, summed by :func:`sum_gradients`, are those of the mean over all tokens,
    however the tokens lie on the ranks.

    Args:
        total: () sum of the losses of this rank's tokens.
        count: Their number; a rank may have none.
        sequence_groups: The ranks.

    Returns:
        total / (number of tokens of all ranks), differentiable.

    Raises:
        InvalidProblem: count is negative, no rank has a token, or ranks make different calls: then
            on all ranks.
        DistributedAttentionError: a rank raised an error of its own, or did not answer within the
            timeout of ``sequence_groups``.

    Example:
        >>> import torch, torch.distributed as dist, dilated.distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> groups = dilated.distributed.SequenceGroups()
        >>> losses = torch.tensor([1.0, 3.0])
        >>> dilated.distributed.mean_loss(losses.sum(), 2, sequence_groups=groups)
        tensor(2.)
        >>> dist.destroy_process_group()
    """
    groups = sequence_groups
    operation = f"mean_loss, call {groups.calls + 1}"

    def check() -> Tensor:
        tokens = integer("count", count)
        if tokens < 0:
            raise InvalidProblem(message("count", "0 <= count", str(tokens), op="mean_loss"))
        return torch.tensor([tokens])

    tokens = int(_sum(groups, _checked(groups, check), operation))
    if tokens == 0:
        raise InvalidProblem(message("count", "a token on some rank", "none", op="mean_loss"))
    return total / tokens


def sum_gradients(parameters: Iterable[Tensor], *, sequence_groups: SequenceGroups) -> None:
    """Replace the gradients of replicated parameters by their sums over the ranks.

    Args:
        parameters: The same on all ranks, in one order; FSDP's have this rank's part summed, with
            those of ranks that hold the same part. A gradient that is None counts as zeros,
            and stays None if all ranks have none.
        sequence_groups: The ranks.

    Raises:
        InvalidProblem: parameters differ between ranks: on all ranks.
        Unsupported: a parameter is not on the CPU.
        DistributedAttentionError: a rank raised an error of its own, or did not answer within the
            timeout of ``sequence_groups``.

    Example:
        >>> import torch, torch.distributed as dist, dilated.distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> groups = dilated.distributed.SequenceGroups()
        >>> layer = torch.nn.Linear(3, 1)
        >>> layer(torch.ones(2, 3)).sum().backward()
        >>> dilated.distributed.sum_gradients(layer.parameters(), sequence_groups=groups)
        >>> layer.bias.grad
        tensor([2.])
        >>> dist.destroy_process_group()
    """
    groups = sequence_groups
    operation = f"sum_gradients, call {groups.calls + 1}"

    def check() -> tuple[list[Tensor], Tensor]:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            _require_cpu("sum_gradients", "parameters", parameter)
        wide = any(parameter.dtype == torch.float64 for parameter in trained)
        dtype = torch.float64 if wide else torch.float32
        given = [
            torch.zeros(_local(p).numel()) if p.grad is None else _local(p.grad).flatten()
            for p in trained
        ]
        present = torch.tensor([float(p.grad is not None) for p in trained], dtype=dtype)
        return trained, torch.cat([present, *(gradient.to(dtype) for gradient in given)])

    trained, flat = _checked(groups, check)
    present, *sums = _sum(groups, flat, operation).split(
        [len(trained), *(_local(parameter).numel() for parameter in trained)]
    )
    for parameter, given, gradient in zip(trained, present.tolist(), sums):
        if given:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            here = _local(parameter.grad)
            here.copy_(gradient.reshape(here.shape))
