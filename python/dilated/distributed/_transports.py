"""How rows travel: what the plan chooses, and what a user may force.

local       no row travels
halo        all_to_all where rows cross one border only
all_to_all  every rank sends every other the rows that it reads: never more than another transport
all_gather  every rank of a segment has all rows of the others, read or not
ring        rows pass from rank to rank; memory for those of one rank at a time, other bits
"""

from __future__ import annotations

from typing import Any

from .._options import Options
from ..errors import InvalidProblem, Unsupported, message
from ._plans import LOCAL, NEIGHBOURS, ExchangePlan

TRANSPORTS = ("local", "halo", "all_to_all", "all_gather", "ring")


def transport_index(asked: Any) -> int:
    """The index in TRANSPORTS plus 1, 0 for None."""
    if asked is None:
        return 0
    if not isinstance(asked, str) or asked not in TRANSPORTS:
        raise InvalidProblem(message("transport", f"one of {', '.join(TRANSPORTS)}", repr(asked)))
    return TRANSPORTS.index(asked) + 1


def transport_of(plan: ExchangePlan, options: Options, asked: str | None) -> str:
    """The transport of a call, the same on all ranks.

    Raises:
        Unsupported: the one asked for cannot run this call.
    """
    chosen = {LOCAL: "local", NEIGHBOURS: "halo"}.get(plan.reach, "all_to_all")
    if asked is None:
        return chosen
    if asked == "local" and plan.reach > LOCAL:
        raise Unsupported(message("transport", f"'{chosen}'", "'local'", "segments cross borders"))
    if asked == "halo" and plan.reach > NEIGHBOURS:
        hint = "a segment spans more than two ranks"
        raise Unsupported(message("transport", f"'{chosen}'", "'halo'", hint))
    if asked == "ring" and not options.weights_have_gradients:
        hint = "a part of a branch has no gradient without"
        raise Unsupported(message("lse_grad", "True with transport 'ring'", "False", hint))
    return asked
