#!/usr/bin/env bash
# Formats and static checks; every finding is an error. `tools/lint.sh --fix` rewrites formats instead of checking.
# Tools come from .venv (pinned in pyproject.toml, extra `lint`).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PWD/.venv/bin:$PATH

# None of our file names holds a space; bash 3.2 has no mapfile.
cpp=($(find include src bindings tests benchmarks examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' | sort))
python=(python compat tests tools benchmarks examples)

if [[ ${1:-} == --fix ]]; then
  clang-format -i "${cpp[@]}"
  ruff format "${python[@]}"
  ruff check --fix "${python[@]}"
  exit
fi

failed=()
check() {
  local start=$SECONDS name=$1
  echo "==> $name"
  shift
  "$@" || failed+=("$name")
  echo "    $((SECONDS - start)) s"
}

check "clang-format" clang-format --dry-run --Werror "${cpp[@]}"
check "ruff format" ruff format --check --quiet "${python[@]}"
check "ruff" ruff check --quiet "${python[@]}"
check "mypy" mypy
check "codespell" codespell
check "sources" python tools/check_sources.py

# What clang-tidy sees is what the compiler saw: the compile commands of the preset, and of the PyTorch operators.
tidy() {
  local database=$1
  shift
  printf '%s\n' "$@" | xargs -P "$(getconf _NPROCESSORS_ONLN)" -n 2 clang-tidy -p "$database" --quiet 2>/dev/null
}
cmake --preset cpu >/dev/null
# That preset has no CUDA: the files that need its headers are left out.
core=($(find src -name '*.cpp' | grep -vE 'kernels/cuda/(cuda_backend|no_sm90)\.cpp' | sort))
bindings=($(find bindings -name '*.cpp' | sort))
check "clang-tidy src" tidy build/cpu "${core[@]}"
check "clang-tidy bindings" tidy build/python "${bindings[@]}"

if ((${#failed[@]})); then
  printf 'lint: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "lint: clean"
