"""How one call is measured on a GPU: CUDA events, and peak bytes of torch's allocator.

Events stand in the stream around the call. A short wait before it lets the host get ahead, as it is
in training: what is measured is the device's time unless the host needs longer than that wait.
Memory: peak of allocated bytes during the call, less what was allocated before it and what it
returned. Everything measured here takes its memory from torch's allocator.
"""

from __future__ import annotations

import shutil
import subprocess
import time

import torch
from torch import Tensor

from measure import Call, result_bytes

_WAIT_CYCLES = 2_000_000  # about 1 ms


def _sleep() -> None:
    torch.cuda._sleep(_WAIT_CYCLES)


class Watch:
    """Times calls by events; see `measure.Watch`."""

    def __init__(self) -> None:
        self.after_lap: float | None = None
        self._lap: torch.cuda.Event | None = None

    def lap(self) -> None:
        """What a call does from here on counts as its second part too."""
        self._lap = torch.cuda.Event(enable_timing=True)
        self._lap.record()

    def seconds_of(self, call: Call) -> float:
        """Seconds on the device."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._lap = None
        _sleep()
        began.record()
        results = call()
        ended.record()
        ended.synchronize()
        del results
        self.after_lap = None
        if self._lap is not None:
            self.after_lap = self._lap.elapsed_time(ended) / 1e3
        return float(began.elapsed_time(ended)) / 1e3

    def peak_extra_bytes(self, call: Call) -> tuple[tuple[Tensor, ...], int | None, float]:
        """(results, peak bytes beyond inputs and results, seconds with the host's) of the second
        call: the first one makes kernels, plans of theirs and workspaces that stay.
        """
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        results = call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        extra = torch.cuda.max_memory_allocated() - before - result_bytes(results)
        return results, max(0, extra), seconds


def query_device(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first device."""
    if not shutil.which("nvidia-smi"):
        return dict.fromkeys(fields, "nvidia-smi is missing")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(zip(fields, (x.strip() for x in answer.split(",")), strict=True))


def describe_device() -> dict[str, str]:
    """Device, driver and versions, as text."""
    return {
        "device": torch.cuda.get_device_name(),
        "driver": query_device("driver_version")["driver_version"],
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
    }


def clocks() -> dict[str, str]:
    """Clocks, power and temperature at this moment."""
    return query_device("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
