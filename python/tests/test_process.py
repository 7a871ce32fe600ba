"""What a process notices: globals, imports, memory, threads, handlers. Rows 1, 2, 12, 13, 18, X2,
X8, X12, X13.
"""

from __future__ import annotations

import ast
import gc
import importlib
import os
import random
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dilated

PACKAGE = Path(dilated.__file__).parent

SNAPSHOT = """
import gc, hashlib, locale, logging, os, random, signal, sys, threading, warnings
import numpy as np, torch

def snapshot():
    digest = lambda data: hashlib.sha256(data).hexdigest()
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "torch rng": digest(torch.get_rng_state().numpy().tobytes()),
        "python rng": digest(repr(random.getstate()).encode()),
        "numpy rng": digest(repr(np.random.get_state()).encode()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic warn": torch.is_deterministic_algorithms_warn_only_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "flush denormal": float(torch.tensor(1e-40) * 1.0),
        "cuda initialised": torch.cuda.is_initialized(),
        "print options": repr(torch._tensor_str.PRINT_OPTS),
        "environment": dict(os.environ),
        "cwd": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGSEGV)],
        "excepthook": sys.excepthook,
        "recursion limit": sys.getrecursionlimit(),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "warnings": list(warnings.filters),
        "gc": (gc.get_threshold(), gc.isenabled(), [c for c in gc.callbacks]),
        "python threads": [t.name for t in threading.enumerate()],
        "os threads": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0,
        "umask": (lambda m: (os.umask(m), m)[1])(os.umask(0)),
    }
"""

CONSTRUCTIONS = """
torch.zeros(2)  # torch's own lazy start
before = snapshot()
import dilated
from dilated import *
from dilated import models
from dilated.models import *
after_import = snapshot()
modules = [
    DilatedAttention([8, 32], [1, 4]),
    DilatedAttention([8, 32], [1, 4], preset="torchscale", dropout_p=0.5),
]
names = [n for n in sorted(dilated.__all__) if isinstance(getattr(dilated, n), type)]
seen_rng = torch.get_rng_state()
modules.append(MultiheadDilatedAttention(32, 4, [8, 32], [1, 4], device="meta"))
modules.append(MultiheadDilatedAttention(32, 4, [8, 32], [1, 4]))
sizes = {"segments": [8, 32], "dilations": [1, 4]}
modules.append(models.LongNetLM(31, 32, 2, 4, **sizes))
modules.append(models.EncoderLayer(32, 4, **sizes))
modules.append(models.DecoderLayer(32, 4, **sizes))
modules.append(models.LongNet(32, 2, 4, **sizes))
modules.append(models.SlideEncoder(12, 32, 2, 4, **sizes))
models.SlideEncoder.from_state_dict(modules[-1].state_dict(), num_heads=4, **sizes)
torch.set_rng_state(seen_rng)  # initial weights are drawn: the one allowed effect
after_construction = snapshot()
x = torch.randn(1, 40, 4, 8, requires_grad=True)
torch.set_rng_state(seen_rng)
modules[0](x, x, x).sum().backward()
str(plan(100, 4, segments=[8], dilations=[1])), backends(), versions()
after_call = snapshot()
for stage, state in (("import", after_import), ("construction", after_construction), ("call",
after_call)):
    for key in before:
        if stage == "call" and key == "os threads":
            continue  # torch starts its own threads with the first parallel region
        assert state[key] == before[key], (stage, key, before[key], state[key])
print("unchanged", len(before), names)
"""


