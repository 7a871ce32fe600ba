"""The benchmark: ours against the best compositions of torch's kernels, dense attention, torch.mm.

    python benchmarks/run.py --quick
    python benchmarks/run.py --device cuda
Measured in one process, on the same threads or GPU, interleaved; `measure` and `measure_cuda` say
what the numbers mean.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import measure_cuda
from configurations import GPU_ROWS, QUICK_ROWS, ROWS
from machine import describe_commit, describe_machine
from runner import run_row
from tables import markdown, picture

_RESULTS = Path(__file__).parent / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description="Time the operator against PyTorch compositions, dense attention, torch.mm.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small rows, eager only: under a minute"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where to run (default: cpu); cuda has rows of its own, in bfloat16",
    )
    parser.add_argument(
        "--rows",
        help=f"comma-separated: {', '.join([*ROWS, *QUICK_ROWS])}; cuda: {', '.join(GPU_ROWS)}",
    )
    parser.add_argument("--repeats", type=int, help="interleaved timings (default: 5, on cuda 15)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile columns")
    parser.add_argument(
        "--compile-budget",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="per composition and row; beyond it eager stands (default: 300)",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON to write (default: a dated name in benchmarks/results)"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="print this result file as Markdown, run nothing",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="also draw rates on a GPU (needs matplotlib)"
    )
    return parser


def _write(path: Path, result: dict[str, Any]) -> None:
    """Aside and renamed: a full disk costs no finished row."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints the table and writes the JSON.

    Args:
        argv: Arguments without the program's name; default those of the process.

    Returns:
        Exit status; 1 if interrupted (finished rows are written).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.markdown:
        try:
            stored = json.loads(options.markdown.read_text())
            print(markdown(stored))
            if options.picture:
                picture(stored, options.picture)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--markdown: expected a result file, got {options.markdown} ({error})")
        return 0
    on_gpu = options.device == "cuda"
    repeats = options.repeats if options.repeats is not None else 15 if on_gpu else 5
    if repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {repeats}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device: expected a CUDA device and a PyTorch that sees it, got none")
    if options.quick and on_gpu:
        parser.error("--quick: expected --device cpu, its rows are of the CPU; got cuda")
    known = GPU_ROWS if on_gpu else ROWS | QUICK_ROWS
    default = QUICK_ROWS if options.quick else GPU_ROWS if on_gpu else ROWS
    names = options.rows.split(",") if options.rows else list(default)
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--rows: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    started = datetime.datetime.now(datetime.timezone.utc)
    kind = "quick" if options.quick else "gpu" if on_gpu else "bench"
    output = options.output or _RESULTS / f"{kind}-{started:%Y%m%d-%H%M%S}.json"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    except OSError as error:
        parser.error(f"--output: cannot write {output}: {error.strerror}")
    previous_threads = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/run.py", *arguments]),
        "started": f"{started:%Y-%m-%d %H:%M} UTC",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "commit": describe_commit(),
        "machine": describe_machine() | (measure_cuda.describe_device() if on_gpu else {}),
        "rows": [],
    }
    interrupted = False
    try:
        with tqdm(names, bar_format="[{elapsed}] {n}/{total} {desc}") as rows:
            for name in rows:
                result["rows"].append(
                    run_row(
                        name,
                        known[name],
                        repeats=repeats,
                        compiled=not (options.no_compile or options.quick),
                        compile_budget=options.compile_budget,
                        progress=rows.set_description_str,
                        device=options.device,
                    )
                )
                if on_gpu:
                    result["rows"][-1]["clocks after"] = measure_cuda.clocks()
                _write(output, result)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        torch.set_num_threads(previous_threads)
    _write(output, result)
    print(markdown(result))
    if options.picture:
        picture(result, options.picture)
    print(f"{'interrupted; ' if interrupted else ''}written to {output}")
    return 1 if interrupted else 0


if __name__ == "__main__":
    raise SystemExit(main())
