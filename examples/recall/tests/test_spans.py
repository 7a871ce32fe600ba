"""The sequences are what spans.py says: an interpreter that reads them finds every answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recall import SINGLES
from spans import NUM_KEYS, NUM_VALUES, VOCABULARY, Recall


def runs(tokens: list[int], run: int) -> list[tuple[int, int]]:
    """(last position, token) of every run of keys or values; equal neighbours are several runs."""
    found, p = [], 0
    while p < len(tokens):
        if tokens[p] < NUM_KEYS + NUM_VALUES:
            assert tokens[p : p + run] == [tokens[p]] * run
            p += run
            found.append((p - 1, tokens[p - 1]))
        else:
            p += 1
    return found


@settings(deadline=None, max_examples=50)
@given(
    pairs=st.integers(1, 6),
    run=st.integers(1, 8),
    extra=st.integers(0, 200),
    seed=st.integers(0, 2**31),
)
def test_every_question_has_its_answer(pairs: int, run: int, extra: int, seed: int) -> None:
    task = Recall(pairs, run)
    batch = task.sample(3, task.shortest + extra, torch.Generator().manual_seed(seed))
    assert int(batch.tokens.min()) >= 0
    assert int(batch.tokens.max()) < VOCABULARY
    for tokens, answers, asked, stored in zip(*(part.tolist() for part in batch), strict=True):
        found = runs(tokens, run)
        known = {found[i][1]: found[i + 1] for i in range(0, 2 * pairs, 2)}  # key -> its value
        questions = found[2 * pairs :]
        assert len(known) == pairs
        assert sorted(key for _, key in questions) == sorted(known)
        assert [p for p, _ in questions] == asked
        assert [known[key][0] for _, key in questions] == stored
        expected = [-1] * len(tokens)
        for last, key in questions:
            expected[last - run + 1 : last + 1] = [known[key][1]] * run
        assert answers == expected


def test_pairs_lie_anywhere() -> None:
    """Every residue class of a dilation of 4 is asked and stored about equally often."""
    batch = SINGLES.sample(4000, 1024, torch.Generator().manual_seed(0))
    for places in (batch.asked, batch.stored):
        counts = torch.bincount(places.flatten() % 4, minlength=4)
        assert counts.min() > 0.9 * counts.sum() / 4


def test_too_short() -> None:
    with pytest.raises(ValueError, match=r"^seqlen: expected >= 64 for Recall\(pairs=4, run=4\)"):
        Recall().sample(1, 63, torch.Generator())
