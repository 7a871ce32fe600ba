#!/usr/bin/env bash
# Tests of the tests: changes one term of the sources and demands that the tests named beside it turn red.
#   tools/mutation_check.sh                    every mutant
#   tools/mutation_check.sh --part N [SEED]    N of them; the seed, by default the day, says which
# Works on a copy in build/mutation, built for the SIMD target of this machine only. An expression that no longer changes exactly one line
# is a failure too: it is brought up to date together with the sources.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$root/build/mutation

# name | file in src | expression of sed -E | tests
mutants=(
  'merge: which maximum|merge.h|s/a\.max > b\.max/a.max < b.max/|merge_test'
  'merge: sign in the power|merge.h|s/b\.sum \* power\(b\.max - top\)/b.sum * power(top - b.max)/|merge_test'
  'merge: sign of log(sum)|merge.h|s/total\.max \+ std::log/total.max - std::log/|merge_test'
  'merge gradient: sign of dL|merge.cpp|s/deltas\[i\] - delta \+ row_dlse/deltas[i] - delta - row_dlse/|partial_test'
  'offset builder: cumulative group|options.cpp|s/b \* base \+ std::min/b * base - std::min/|options_test'
  'offset builder: torchscale rule|options.cpp|s/return head \/ ceil_div/return -head \/ ceil_div/|options_test'
  'offset builder: head of a shard|options.cpp|s/= options\.head_offset \+ h;/= h;/|partial_test'
  'geometry: covered positions|geometry.h|s/\(p % segment\) % dilation == o/p % dilation == o/|geometry_test'
  'geometry: span origin|geometry.h|s/\+ o - window\.begin, dilation/+ o + window.begin, dilation/|window_test'
  'geometry: span end|geometry.h|s/first_row_at\(s, o, window\.end\)/first_row_at(s, o, window.end - 1)/|window_test'
  'geometry: window of the phantoms|geometry.h|s/keys\.contains\(.* - 1\) \?/keys.size() > 0 ?/|window_test'
  'geometry: slot of a window|geometry.h|s/slot\(p \/ segment, p % segment \/ dilation\)/slot(p \/ segment, 0)/|window_test'
  'sequences: batch entry|sequences.cpp|s/packed \? 0 : s, length/packed ? 0 : 0 * s, length/|property_test'
  'sequences: first key row|sequences.cpp|s/key_row \+= window\.keys/key_row += window.queries/|window_test'
  'softmax: sign of the rescaling|kernels/cpu/softmax-inl.h|s/hn::Sub\(old_max, base/hn::Sub(base[v], old_max - base/|property_test'
  'softmax: older sums not rescaled|kernels/cpu/softmax-inl.h|s/hn::LoadU\(tag, at\), factors, block/hn::LoadU(tag, at), hn::Set(tag, 1.0f), block/|traps_test'
  'softmax: own key hidden|kernels/cpu/softmax-inl.h|s/hn::Le\(key, query\)/hn::Lt(key, query)/|property_test'
  'forward: weight of phantoms|kernels/cpu/attention_forward.cpp|s/units_\.power\(-top\)/units_.power(top)/|property_test'
  'forward: last causal key|kernels/cpu/attention_forward.cpp|s/std::min\(piece\.keys\.last, piece\.queries\.last\)/std::min(piece.keys.last, piece.queries.last - 1)/|property_test'
  'forward: mean|kernels/cpu/attention_forward.cpp|s/factor \/= static_cast<float>/factor *= static_cast<float>/|property_test'
  'forward: hidden NaN|kernels/cpu/attention_forward.cpp|s/if \(diagonal && !is_finite/if (false \&\& !is_finite/|nonfinite_test'
  'backward: sign of dL|kernels/cpu/attention_backward.cpp|s/float delta = -dlse;/float delta = dlse;/|property_test'
  'backward: dP + delta|kernels/cpu/score_gradient-inl.h|s/hn::Sub\(block\.sum\[i\]\[v\], deltas\)/hn::Add(block.sum[i][v], deltas)/|property_test'
  'backward: delta under dropout|kernels/cpu/score_gradient-inl.h|s/factor \* ds - delta\[i\]/factor * ds + delta[i]/|property_test'
  'backward: sign of the residual|kernels/cpu/score_gradient-inl.h|s/hn::Sub\(x, residual\)/hn::Add(x, residual)/|property_test'
  'backward: count of a mean|kernels/cpu/attention_backward.cpp|s/branch\.residual \+ std::log2/branch.residual - std::log2/|property_test'
  'backward: saved rows of a window|kernels/cpu/attention_backward.cpp|s/geometry_\.first_slot\(sequence_\.queries\.begin\)/0/|window_test'
  'backward: hidden NaN|kernels/cpu/attention_backward.cpp|s/= diagonal && !tile_is_finite/= false \&\& !tile_is_finite/|nonfinite_test'
  'pack: bfloat16|kernels/cpu/pack-inl.h|s/ShiftLeft<16>/ShiftLeft<15>/|property_test'
  'pack: factor of the last columns|kernels/cpu/pack-inl.h|s/to\[c\] = factor \* source\[c\];/to[c] = source[c];/|property_test'
  'pack: last column of a block|kernels/cpu/pack-inl.h|s/if \(c \+ 3 < columns\)/if (c + 4 < columns)/|property_test'
  'pack: sum of the last columns|kernels/cpu/pack-inl.h|s/^    y\[c\] \+= factor/    y[c] -= factor/|property_test'
  'score units: sign|score_units.h|s/scale < 0\.0 \? -1\.0f : 1\.0f/1.0f/|property_test'
  'score units: log-sum-exp|score_units.h|s/double\{row\.max\} \+ std::log/double{row.max} - std::log/|property_test'
  'score units: share|score_units.h|s/base_of\(branch\.lse\) - base_of\(whole\.lse\)/base_of(whole.lse) - base_of(branch.lse)/|property_test'
  'score units: residual|score_units.h|s/factor_ \* \(row\.max - base_of\(lse\)\)/factor_ * row.max/|property_test'
  'reference: sign of delta|kernels/reference/attention_backward.cpp|s/branch_delta - dlse_b/branch_delta + dlse_b/|gradient_test'
)

