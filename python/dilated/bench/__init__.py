"""Benchmarks: ours against the best compositions of torch's kernels, dense attention, and torch.mm.

    python -m dilated.bench --quick
Measured in one process, on the same threads, interleaved; see `measure` for what the numbers mean.
"""

from .command import main
from .sweep import length_sweep

__all__ = ["length_sweep", "main"]
