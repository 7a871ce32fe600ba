#!/usr/bin/env bash
# Prepares a checkout: .venv with PyTorch (CPU) and the build tools, and the C++ packages. Called by make.
#   tools/set_up.sh          what `make demo` needs
#   tools/set_up.sh tests    also what the C++ tests need
# Looks for installed packages first, then asks apt-get where it may (root, or sudo without a password), and leaves
# the rest to CMake, which builds pinned sources. Says what it does; where it may not, stops with what to type.
# Settings: PYTHON, TORCH_INDEX, SYSTEM_PACKAGES=no (never ask apt-get).
set -euo pipefail
cd "$(dirname "$0")/.."

tests=$([[ ${1:-} == tests ]] && echo ON || echo OFF)
python=${PYTHON:-python3}
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
torch_version=2.13.0
venv=.venv

say() { printf '==> %s\n' "$*"; }
stop() {
  printf '\n==> Cannot go on: %s\n    Type:\n' "$1" >&2
  shift
  printf '        %s\n' "$@" >&2
  exit 1
}

# apt <package...>: installs them if this user may; status 1 if not.
apt_updated=
apt() {
  [[ ${SYSTEM_PACKAGES:-yes} != no ]] && command -v apt-get >/dev/null || return 1
  local as_root=env
  if [[ $(id -u) != 0 ]]; then
    sudo -n true 2>/dev/null || return 1
    as_root='sudo -n env'
  fi
  say "apt-get install $*"
  if [[ -z $apt_updated ]]; then
    $as_root apt-get update -qq || say "apt-get update failed; going on with the lists that are here"
    apt_updated=yes
  fi
  $as_root DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# --- a C++20 compiler -------------------------------------------------------------------------------------------
works() { "${CXX:-c++}" -std=c++20 -fsyntax-only -x c++ - <<<'#include <source_location>
#include <concepts>' 2>/dev/null; }
if ! works; then
  apt g++ && works || stop "no C++20 compiler (g++ >= 11 or clang >= 15); set CXX, or install one" "sudo apt-get install g++"
fi

# --- Python environment -----------------------------------------------------------------------------------------
if [[ ! -x $venv/bin/python ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  command -v "$python" >/dev/null || apt python3 || stop "no Python" "sudo apt-get install python3 python3-venv"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    stop "$("$python" --version) is too old: 3.10 or newer is needed" "make PYTHON=/path/to/python3.11 demo"
  say "making $venv with $("$python" --version)"
  make_venv() { rm -rf "$venv" && "$python" -m venv "$venv" >/dev/null 2>&1; }
  make_venv || { apt python3-venv && make_venv; } ||
    stop "$python cannot make a virtual environment" "sudo apt-get install python3-venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# --- PyTorch: the CPU build, which is 10 times smaller than the default one on Linux ----------------------------
if ! "$venv/bin/python" - <<'EOF_PY' 2>/dev/null
import importlib.metadata, sys
sys.exit(tuple(map(int, importlib.metadata.version("torch").split("+")[0].split(".")[:2])) < (2, 11))
EOF_PY
then
  if [[ $(uname -s) == Darwin ]]; then
    requirement=torch==$torch_version # the registry's build for this system is the CPU build
  else
    requirement=torch==$torch_version+cpu
  fi
  say "installing $requirement"
  if ! pip install --quiet "$requirement" 2>"$venv/torch.log"; then
    say "not in the configured package indexes; asking $torch_index"
    # numpy etc. come from the usual index; two short tries, so that an unreachable host does not hold us up.
    pip install --quiet --timeout 20 --retries 1 --extra-index-url "$torch_index" "$requirement" 2>>"$venv/torch.log" || {
      tail -n 3 "$venv/torch.log" >&2
      stop "no CPU build of PyTorch $torch_version found (log: $venv/torch.log)" \
        "make TORCH_INDEX=https://an.index/that/has/it demo" \
        "# or any PyTorch >= 2.11, then make again; the registry's own build for Linux brings several GB of CUDA:" \
        "$venv/bin/pip install torch==$torch_version"
    }
  fi
fi

# --- build tools ------------------------------------------------------------------------------------------------
tools=("scikit-build-core>=0.11")
recent_cmake() { cmake --version 2>/dev/null | awk 'NR == 1 { split($3, v, "."); exit !(v[1] > 3 || v[1] == 3 && v[2] >= 25) } END { if (!NR) exit 1 }'; }
recent_cmake || tools+=("cmake>=3.25,<4")
command -v ninja >/dev/null || tools+=(ninja)
say "Python packages: ${tools[*]}"
pip install --quiet "${tools[@]}"
export PATH=$PWD/$venv/bin:$PATH

# --- C++ packages -----------------------------------------------------------------------------------------------
# missing: names of those that are not here.
missing() {
  rm -rf build/packages
  mkdir -p build
  cmake -S cmake/packages -B build/packages -G Ninja -DTESTS="$tests" >build/packages.log 2>&1 &&
    grep -q '^MISSING:' build/packages.log || {
    tail -n 5 build/packages.log >&2
    stop "cmake could not look for the C++ packages (log: build/packages.log)" \
      "cmake -S cmake/packages -B build/packages -G Ninja"
  }
  sed -n 's/^MISSING: *//p' build/packages.log
}
debian_packages() {
  case $1 in
    GTest) echo libgtest-dev libgmock-dev ;;
    nlohmann_json) echo nlohmann-json3-dev ;;
    *) echo "lib$1-dev" ;;
  esac
}
not_here=$(missing)
if [[ $not_here ]]; then
  say "C++ packages not installed: $not_here"
  packages=()
  for name in $not_here; do packages+=($(debian_packages "$name")); done
  apt "${packages[@]}" || say "apt-get is not ours to use, or failed"
  not_here=$(missing)
  if [[ $not_here ]]; then
    say "building from pinned sources instead: $not_here"
    rm -rf build/packages
    cmake -S . -B build/packages -G Ninja \
      -DDILATED_TESTS="$tests" -DDILATED_BENCHMARKS="$tests" >build/packages.log 2>&1 || {
      grep -m 3 -i -E 'error|failed' build/packages.log >&2 || true
      stop "these could not be fetched: $not_here (log: build/packages.log)" \
        "sudo apt-get install ${packages[*]}" "# or the packages of that name of your system, then make again"
    }
  fi
fi
rm -rf build/packages
say "ready: $("$venv/bin/python" --version), torch $("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))'), $(cmake --version | head -n 1)"
