#!/usr/bin/env bash
# Is the GPU side healthy? Builds in place, runs the GPU tests and a two-minute benchmark, prints one short table last.
# Uses the current environment as it is: no network, nothing installed. Logs go to ${OUT:-build/gpu-check}.
# BENCH="nf4_quant lora" runs these suites of the benchmark only.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
logs=${OUT:-build/gpu-check}
mkdir -p "$logs"
declare -a table
failed=0

step() { # name, command...: runs it, keeps its log, notes result and seconds
  local name=$1 began=$SECONDS
  shift
  echo "== $name"
  if "$@" >"$logs/$name.log" 2>&1; then
    table+=("$(printf '%-12s ok      %4d s  %s' "$name" $((SECONDS - began)) "$(tail -n 1 "$logs/$name.log" | cut -c1-100)")")
  else
    failed=1
    table+=("$(printf '%-12s FAILED  %4d s  %s' "$name" $((SECONDS - began)) "$logs/$name.log")")
    tail -n 40 "$logs/$name.log"
  fi
}

step build env FASTPEFT_CUDA=1 FASTPEFT_CUDA_ARCHS="${FASTPEFT_CUDA_ARCHS:-80;90a}" "$python" setup.py --quiet build_ext --inplace
step info "$python" -m fastpeft info
cat "$logs/info.log"
step tests "$python" -m pytest -m gpu
# shellcheck disable=SC2086  # BENCH is a list of words
step bench "$python" -m bench --quick --no-save ${BENCH:-}
cat "$logs/bench.log"
printf '\n%s\n' "${table[@]}"
exit $failed
