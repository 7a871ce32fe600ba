"""dilated_attention on shards: all ranks agree on a call, then its transport runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

import torch
from torch import Tensor

from .. import _fake, _ops
from .._inputs import lengths, optional_tensors, require_tensors
from .._options import COLUMN_SUM_PRESETS, DTYPES, Options, attention_options, flag, integers
from .._transforms import autocast_inputs
from ..errors import InvalidProblem, Unsupported, message
from ._agreement import Header, agree
from ._class_rows import ClassRowsAttention
from ._groups import SequenceGroups
from ._messages import require_usable
from ._plans import Call, ExchangePlan, make_exchange_plan
from ._ring import RingAttention
from ._transports import transport_index, transport_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._options import AttentionOptions, Integers, Lengths

_MOST_PLANS = 64


def plan_of(groups: SequenceGroups, shapes: Any, shards: Any, options: Options) -> ExchangePlan:
    """Of a call with these shapes, but for their length; cached."""
    shapes = _with_length(shapes, sum(shards))
    key = (*shapes, None, *shards, None, *options[:3], *options.packed)
    plan = groups.plans.get(key)
    if plan is None:
        plan = make_exchange_plan(shapes, tuple(shards), groups.rank, options)
        while len(groups.plans) >= _MOST_PLANS:
            groups.plans.pop(next(iter(groups.plans)))
        groups.plans[key] = plan
    return plan


@dataclass
class Given:
    """A checked call of this rank, before others are asked."""

    options: Options
    shapes: tuple[int, ...]  # of the whole call; seqlen is 0 where only all ranks know it
    shards: list[int] | None
    cu_seqlens: list[int]
    seqused: Tensor | None
    dropout_seed: Tensor | None
    transport: str | None
    header: Header


def call_shapes(
    layout: str, query: Tensor, key: Tensor, has_seqused: bool, cu: list[int]
) -> tuple[int, ...]:
    """Of the whole call, without its length (bindings/torch/arguments.h)."""
    heads_dim = {"bshd": 2, "bhsd": 1, "shd": 1}[layout]
    batch = 1 if layout == "shd" else query.shape[0]
    return (0, 0, DTYPES.index(query.dtype), batch, 0, query.shape[heads_dim],
            key.shape[heads_dim], query.shape[-1], 0, int(has_seqused), *cu)  # fmt: skip


def _with_length(shapes: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (*shapes[:4], length, *shapes[5:])


def check_call(
    groups: SequenceGroups,
    tensors: tuple[Tensor, Tensor, Tensor],
    shards: Sequence[SupportsIndex] | None,
    seqused: Lengths | None,
    cu_seqlens: Lengths | None,
    dropout_seed: SupportsIndex | Tensor | None,
    transport: str | None,
    options: Options,
    drawn: bool | None = None,
) -> Given:
    """What can be checked before other ranks are asked."""
    query, key, _ = tensors
    cpu = torch.device("cpu")
    if query.device != cpu:
        expected = "tensors on the CPU over several ranks"
        raise Unsupported(message("query", expected, str(query.device)))
    optional, _ = optional_tensors(query, options, None, None, None, None, dropout_seed)
    _fake.check((*tensors, *optional), options)
    packed = options.layout == "shd"
    rows = query.shape[{"bshd": 1, "bhsd": 2, "shd": 0}[options.layout]]
    starts = lengths("cu_seqlens", cu_seqlens, cpu)
    cu = [] if starts is None else starts.tolist()
    if packed != bool(cu):
        expected = "starts of the whole packed sequences with layout 'shd', and only then"
        raise InvalidProblem(message("cu_seqlens", expected, "none" if packed else f"{cu}"))
    used = lengths("seqused", seqused, cpu)
    given = None if shards is None else integers("shards", shards)
    if given is not None and (len(given) != groups.size or given[groups.rank] != rows):
        expected = f"{groups.size} numbers of rows, {rows} of them for rank {groups.rank}"
        raise InvalidProblem(message("shards", expected, str(given)))
    shapes = call_shapes(options.layout, query, key, used is not None, cu)
    # What can be compared before the shards are known.
    total = [cu[-1] if cu else 0] if given is None else given
    asked = (list(_with_length(shapes, sum(total))), total, 0, *options)
    hashes = list(_ops.ask(_ops.ops.exchange_numbers, *asked)[3:])
    seed = optional.dropout_seed
    header = Header(0, groups.calls, 0, *hashes)._replace(
        seqused=0 if used is None else hash(tuple(used.tolist())),
        transport=transport_index(transport),
        seeded=int(dropout_seed is not None and not drawn),
        rows=rows,
        seed=0 if seed is None else int(seed[0]),
        offset=0 if seed is None else int(seed[1]),
    )
    return Given(options, shapes, given, cu, used, seed, transport, header)


def agreed_call(groups: SequenceGroups, check: Any) -> Call:
    """The call of all ranks."""
    require_usable(groups)
    groups.calls += 1
    operation = f"call {groups.calls}"
    given: Given = check()
    plan = None
    if groups.size == 1:
        given.shards = [given.header.rows]
    if given.shards is not None:
        plan = plan_of(groups, given.shapes, given.shards, given.options)
    shards, seed = given.shards, given.dropout_seed
    if plan is None or not plan.is_local or (seed is not None and groups.size > 1):
        headers = agree(groups, given.header, operation)
        shards = [header.rows for header in headers]
        if seed is not None:
            seed = torch.tensor([headers[0].seed, headers[0].offset], dtype=torch.int64)
        plan = plan_of(groups, given.shapes, shards, given.options)
    assert shards is not None
    return Call(
        groups,
        groups.calls,
        plan,
        transport_of(plan, given.options, given.transport),
        given.options,
        given.shapes[3],
        given.cu_seqlens,
        given.seqused,
        seed,
    )


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sequence_groups: SequenceGroups,
    segments: Integers,
    dilations: Integers,
    shards: Sequence[SupportsIndex] | None = ...,
    seqused: Lengths | None = ...,
    cu_seqlens: Lengths | None = ...,
    dropout_seed: SupportsIndex | Tensor | None = ...,
    transport: str | None = ...,
    key_mask: Tensor | None = ...,
    row_shift: bool = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sequence_groups: SequenceGroups,
    segments: Integers,
    dilations: Integers,
    shards: Sequence[SupportsIndex] | None = ...,
    seqused: Lengths | None = ...,
    cu_seqlens: Lengths | None = ...,
    dropout_seed: SupportsIndex | Tensor | None = ...,
    transport: str | None = ...,
    key_mask: Tensor | None = ...,
    row_shift: bool = ...,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sequence_groups: SequenceGroups,
    segments: Integers,
    dilations: Integers,
    shards: Sequence[SupportsIndex] | None = ...,
    seqused: Lengths | None = ...,
    cu_seqlens: Lengths | None = ...,
    dropout_seed: SupportsIndex | Tensor | None = ...,
    transport: str | None = ...,
    key_mask: Tensor | None = ...,
    row_shift: bool = ...,
    return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sequence_groups: SequenceGroups,
    segments: Integers,
    dilations: Integers,
    shards: Sequence[SupportsIndex] | None = None,
    seqused: Lengths | None = None,
    cu_seqlens: Lengths | None = None,
    dropout_seed: SupportsIndex | Tensor | None = None,
    transport: str | None = None,
    key_mask: Tensor | None = None,
    row_shift: bool = False,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Dilated self-attention of a sequence whose positions are spread over ranks.

    Every rank calls it with its shard: consecutive positions, in rank order, of any number, none
    included. The output and the gradient of the query have the bits that
    :func:`dilated.dilated_attention` computes for them from the whole sequence, for every number of
    ranks and every way to cut. Gradients of key and value are sums over ranks, in float32 and in
    rank order, rounded once: the same bits in every run.

    Args:
        query: (batch, rows, heads, head_dim), or as ``layout`` says: this rank's rows.
        key: (batch, rows, kv_heads, head_dim).
        value: like key.
        sequence_groups: The ranks.
        segments: Segment length of every branch.
        dilations: Dilation of every branch.
        shards: Rows of every rank. None: ranks tell each other. If they are given and no segment
            crosses a border, nothing is communicated at all.
        seqused: True length of every sequence, whole: the same on all ranks.
        cu_seqlens: Starts of the packed sequences and their end, of all ranks together.
        dropout_seed: As in :func:`dilated.dilated_attention`, the same on all ranks. None: the
            first rank draws it.
        transport: How rows travel, the same on all ranks: "local", "halo", "all_to_all",
            "all_gather" or "ring". None: the first of the first three that can. "ring" holds rows
            of one rank at a time and sums in another order: its bits are not those of one process.
        key_mask: Must be None: it would have to hold the keys of other ranks.
        row_shift: Must be False.
        return_lse: Also return the log-sum-exp L.
        **options: Options of :func:`dilated.dilated_attention`, the same on all ranks.

    Returns:
        Output like query, or (output, lse) with lse (batch, heads, rows), packed (heads, rows).
        Both are differentiable once; backward communicates, so all ranks must call it.

    Raises:
        InvalidProblem: an argument breaks a rule, or ranks make different calls: then on all ranks,
            before any tensor travels.
        Unsupported: no back end or not this transport can run this, a key_mask or row_shift is
            given, or tensors are not on the CPU.
        DistributedAttentionError: a rank raised an error of its own, or did not answer within the
            timeout of ``sequence_groups``.

    Example:
        >>> import torch, torch.distributed as dist, dilated.distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> groups = dilated.distributed.SequenceGroups()
        >>> q, k, v = torch.randn(3, 1, 100, 8, 16).unbind(0)
        >>> out = dilated.distributed.dilated_attention(
        ...     q, k, v, sequence_groups=groups, segments=[16, 64], dilations=[1, 4]
        ... )
        >>> out.shape
        torch.Size([1, 100, 8, 16])
        >>> dist.destroy_process_group()
    """
    inputs = query, key, value

    def read_options() -> Options:
        nonlocal inputs
        require_tensors(query, key, value)
        if key_mask is not None:
            hint = "seqused and cu_seqlens say which positions there are"
            raise Unsupported(message("key_mask", "none over ranks", "a mask", hint))
        if flag("row_shift", row_shift):
            raise Unsupported(message("row_shift", "False over ranks", "True"))
        if options.get("preset") in COLUMN_SUM_PRESETS:
            hint = "its column sums run over the whole sequence"
            raise Unsupported(message("preset", "no column sums over ranks", "'fkodom'", hint))
        checked = attention_options(segments=segments, dilations=dilations, **options)
        if torch.is_autocast_enabled(query.device.type):
            none = _ops.OptionalTensors()
            cast = autocast_inputs(query.device.type, (query, key, value, *none, *checked))
            inputs = cast[0], cast[1], cast[2]
        return checked

    if torch.compiler.is_compiling():
        from ._compiled import compiled_attention

        checked = read_options()
        out, lse = compiled_attention(
            sequence_groups, inputs, shards, seqused, cu_seqlens, dropout_seed, transport, checked
        )
        return (out, lse) if flag("return_lse", return_lse) else out

    def check() -> Given:
        checked = read_options()
        return check_call(
            sequence_groups, inputs, shards, seqused, cu_seqlens, dropout_seed, transport, checked
        )

    with sequence_groups:
        wants_lse = flag("return_lse", return_lse)
        call = agreed_call(sequence_groups, check)
        function: Any = RingAttention if call.transport == "ring" else ClassRowsAttention
        out, lse = function.apply(*inputs, call)
    return (out, lse) if wants_lse else out
