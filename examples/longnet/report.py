"""Gathers every number of a run, draws it, and writes `report.html` and `report.json`.

Everything is measured here and now: held-out bits, sample, timings; nothing is copied from
elsewhere. Timing and machine are the repository's benchmarks.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import torch

import dilated
import figures
from configuration import TrainConfig
from corpus import Corpus
from dilated.pattern import pattern_figure
from evaluation import bits_by_context, held_out_windows
from generation import generate
from run_folder import RunFolder
from training import TrainResult

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from machine import describe_machine
from sweep import length_sweep

REPORT_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
_SAMPLE_BYTES, _SAMPLE_PROMPT, _SAMPLE_WINDOW = 256, 768, 1024


def write_report(
    result: TrainResult,
    corpus: Corpus,
    folder: RunFolder,
    *,
    command: str,
    full: bool = True,
    num_windows: int = 64,
) -> Path:
    """Evaluates a trained model and writes the report.

    Args:
        result: what `train` returned.
        corpus: the corpus to be judged by; the report says if it is not the model's.
        folder: of the run, locked.
        command: the command line to print in it.
        full: also time this operator against others, which takes minutes.
        num_windows: held-out windows to score.

    Returns:
        The path of report.html.

    Raises:
        TrainingError: the folder cannot be written, or the held-out part is too short.
    """
    config, model = result.config, result.model
    longest = config.context
    if config.separate_documents:  # then no window goes over the end of a document
        longest = min(longest, max(document.numel() for document in corpus.held_out) - 1)
    print("report: held-out bits per byte", flush=True)
    curve = bits_by_context(model, corpus, longest=max(1, longest), num_windows=num_windows)
    print("report: sample", flush=True)
    sample = _sample(result, corpus)
    timing: list[dict[str, Any]] = []
    if full:
        print("report: time and memory, 1k to 64k tokens (minutes)", flush=True)
        timing = length_sweep(
            REPORT_LENGTHS,
            num_heads=config.model.num_heads,
            head_dim=config.model.embed_dim // config.model.num_heads,
            segments=config.model.segments,
            dilations=config.model.dilations,
            is_causal=True,
            progress=lambda line: print(f"  {line}", flush=True),
        )
    attention = _attention(config)
    plan = dilated.plan(config.context, **attention)
    seconds = sum(record["seconds"] for record in result.history)
    learnt = len(result.history) * config.batch_size * config.context
    report: dict[str, Any] = {
        "command": command,
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": {
            "origin": corpus.origin,
            "train_bytes": corpus.train.numel(),
            "train_files": corpus.starts.numel(),
            "held_out_bytes": corpus.num_held_out_bytes,
            "held_out_files": list(corpus.held_out_names),
            "sha256": corpus.fingerprint,
            "models_sha256": result.corpus,
            "is_the_models": result.corpus == corpus.fingerprint,
        },
        "training": {
            "steps": len(result.history),
            "seconds": seconds,
            "bytes_learnt": learnt,
            "bytes_per_second": learnt / seconds if seconds else 0.0,
            "history": result.history,
        },
        "context_curve": asdict(curve),
        "sample": sample,
        "timing": timing,
        "machine": describe_machine(),
        "explain": plan.explain(),
        "pairs": plan.pair_counts,
        "dense_pairs": config.model.num_heads * config.context * (config.context + 1) // 2,
    }
    heads = range(min(2, config.model.num_heads))
    pictures = {
        "loss": figures.svg(figures.loss_figure(result.history, curve.bits_per_byte[-1])),
        "context": figures.svg(figures.context_figure(curve)),
        "pattern": figures.png(pattern_figure(config.context, heads=heads, **attention)),
    }
    if timing:
        measured = [row for row in timing if row["seconds_median"] is not None]
        pictures["timing"] = figures.svg(figures.timing_figure(measured))
    page = _template().render(report=report, pictures=pictures, names=figures.NAMES)
    folder.write("report.json", json.dumps(report, indent=1, allow_nan=False).encode())
    return folder.write("report.html", page.encode(errors="backslashreplace"))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    return environment.get_template("report.html.j2")


def _attention(config: TrainConfig) -> dict[str, Any]:
    """The attention of one layer, as `dilated.plan` takes it."""
    model = config.model
    return {
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.embed_dim // model.num_heads,
        "segments": model.segments,
        "dilations": model.dilations,
        "preset": model.preset,
        "is_causal": True,
    }


def _sample(result: TrainResult, corpus: Corpus) -> dict[str, Any]:
    longest = max(1, min(_SAMPLE_PROMPT, result.config.context - 1))
    prompt = held_out_windows(corpus, longest, 3)[-1]
    window = min(_SAMPLE_WINDOW, result.config.context)
    begin = time.monotonic()
    new = generate(
        result.model,
        prompt,
        _SAMPLE_BYTES,
        window=window,
        temperature=0.7,
        generator=torch.Generator().manual_seed(result.config.seed),
    )
    return {
        "text": bytes(new).decode("utf-8", errors="replace"),
        "prompt": bytes(prompt.tolist()).decode("utf-8", errors="replace"),
        "temperature": 0.7,
        "window": window,
        "seconds": time.monotonic() - begin,
    }
