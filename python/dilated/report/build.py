"""Gathers every number of a run, draws it, and writes `report.html` and `report.json`.

Everything is measured here and now: held-out bits, sample, timings; nothing is copied from
elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import dilated
from dilated.bench.machine import describe_machine
from dilated.models import generate
from dilated.report import figures, html
from dilated.training.checkpoint import write_durably
from dilated.training.errors import TrainingError, reason
from dilated.training.evaluation import ContextCurve, bits_by_context, held_out_windows

if TYPE_CHECKING:
    from dilated.training import Corpus, TrainResult

_SAMPLE_BYTES, _SAMPLE_PROMPT, _SAMPLE_WINDOW = 256, 768, 1024


def write_report(
    result: TrainResult,
    corpus: Corpus,
    out: str | Path,
    *,
    command: str,
    full: bool = True,
    num_windows: int = 64,
) -> Path:
    """Evaluates a trained model and writes the report folder.

    Args:
        result: what `dilated.training.train` returned.
        corpus: the corpus it learnt from.
        out: folder for report.html and report.json.
        command: the command line to print in it.
        full: also time this operator against others, which takes minutes.
        num_windows: held-out windows to score.

    Returns:
        The path of report.html.

    Raises:
        TrainingError: the folder cannot be written.
        MissingPackage: matplotlib is not installed.
    """
    out = Path(out)
    config, model = result.config, result.model
    print("report: held-out bits per byte", flush=True)
    curve = bits_by_context(model, corpus, longest=config.context, num_windows=num_windows)
    print("report: sample", flush=True)
    sample = _sample(result, corpus)
    timing: list[dict[str, Any]] = []
    if full:
        from dilated.report.timing import REPORT_LENGTHS, measure

        print("report: time and memory, 1k to 64k tokens (minutes)", flush=True)
        timing = measure(
            REPORT_LENGTHS,
            segments=config.model.segments,
            dilations=config.model.dilations,
            num_heads=config.model.num_heads,
            head_dim=config.model.embed_dim // config.model.num_heads,
        )
    seconds = sum(record["seconds"] for record in result.history)
    learnt = len(result.history) * config.batch_size * config.context
    report: dict[str, Any] = {
        "command": command,
        "config": config.to_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": {
            "origin": corpus.origin,
            "train_bytes": corpus.train.numel(),
            "train_files": corpus.num_train_files,
            "train_sha256": corpus.fingerprint,
            "held_out_bytes": corpus.num_held_out_bytes,
            "held_out_files": list(corpus.held_out_names),
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
        "explain": _explain(config),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_durably(out / "report.json", json.dumps(report, indent=1).encode())
        write_durably(out / "report.html", _page(report, curve, config).encode())
    except OSError as error:
        raise TrainingError(f"--out: expected to write {out}, got: {reason(error)}") from None
    return out / "report.html"


def _attention(config: Any) -> dict[str, Any]:
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


def _explain(config: Any) -> str:
    return dilated.plan(config.context, batch=config.batch_size, **_attention(config)).explain()


def _sample(result: TrainResult, corpus: Corpus) -> dict[str, Any]:
    longest = min(_SAMPLE_PROMPT, result.config.context - 1)
    prompt = held_out_windows(corpus, longest, 3)[-1].long()
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
        "prompt": bytes(prompt.tolist()).decode("utf-8", errors="replace"),
        "text": bytes(new.tolist()).decode("utf-8", errors="replace"),
        "temperature": 0.7,
        "window": window,
        "seconds": time.monotonic() - begin,
    }


def _page(report: dict[str, Any], curve: ContextCurve, config: Any) -> str:
    training, corpus, sample = report["training"], report["corpus"], report["sample"]
    held_out = curve.bits_per_byte[-1]
    sections = [
        (
            "What ran",
            html.facts(
                {
                    "command": report["command"],
                    "corpus": f"{corpus['origin']}: {corpus['train_bytes']:,} bytes in "
                    f"{corpus['train_files']} files to learn from, "
                    f"{corpus['held_out_bytes']:,} bytes in "
                    f"{len(corpus['held_out_files'])} files held out",
                    "model": f"LongNetLM, {report['parameters']:,} parameters, "
                    f"{config.model.num_layers} layers, width {config.model.embed_dim}, "
                    f"{config.model.num_heads} heads",
                    "attention": f"causal, segments {_list(config.model.segments)}, dilations "
                    f"{_list(config.model.dilations)}, preset {config.model.preset}",
                    "training": f"{training['steps']} of {config.steps} steps of "
                    f"{config.batch_size} x "
                    f"{config.context:,} bytes in {training['seconds']:.0f} s "
                    f"({training['bytes_per_second'] / 1e3:.1f} kB/s)",
                    "result": f"{held_out:.3f} bits per byte on held-out files with "
                    f"{curve.contexts[-1]:,} bytes of context",
                }
            ),
        ),
        (
            "Loss",
            figures.svg(figures.loss_figure(training["history"], held_out)),
        ),
        (
            "What context buys",
            figures.svg(figures.context_figure(curve))
            + html.paragraph(
                f"The same {curve.num_windows * curve.scored_bytes:,} held-out bytes at every "
                f"context: the last {curve.scored_bytes} of {curve.num_windows} windows. For a "
                "context c the model reads only the c bytes that end there. The longest context "
                f"gains {curve.gain[-1]:.4f} ± {curve.gain_standard_error[-1]:.4f} bits per byte "
                "over the shortest."
            ),
        ),
    ]
    if report["timing"]:
        sections.append(("Time and memory", _timing_section(report["timing"])))
    heads = range(min(2, config.model.num_heads))
    picture = figures.pattern_figure(config.context, heads=heads, **_attention(config))
    pairs = dilated.plan(config.context, **_attention(config)).pair_counts
    dense = config.model.num_heads * config.context * (config.context + 1) // 2
    sections += [
        (
            "The pattern used",
            figures.png(picture)
            + html.paragraph(
                f"Asked of the plan: the first {min(config.context, 4096):,} of {config.context:,} "
                "positions, and the end of the shortest segment enlarged. Pairs per "
                f"branch at {config.context:,}: {_list(pairs)}; together "
                f"{100 * sum(pairs) / dense:.1f} % of dense causal attention."
            ),
        ),
        (
            "A sample",
            html.sample(sample["prompt"], sample["text"])
            + html.paragraph(
                f"Grey: held-out prompt. Black: written by the model at temperature "
                f"{sample['temperature']}, in {sample['seconds']:.1f} s; each byte runs the model "
                f"over the last {sample['window']:,} bytes again."
            ),
        ),
        ("Machine and versions", html.facts(report["machine"])),
        ("Which back end, and why", f"<pre>{escape(report['explain'])}</pre>"),
    ]
    return html.page("A LongNet trained with dilated", sections)


def _timing_section(rows: Sequence[dict[str, Any]]) -> str:
    from dilated.report.timing import HEADER, cells, measured

    text = figures.svg(figures.timing_figure(measured(rows)))
    text += html.paragraph(
        "Measured in one run on the same threads, repeats interleaved: this configuration, causal, "
        "one sequence, float32. Extra memory: the largest amount above inputs and results."
    )
    return text + html.table(HEADER, [cells(row) for row in rows], numbers_from=3)


def _list(values: Sequence[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)
