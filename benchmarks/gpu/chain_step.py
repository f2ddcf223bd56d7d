"""A whole training step of a ViT whose blocks are two operators each, beside the frozen floor.

    python -m benchmarks.gpu.chain_step [--images 64] [--rank 16] [--variants REGEX]
        [--modes eager graph] [--rounds 10] [--no-steps] [--profile CSV] [--out CSV]
    python -m benchmarks.gpu.chain_step --compile    # no GPU: registers and stack of every launch

The step and the modes are those of `step.py`, and so is the gate: logits and factor gradients
within twice plain torch's error, both against float64. The operators are in `chain.py`.

First every launch by itself at the model's sizes and in several block shapes, beside the same step
in torch: microseconds with a cold L2 cache, and the relative difference of the results. Then whole
steps, by variant:

torch       the operators in plain torch: what their arrangement alone gives
best        Triton launches, each in the block shape that was fastest by itself
passes      the same, but GELU is torch's and its linears' thin products are passes of their own
act         the same, but GELU's kernels carry those products
three       `best`, but dx̂ of qkv is three GEMMs: nothing is copied
flash       `best` with FlashAttention 2 in place of cuDNN's attention

Triton's launches are compiled beforehand, in processes that start before CUDA does. `--device cpu`
walks through all of it with a tiny model in Triton's interpreter, in float16.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from rich.console import Console
from torch import Tensor, nn

from .. import peers
from ..lib.rows import STEP_COLUMNS, STEP_CSV, Row, append_rows
from ..lib.timing import interleave
from ..peers import FLOOR, PEFT_LORA, Peer
from ..whole_model import Gate, draw_batch, make_base
from . import step
from .between import Usage, compiled_by, label
from .chain import ATTENTION, ChainedViT, TorchKernels
from .chain_triton import (
    CANDIDATES,
    INTERPRETER,
    ActConfig,
    Configs,
    Shape,
    TritonKernels,
    steps,
)

MODEL = "vit_base_patch16_224"
ACT = Configs(gelu=ActConfig(64, 32, 5, 4, 2), gelu_grad=ActConfig(64, 64, 8, 4, 2))
MOST_COMPILING = 60.0  # seconds that a measurement waits for all launches to be compiled
FARTHEST = 0.03  # a launch's results from torch's, relative; both round to bfloat16


class Variant(NamedTuple):
    """How a chained model runs."""

    name: str
    kernels: Callable[[], TorchKernels]
    attention: str = "cudnn"
    method: str = "EFFT2"

    # What step.Bench asks of an entry.
    backend = ""
    strategy = "auto"

    def build(self, base: nn.Module, rank: int) -> Peer:
        peer = peers.build(self.method, base, rank)
        model = ChainedViT(peer.model, self.kernels(), ATTENTION[self.attention])
        return Peer(self.name, model, peer.method, peer.factors)


def variants(device: str, best: Configs) -> list[Variant]:
    """What is measured, what teaches most first."""
    attention = "cudnn" if device == "cuda" else "cpu"
    act_default = ACT if device == "cuda" else INTERPRETER

    def kernels(configs: Configs, *, copy_gradient: bool = True) -> Callable[[], TorchKernels]:
        return lambda: TritonKernels(configs, copy_gradient=copy_gradient)

    passes = kernels(best._replace(gelu=None, gelu_grad=None))
    act = kernels(act_default._replace(norm=best.norm, norm_grad=best.norm_grad))
    return [
        Variant("EFFT2 [chain best]", kernels(best), attention),
        Variant("EFFT2 [chain passes]", passes, attention),
        Variant("LoRA [chain best]", kernels(best), attention, "LoRA"),
        Variant("EFFT2 [chain act]", act, attention),
        Variant("EFFT2 [chain torch]", TorchKernels, attention),
        Variant("EFFT2 [chain three]", kernels(best, copy_gradient=False), attention),
        Variant("EFFT2 [chain flash]", kernels(best), "flash" if device == "cuda" else "cpu"),
    ]


def default_configs(device: str) -> Configs:
    return Configs() if device == "cuda" else INTERPRETER


def candidates(what: str, device: str) -> list[Configs]:
    """All block shapes of one launch."""
    field = what.partition(" ")[0]
    if field not in CANDIDATES:
        return [default_configs(device)]
    own = CANDIDATES[field]
    if device == "cpu":
        own = [None] if field.startswith("gelu") else []
        own.append(getattr(INTERPRETER, field))
    return [default_configs(device)._replace(**{field: config}) for config in own]


# Compiling ahead


def _compile(configs: Configs, name: str, shape: Shape, arch: int) -> Usage:
    kernels = TritonKernels(configs)
    return compiled_by(steps(kernels, shape, "meta", torch.bfloat16)[name], arch)


def compile_all(shape: Shape, arch: int, processes: int, seconds: float) -> bool:
    """Compile every launch into Triton's cache on disk, and print registers and stack.

    Returns:
        Whether all compiled.
    """
    whole = True
    until = time.perf_counter() + seconds
    pool = ProcessPoolExecutor(processes, mp_context=get_context("fork"))
    jobs = [
        (what, configs, pool.submit(_compile, configs, what, shape, arch))
        for what in steps(TorchKernels(), shape, "meta", torch.bfloat16)
        for configs in candidates(what, "cuda")
    ]
    for what, configs, job in jobs:
        usage: Usage
        try:
            usage = job.result(timeout=max(1.0, until - time.perf_counter()))
        except Exception as error:  # then the first launch compiles it
            usage = f"{type(error).__name__}: {error}"
        text = usage if isinstance(usage, str) else "  ".join(map(_usage, usage))
        whole &= not isinstance(usage, str)
        print(f"compiled {what:20} {_label(what, configs):36} {text}", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    return whole


def _label(what: str, configs: Configs) -> str:
    """The block shape of a launch."""
    config = getattr(configs, what.partition(" ")[0], None)
    if config is None:
        return "passes" if what.startswith("gelu") else ""
    return label(config)


def _usage(one: Any) -> str:
    return f"{one.kernel}: {one.registers} registers, {one.stack_bytes} B stack;"


# Every launch by itself


def measure_steps(shape: Shape, device: str, rounds: int) -> Configs:
    """Print each launch's microseconds in torch and in all block shapes, and how far its results
    are from torch's.

    Returns:
        The fastest block shapes.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    best = default_configs(device)
    for what in steps(TorchKernels(), shape, "meta", dtype):
        try:
            found = _measure_step(what, shape, device, dtype, rounds)
        except Exception as error:  # one launch must not stop the others
            print(f"{what:20} FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        field = what.partition(" ")[0]
        if what == field and field in CANDIDATES and found is not None:
            best = best._replace(**{field: getattr(found, field)})
    print(f"best: {best}", flush=True)
    return best


def _measure_step(
    what: str, shape: Shape, device: str, dtype: torch.dtype, rounds: int
) -> Configs | None:
    """The fastest of one launch's block shapes; None if none is right."""

    def made(kernels: TorchKernels) -> Callable[[], Any]:
        torch.manual_seed(0)  # the same operands for all
        return steps(kernels, shape, device, dtype)[what]

    calls = {"torch": made(TorchKernels())}
    passed: dict[str, Configs] = {}
    apart: dict[str, str] = {}
    with torch.no_grad():
        expected = _tensors(calls["torch"]())
        for configs in candidates(what, device):
            name = _label(what, configs) or "triton"
            call = made(TritonKernels(configs))
            try:
                distance = _distance(_tensors(call()), expected)
            except Exception as error:  # one block shape must not stop the others
                print(f"{what:20} {name} FAILED: {str(error)[:200]}", flush=True)
                continue
            apart[name] = f"{distance:.0e}" if distance < FARTHEST else f"WRONG: {distance:.0e}"
            if distance < FARTHEST:
                passed[name], calls[name] = configs, call
        del expected
        timings = interleave(
            calls,
            seconds=0.0,
            device=device,
            graphs=device == "cuda",
            fewest_rounds=rounds,
            warm_ups=1 if device == "cuda" else 0,
        )
    us = {name: 1e3 * timings.time(name).p50 for name in calls}
    cells = [f"{name} {us[name]:.1f}" for name in calls]
    print(f"{what:20} µs: {'; '.join(cells)}   apart: {'; '.join(apart.values())}", flush=True)
    return passed[min(passed, key=us.__getitem__)] if passed else None


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of two results."""
    pairs = [
        (f.float().flatten(), e.float().flatten()) for f, e in zip(found, expected, strict=True)
    ]
    return max(float((f - e).norm() / e.norm()) for f, e in pairs)


# The command


def tiny_base() -> nn.Module:
    """A ViT that the interpreter can do."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=11
    )
    model.requires_grad_(False)
    model.get_classifier().requires_grad_()
    whole: nn.Module = model.train()
    return whole


