#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under ten minutes: tests, sanitizer, tuning, benchmark rows.
#
#     benchmarks/gpu_check.sh
#
# Needs a machine with an NVIDIA GPU and a python that has torch, triton, pytest, numpy and rich; downloads
# nothing and installs nothing. PYTHON names the interpreter, RESULTS the folder for CSV rows, tuned block
# shapes, measured.json and the log. The CUDA C++ backend is taken along where efft_kernels/_native_cuda.so is
# built. Every stage has its own time limit, all of them together TOTAL seconds, and each runs even where an
# earlier one failed; the last lines say which did and how long each took.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
total=${TOTAL:-590}
mkdir -p "$results"
exec > >(tee "$results/gpu_check.log") 2>&1
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
summary=()
failed=0

stage() { # stage NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS left=$((total - SECONDS))
  shift 2
  printf '\n== %s\n' "$name"
  if ((left < 5)); then
    summary+=("FAILED  $name (not run: the $total s are used up)")
    failed=1
    return
  fi
  if timeout -k 5 "$((limit < left ? limit : left))" "$@"; then
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
device=$("$python" -c 'from efft_kernels.ops.backends.triton import device; print(device.properties(None).name)') || exit 1
tuned=$results/$device.json

# The strategies of the CUDA C++ backend, as the benchmark names them; none where it is not built.
native=()
if compgen -G 'efft_kernels/_native_cuda*.so' >/dev/null; then
  read -r -a native < <("$python" - <<'PY'
import sys
from efft_kernels.ops import dispatch
reason = dispatch.available_backends()["cuda"]
if reason is None:
    print(*(f"cuda:{name}" for name in dispatch.require_backend("cuda").STRATEGIES))
else:
    print(f"the CUDA C++ backend is built but cannot run here: {reason}", file=sys.stderr)
PY
  )
  if ((${#native[@]} == 0)); then
    summary+=("FAILED  CUDA C++ backend: built, but it cannot run here")
    failed=1
  fi
else
  summary+=("skipped CUDA C++ backend: efft_kernels/_native_cuda.so is not built")
fi

# Those that are benchmarked: never `merged`, which no one may pick for weights stored in half precision.
benched=()
for name in ${native[@]+"${native[@]}"}; do
  [[ $name == *:merged ]] || benched+=("$name")
done

# A forward and a backward of every strategy and dtype, on sizes that no tile divides and on some that tiles do.
small=$(cat <<'PY'
import sys, torch
from efft_kernels import low_rank_linear
from efft_kernels.ops.dispatch import require_backend
for name in sys.argv[1:]:
    backend, _, strategy = name.partition(":")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for M, K, n, G, Ra, Rb in ((67, 71, 29, 3, 7, 5), (1573, 824, 776, 3, 16, 8)):
            x, down, core, up = (torch.randn(size, device="cuda", dtype=dtype, requires_grad=True)
                                 for size in ((M, K), (K, Ra), (G, Ra, Rb), (1, n, Rb)))
            if require_backend(backend).rejects(x) is None:
                weight, bias = (torch.randn(size, device="cuda", dtype=dtype) for size in ((n * G, K), (n * G,)))
                y = low_rank_linear(x, weight, bias, down, core, up, backend=backend, strategy=strategy)
                y.float().sum().backward()
torch.cuda.synchronize()
PY
)

# Most of the time goes into compiling some 300 kernels, so in as many processes as there are cores.
stage "tests, Triton" 120 "$python" -m benchmarks.parallel_tests --jobs "$(nproc)" -m gpu \
  tests/ops/backends/triton/kernels
if ((${#native[@]})); then
  stage "tests, CUDA C++" 60 "$python" -m pytest -q -m gpu -p no:cacheprovider tests/ops/backends/test_cuda_backend.py
fi
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    stage "compute-sanitizer $tool, Triton" 35 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider tests/ops/backends/triton/kernels/test_exact.py \
      -k "exact_operands and M67 and float16"
    if ((${#native[@]})); then
      stage "compute-sanitizer $tool, CUDA C++" 30 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$python" -c "$small" "${native[@]}"
    fi
  done
else
  summary+=("skipped compute-sanitizer: not on the PATH")
fi
stage "benchmark, model's block shapes" 35 "$python" -m benchmarks.operators --device cuda \
  --impl triton:fused triton:split torch:split peft --out "$results/operators_untuned.csv"
stage "tuning" 130 "$python" -m tools.tune_triton --seconds 105 --out "$tuned"
export EFFT_KERNELS_TUNED=$tuned
stage "benchmark, tuned" 60 "$python" -m benchmarks.operators --device cuda --modes fwd "train fwd" "fwd+bwd" \
  --impl triton:auto triton:fused triton:split ${benched[@]+"${benched[@]}"} torch:split peft \
  --out "$results/operators.csv"
stage "benchmark, host overhead included" 35 "$python" -m benchmarks.operators --device cuda --eager \
  --impl triton:auto triton:fused triton:split ${benched[@]+"${benched[@]}"} torch:split peft \
  --out "$results/operators.csv"
stage "measured.json for the cost model" 10 "$python" -m benchmarks.measured "$results/operators.csv" \
  --out "$results/measured.json"

printf '\n== summary (%s s)\n' "$SECONDS"
printf '%s\n' "${summary[@]}" "rows, tuned block shapes, measured.json and the log are in $results"
exit $failed
