"""Rules of the source tree that no compiler checks (docs/development.md). Prints every breach.

1. Includes point downwards only: include <- src <- bindings; kernels/* never include one another;
   the public headers know no torch, Python, CUDA, Highway or fmt.
2. No macros of our own: #define only in HWY_* protocol lines.
3. Every C++ source is named in its folder's CMakeLists.txt.
4. A file opens with a comment that says what it is.
5. Shell scripts keep to bash 3.2, the one of macOS.
6. A section, test code or document that a source names is defined in docs/.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPP = ("*.h", "*.cpp", "*.cu", "*.cuh")

# What a file in a folder may include in quotes, by prefix; the longest folder that matches counts.
MAY_INCLUDE = {
    "include/dilated": ("dilated/",),
    "src": ("dilated/", "src/*.h"),
    "src/kernels": ("dilated/", "src/*.h", "hwy/"),
    "bindings/torch": ("dilated/", "bindings/torch/"),
    "tests": ("dilated/", "src/", "tests/", "hwy/"),
    "benchmarks": ("dilated/",),
    "benchmarks/cuda": ("dilated/", "src/*.h", "src/kernels/cuda/", "benchmarks/cuda/"),
    "examples": ("dilated/",),
}
PUBLIC_FORBIDDEN = re.compile(r"<(torch|ATen|c10|Python|cuda|hwy|fmt)\b")
OWN_KERNEL = re.compile(r"src/kernels/([^/]+)/")


def cpp_files() -> Iterator[Path]:
    """All C++ and CUDA files of the project, sorted."""
    for folder in ("include", "src", "bindings", "tests", "benchmarks", "examples"):
        for pattern in CPP:
            yield from sorted((ROOT / folder).rglob(pattern))


def allowed(include: str, path: str, prefixes: tuple[str, ...]) -> bool:
    """Whether `path` may include the quoted name."""
    kernel = OWN_KERNEL.match(path)
    if kernel and include.startswith(f"src/kernels/{kernel[1]}/"):
        return True
    for prefix in prefixes:
        if prefix.endswith("*.h"):  # files directly in the folder
            folder = prefix[: -len("*.h")]
            if include.startswith(folder) and "/" not in include[len(folder) :]:
                return True
        elif include.startswith(prefix):
            return True
    return False


def check_file(path: Path) -> Iterator[str]:
    """Breaches of rules 1, 2 and 4 in one file."""
    name = path.relative_to(ROOT).as_posix()
    folder = max((f for f in MAY_INCLUDE if name.startswith(f + "/")), key=len)
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].startswith("//"):
        yield f"{name}:1: expected an opening comment that says what the file is"
    for number, line in enumerate(lines, 1):
        if quoted := re.match(r'\s*#\s*include\s+"([^"]+)"', line):
            if not allowed(quoted[1], name, MAY_INCLUDE[folder]):
                yield f"{name}:{number}: {folder}/ may not include {quoted[1]}"
        elif re.match(r"\s*#\s*include", line):
            if folder == "include/dilated" and PUBLIC_FORBIDDEN.search(line):
                yield f"{name}:{number}: public header includes {line.strip()}"
            if "<torch/" in line and name != "bindings/torch/stable_abi.h":
                yield f"{name}:{number}: only bindings/torch/stable_abi.h spells torch headers"
        elif macro := re.match(r"\s*#\s*define\s+(\w+)", line):
            guard = name.endswith("-inl.h") and re.fullmatch(
                r"[A-Z_]+_INL_H_(TARGET|TOGGLE)?", macro[1]
            )
            if not macro[1].startswith("HWY_") and not guard:
                yield f"{name}:{number}: macro of our own: {macro[1]}"


def check_listed() -> Iterator[str]:
    """Breaches of rule 3."""
    for folder in ("src", "bindings/torch", "tests"):
        listing = (ROOT / folder / "CMakeLists.txt").read_text(encoding="utf-8")
        words = set(re.split(r"[\s()]+", listing))
        for path in sorted((ROOT / folder).rglob("*.cpp")):
            name = path.relative_to(ROOT / folder).as_posix()
            if name not in words and name.removesuffix(".cpp") not in words:
                yield f"{folder}/{name}: not named in {folder}/CMakeLists.txt"


# §5 of docs/semantics.md, a code of docs/requirements.md, a Markdown file.
REFERENCE = re.compile(r"§(\d+)|\b([RXTM]\d{1,2})\b|\b([\w/]+\.md)\b")


def check_references() -> Iterator[str]:
    """Breaches of rule 6."""
    sections = set(re.findall(r"^## §(\d+) ", (ROOT / "docs/semantics.md").read_text(), re.M))
    codes = set(
        re.findall(r"^\| ([RXTM]\d+) \|", (ROOT / "docs/requirements.md").read_text(), re.M)
    )
    documents = {path.name for path in [*ROOT.glob("*.md"), *ROOT.rglob("docs/*.md")]}
    python = [p for f in ("python", "compat", "tests", "examples", "benchmarks", "tools")
              for p in sorted((ROOT / f).rglob("*.py"))]  # fmt: skip
    for path in [*cpp_files(), *python]:
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            comment = re.search(r"//.*|#.*|\"\"\".*|^\s*[A-Z].*", line)
            for section, code, document in REFERENCE.findall(comment[0] if comment else ""):
                if (section and section not in sections) or (code and code not in codes):
                    yield f"{name}:{number}: no document defines {code or '§' + section}"
                if document and Path(document).name not in documents:
                    yield f"{name}:{number}: there is no {document}"


# What bash 3.2 lacks. No pattern sees that it also refuses an empty array under `set -u`.
NEWER_BASH = re.compile(
    r"\b(mapfile|readarray|coproc|wait -n|(declare|local|typeset) -[gAn]+)\b"
    r"|\$\{\w+(\^|,|@[QEPAa]\})|&>>|\|&|\$EPOCH|;;&|\bprintf '%\("
)


def check_shell() -> Iterator[str]:
    """Breaches of rule 5."""
    for path in sorted([*(ROOT / "tools").glob("*.sh"), ROOT / ".ci" / "run"]):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if newer := NEWER_BASH.search(line.split("# ")[0]):
                yield f"{path.relative_to(ROOT)}:{number}: bash 3.2 has no {newer[0]}"


def main() -> int:
    breaches = [breach for path in cpp_files() for breach in check_file(path)]
    breaches += check_listed()
    breaches += check_shell()
    breaches += check_references()
    print(
        "\n".join(breaches)
        if breaches
        else "sources: include rule, macros and lists are as they should be"
    )
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
