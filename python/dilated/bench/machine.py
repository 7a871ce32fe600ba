"""Which machine, which versions: what a reader needs to compare numbers."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import dilated


def describe_machine() -> dict[str, str]:
    """Names and numbers of the machine and the software, as text."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": str(cores),
        "threads used by torch": str(torch.get_num_threads()),
        "memory": _memory(),
        "system": platform.platform(),
        "back ends": "; ".join(f"{b.name}: {b.description}" for b in dilated.backends()),
    }
    # The library's path says nothing to a reader elsewhere.
    versions = {name: value for name, value in dilated.versions().items() if name != "library"}
    return facts | versions | {"torch's SIMD": torch.backends.cpu.get_cpu_capability()}


def _first(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _memory() -> str:
    total = _first("/proc/meminfo", "MemTotal")
    return f"{int(total.split()[0]) / 2**20:.1f} GiB" if total else "unknown"
