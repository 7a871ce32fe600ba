"""Which machine, which versions: what a reader needs to compare numbers."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import cpuinfo
import psutil
import torch

import dilated


def describe_commit() -> str:
    """DILATED_COMMIT, for copies elsewhere; else that of this file's repository, or "unknown"."""
    if stated := os.environ.get("DILATED_COMMIT"):
        return stated
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.strip()


def describe_machine() -> dict[str, str]:
    """Names and numbers of the machine and the software, as text."""
    facts = {
        "processor": cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or "unknown",
        "cores": str(psutil.cpu_count()),
        "threads used by torch": str(torch.get_num_threads()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        "back ends": "; ".join(f"{b.name}: {b.description}" for b in dilated.backends()),
    }
    # The library's path says nothing to a reader elsewhere.
    versions = {name: value for name, value in dilated.versions().items() if name != "library"}
    return facts | versions | {"torch's SIMD": torch.backends.cpu.get_cpu_capability()}
