VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.efft-kernels-installed
JOBS  ?= 2
# What [build-system] in pyproject.toml requires, and nvcc
BUILD_REQUIRES := setuptools torch ninja pybind11 nvidia-cutlass "cuda-toolkit[cccl,crt,nvcc,nvvm]"
CSRC   = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-vtab test docs lint format bench bench-check tables aot asan fuzz soak mutate clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv, build the native libraries, and show what runs on this machine
	$(BIN)/efft-kernels doctor

demo: $(STAMP) ## fine-tune a small vision transformer and show what it cost
	$(BIN)/efft-kernels demo

demo-vtab: $(STAMP) ## the papers' comparison in small: every method and baseline on two tasks of photographs
	$(BIN)/efft-kernels demo-vtab

test: $(STAMP) ## run the tests in JOBS processes (default 2), one torch thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --benchmark-disable

docs: $(STAMP) ## the documentation's site in build/site; fails where a link leads nowhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP) ## what the adapter costs on this CPU; let nothing else run
	$(BIN)/python -m benchmarks.operators --seconds 60
	$(BIN)/python -m benchmarks.operators --models ViT-S/16 ViT-B/16 --images 8 --ranks 16 \
	  --impl torch:auto cpp:auto auto peft --modes fwd+bwd --seconds 60
	$(BIN)/python -m benchmarks.whole_model --models vit_tiny_patch16_224:8 vit_base_patch16_224:2 \
	  swin_tiny_patch4_window7_224:4 vit_small_patch16_224:8 --seconds 20 --memory-batches 1 2 4
	$(BIN)/python -m benchmarks.whole_model --models vit_tiny_patch16_224:8 vit_base_patch16_224:2 \
	  swin_tiny_patch4_window7_224:4 vit_small_patch16_224:8 --memory-only
	$(BIN)/python -m benchmarks.plots
	$(BIN)/python -m benchmarks.tables

bench-check: $(STAMP) ## fail where a ratio is worse than the last committed one
	$(BIN)/python -m benchmarks.check

tables: $(STAMP) ## the measured tables of README and docs/measured.md from the CSVs
	$(BIN)/python -m benchmarks.tables

aot: $(STAMP) ## compile every shipped kernel configuration for sm_80, sm_90 and sm_100, no GPU needed
	$(BIN)/python -m tools.compile_triton

asan: $(STAMP) ## test the C++ operators under AddressSanitizer and UBSan
	csrc/build/asan.sh $(BIN)/python

fuzz: $(STAMP) ## random calls against the specification, for SECONDS (default 60), from SEED (default: new ones)
	$(BIN)/python -m tools.fuzz --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED))

soak: $(STAMP) ## kill save, train and a sweep at random moments, KILLS times (default 200)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.soak --kills $(or $(KILLS),200)

mutate: $(STAMP) ## put SAMPLE small faults into the core (default 40, 0 for all), those of tools/csrc_faults.py into csrc, and count those noticed
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.mutate --sample $(or $(SAMPLE),40)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.mutate_csrc

lint: $(STAMP) ## check style, types, formatting and which module imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(if $(CSRC),$(BIN)/clang-format --dry-run --Werror $(CSRC))

format: $(STAMP) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

clean: ## remove build products and caches; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(STAMP)
	find efft_kernels tests benchmarks tools csrc -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	find efft_kernels -name '*.so' -delete
	rm -f efft_kernels/_build_report.json

# The native build comes before pip's, which hides its progress and then finds all of it made.
$(STAMP): pyproject.toml setup.py constraints.txt $(CSRC) $(wildcard csrc/build/*.py) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt $(BUILD_REQUIRES)
	$(BIN)/python csrc/build/native_build.py
	$(BIN)/python -m pip install --no-build-isolation -c constraints.txt -e ".[dev]"
	@touch $@

# The first interpreter that is new enough and able to make a virtual environment.
$(BIN)/python:
	@for python in $(PYTHON) python3.12 python3.11 python3.10 python3; do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$python"; exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: efft-kernels needs Python 3.10 or newer with the venv module; found none." >&2; \
	echo "Install one, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1
