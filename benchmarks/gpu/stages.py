"""What `benchmarks/gpu_check.sh` runs, in the order in which it teaches most; check.py runs it."""

from __future__ import annotations

from .check import Stage


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("{python}", "-m", name, *arguments)


def _pytest(*arguments: str) -> tuple[str, ...]:
    return _module("benchmarks.parallel_tests", "--jobs", "{cores}", "-m", "gpu", *arguments)


# Small cases with every kernel: both GEMMs, P in the loop, an end of K inside 16 bytes, a merge.
_SANITIZED = (
    "cuda general 64 split bfloat16",
    "cuda Hopper 128 fused bfloat16",
    "cuda K tail 128 split bfloat16",
    "cuda merged merged bfloat16",
    "cuda general 64 r61 split float16",
    "cuda Hopper 192 fused float16",
)


def _sanitizer(tool: str, limit_s: float) -> Stage:
    """compute-sanitizer over some of the smoke test's cases.

    It watches the package's kernels alone, and every tensor is an allocation of its own: it knows
    nothing of the parts of torch's cached blocks.
    """
    smoke = _module("benchmarks.gpu.smoke", "--inline", "--seconds", str(limit_s - 3))
    watched = ("--error-exitcode", "1", "--kernel-name", "kns=efft_kernels")
    return Stage(
        f"compute-sanitizer {tool}",
        "second",
        limit_s,
        (
            *("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "{tool}", "--tool", tool, *watched),
            *(*smoke, "--only", *_SANITIZED),
        ),
        # The second tool would walk through the same once more.
        dry=(*smoke, "--device", "cpu", "--only", *_SANITIZED) if tool == "memcheck" else None,
        needs="compute-sanitizer",
    )


_DOCTOR = ("{python}", "-c", "from efft_kernels.cli import app; app()", "doctor")
_TINY = (
    *("--device", "cpu", "--model", "vit_tiny_patch16_224", "--images", "1", "--rounds", "1"),
    *("--methods", "EFFT2", "--backends", "torch"),
)
_LAYER = ("--device", "cpu", "--model", "ViT-Ti/16", "--images", "1", "--impl", "torch:split")
# Of the operator rows: what `auto` takes, and each strategy that it may take.
_OPERATORS = (
    *("triton:auto", "triton:fused", "triton:split", "cuda:auto", "cuda:fused", "cuda:split"),
    *("torch:split", "peft"),
)
# The kernels of one layer, forward and backward, each once.
_NCU_RUN = _module("benchmarks.gpu.kernel_times", "--no-profiler", "--impl", "cuda:split")

STAGES = (
    Stage("load", "first", 30, _DOCTOR, dry=_DOCTOR),
    Stage(
        "smoke, bit for bit",
        "first",
        70,
        _module("benchmarks.gpu.smoke", "--seconds", "65", "--out", "{results}/smoke.csv"),
        dry=_module(
            *("benchmarks.gpu.smoke", "--device", "cpu", "--out", "{results}/smoke.csv"),
            *("--only", "general 64 split", "Hopper 192 fused", "triton odd"),
        ),
    ),
    Stage(
        "whole step",
        "first",
        85,
        _module(
            "benchmarks.gpu.step",
            *("--profile", "{results}/step_kernels.csv", "--out", "{results}/step.csv"),
        ),
        dry=_module(
            "benchmarks.gpu.step",
            *(*_TINY, "--profile", "{results}/step_kernels.csv", "--out", "{results}/step.csv"),
        ),
    ),
    Stage(
        "chain",
        "first",
        45,
        _module("benchmarks.gpu.chain", "--out", "{results}/chain.csv"),
        dry=_module("benchmarks.gpu.chain", "--device", "cpu", "--out", "{results}/chain.csv"),
    ),
    Stage(
        "between the GEMMs",
        "first",
        75,
        _module("benchmarks.gpu.between", "--seconds", "62", "--out", "{results}/between.csv"),
        dry=_module("benchmarks.gpu.between", "--device", "cpu", "--out", "{results}/between.csv"),
    ),
    Stage(
        "kernel times",
        "first",
        50,
        _module("benchmarks.gpu.kernel_times", "--out", "{results}/kernel_times.csv"),
        dry=_module("benchmarks.gpu.kernel_times", *_LAYER, "--out", "{results}/kernel_times.csv"),
    ),
    Stage(
        "kernel times, float32 weights",
        "first",
        20,
        _module(
            *("benchmarks.gpu.kernel_times", "--weights", "float32", "--impl", "cuda:split"),
            *("cuda:fused", "cuda:merged", "triton:split", "triton:merged"),
            *("--out", "{results}/kernel_times.csv"),
        ),
        dry=_module(
            *("benchmarks.gpu.kernel_times", *_LAYER, "--weights", "float32"),
            *("--out", "{results}/kernel_times.csv"),
        ),
    ),
    Stage(
        "tests, chain",
        "second",
        50,
        _pytest(
            *("tests/ops/backends/test_cuda_chain.py", "tests/ops/test_chains.py"),
            *("tests/adapters/test_chained.py", "tests/adapters/test_joint_factors.py"),
        ),
    ),
    Stage("tests, CUDA C++", "second", 60, _pytest("tests/ops/backends/test_cuda_backend.py")),
    Stage("tests, Triton", "second", 80, _pytest("tests/ops/backends/triton/kernels")),
    Stage(
        "whole step",
        "second",
        40,
        _module(
            *("benchmarks.gpu.step", "--backends", "auto", "cuda"),
            *("--profile", "{results}/step_kernels.csv", "--out", "{results}/step.csv"),
        ),
    ),
    _sanitizer("memcheck", 25),
    _sanitizer("racecheck", 25),
    Stage(
        "operators",
        "second",
        35,
        _module(
            "benchmarks.operators",
            *("--device", "cuda", "--rounds", "20", "--modes", "train fwd", "fwd+bwd"),
            *("--impl", *_OPERATORS, "--out", "{results}/operators.csv"),
        ),
        dry=_module(
            "benchmarks.operators",
            *("--device", "cpu", "--models", "ViT-Ti/16", "--layers", "proj", "--ranks", "16"),
            *("--seconds", "1", "--impl", "torch:split", "--out", "{results}/operators.csv"),
        ),
    ),
    Stage(
        "measured.json for the cost model",
        "second",
        10,
        _module(
            "benchmarks.measured", "{results}/operators.csv", "--out", "{results}/measured.json"
        ),
    ),
    Stage(
        "tuning",
        "second",
        20,
        _module(
            *("tools.tune_triton", "--seconds", "14", "--jobs", "{cores}"),
            *("--out", "{results}/tuned.json"),
        ),
    ),
    # What follows gets the time that the stages above leave.
    Stage(
        "whole step, compiled",
        "second",
        60,
        _module(
            "benchmarks.gpu.step",
            *("--methods", "EFFT2", "--backends", "cuda", "--no-gate"),
            *("--modes", "compiled-graph", "--out", "{results}/step.csv"),
        ),
    ),
    Stage(
        "Nsight Compute, the hottest kernels",
        "second",
        30,
        (
            *("{tool}", "--clock-control", "none", "--set", "full", "--csv", "--page", "details"),
            *("--kernel-name", "regex:gemm_sm90|thin|tall_grad|unfold", "--launch-count", "8"),
            *("--log-file", "{results}/ncu.csv", *_NCU_RUN),
        ),
        dry=(*_NCU_RUN, *_LAYER),
        needs="ncu",
    ),
)
