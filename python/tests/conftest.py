"""Settings of the whole suite: derandomised properties, few threads, no skipped back end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

# Derandomised: a failure repeats; `--hypothesis-seed` explores further.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    # Problems are tiny: more threads only wait for each other. Tests of threads set their own
    # number.
    torch.set_num_threads(1)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every back end that a CPU can run; a missing one fails rather than skips."""
    return str(request.param)


@pytest.fixture
def poisoned_memory() -> object:
    """torch fills every new tensor with NaN: whatever is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
