"""Trains a LongNet on bytes: `python examples/longnet train | demo | report | generate`.

Arguments in, one call each; errors come out as one line and exit code 2, a run stopped by a signal
as 128 plus its number. In every case but SIGKILL the run is saved.
"""

from __future__ import annotations

import codecs
import os
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from configuration import ModelConfig, TrainConfig, check_seed
from corpus import Corpus, read_corpus
from dilated import InvalidProblem, Unsupported
from dilated.cli import Parser, integer, integers, run
from errors import TrainingError, reason
from generation import generate
from memory import keep_freed_memory
from report import write_report
from run_folder import RunFolder
from training import TrainResult, check_resumed, saved_config, saved_result, train

_MOST_THREADS = 1024


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; None reads sys.argv. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    parser.set_defaults(command_line=shlex.join(["python", "examples/longnet", *arguments]))
    return run(parser, arguments, (TrainingError, InvalidProblem, Unsupported))


def _parser() -> Parser:
    parser = Parser(prog="longnet", description="Train a LongNet on bytes, report, generate.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("train", "train on a file or folder, then write a short report"),
        ("demo", "train on the standard library's sources, or go on; then the whole report"),
    ):
        _add_training(commands.add_parser(name, help=text), demo=name == "demo")
    report = commands.add_parser("report", help="write the report of a run again")
    add = report.add_argument
    add("--out", type=Path, required=True, help="the run's folder")
    add("--report", choices=("full", "short"), default="full", help="default: full")
    add("--input", help="another corpus to be judged by, or where the run's is now")
    add("--glob", help="which files of that folder (default: as in training)")
    add("--threads", type=integer, help="CPU threads (default: torch's)")
    report.set_defaults(run=_report)
    _add_generate(commands.add_parser("generate", help="continue a prompt with a trained model"))
    return parser


def _add_training(command: Parser, *, demo: bool) -> None:
    """train and demo share their flags; None is the default, or the checkpoint's with --resume."""
    add, name = command.add_argument, "demo" if demo else "run"
    add("--input", help="file or folder to learn from (default: the standard library's sources)")
    add("--glob", help="which files of the folder, such as '*.py' (default: all)")
    add(
        "--separate-documents",
        action="store_true",
        default=None,
        help="files of the folder see only themselves",
    )
    add("--out", type=Path, default=Path(name), help=f"folder to write (default: {name})")
    start = command.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="continue the run in --out, to the bit"
    )
    start.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    for flag, kind, text in (
        ("--steps", integer, "optimiser steps"),
        ("--context", integer, "bytes per window (default: 16384)"),
        ("--batch-size", integer, "windows per step"),
        ("--learning-rate", float, "highest rate, after warm-up"),
        ("--warmup-steps", integer, "steps of linear warm-up"),
        ("--seed", int, "of weights and order"),
        ("--checkpoint-every", integer, "steps between checkpoints"),
        ("--embed-dim", integer, "width of the model"),
        ("--num-layers", integer, "decoder layers"),
        ("--num-heads", integer, "query heads"),
        ("--num-kv-heads", integer, "key/value heads (default: as many)"),
        ("--ffn-dim", integer, "inner width of the feed-forward"),
        ("--segments", integers, "segment lengths, such as 1024,4096,16384"),
        ("--dilations", integers, "dilations, such as 1,2,4"),
        ("--preset", str, "longnet (default), torchscale, head_groups, fork"),
        ("--threads", integer, "CPU threads (default: torch's)"),
    ):
        add(flag, type=kind, help=text)
    for flag, text in (
        ("--activation-checkpointing", "less memory, more time"),
        ("--plain", "progress as lines, also on a terminal"),
    ):
        add(flag, action="store_true", default=None, help=text)
    add(
        "--report",
        choices=("full", "short", "none"),
        default="full" if demo else "short",
        help="full times this operator against others",
    )
    command.set_defaults(run=_train)


def _add_generate(command: Parser) -> None:
    add = command.add_argument
    add("--out", type=Path, default=Path("run"), help="the run's folder (default: run)")
    prompt = command.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="def ", help="text to continue (default: 'def ')")
    prompt.add_argument("--prompt-file", type=Path, help="continue this file instead")
    add("--bytes", type=integer, default=256, help="how many to add (default: 256)")
    add("--window", type=integer, default=2048, help="bytes read again for each (default: 2048)")
    add("--temperature", type=float, default=0.8, help="0: the likeliest byte (default: 0.8)")
    add("--top-k", type=integer, help="draw from the k likeliest bytes")
    add("--seed", type=int, default=0, help="of the draw (default: 0)")
    add("--threads", type=integer, help="CPU threads (default: torch's)")
    command.set_defaults(run=_generate)


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if not 1 <= threads <= _MOST_THREADS:
        raise TrainingError(f"--threads: expected 1 to {_MOST_THREADS}, got {threads}")
    torch.set_num_threads(threads)


