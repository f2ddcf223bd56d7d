#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes: tests, sanitizer, tuning, benchmark rows.
#
#     benchmarks/gpu_check.sh
#
# Needs a machine with an NVIDIA GPU and a python that has torch, triton, pytest, numpy and rich; downloads
# nothing and installs nothing. PYTHON names the interpreter, RESULTS the folder for CSV rows, tuned block
# shapes and the log. Every stage has its own time limit and runs even where an earlier one failed; the last
# lines say which did.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
mkdir -p "$results"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
summary=()
failed=0

stage() { # stage NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  printf '\n== %s\n' "$name"
  if timeout "$limit" "$@"; then
    summary+=("ok      $name ($((SECONDS - start)) s)")
  else
    summary+=("FAILED  $name ($((SECONDS - start)) s of at most $limit)")
    failed=1
  fi
}

"$python" - <<'PY' || exit 1
import sys
import torch, triton
if not torch.cuda.is_available():
    sys.exit("gpu_check.sh needs a CUDA device; torch sees none")
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "torch", torch.__version__, "triton", triton.__version__)
PY
device=$("$python" -c 'from efft_kernels.ops.triton import tuning; print(tuning.device(None).name)') || exit 1
tuned=$results/$device.json
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)

stage "tests" 150 "$python" -m pytest -q -m gpu ${parallel[@]+"${parallel[@]}"} -p no:cacheprovider \
  tests/ops/test_triton_kernels.py
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    stage "compute-sanitizer $tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider tests/ops/test_triton_kernels.py \
      -k "exact_operands and M67 and float16"
  done
else
  summary+=("skipped compute-sanitizer: not on the PATH")
fi
stage "benchmark, model's block shapes" 45 "$python" benchmarks/operator_bench.py \
  --impl triton:fused triton:split torch:split peft --out "$results/operators_untuned.csv"
stage "tuning" 160 "$python" -m efft_kernels.ops.triton.tune --seconds 130 --out "$tuned"
export EFFT_KERNELS_TUNED=$tuned
stage "benchmark, tuned" 45 "$python" benchmarks/operator_bench.py \
  --impl triton:auto triton:fused triton:split torch:split peft --out "$results/operators.csv"
stage "benchmark, host overhead included" 40 "$python" benchmarks/operator_bench.py --eager \
  --impl triton:auto triton:fused triton:split torch:split peft --out "$results/operators.csv"

printf '\n== summary (%s s)\n' "$SECONDS"
printf '%s\n' "${summary[@]}" "rows and tuned block shapes are in $results"
exit $failed
