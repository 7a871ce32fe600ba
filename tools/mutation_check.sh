#!/usr/bin/env bash
# Tests of the tests: flips the sign of one term in merge.h, the offset builder or delta, rebuilds a copy of the
# sources and demands that ctest turns red. Not part of `make test`. Usage: tools/mutation_check.sh [WORK_FOLDER]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work/source"

# name | file | expression of sed -E that must change exactly one line
mutations=(
  'merge.h: sign inside exp|src/merge.h|s/std::exp\(b - top\)/std::exp(b + top)/'
  'merge.h: sign of log(sum)|src/merge.h|s/top \+ std::log\(sum\)/top - std::log(sum)/'
  'offset builder: cumulative group|src/options.cpp|s/b \* base \+ std::min/b * base - std::min/'
  'offset builder: torchscale rule|src/options.cpp|s/return head \/ ceil_div/return -head \/ ceil_div/'
  'cpu delta: sign of dL|src/kernels/cpu/attention_backward.cpp|s/float delta = -dlse;/float delta = dlse;/'
  'cpu delta: dP + delta|src/kernels/cpu/attention_backward.cpp|s/hn::Sub\(block\.sum\[i\]\[v\], deltas\)/hn::Add(block.sum[i][v], deltas)/'
  'reference: sign of delta|src/kernels/reference/attention_backward.cpp|s/terms\.weight \* branch_delta - dlse_b/terms.weight * branch_delta + dlse_b/'
)

build_and_test() {
  cmake --build "$work/build" --parallel 2 >"$work/build.log" 2>&1 || { tail -20 "$work/build.log"; return 2; }
  ctest --test-dir "$work/build" --output-on-failure --stop-on-failure -j2 >"$work/test.log" 2>&1
}

for name in CMakeLists.txt cmake include src tests; do
  cp -r "$root/$name" "$work/source/"
done
cmake -S "$work/source" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DDILATED_CUDA=OFF -DDILATED_TESTS=ON >/dev/null
build_and_test || { echo "the unchanged sources do not pass; see $work/test.log"; exit 1; }
echo "unchanged: all tests pass"

survivors=0
for mutation in "${mutations[@]}"; do
  IFS='|' read -r name file expression <<<"$mutation"
  original=$(<"$work/source/$file")
  sed -E -i "$expression" "$work/source/$file"
  changed=$(diff <(printf '%s\n' "$original") "$work/source/$file" | grep -c '^>' || true)
  if [[ $changed != 1 ]]; then
    echo "STALE     $name: the expression changes $changed lines"
    survivors=$((survivors + 1))
  else
    status=0
    build_and_test || status=$?
    case $status in
      0) echo "SURVIVED  $name"; survivors=$((survivors + 1)) ;;
      2) echo "NO BUILD  $name"; survivors=$((survivors + 1)) ;;
      *) echo "killed    $name: $(sed -nE 's/.*[0-9]+ - ([a-z_]+_test) \(.*/\1/p' "$work/test.log" | paste -sd' ')" ;;
    esac
  fi
  printf '%s\n' "$original" >"$work/source/$file"
done
[[ $survivors == 0 ]]
