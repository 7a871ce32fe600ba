"""The program `dilated`: train, demo, report, generate, bench, info, pattern.

Arguments in, one call of the library each; errors come out as one line and exit code 2, an
interrupted run as 130 (SIGTERM: 143). Torch and the plotting libraries are imported by the commands
that need them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dilated.training import Corpus, TrainConfig, TrainResult

_MODEL_FLAGS = ("embed_dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name; None reads sys.argv.

    Returns:
        Exit code: 0, 2 for a wrong argument or unusable path, 130 after Ctrl-C, 143 after SIGTERM.

    Example:
        >>> from dilated.cli import main
        >>> main(["pattern", "--seqlen", "8", "--segments", "4,8", "--dilations", "1,2"])
        branch 0: segment 4, dilation 1: 32 pairs
        branch 1: segment 8, dilation 2: 16 pairs
        total: 48 pairs for 1 head(s), 75.0 % of dense (64)
        0
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["bench"]:  # a program of its own, with its own flags
        from dilated.bench import main as bench

        return bench(arguments[1:])
    options = _parser().parse_args(arguments)
    options.command_line = shlex.join(["dilated", *arguments])
    from dilated.errors import InvalidProblem, Unsupported
    from dilated.report.errors import MissingPackage
    from dilated.training.errors import TrainingError

    try:
        return int(options.run(options))
    except (TrainingError, InvalidProblem, Unsupported, MissingPackage) as error:
        print(f"dilated {options.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `dilated pattern | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(
            f"dilated {options.command}: stopped; finished checkpoints are intact", file=sys.stderr
        )
        return 130


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected integers like 1024,4096, got {text!r}"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dilated", description="Exact dilated attention: train a LongNet, measure, inspect."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_training(commands)
    _add_generate(commands)
    commands.add_parser("bench", help="time the operator against dense attention and compositions")
    info = commands.add_parser(
        "info", help="back ends, SIMD target, versions, and which runs and why"
    )
    _add_problem(info, seqlen=16384, num_heads=4, required=False)
    info.set_defaults(run=_info)
    pattern = commands.add_parser("pattern", help="picture and pair counts of any configuration")
    _add_problem(pattern, seqlen=256, num_heads=1, required=True)
    pattern.add_argument("--out", type=Path, help="picture to write: .png or .svg")
    pattern.set_defaults(run=_pattern)
    return parser


def _add_training(commands: Any) -> None:
    """train, demo (train with its defaults, then the whole report) and report share their flags."""
    for name, text in (
        ("train", "train a byte-level LongNet on a file or folder, then write a short report"),
        (
            "demo",
            "train with the defaults on the standard library's sources, then the whole report",
        ),
    ):
        command = commands.add_parser(name, help=text)
        add = command.add_argument
        add(
            "--input", help="file or folder to learn from (default: the standard library's sources)"
        )
        add("--glob", help="which files of the folder, such as '*.py' (default: all)")
        add(
            "--out",
            type=Path,
            default=Path("demo" if name == "demo" else "run"),
            help="folder to write",
        )
        add("--resume", action="store_true", help="continue the run in --out, to the bit")
        add("--overwrite", action="store_true", help="delete the run in --out and start anew")
        for flag, kind, text in (
            ("--steps", int, "optimiser steps"),
            ("--context", int, "bytes per window (default 16384)"),
            ("--batch-size", int, "windows per step"),
            ("--learning-rate", float, "highest rate, after warm-up"),
            ("--warmup-steps", int, "steps of linear warm-up"),
            ("--seed", int, "of weights and order"),
            ("--checkpoint-every", int, "steps between checkpoints"),
            ("--embed-dim", int, "width of the model"),
            ("--num-layers", int, "decoder layers"),
            ("--num-heads", int, "query heads"),
            ("--num-kv-heads", int, "key/value heads (default: as many)"),
            ("--ffn-dim", int, "inner width of the feed-forward (default: 4 * embed_dim)"),
            ("--segments", _integers, "segment lengths, such as 1024,4096,16384"),
            ("--dilations", _integers, "dilations, such as 1,2,4"),
        ):
            add(flag, type=kind, help=text)
        add("--preset", help="longnet (default), torchscale, head_groups, fork")
        add(
            "--activation-checkpointing",
            action="store_true",
            default=None,
            help="less memory, more time",
        )
        add("--threads", type=int, help="CPU threads (default: torch's)")
        add(
            "--plain",
            action="store_true",
            default=None,
            help="progress as lines, also on a terminal",
        )
        add(
            "--report",
            choices=("full", "short", "none"),
            default="full" if name == "demo" else "short",
            help="full times this operator against others; short leaves that out",
        )
        command.set_defaults(run=_train)
    command = commands.add_parser(
        "report", help="write the report of a finished or stopped run again"
    )
    command.add_argument("--out", type=Path, required=True, help="the run's folder")
    command.add_argument("--report", choices=("full", "short"), default="full")
    command.add_argument("--input", help="where the corpus is now, if it moved")
    command.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    command.set_defaults(run=_report)


def _add_generate(commands: Any) -> None:
    command = commands.add_parser("generate", help="continue a prompt with a trained model")
    add = command.add_argument
    add("--out", type=Path, default=Path("run"), help="the run's folder (default: run)")
    add("--prompt", default="def ", help="text to continue (default: 'def ')")
    add("--prompt-file", type=Path, help="continue this file instead")
    add("--bytes", type=int, default=256, help="how many to add")
    add(
        "--window",
        type=int,
        default=2048,
        help="bytes the model reads; each new byte costs one pass",
    )
    add("--temperature", type=float, default=0.8)
    add("--top-k", type=int)
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="CPU threads (default: torch's)")
    command.set_defaults(run=_generate)


def _add_problem(
    command: argparse.ArgumentParser, *, seqlen: int, num_heads: int, required: bool
) -> None:
    add = command.add_argument
    add("--seqlen", type=int, default=seqlen)
    add("--num-heads", type=int, default=num_heads)
    add("--num-kv-heads", type=int)
    add("--head-dim", type=int, default=32)
    add("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    add("--segments", type=_integers, required=required, default=(512, 2048, 16384))
    add("--dilations", type=_integers, required=required, default=(1, 2, 4))
    add("--causal", action="store_true")
    for name in ("offsets", "groups", "merge", "tail", "preset", "gqa_offset", "backend"):
        add("--" + name.replace("_", "-"))
    add("--head", type=int, default=0, help="the head to draw")


def _configuration(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `dilated.plan`."""
    import torch

    return {
        "num_heads": options.num_heads,
        "num_kv_heads": options.num_kv_heads,
        "head_dim": options.head_dim,
        "dtype": getattr(torch, options.dtype),
        "segments": options.segments,
        "dilations": options.dilations,
        "offsets": options.offsets,
        "groups": options.groups,
        "merge": options.merge,
        "tail": options.tail,
        "preset": options.preset,
        "gqa_offset": options.gqa_offset,
        "is_causal": options.causal,
    }


