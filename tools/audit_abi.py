"""Shows that the operator library fits every Python and every PyTorch >= 2.11.

    python tools/audit_abi.py LIBRARY.so

It may need only PyTorch's C functions (aoti_torch_*, torch_*), no symbol of Python, no C++ symbol
of torch, and no library but PyTorch's and the system's. With --static, Highway's shared library is
refused too (for wheels that travel). Needs `nm` and `readelf`. Exit status 1 on a breach.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

SYSTEM = re.compile(r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|ld-linux[\w-]*)\.so[.\d]*$")
TORCH = re.compile(r"lib(torch|torch_cpu|c10)\.so$")
HIGHWAY = re.compile(r"libhwy\.so[.\d]*$")


def lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--static", action="store_true", help="refuse Highway's shared library")
    arguments = parser.parse_args()

    undefined = [
        row.split()[-1].split("@")[0]
        for row in lines("nm", "-D", "--undefined-only", str(arguments.library))
    ]
    needed = [
        match[1]
        for row in lines("readelf", "-d", str(arguments.library))
        if (match := re.search(r"\(NEEDED\).*\[(.+)\]", row))
    ]
    # Of the build machine; a Highway outside the system's folders is the one reason to have any.
    paths = [
        match[1]
        for row in lines("readelf", "-d", str(arguments.library))
        if (match := re.search(r"PATH\).*\[(.+)\]", row))
        and (arguments.static or not any(Path(match[1]).glob("libhwy.so*")))
    ]

    python = [symbol for symbol in undefined if re.match(r"_?Py[A-Z_]", symbol)]
    torch_cpp = [s for s in undefined if re.match(r"_Z.*(2at|3c10|5torch)", s)]
    torch_c = [s for s in undefined if re.match(r"(aoti_)?torch_", s)]
    foreign = [
        name
        for name in needed
        if not (
            SYSTEM.match(name)
            or TORCH.match(name)
            or (HIGHWAY.match(name) and not arguments.static)
        )
    ]

    print(f"{arguments.library}: {len(torch_c)} C functions of PyTorch; needs {', '.join(needed)}")
    breaches = {
        "symbols of Python": python,
        "C++ symbols of PyTorch": torch_cpp,
        "libraries that may be absent": foreign,
        "run paths of the build machine": paths,
    }
    for what, found in breaches.items():
        if found:
            print(f"  not allowed: {what}: {', '.join(found)}")
    if not torch_c:
        print("  not allowed: no function of PyTorch at all; is this the operator library?")
    return 1 if any(breaches.values()) or not torch_c else 0


if __name__ == "__main__":
    sys.exit(main())
