#!/usr/bin/env bash
# Everything that needs a GPU, in two halves of under 290 seconds each:
#
#     benchmarks/gpu_check.sh first      is it right, and where does the time go
#     benchmarks/gpu_check.sh second     tests, sanitizer, tuning, rows for the tables
#
# Needs a machine with an NVIDIA GPU and a python with what `pip install -e .[dev]` installs; downloads
# nothing and installs nothing. PYTHON names the interpreter, RESULTS the folder for rows and the log.
# --dry tries the flow where there is no GPU. benchmarks/gpu/stages.py lists the stages.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu.check "$@"