def shape_of(base: Any, images: int, rank: int) -> Shape:
    K = base.embed_dim
    return Shape(
        images * step.tokens(base), K, base.blocks[0].mlp.fc1.out_features, rank, len(base.blocks)
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--variants", default="", help="a regular expression on their names")
    parser.add_argument("--modes", nargs="+", choices=step.MODES, default=("graph", "eager"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-steps", action="store_true", help="leave out the launches alone")
    parser.add_argument("--no-peers", action="store_true", help="leave out PEFT and EFFT2 [cuda]")
    parser.add_argument("--seconds", type=float, default=100.0, help="start no variant after these")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="append the kernels to a CSV")
    parser.add_argument("--out", type=Path, default=STEP_CSV)
    parser.add_argument("--compile", action="store_true", help="only compile, and print registers")
    parser.add_argument("--arch", type=int, default=90, help="compiled ahead for this GPU")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    cuda = options.device == "cuda"
    if options.compile or cuda:
        shape = Shape(options.images * 197, 768, 3072, options.rank, 12)
        seconds = 3600.0 if options.compile else MOST_COMPILING
        whole = compile_all(shape, options.arch, options.processes, seconds)
        print(f"{time.perf_counter() - start:4.0f} s  compiled", flush=True)
        if options.compile:
            return 0 if whole else 1
    elif os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]])
    if cuda:
        base = make_base(MODEL, "cuda")
        batch = draw_batch(base, options.images, "cuda")
    else:
        base, batch = tiny_base(), (torch.randn(3, 3, 32, 32), torch.randint(11, (3,)))
        step.AMP = torch.float16  # the interpreter multiplies no bfloat16
        options.modes, options.rank, options.rounds = ("eager",), 5, 1
    shape = shape_of(base, len(batch[0]), options.rank)
    best = default_configs(options.device)
    if not options.no_steps:
        best = measure_steps(shape, options.device, options.rounds)
        step.release(options.device)
        print(f"{time.perf_counter() - start:4.0f} s  launches measured", flush=True)
    rows: list[Row] = []

    def write(row: Row) -> None:
        append_rows(options.out, STEP_COLUMNS, [row])
        rows.append(row)
        seconds = time.perf_counter() - start
        print(f"{seconds:4.0f} s  {row['impl']}, {row['mode']}: {step._time_cell(row)}", flush=True)

    bench = step.Bench(
        base,
        batch,
        options.rank,
        options.device,
        options.rounds,
        options.modes,
        case={
            "model": MODEL if cuda else "tiny",
            "dtype": f"{str(step.AMP).removeprefix('torch.')} autocast",
            "frozen_dtype": "float32",
            "batch": len(batch[0]),
            "r": options.rank,
        },
        gate=Gate(base, options.rank, batch, step.AMP),
        write=write,
    )
    chosen = [v for v in variants(options.device, best) if re.search(options.variants, v.name)]
    others = [] if options.no_peers else [step.Entry("EFFT2", "cuda" if cuda else "torch")]
    others += [] if options.no_peers else [step.Entry(PEFT_LORA)]
    todo: list[Any] = [step.Entry(FLOOR), *chosen[:2], *others, *chosen[2:]]
    measured = []
    for entry in todo:
        if time.perf_counter() - start > options.seconds:
            print(f"{entry.name}: skipped, {options.seconds:.0f} s are over", flush=True)
            continue
        peer = bench.run(entry)
        if peer is not None and (entry.name == FLOOR or entry in chosen[:2]):
            measured.append(peer)
        del peer
    kernels = step.profile_all(bench, measured, options.profile) if options.profile else []
    Console(width=None if sys.stdout.isatty() else 160).print(step.summary(rows, kernels))
    for name, what in bench.failures:
        print(f"FAILED {name}: {what}", flush=True)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
