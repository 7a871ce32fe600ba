"""Messages between the ranks of a group: every one waited for once, for a bounded time."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import DistributedAttentionError, Unsupported, message
from ._groups import SequenceGroups

# Ours among the tags of the group; forward and backward exchange headers first.
HEADER_TAG = 0x64696C
ROWS_TAG = HEADER_TAG + 1
GRADIENTS_TAG = HEADER_TAG + 2

# After one rank failed, what the others have long sent must be there.
_GRACE = datetime.timedelta(milliseconds=50)


def has_messages(groups: SequenceGroups) -> bool:
    """Whether the group has point-to-point messages with tags and a timeout each."""
    return "gloo" in dist.get_backend(groups.group)


def require_usable(groups: SequenceGroups) -> None:
    """Raise if an exchange failed before, or the group has no point-to-point messages here."""
    if groups.failure is not None:
        raise DistributedAttentionError(
            f"dilated_attention: sequence_groups: no call after a failed one ({groups.failure})",
            "call",
            (),
        )
    if not has_messages(groups):
        expected = "a Gloo group, with tensors on the CPU"
        backend = dist.get_backend(groups.group)
        raise Unsupported(message("sequence_groups", expected, backend))


def failure(
    groups: SequenceGroups,
    operation: str,
    ranks: Sequence[int],
    expected: str,
    got: str,
    hint: str,
) -> DistributedAttentionError:
    """The error of a rank that the others left alone."""
    text = (
        f"dilated_attention: {operation} over {groups.size} ranks: expected {expected}, got {got} "
        f"from ranks {list(ranks)} of group {groups.group.group_name!r} (this is rank "
        f"{groups.rank}; {hint})"
    )
    return DistributedAttentionError(text, operation, tuple(ranks))


class Exchange:
    """Messages that are under way. Tensors are contiguous; none stands for no message."""

    def __init__(
        self,
        groups: SequenceGroups,
        sends: Mapping[int, Tensor],
        receives: Mapping[int, Tensor],
        tag: int,
        operation: str,
        timeout: float | None = None,
    ) -> None:
        self._groups = groups
        self._operation = operation
        self._timeout = groups.timeout if timeout is None else timeout
        self._deadline = time.monotonic() + self._timeout
        self._tensors = (sends, receives)  # alive until waited for
        self._works: list[tuple[int, dist.Work]] = []
        # Receives first: what does not arrive says more than what is not fetched.
        for start, tensors, peer_argument in (
            (dist.irecv, receives, "group_src"),
            (dist.isend, sends, "group_dst"),
        ):
            for peer, tensor in tensors.items():
                self._start(start, tensor, peer, {peer_argument: peer}, tag)

    def _start(
        self, start: Any, tensor: Tensor, peer: int, peer_argument: dict[str, int], tag: int
    ) -> None:
        try:
            work = start(tensor, group=self._groups.group, tag=tag, **peer_argument)
        except RuntimeError as error:  # a closed connection
            self._fail([peer, *self._missing()], error)
        self._works.append((peer, work))

    def finish(self) -> None:
        """Wait for all messages.

        Raises:
            DistributedAttentionError: some rank did not answer, or its process is gone.
        """
        while self._works:
            peer, work = self._works.pop(0)
            left = datetime.timedelta(seconds=max(self._deadline - time.monotonic(), 0.001))
            try:
                work.wait(left)
            except RuntimeError as error:
                self._fail([peer, *self._missing()], error)
        self._tensors = ({}, {})

    def _missing(self) -> list[int]:
        """Ranks whose messages are not there either."""
        missing = []
        while self._works:
            peer, work = self._works.pop(0)
            try:
                work.wait(_GRACE)
            except RuntimeError:
                missing.append(peer)
        return missing

    def _fail(self, ranks: list[int], error: RuntimeError) -> None:
        named = tuple(sorted(set(ranks)))
        self._groups.failure = f"{self._operation}, ranks {list(named)}"
        expected = f"an answer within {self._timeout:g} s"
        raise failure(self._groups, self._operation, named, expected, "none", str(error)) from error
