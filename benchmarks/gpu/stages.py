"""What `benchmarks/gpu_check.sh` runs, in the order in which it teaches most; check.py runs it."""

from __future__ import annotations

from .check import Stage


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("{python}", "-m", name, *arguments)


def _pytest(*arguments: str) -> tuple[str, ...]:
    return _module("benchmarks.parallel_tests", "--jobs", "{cores}", "-m", "gpu", *arguments)


def _sanitizer(tool: str, cases: str) -> tuple[str, ...]:
    """compute-sanitizer over some of the smoke test's cases, in one process."""
    python = _module("benchmarks.gpu.smoke", "--inline", "--only", cases)
    return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *python)


_DOCTOR = ("{python}", "-c", "from efft_kernels.cli import app; app()", "doctor")
_TINY = ("--device", "cpu", "--model", "vit_tiny_patch16_224", "--images", "2", "--rounds", "1")
_LAYER = ("--device", "cpu", "--model", "ViT-Ti/16", "--images", "1", "--impl", "torch:split")
# Of the operator rows: what `auto` takes, and each strategy that it may take.
_OPERATORS = (
    *("triton:auto", "triton:fused", "triton:split", "cuda:auto", "cuda:fused", "cuda:split"),
    *("torch:split", "peft"),
)

STAGES = (
    Stage("load", "first", 30, _DOCTOR, dry=_DOCTOR),
    Stage(
        "smoke, bit for bit",
        "first",
        70,
        _module("benchmarks.gpu.smoke", "--seconds", "65", "--out", "{results}/smoke.csv"),
        dry=_module("benchmarks.gpu.smoke", "--device", "cpu", "--out", "{results}/smoke.csv"),
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
    Stage("tests, CUDA C++", "second", 60, _pytest("tests/ops/backends/test_cuda_backend.py")),
    Stage("tests, Triton", "second", 80, _pytest("tests/ops/backends/triton/kernels")),
    Stage(
        "whole step",
        "second",
        60,
        _module("benchmarks.gpu.step", "--out", "{results}/step.csv"),
        dry=_module("benchmarks.gpu.step", *_TINY, "--out", "{results}/step.csv"),
    ),
    Stage(
        "whole step, compiled",
        "second",
        80,
        _module(
            "benchmarks.gpu.step",
            *("--methods", "EFFT2", "--backends", "cuda", "triton", "--no-gate"),
            *("--modes", "compiled", "compiled-graph", "--out", "{results}/step.csv"),
        ),
    ),
    Stage(
        "tuning",
        "second",
        60,
        _module("tools.tune_triton", "--seconds", "50", "--out", "{results}/tuned.json"),
    ),
    Stage(
        "operators",
        "second",
        50,
        _module(
            "benchmarks.operators",
            *("--device", "cuda", "--rounds", "30", "--modes", "fwd", "train fwd", "fwd+bwd"),
            *("--impl", *_OPERATORS, "--out", "{results}/operators.csv"),
        ),
        dry=_module(
            "benchmarks.operators",
            *("--device", "cpu", "--models", "ViT-Ti/16", "--ranks", "16", "--seconds", "1"),
            *("--impl", "torch:split", "--out", "{results}/operators.csv"),
        ),
    ),
    Stage(
        "measured.json for the cost model",
        "second",
        15,
        _module(
            "benchmarks.measured", "{results}/operators.csv", "--out", "{results}/measured.json"
        ),
    ),
    *(
        Stage(
            f"compute-sanitizer {tool}",
            "second",
            40,
            _sanitizer(tool, "sanitized"),
            needs="compute-sanitizer",
        )
        for tool in ("memcheck", "racecheck")
    ),
    Stage(
        "Nsight Compute, the hottest kernels",
        "second",
        40,
        (
            *("ncu", "--clock-control", "none", "--set", "full", "--csv", "--page", "details"),
            *("--kernel-name", "regex:gemm_sm90|thin_kernel|tall_grad", "--launch-count", "6"),
            *("--log-file", "{results}/ncu.csv"),
            *_module("benchmarks.gpu.kernel_times", "--impl", "cuda:split", "--no-profiler"),
        ),
        needs="ncu",
    ),
)