def _python(program: str, **environment: str) -> str:
    paths = os.pathsep.join(p for p in (str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")) if p)
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_and_construction_leave_the_process_alone() -> None:
    """Row X12: about thirty globals before and after import, construction and a call."""
    assert "unchanged" in _python(SNAPSHOT + CONSTRUCTIONS)


def test_names_of_all_exist_and_no_other_is_documented() -> None:
    """Row X13."""
    namespace: dict[str, Any] = {}
    exec("from dilated import *", namespace)
    assert set(dilated.__all__) <= set(namespace)
    assert sorted(dilated.__all__) == dilated.__all__
    for name in dilated.__all__:
        assert getattr(importlib.import_module("dilated"), name).__doc__, name


def test_missing_library_says_what_to_do() -> None:
    program = "import dilated"
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "DILATED_LIBRARY": "/nowhere/lib.so"},
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: dilated: compiled operators not found: /nowhere/lib.so (DILATED_LIBRARY "
        "names it; `pip install .` builds them, or set DILATED_LIBRARY to a built library)"
    )


def test_tables_are_equal_in_every_process() -> None:
    """Row X8: no hash order, no random state."""
    program = (
        "import dilated; print(dilated.plan(1, 12, num_kv_heads=4, segments=[8, 16, 64], "
        "dilations=[1, 6, 12], offsets='torchscale').offsets)"
    )
    tables = {_python(program, PYTHONHASHSEED=str(seed)) for seed in (0, 1)}
    assert len(tables) == 1


def test_no_catch_all_handlers() -> None:
    """Row X2: nothing swallows an error."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = (
                {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                if node.type
                else {""}
            )
            reraises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            assert not caught & {"", "Exception", "BaseException"} or reraises, (path, node.lineno)


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_a_thousand_lengths_leave_no_memory_behind() -> None:
    """Rows 2, 12, 13: nothing is kept between calls, forward and backward, string arguments
    included.
    """

    def sweep() -> None:
        for n in range(1, 1001):
            x = torch.ones(1, n, 2, 8, requires_grad=True)
            call = {
                "segments": [16, 64],
                "dilations": [1, 4],
                "preset": "torchscale",
                "tail": "mask",
            }
            dilated.dilated_attention(x, x, x, **call).sum().backward()

    sweep()
    gc.collect()
    before = _resident_bytes()
    for _ in range(3):
        sweep()
    gc.collect()
    assert _resident_bytes() - before < 2**20


def test_workspace_is_a_formula_and_grows_with_threads_not_length() -> None:
    """R16: scratch asked from torch's allocator is workspace_bytes; 4 x the length adds at most
    4 x.
    """
    shape = {"segments": [64, 256], "dilations": [1, 4], "head_dim": 32}
    short, long = (dilated.plan(n, 4, threads=1, **shape).workspace_bytes for n in (1024, 4096))
    more = dilated.plan(1024, 4, threads=2, **shape).workspace_bytes
    for a, b, c in zip(short, long, more, strict=True):
        assert 0 <= a <= b <= 4 * a
        assert a <= c <= 2 * a


def test_host_threads_share_one_module() -> None:
    """R1: 4 host threads, mixed shapes, the bits of one thread."""
    module = dilated.DilatedAttention([8, 32], [1, 4], is_causal=True, merge="mean")
    inputs = [torch.randn(1, n, 4, 8) for n in (5, 33, 64, 97)]

    def call(x: torch.Tensor) -> list[torch.Tensor]:
        y = x.clone().requires_grad_()
        out = module(y, y, y)
        return [out.detach(), *torch.autograd.grad(out.sum(), y)]

    wanted = [call(x) for x in inputs]
    failures: list[Any] = []

    def work(first: int) -> None:
        try:
            for i in range(200):
                k = (first + i) % 4
                if not all(map(torch.equal, call(inputs[k]), wanted[k])):
                    failures.append((first, i))
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_random_states_of_python_and_numpy_are_untouched() -> None:
    states = random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    x = torch.randn(1, 9, 2, 4)
    dilated.dilated_attention(x, x, x, segments=[4], dilations=[1], dropout_p=0.5)
    assert states == (random.getstate(), repr(np.random.get_state()))  # noqa: NPY002


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_no_more_threads_than_torch_allows(threads: int) -> None:
    """No second pool: a call starts no thread that torch does not own."""
    program = f"""
import os, torch, dilated
torch.set_num_threads({threads})
a = torch.randn(512, 512)
for _ in range(3):
    a @ a  # torch's pool is up
x = torch.randn(1, 4096, 4, 16)
torch.nn.functional.gelu(x)
before = len(os.listdir("/proc/self/task"))
y = x.requires_grad_()
for _ in range(3):
    dilated.dilated_attention(y, y, y, segments=[64], dilations=[1]).sum().backward()
after = len(os.listdir("/proc/self/task"))
print(before, after)
"""
    before, after = (int(word) for word in _python(program).split())
    assert after <= max(before, threads) + 1, "autograd's own thread is the only other one"
