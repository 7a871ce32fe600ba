"""Embeds a chromosome in one forward pass: `python examples/chromosome/embed.py --fasta FILE`.

Every base of a bacterial chromosome, five million of them, is a position of one sequence. Writes
`embedding.npy`, (bases, embed_dim) in float16, and `embedding.png`, the embedding's principal
components beside what is known of the sequence. The weights are random: this shows length, time and
memory, and that nothing of the sequence is lost on the way; not a trained model of DNA.
"""

from __future__ import annotations

import resource
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

import dilated
from composition import Composition, composition, principal_components, window_means
from dilated import InvalidProblem, Unsupported
from dilated.cli import Parser, Refused, integer, integers, run
from drawing import embedding_figure
from encoder import ChromosomeEncoder, forward_memory, pieces
from fasta import choose, read_records

_PACKAGE = "kleborate-examples"
_OTHER_MEMORY = 2**30  # Python, torch, the pieces at work


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; None reads sys.argv. Returns the exit code."""
    parser = Parser(prog="examples", description=__doc__)
    add = parser.add_argument
    add("--fasta", type=Path, required=True, help="sequences; also .gz and .xz")
    add("--record", help="which sequence of the file (default: the longest)")
    add("--out", type=Path, default=Path("chromosome"), help="folder (default: chromosome)")
    add("--embed-dim", type=integer, default=64, help="width (default: 64)")
    add("--num-layers", type=integer, default=3, help="encoder layers (default: 3)")
    add("--num-heads", type=integer, default=4, help="attention heads (default: 4)")
    add("--segments", type=integers, default=(512, 4096, 32768, 2**23), help="of the branches")
    add("--dilations", type=integers, default=(1, 4, 16, 64), help="of the branches")
    add("--window", type=integer, default=10_000, help="bases per point of the picture")
    add("--seed", type=int, default=0, help="of the weights (default: 0)")
    parser.set_defaults(command="chromosome", run=_embed)
    return run(parser, arguments, (InvalidProblem, Unsupported))


def _embed(options: Namespace) -> int:
    _check(options)
    records = read_records(options.fasta)
    name = choose(records, options.record)
    codes = records[name]
    n = codes.size
    if not 1 <= options.window <= n // 3:
        raise Refused(
            f"--window: expected 1 to {n // 3}, a third of the sequence, got {options.window}"
        )
    needed = forward_memory(n, options.embed_dim, options.num_heads) + _OTHER_MEMORY
    available = psutil.virtual_memory().available
    if needed > available:
        raise Refused(
            f"--embed-dim: expected what fits into {available / 2**30:.1f} GiB of free memory, got "
            f"{options.embed_dim}, which needs {needed / 2**30:.1f} GiB for {n:,} bases"
        )
    torch.manual_seed(options.seed)
    model = ChromosomeEncoder(
        options.embed_dim,
        options.num_layers,
        options.num_heads,
        options.segments,
        options.dilations,
    ).eval()
    print(
        f"{name}: {n:,} bases, one sequence; {options.num_layers} layers, width "
        f"{options.embed_dim}, {options.num_heads} heads, segments {options.segments}, dilations "
        f"{options.dilations}; random weights; {torch.get_num_threads()} threads; about "
        f"{needed / 2**30:.1f} GiB",
        flush=True,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    embedding, seconds = _forward(model, torch.from_numpy(codes))
    peak = peak_memory()  # of the pass; what follows needs less
    print(
        f"one forward pass: {seconds:.1f} s, {n / seconds:,.0f} bases/s, peak memory "
        f"{peak / 2**30:.2f} GiB"
    )
    _write(options.out / "embedding.npy", embedding)
    _draw(options.out / "embedding.png", name, codes, embedding, options.window)
    return 0


def _check(options: Namespace) -> None:
    for flag in ("embed_dim", "num_layers", "num_heads"):
        value = getattr(options, flag)
        if value < 1:
            raise Refused(f"--{flag.replace('_', '-')}: expected >= 1, got {value}")
    if options.embed_dim % (2 * options.num_heads):
        raise Refused(
            f"--embed-dim: expected a multiple of 2 * num_heads = {2 * options.num_heads}, got "
            f"{options.embed_dim}"
        )
    dilated.plan(1, options.num_heads, segments=options.segments, dilations=options.dilations)
    if not options.fasta.is_file():
        raise Refused(
            f"--fasta: expected a file, got {options.fasta} (`make demo-chromosome` fetches "
            f"Debian's package {_PACKAGE}; by hand: apt-get download {_PACKAGE} && dpkg -x "
            f"{_PACKAGE}_*.deb . ; any FASTA file will do)"
        )


def _forward(model: ChromosomeEncoder, bases: Tensor) -> tuple[Tensor, float]:
    begin = time.perf_counter()
    with tqdm(total=model.num_steps(bases.numel()), unit="step", file=sys.stdout) as bar:

        def progress(stage: str) -> None:
            bar.set_postfix_str(stage, refresh=False)
            bar.update()

        embedding = model(bases, progress)
    return embedding, time.perf_counter() - begin


def peak_memory() -> int:
    """The most bytes that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write(path: Path, embedding: Tensor) -> None:
    """In pieces: a whole copy in float16 would be half as large again."""
    n, width = embedding.shape
    header = {"descr": "<f2", "fortran_order": False, "shape": (n, width)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces(n):
            file.write(embedding[piece].numpy().astype("<f2").tobytes())
    print(f"wrote {path}: ({n}, {width}) float16")


def _draw(path: Path, name: str, codes: NDArray[np.uint8], embedding: Tensor, window: int) -> None:
    known: Composition = composition(codes, window)
    components = principal_components(window_means(embedding, window), 2)
    for number, component in enumerate(components.T, 1):
        gc, skew = (np.corrcoef(component, what)[0, 1] for what in (known.gc, known.skew))
        print(
            f"component {number}: correlation with GC content {gc:+.2f}, with GC skew {skew:+.2f}"
        )
    embedding_figure(name, window, known, components).savefig(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(main())
