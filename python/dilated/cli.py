"""The program `dilated`: `info` and `pattern`.

Arguments in, one call of the library each. Whatever is wrong comes out as one line and exit code 2;
a reader that went away (`dilated pattern | head`) gives 1, Ctrl-C 130. torch and matplotlib are
imported by the commands that need them. `Parser`, `integer`, `integers` and `run` serve the
programs of the repository too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

_INT64 = range(-(2**63), 2**63)


class Refused(Exception):
    """A command line that cannot be honoured; the message is one line and names the flag."""


class Parser(argparse.ArgumentParser):
    """Errors are one line, flags are spelt out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Exit code 2 without the usage, which would hide the line that matters."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def integer(text: str) -> int:
    """An integer that the core can hold."""
    try:
        value = int(text)
    except ValueError:
        value = _INT64.stop
    if value not in _INT64:
        raise argparse.ArgumentTypeError(f"expected an integer of 64 bits, got {text!r}")
    return value


def integers(text: str) -> tuple[int, ...]:
    """Integers with commas between them."""
    return tuple(integer(part) for part in text.split(","))


def run(
    parser: Parser, arguments: Sequence[str] | None, refusals: tuple[type[Exception], ...]
) -> int:
    """Parses a command line and calls its `run`.

    Args:
        parser: sets `run`, a function of the options that returns the exit code, by command.
        arguments: the command line without the program's name; None reads sys.argv.
        refusals: errors that are the user's to mend: their message goes to standard error.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal can show every character
            stream.reconfigure(errors="backslashreplace")
    options = parser.parse_args(arguments)
    name = f"{parser.prog} {options.command}"
    expected: tuple[type[Exception], ...] = (Refused, *refusals)
    try:
        code = int(options.run(options))
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk can still be told
    except KeyboardInterrupt:
        return _failed(f"{name}: stopped", 130)
    except BrokenPipeError:
        return _failed(f"{name}: standard output was closed", 1)
    except expected as error:
        return _failed(f"{name}: error: {error}", 2)
    except OSError as error:
        return _failed(f"{name}: error: {error}", 2)
    return code


def _failed(line: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # both streams may be gone
        print(line, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # or the interpreter complains of it once more
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name; None reads sys.argv.

    Returns:
        Exit code: 0; 2 for a wrong argument or an unusable path; 1 if standard output was closed;
        130 after Ctrl-C.

    Example:
        >>> from dilated.cli import main
        >>> main(["pattern", "--seqlen", "8", "--segments", "4,8", "--dilations", "1,2"])
        branch 0: segment 4, dilation 1: 32 pairs
        branch 1: segment 8, dilation 2: 16 pairs
        total: 48 pairs for 1 head(s), 75.0 % of dense (64)
        0
    """
    from dilated.errors import InvalidProblem, Unsupported

    return run(_parser(), arguments, (InvalidProblem, Unsupported))


def _parser() -> Parser:
    from dilated import __version__

    parser = Parser(prog="dilated", description="Exact dilated attention: what runs, what it sees.")
    parser.add_argument("--version", action="version", version=f"dilated {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, back ends, and which runs a problem and why")
    _add_problem(info, seqlen=16384, num_heads=4, required=False)
    add = info.add_argument
    add("--head-dim", type=integer, default=32, help="dimension of a head (default: 32)")
    add("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    add("--merge", help="lse, sum or mean")
    add("--tail", help="mask or phantom")
    add("--backend", help="force this back end")
    info.set_defaults(run=_info)
    pattern = commands.add_parser("pattern", help="pair counts and picture of any configuration")
    _add_problem(pattern, seqlen=256, num_heads=1, required=True)
    pattern.add_argument("--out", type=Path, help="picture to write: .png or .svg")
    pattern.add_argument("--head", type=integer, help="the head to draw (default: 0)")
    pattern.set_defaults(run=_pattern)
    return parser


def _add_problem(command: Parser, *, seqlen: int, num_heads: int, required: bool) -> None:
    """What decides who sees whom; every option acts in both commands."""
    add = command.add_argument
    add("--seqlen", type=integer, default=seqlen, help=f"length (default: {seqlen})")
    add("--num-heads", type=integer, default=num_heads, help=f"query heads (default: {num_heads})")
    add("--num-kv-heads", type=integer, help="key/value heads")
    branches = {} if required else {"segments": (512, 2048, 16384), "dilations": (1, 2, 4)}
    for name in ("segments", "dilations"):
        text = f"{name[:-1]} of every branch, such as 1,2,4"
        add(f"--{name}", type=integers, required=required, default=branches.get(name), help=text)
    add("--causal", action="store_true", help="keys after the query are not seen")
    add("--offsets", help="paper, torchscale, branch or zero")
    add("--groups", help="none, cumulative or literal")
    add("--gqa-offset", help="kv or q")
    add("--preset", help="longnet, torchscale, head_groups, fork or fkodom")


def _configuration(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `dilated.plan`."""
    names = ("num_heads", "num_kv_heads", "segments", "dilations")
    choices = ("offsets", "groups", "gqa_offset", "preset")
    given = {name: getattr(options, name) for name in (*names, *choices)}
    return {**given, "is_causal": options.causal}


def _info(options: argparse.Namespace) -> int:
    import torch

    import dilated

    for name, value in dilated.versions().items():
        print(f"{name}: {value}")
    print("back ends, in the order in which they are asked:")
    for backend in dilated.backends():
        print(
            f"  {backend.name} ({'available' if backend.available else 'not available'}): "
            f"{backend.description}"
        )
    numerics = {name: getattr(options, name) for name in ("head_dim", "merge", "tail", "backend")}
    dtype = getattr(torch, options.dtype)
    plan = dilated.plan(options.seqlen, dtype=dtype, **numerics, **_configuration(options))
    print(plan.explain())
    return 0


def _pattern(options: argparse.Namespace) -> int:
    import dilated

    if options.out is None and options.head is not None:
        raise Refused("--head: expected --out with it, got none (counts are those of all heads)")
    if options.out is not None and options.out.suffix not in (".png", ".svg"):
        raise Refused(f"--out: expected a name ending in .png or .svg, got {options.out}")
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
        _draw(options.out, options.seqlen, options.head or 0, configuration)
        print(f"wrote {options.out}")
    return 0


def _draw(path: Path, seqlen: int, head: int, configuration: dict[str, Any]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise Refused("--out: expected matplotlib, got none (pip install matplotlib)")
    from dilated.pattern import pattern_figure

    picture = io.BytesIO()
    figure = pattern_figure(seqlen, heads=[head], **configuration)
    figure.savefig(picture, format=path.suffix[1:])
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:  # aside and renamed: a full disk leaves no half picture
        aside.write_bytes(picture.getbuffer())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise Refused(f"--out: expected to write {path}, got: {error.strerror}") from None


if __name__ == "__main__":
    raise SystemExit(main())
