"""Runs the code that readers copy: README.md, docs/*.md and docstrings of the installed package.

    python tools/check_snippets.py [--prefix build/installed]

- ```python blocks run, each in a namespace of its own, in a temporary folder.
- ```cpp blocks that contain `int main` are compiled against the C++ library under --prefix and run.
- `>>>` examples of docstrings are doctests (ELLIPSIS and NORMALIZE_WHITESPACE apply); every
  function and class that `dilated` exports must have one. Exceptions and modules need none.
  Those of `dilated_attention_pytorch` run, too.
Shell blocks are not run. Exit status 1 if anything fails, or if README.md lacks an example.
"""

from __future__ import annotations

import argparse
import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)

CMAKE = """cmake_minimum_required(VERSION 3.25)
project(snippets LANGUAGES CXX)
find_package(dilated CONFIG REQUIRED)
foreach(name {names})
  add_executable(${{name}} ${{name}}.cpp)
  target_link_libraries(${{name}} PRIVATE dilated::dilated)
endforeach()
"""


@dataclass(frozen=True)
class Block:
    """A fenced block and where it stands."""

    file: str
    line: int
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}"


def blocks() -> list[Block]:
    """All fenced blocks of README.md and docs/*.md, in order."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            found.append(Block(path.relative_to(ROOT).as_posix(), line, match[1], match[2]))
    return found


def run_python(block: Block) -> bool:
    """Runs one block; the line numbers of a traceback are those of the file."""
    code = "\n" * (block.line - 1) + block.code
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            exec(compile(code, block.file, "exec"), {"__name__": "__main__"})
        except BaseException:  # SystemExit too: an example that exits is not one
            traceback.print_exc()
            return False
        finally:
            os.chdir(here)
    return True


def run_cpp(programs: list[Block], prefix: Path) -> list[str]:
    """Compiles and runs the programs; returns the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        names = [f"snippet_{i}" for i in range(len(programs))]
        (Path(folder) / "CMakeLists.txt").write_text(CMAKE.format(names=" ".join(names)))
        for name, block in zip(names, programs, strict=True):
            line = f'#line {block.line} "{ROOT / block.file}"\n'
            (Path(folder) / f"{name}.cpp").write_text(line + block.code)
        configure = [
            "cmake",
            "-S",
            folder,
            "-B",
            f"{folder}/build",
            f"-DCMAKE_PREFIX_PATH={prefix.resolve()}",
        ]
        if subprocess.run([*configure, "--log-level=WARNING"], check=False).returncode:
            return [block.name for block in programs]
        failed = []
        for name, block in zip(names, programs, strict=True):
            build = ["cmake", "--build", f"{folder}/build", "--target", name]
            built = subprocess.run(build, check=False, capture_output=True, text=True)
            if built.returncode:
                print(built.stdout, built.stderr, file=sys.stderr)
            if (
                built.returncode
                or subprocess.run([f"{folder}/build/{name}"], check=False).returncode
            ):
                failed.append(block.name)
        return failed


def run_docstrings() -> tuple[int, list[str]]:
    """Runs every doctest of both packages; returns how many ran, and the names of failures."""
    package = importlib.import_module("dilated")
    names = [
        module.name
        for each in (package, importlib.import_module("dilated_attention_pytorch"))
        for module in pkgutil.walk_packages(each.__path__, f"{each.__name__}.")
        if not module.name.endswith((".__main__", ".libdilated_torch"))
    ]
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    finder = doctest.DocTestFinder(exclude_empty=True)
    ran, failed = 0, []
    for name in ["dilated", *names]:
        for test in finder.find(importlib.import_module(name), name):
            result = runner.run(test)
            ran += result.attempted
            if result.failed:
                failed.append(test.name)
    for name in package.__all__:
        thing = getattr(package, name)
        exception = inspect.isclass(thing) and issubclass(thing, BaseException)
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and not exception:
            text = inspect.getdoc(thing) or ""
            if inspect.isclass(thing):
                text += "".join(
                    inspect.getdoc(m) or "" for m in vars(thing).values() if inspect.isfunction(m)
                )
            if ">>>" not in text:
                failed.append(f"dilated.{name} (has no example)")
    return ran, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefix", type=Path, default=ROOT / "build" / "installed")
    prefix = parser.parse_args().prefix

    everything = blocks()
    python = [b for b in everything if b.language == "python"]
    cpp = [b for b in everything if b.language == "cpp" and "int main" in b.code]
    failed = []
    for language, some in (("Python", python), ("C++", cpp)):
        if not any(b.file == "README.md" for b in some):
            failed.append(f"README.md (has no {language} example)")

    for block in python:
        print(f"==> {block.name}", flush=True)
        if not run_python(block):
            failed.append(block.name)
    print(f"==> {', '.join(b.name for b in cpp)} (C++)", flush=True)
    failed += run_cpp(cpp, prefix)
    examples, broken = run_docstrings()
    failed += broken

    print(
        f"{len(python)} Python blocks, {len(cpp)} C++ programs, {examples} docstring examples",
        flush=True,
    )
    if failed:
        print("snippets failed: " + ", ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
