"""All ranks make the same call, or all raise the same error before any tensor travels."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..errors import DistributedAttentionError, InvalidProblem, message
from ._groups import SequenceGroups
from ._messages import HEADER_TAG, Exchange, failure, require_usable

if TYPE_CHECKING:
    from ._plans import Call


class Header(NamedTuple):
    """What a rank says about its call, 64-bit integers."""

    failed: int = 0  # this rank raises an error of its own
    call: int = 0
    backward: int = 0
    shapes: int = 0  # hashes of the exchange plan
    branches: int = 0
    options: int = 0
    shards: int = 0
    seqused: int = 0  # a hash
    transport: int = 0  # as asked for
    seeded: int = 0  # whether dropout_seed was given
    rows: int = 0  # may differ
    seed: int = 0  # rank 0's counts where none was given
    offset: int = 0


_STEP = ("call", "backward")
# What must be equal, and how a message calls it.
_WORDS = {
    "call": "another number of calls",
    "backward": "another pass",
    "shapes": "other shapes, dtype or heads",
    "branches": "other segments, dilations or offsets",
    "options": "other options",
    "shards": "other shards or cu_seqlens",
    "seqused": "another seqused",
    "transport": "another transport",
    "seeded": "another dropout_seed",
}


# An error is told to ranks that are about to listen; others find the connection closed.
_SECONDS_TO_TELL = 2.0


def _exchange(
    groups: SequenceGroups, header: Header, operation: str, timeout: float | None = None
) -> list[Header]:
    others = [rank for rank in range(groups.size) if rank != groups.rank]
    mine = torch.tensor(header, dtype=torch.int64)
    received = {rank: torch.empty_like(mine) for rank in others}
    Exchange(groups, dict.fromkeys(others, mine), received, HEADER_TAG, operation, timeout).finish()
    received[groups.rank] = mine
    return [Header(*received[rank].tolist()) for rank in range(groups.size)]


def tell_failure(groups: SequenceGroups, error: type[BaseException]) -> None:
    """Tell the others, who wait for this rank's header or will, that it raises an error of its own.

    Whoever does not listen in time finds the connection closed: Gloo closes all after a timeout.
    """
    with contextlib.suppress(DistributedAttentionError):  # they may have failed otherwise
        timeout = min(groups.timeout, _SECONDS_TO_TELL)
        _exchange(groups, Header(failed=1, call=groups.calls), "an error", timeout)
    groups.failure = f"an error of this rank, {error.__name__}"


def agree(groups: SequenceGroups, header: Header, operation: str) -> list[Header]:
    """The headers of all ranks, in their order.

    Raises:
        InvalidProblem: they differ; the same message on all ranks.
        DistributedAttentionError: some rank failed, or did not answer.
    """
    headers = _exchange(groups, header, operation)
    failed = [rank for rank, other in enumerate(headers) if other.failed]
    if failed:
        groups.failure = f"an error of ranks {failed} before {operation}"
        raise failure(
            groups, operation, failed, "a call of every rank", "an error", "they say which"
        )
    differences: list[str] = []
    for name, words in _WORDS.items():
        if differences and name not in _STEP:
            break  # calls at different steps have nothing else to compare
        values = [getattr(other, name) for other in headers]
        usual = Counter(values).most_common(1)[0][0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            differences.append(f"{words} on ranks {odd}")
    given = {(h.seed, h.offset) for h in headers if h.seeded}
    if len(given) > 1 and not differences:
        differences.append("different dropout seeds")
    if differences:
        # Calls that differ once are no longer counted alike.
        groups.failure = "; ".join(differences)
        raise InvalidProblem(
            message("sequence_groups", "the same call on all ranks", groups.failure)
        )
    return headers


def agree_on_backward(call: Call) -> None:
    """All ranks are in the backward of this call.

    Raises:
        InvalidProblem, DistributedAttentionError: as `agree`.
    """
    require_usable(call.groups)
    header = Header(0, call.number, 1, *call.plan.hashes)
    agree(call.groups, header, f"backward of call {call.number}")