count=${#mutants[@]}
first=0
case ${1:-} in
  '') ;;
  --part)
    first=$(((10#${3:-$(date +%j)} * $2) % count))
    count=$2
    ;;
  *) sed -n '2,6s/^# //p' "$0" >&2; exit 2 ;;
esac

# Status 0: all pass, 1: one fails, 2: no build.
build_and_test() {
  cmake --build "$work/build" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-2}" --target "$@" >"$work/build.log" 2>&1 || return 2
  ctest --test-dir "$work/build" -R "^($(IFS='|'; echo "$*"))\$" --no-tests=error --timeout 120 \
    --output-on-failure --stop-on-failure >"$work/test.log" 2>&1 || return 1
}

rm -rf "$work/source"
mkdir -p "$work/source"
for name in CMakeLists.txt cmake include src tests; do
  cp -Rp "$root/$name" "$work/source/"
done
cmake -S "$work/source" -B "$work/build" -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CXX_FLAGS=-DHWY_COMPILE_ONLY_STATIC -march=native" \
  -DCMAKE_CXX_FLAGS_RELEASE=-O1 >/dev/null

survivors=0
verdict() {
  printf '%-9s %s\n' "$1" "$2"
  [[ $1 == killed ]] || survivors=$((survivors + 1))
}
passed=' ' # tests that pass on the unchanged sources
for ((i = first; i < first + count; ++i)); do
  IFS='|' read -r name file expression tests <<<"${mutants[i % ${#mutants[@]}]}"
  source=$work/source/src/$file
  read -ra programs <<<"$tests"
  for program in "${programs[@]}"; do
    [[ $passed == *" $program "* ]] || build_and_test "$program" || {
      tail -n 20 "$work/build.log" "$work/test.log" >&2
      echo "mutation_check: $program does not pass on the unchanged sources" >&2
      exit 1
    }
    passed+="$program "
  done
  sed -E "$expression" "$root/src/$file" >"$source"
  changed=$(diff "$root/src/$file" "$source" | grep -c '^>' || true)
  if [[ $changed != 1 ]]; then
    verdict STALE "$name: the expression changes $changed lines of src/$file"
  else
    status=0
    build_and_test "${programs[@]}" || status=$?
    case $status in
      0) verdict SURVIVED "$name: $tests" ;;
      1) verdict killed "$name: $(sed -nE 's/.*[0-9]+ - ([a-z_]+_test) \(.*/\1/p' "$work/test.log" | paste -s -d ' ' -)" ;;
      *) verdict NO-BUILD "$name: $(grep -m 1 error "$work/build.log")" ;;
    esac
  fi
  cp "$root/src/$file" "$source"
done
echo "mutation_check: $((count - survivors)) of $count mutants killed"
[[ $survivors == 0 ]]
