"""How one call is measured: wall-clock seconds, and peak extra bytes of the process.

Memory, the same way for every method: free heap pages go back to the kernel (malloc_trim), the
kernel's high-water mark is reset (/proc/self/clear_refs), the call runs, and
    extra = VmHWM - VmRSS before - bytes of what the call returned.
That sees torch's allocator, BLAS buffers and our scratch alike. It needs Linux; elsewhere None.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Measurement, TaskSpec

from configurations import Attention

Call = Callable[[], tuple[Tensor, ...]]


class CompileBudgetExceeded(BaseException):
    """Compiling took too long; not an Exception, so that no fallback in torch swallows it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises CompileBudgetExceeded in the block after `seconds`; in the main thread only."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise CompileBudgetExceeded

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _reset_peak() -> int | None:
    """Resident bytes now, after the high-water mark was reset; None where that is impossible."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def result_bytes(results: tuple[Tensor, ...]) -> int:
    """Bytes of the storages of tensors, shared ones once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}.values()
    )


def peak_extra_bytes(call: Call) -> tuple[tuple[Tensor, ...], int | None, float]:
    """(results, peak bytes beyond inputs and results or None, seconds) of one call."""
    before = _reset_peak()
    began = time.perf_counter()
    results = call()
    seconds = time.perf_counter() - began
    if before is None:
        return results, None, seconds
    return results, max(0, _status("VmHWM") - before - result_bytes(results)), seconds


def seconds_of(call: Call) -> float:
    """Wall-clock seconds of one call; its results are freed outside the clock."""
    began = time.perf_counter()
    results = call()
    seconds = time.perf_counter() - began
    del results
    return seconds


class Watch:
    """Times calls by the wall clock: `after_lap` holds seconds since the last call's `lap`."""

    def __init__(self) -> None:
        self.after_lap: float | None = None
        self._lap: float | None = None

    def lap(self) -> None:
        """What a call does from here on counts as its second part too."""
        self._lap = time.perf_counter()

    def seconds_of(self, call: Call) -> float:
        """`seconds_of` this module."""
        self._lap = None
        began = time.perf_counter()
        seconds = seconds_of(call)
        self.after_lap = None if self._lap is None else began + seconds - self._lap
        return seconds

    def peak_extra_bytes(self, call: Call) -> tuple[tuple[Tensor, ...], int | None, float]:
        """`peak_extra_bytes` of this module."""
        return peak_extra_bytes(call)


def forward_call(
    attention: Attention, inputs: tuple[Tensor, ...], lap: Callable[[], None] = lambda: None
) -> Call:
    """One inference forward of (query, key, value, ...); it has no lap."""
    query, key, value = (x.detach() for x in inputs[:3])

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attention(query, key, value),)

    return call


def forward_backward_call(
    attention: Attention, inputs: tuple[Tensor, ...], lap: Callable[[], None] = lambda: None
) -> Call:
    """One training step's worth of (query, key, value, grad): (out, dquery, dkey, dvalue).

    `lap` is called between forward and backward.
    """
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])

    def call() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            out = attention(query, key, value)
            lap()
            grads = torch.autograd.grad(out, (query, key, value), inputs[3])
        return (out.detach(), *grads)

    return call


CALLS = {"forward": forward_call, "forward_backward": forward_backward_call}


def make_inputs(
    seqlen: int,
    num_heads: int,
    head_dim: int,
    seed: int = 0,
    *,
    batch: int = 1,
    num_kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """Normal query, key, value, output gradient: (batch, seqlen, heads, head_dim)."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = num_heads, num_kv_heads or num_heads, num_kv_heads or num_heads, num_heads
    return tuple(
        torch.randn((batch, seqlen, h, head_dim), generator=generator, dtype=dtype, device=device)
        for h in heads
    )


def summary(seconds: list[float]) -> dict[str, Any]:
    """Samples, their median and interquartile range, by `torch.utils.benchmark`."""
    measured = measurement(seconds)
    return {"seconds": seconds, "seconds_median": measured.median, "seconds_iqr": measured.iqr}


def measurement(seconds: list[float]) -> Measurement:
    """Samples as PyTorch's own benchmarks describe them."""
    return Measurement(1, seconds, TaskSpec("call()", ""))
