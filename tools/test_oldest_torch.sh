#!/usr/bin/env bash
# Runs the operator's Python tests with the oldest PyTorch that pyproject.toml admits, on the library that was built
# with ours: one library serves all. Keeps that PyTorch in .venv-oldest.
#   tools/test_oldest_torch.sh <operator library> [options of pytest...]
# Where there is no CPU build of it, the registry's own build will do in CI only, as it brings several GB of CUDA;
# elsewhere this says so and tests nothing. Settings: PYTHON, TORCH_INDEX, DILATED_CI.
set -euo pipefail
library=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
cd "$(dirname "$0")/.."
version=$(sed -nE 's/^dependencies = .*"torch>=([0-9.]+)".*/\1/p' pyproject.toml).0
venv=.venv-oldest
python=$venv/bin/python

has_torch() { [[ $("$python" -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null) == "$version" ]]; }
install() { "$python" -m pip --disable-pip-version-check install --quiet "$@" 2>>"$venv/torch.log"; }

if ! has_torch; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  echo "==> installing torch $version in $venv"
  build=+cpu
  [[ $(uname -s) == Linux ]] || build= # the registry's build for other systems is the CPU build
  if ! install "torch==$version$build" &&
    ! install --timeout 20 --retries 1 \
      --extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "torch==$version$build"; then
    if [[ ! ${DILATED_CI:-} ]]; then
      echo "test-oldest-torch: not run, as no CPU build of PyTorch $version was found (log: $venv/torch.log)" >&2
      exit 0
    fi
    install "torch==$version" || { tail -n 5 "$venv/torch.log" >&2; exit 1; }
  fi
fi
install numpy pytest hypothesis safetensors
has_torch || { echo "test-oldest-torch: torch $version is installed and cannot be imported" >&2; exit 1; }

tests=()
for name in operators modules gradients; do tests+=("python/tests/test_$name.py"); done
PYTHONPATH=$PWD/python:$PWD/compat DILATED_LIBRARY=$library "$python" -m pytest "$@" "${tests[@]}"
