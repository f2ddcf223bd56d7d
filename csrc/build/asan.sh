#!/usr/bin/env bash
# Builds _native.so with AddressSanitizer and UBSan in its own folder and runs the C++ operators' tests
# on it; any report ends the run. Usage: csrc/build/asan.sh PYTHON [pytest arguments]
set -euo pipefail
python=$(realpath -s "${1:?usage: csrc/build/asan.sh PYTHON [pytest arguments]}")
shift
# EFFT_KERNELS_CPU_ISA=avx2|baseline runs the same tests on the kernels of another instruction set.
if [[ $# -eq 0 ]]; then set -- -m "not slow" tests/ops/backends/cpp; fi
cd "$(dirname "$0")/../.."

"$python" csrc/build/native_build.py --sanitize --only _native --build-dir build/asan

# The runtimes of the compiler that built it come before everything that Python loads, and libstdc++
# with them, so that ASan sees the exceptions thrown across libraries.
preload=
for library in libasan.so libubsan.so libstdc++.so.6; do
  path=$(${CXX:-c++} -print-file-name="$library")
  if [[ $path != /* ]]; then
    echo "error: ${CXX:-c++} has no $library; the sanitizers need g++ with its libasan and libubsan" >&2
    exit 1
  fi
  preload+=${preload:+:}$(realpath "$path")
done

# Python and torch leak by design, so leaks are not looked for.
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export EFFT_KERNELS_NATIVE_LIBRARY=$PWD/build/asan/_native.so
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
# --capture=sys leaves the file descriptors alone, so that a report is seen.
LD_PRELOAD=$preload exec "$python" -m pytest -p no:cacheprovider -q --capture=sys --benchmark-disable \
  "$@"
