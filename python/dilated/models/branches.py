"""Which branches to take: segments and dilations for a length, and the reasons.

The paper's rule: both grow geometrically: nearby tokens are seen densely, far ones sparsely,
and the work of all branches together stays a small multiple of the first one's.
"""

from __future__ import annotations

from dataclasses import dataclass

from dilated.errors import InvalidProblem, message


@dataclass(frozen=True)
class Branches:
    """Segments and dilations, one pair per branch, and why they were chosen; `str` shows all.

    Made by `choose_branches`.

    Example:
        >>> from dilated.models import LongNet, choose_branches
        >>> chosen = choose_branches(1000, num_heads=4, local=64)
        >>> model = LongNet(32, 2, 4, segments=chosen.segments, dilations=chosen.dilations)
    """

    segments: tuple[int, ...]
    dilations: tuple[int, ...]
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """The lists, then one reason a line."""
        lists = f"segments {list(self.segments)}, dilations {list(self.dilations)}"
        return "\n".join([lists, *(f"* {reason}" for reason in self.reasons)])


def choose_branches(
    longest: int, num_heads: int, *, num_kv_heads: int | None = None, local: int = 2048
) -> Branches:
    """Branches for sequences of up to `longest` positions; a pure function of its arguments.

    Args:
        longest: the longest sequence that the model will serve.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads; default num_heads.
        local: length of the segments within which a token sees everything.

    Returns:
        Segments, dilations and reasons. For 12 heads and 32,768 positions they are the paper's.

    Raises:
        InvalidProblem: a number is below 1, or num_kv_heads does not divide num_heads.

    Example:
        >>> from dilated.models import choose_branches
        >>> chosen = choose_branches(32_768, num_heads=12)
        >>> chosen.segments, chosen.dilations
        ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
        >>> print(chosen)
        segments [2048, 4096, 8192, 16384, 32768], dilations [1, 2, 4, 6, 12]
        * segments of 2048 with dilation 1: every token sees its neighbourhood in full
        * the longest segment, 32768, holds the longest sequence, 32768: nothing is cut apart
        * dilations divide the 12 key/value heads: every position of a segment is kept by some head
        * a token far away is seen by the heads that keep its residue, from places of that residue
        * 7.7 times fewer pairs of query and key than dense attention at 32768
        * 6 does not divide 16384: preset torchscale needs row_shift for longer sequences
        * 12 does not divide 32768: preset torchscale needs row_shift for longer sequences
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    sizes = {"longest": longest, "num_heads": num_heads, "num_kv_heads": kv_heads, "local": local}
    for name, size in sizes.items():
        if size < 1:
            raise InvalidProblem(message(name, ">= 1", str(size), op="choose_branches"))
    if num_heads % kv_heads:
        expected = f"a divisor of num_heads = {num_heads}"
        raise InvalidProblem(message("num_kv_heads", expected, str(kv_heads), op="choose_branches"))
    if longest <= local:
        why = f"the longest sequence, {longest}, fits in one local segment: dense attention"
        return Branches((local,), (1,), (why,))
    doublings = (-(-longest // local) - 1).bit_length()
    dilations = _dilations(kv_heads, doublings + 1)
    if len(dilations) == 1:
        why = (
            "1 key/value head: any dilation above 1 would leave positions that no head keeps; "
            f"dense attention over {longest}"
        )
        return Branches((longest,), (1,), (why,))
    steps = len(dilations) - 1
    segments = [local * 2 ** (doublings * i // steps) for i in range(steps + 1)]
    return Branches(
        tuple(segments), tuple(dilations), _reasons(longest, kv_heads, segments, dilations)
    )


def _dilations(kv_heads: int, most: int) -> list[int]:
    """Divisors of the heads that grow at most twofold a step: 1, 2, 4, 6, 12 of 12."""
    found = [1]
    for step in range(1, kv_heads.bit_length() + 1):
        largest = max(d for d in range(1, min(2**step, kv_heads) + 1) if kv_heads % d == 0)
        if largest > found[-1] and len(found) < most:
            found.append(largest)
    return found


def _reasons(
    longest: int, kv_heads: int, segments: list[int], dilations: list[int]
) -> tuple[str, ...]:
    pairs = sum(min(w, longest) / r**2 for w, r in zip(segments, dilations, strict=True))
    uneven = [
        f"{r} does not divide {w}: preset torchscale needs row_shift for longer sequences"
        for w, r in zip(segments, dilations, strict=True)
        if w % r
    ]
    return (
        f"segments of {segments[0]} with dilation 1: every token sees its neighbourhood in full",
        f"the longest segment, {segments[-1]}, holds the longest sequence, {longest}: "
        "nothing is cut apart",
        f"dilations divide the {kv_heads} key/value heads: every position of a segment is kept by "
        "some head",
        "a token far away is seen by the heads that keep its residue, from places of that residue",
        f"{longest / pairs:.1f} times fewer pairs of query and key than dense attention at "
        f"{longest}",
        *uneven,
    )