def _train(options: Namespace) -> int:
    """Everything is checked before the folder is touched, and an old run goes last."""
    keep_freed_memory()
    _set_threads(options.threads)
    folder = RunFolder(options.out)
    given = {name: value for name, value in vars(options).items() if value is not None}
    base, resume, state = TrainConfig(), options.resume, None
    if resume or (options.command == "demo" and not options.overwrite and folder.checkpoints()):
        state = folder.latest()
        if resume:
            base = saved_config(state)
    config = base.with_options(given)
    config.check()
    corpus = read_corpus(config.input, glob=config.glob, context=config.context)
    if state is not None:
        check_resumed(state, config, corpus)
        print(f"{options.out} holds this run at step {state['step']} of {config.steps}")
    _describe(config, corpus)
    with folder:
        result = train(
            config,
            corpus,
            folder,
            resume=state is not None,
            overwrite=options.overwrite,
            plain=options.plain,
        )
        if result.signal is not None:
            again = [sys.executable, sys.argv[0], options.command, "--out", str(options.out)]
            print(
                f"stopped at step {len(result.history)} of {config.steps}; saved. To go on: "
                f"{shlex.join([*again, '--resume'])}",
                flush=True,
            )
            return 128 + result.signal
        if options.report != "none":
            _write_report(options, result, corpus, folder)
    return 0


def _describe(config: TrainConfig, corpus: Corpus) -> None:
    model: ModelConfig = config.model
    print(
        f"corpus: {corpus.origin}: {corpus.train.numel():,} bytes in {corpus.starts.numel()} "
        f"files to learn from, {corpus.num_held_out_bytes:,} bytes in {len(corpus.held_out)} held "
        "out"
    )
    print(
        f"model: {model.num_layers} layers, width {model.embed_dim}, {model.num_heads} heads, "
        f"segments {model.segments}, dilations {model.dilations}; context {config.context} bytes, "
        f"{config.steps} steps, {torch.get_num_threads()} threads",
        flush=True,
    )


def _write_report(
    options: Namespace, result: TrainResult, corpus: Corpus, folder: RunFolder
) -> None:
    full = options.report == "full"
    path = write_report(result, corpus, folder, command=options.command_line, full=full)
    print(f"report: {path} (and {path.with_suffix('.json').name} beside it)")


def _load(folder: RunFolder) -> TrainResult:
    """The newest checkpoint as it stands; what it has to say goes to standard error."""

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    result = saved_result(folder.latest(say))
    done, steps = len(result.history), result.config.steps
    if done < steps:
        say(f"the run in {folder.path} stands at step {done} of {steps}")
    return result


def _report(options: Namespace) -> int:
    _set_threads(options.threads)
    folder = RunFolder(options.out)
    result = _load(folder)
    config = result.config
    path = options.input or config.input
    glob = options.glob
    if glob is None and path is not None and Path(path).is_dir():
        glob = config.glob
    corpus = read_corpus(path, glob=glob, context=config.context)
    with folder:
        _write_report(options, result, corpus, folder)
    return 0


def _generate(options: Namespace) -> int:
    _set_threads(options.threads)
    check_seed(options.seed)
    prompt = os.fsencode(options.prompt)
    if options.prompt_file is not None:
        try:
            prompt = options.prompt_file.read_bytes()
        except OSError as error:
            raise TrainingError(
                f"--prompt-file: expected a readable file, got {options.prompt_file} "
                f"({reason(error)})"
            ) from None
    begin = time.monotonic()
    new = generate(
        _load(RunFolder(options.out)).model,
        torch.tensor(list(prompt), dtype=torch.int64),
        options.bytes,
        window=options.window,
        temperature=options.temperature,
        top_k=options.top_k,
        generator=torch.Generator().manual_seed(options.seed),
    )
    show = _writer()
    if options.prompt_file is None:
        show(prompt)
    for byte in new:  # at once: whatever ends this, what is written is not lost
        show(bytes([byte]))
    show(b"\n")
    print(
        f"{options.bytes} bytes in {time.monotonic() - begin:.1f} s: every byte runs the model "
        f"over the last {options.window} bytes again (no cache)",
        file=sys.stderr,
    )
    return 0


def _writer() -> Callable[[bytes], None]:
    """Bytes as they are into files and pipes, as text on a terminal."""
    if sys.stdout is None:
        raise TrainingError("standard output: expected one for the text, got none")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(content: bytes) -> None:
        if sys.stdout.isatty():
            sys.stdout.write(decoder.decode(content))
        else:
            sys.stdout.buffer.write(content)
        sys.stdout.flush()

    return show


if __name__ == "__main__":
    raise SystemExit(main())