def _info(options: argparse.Namespace) -> int:
    import dilated

    for name, value in dilated.versions().items():
        print(f"{name}: {value}")
    print("back ends, in the order in which they are asked:")
    for backend in dilated.backends():
        print(
            f"  {backend.name} ({'available' if backend.available else 'not available'}): "
            f"{backend.description}"
        )
    plan = dilated.plan(options.seqlen, backend=options.backend, **_configuration(options))
    print(plan.explain())
    return 0


def _pattern(options: argparse.Namespace) -> int:
    import dilated

    configuration = _configuration(options)
    pairs = dilated.plan(options.seqlen, **configuration).pair_counts
    branches = zip(options.segments, options.dilations, pairs, strict=True)
    for number, (segment, dilation, count) in enumerate(branches):
        print(f"branch {number}: segment {segment}, dilation {dilation}: {count} pairs")
    n = options.seqlen
    dense = options.num_heads * (n * (n + 1) // 2 if options.causal else n * n)
    share = f", {100 * sum(pairs) / dense:.1f} % of dense ({dense})" if dense else ""
    print(f"total: {sum(pairs)} pairs for {options.num_heads} head(s){share}")
    if options.out is not None:
        from dilated.report import pattern_picture

        pattern_picture(options.seqlen, options.out, head=options.head, **configuration)
        print(f"wrote {options.out}")
    return 0


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        from dilated.training import TrainingError

        if threads < 1:
            raise TrainingError(f"--threads: expected >= 1, got {threads}")
        torch.set_num_threads(threads)


def _config(options: argparse.Namespace, base: TrainConfig) -> TrainConfig:
    """`base` with what the command line names."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    model = {f.name: given[f.name] for f in fields(base.model) if f.name in given}
    own = {f.name: given[f.name] for f in fields(base) if f.name in given and f.name != "model"}
    return replace(base, **own, model=replace(base.model, **model))


def _train(options: argparse.Namespace) -> int:
    from dilated import training
    from dilated.report import need_matplotlib
    from dilated.training.checkpoint import checkpoint_files
    from dilated.training.memory import keep_freed_memory

    if options.report != "none":
        need_matplotlib()  # now, not after minutes of training
    keep_freed_memory()
    _set_threads(options.threads)
    base = training.TrainConfig()
    resume, overwrite = options.resume, options.overwrite
    if options.command == "demo" and not resume and not overwrite and checkpoint_files(options.out):
        # `make demo` twice: go on with an unfinished run, repeat a finished one.
        state = training.latest_checkpoint(options.out)
        resume = state["step"] < state["config"]["steps"]
        overwrite = not resume
        found = "an unfinished run: continuing it" if resume else "a finished run: starting anew"
        print(f"{options.out} holds {found}")
    if resume:
        state = training.latest_checkpoint(options.out, say=lambda _: None)
        base = training.TrainConfig.from_dict(state["config"])
    config = _config(options, base)
    corpus = training.read_corpus(config.input, glob=config.glob, context=config.context)
    _describe(config, corpus)
    result = training.train(
        config, corpus, options.out, resume=resume, overwrite=overwrite, plain=options.plain
    )
    if result.signal is not None:
        print(
            f"stopped at step {len(result.history)} of {result.config.steps}; saved. To go on: "
            f"dilated {options.command} --out {shlex.quote(str(options.out))} --resume"
        )
        return 128 + result.signal
    if options.report != "none":
        _write_report(options, result, corpus)
    return 0


def _describe(config: TrainConfig, corpus: Corpus) -> None:
    import torch

    print(
        f"corpus: {corpus.origin}: {corpus.train.numel():,} bytes in {corpus.num_train_files} "
        f"files to learn from, {corpus.num_held_out_bytes:,} bytes in {len(corpus.held_out)} held "
        "out"
    )
    print(
        f"model: {config.model.num_layers} layers, width {config.model.embed_dim}, "
        f"{config.model.num_heads} heads, segments {config.model.segments}, dilations "
        f"{config.model.dilations}; context {config.context} bytes, {config.steps} steps, "
        f"{torch.get_num_threads()} threads",
        flush=True,
    )


def _write_report(options: argparse.Namespace, result: TrainResult, corpus: Corpus) -> None:
    from dilated.report import write_report

    path = write_report(
        result, corpus, options.out, command=options.command_line, full=options.report == "full"
    )
    print(f"report: {path} (and {path.with_suffix('.json').name} beside it)")


def _load(out: Path, steps_note: bool = True) -> TrainResult:
    from dilated import training

    state = training.latest_checkpoint(out)
    config = training.TrainConfig.from_dict(state["config"])
    model = training.build_model(config)
    model.load_state_dict(state["model"])
    if steps_note and state["step"] < config.steps:
        print(f"the run in {out} stands at step {state['step']} of {config.steps}", file=sys.stderr)
    return training.TrainResult(model, config, list(state["history"]), None)


def _report(options: argparse.Namespace) -> int:
    from dilated import training

    _set_threads(options.threads)
    result = _load(options.out)
    config = result.config
    corpus = training.read_corpus(
        options.input or config.input, glob=config.glob, context=config.context
    )
    _write_report(options, result, corpus)
    return 0


def _generate(options: argparse.Namespace) -> int:
    import time

    import torch

    from dilated.models import generate
    from dilated.training import TrainingError

    _set_threads(options.threads)
    prompt = options.prompt.encode()
    if options.prompt_file is not None:
        try:
            prompt = options.prompt_file.read_bytes()
        except OSError as error:
            raise TrainingError(
                f"--prompt-file: expected a readable file, got {options.prompt_file} "
                f"({error.strerror})"
            ) from None
    model = _load(options.out).model
    begin = time.monotonic()
    new = generate(
        model,
        torch.tensor(list(prompt), dtype=torch.int64),
        options.bytes,
        window=options.window,
        temperature=options.temperature,
        top_k=options.top_k,
        generator=torch.Generator().manual_seed(options.seed),
    )
    seconds = time.monotonic() - begin
    shown = options.prompt if options.prompt_file is None else ""
    sys.stdout.write(shown + bytes(new.tolist()).decode("utf-8", errors="replace") + "\n")
    print(
        f"{options.bytes} bytes in {seconds:.1f} s: every byte runs the model over the last "
        f"{options.window} bytes again (no cache)",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
