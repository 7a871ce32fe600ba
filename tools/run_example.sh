#!/usr/bin/env bash
# Builds examples/cpp outside the tree against an installed library, and runs it.
#   tools/run_example.sh <install prefix> <build folder> [options of cmake...]
set -euo pipefail
prefix=$(cd "$1" && pwd)
build=$2
shift 2
source=$(cd "$(dirname "$0")/../examples/cpp" && pwd)

rm -rf "$build"
mkdir -p "$build"
cp -r "$source" "$build/source" # a copy: nothing of the checkout is in reach
cmake -S "$build/source" -B "$build/build" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release "$@"
cmake --build "$build/build"
"$build/build/attention"
