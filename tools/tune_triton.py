"""Measure block shapes on the GPU at hand and write them where `configs.py` finds them.

    python -m tools.tune_triton [--images 64] [--rank 16] [--models ViT-B/16] [--jobs 8]
        [--out FILE]

For every layer and pass the configs below are compiled, by several processes at once. Then one
compares them with the default's result, times them, and keeps the fastest. So it does with the
steps of a chain of blocks that there are in Triton and in CUDA C++. Rows of an existing file are
kept unless measured again; the file is replaced in one step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.errors import TritonError
from triton.testing import do_bench

from benchmarks.lib.shapes import models
from efft_kernels.atomic_files import replacing
from efft_kernels.ops.backends import cuda_chain
from efft_kernels.ops.backends.chain_steps import Norm, TorchSteps
from efft_kernels.ops.backends.cuda_chain import CudaSteps
from efft_kernels.ops.backends.triton import configs, device, tuning
from efft_kernels.ops.backends.triton.chain import configs_for
from efft_kernels.ops.backends.triton.configs import GemmConfig, PassConfig, gemm_smem_bytes
from efft_kernels.ops.backends.triton.gemm import launch_gemm
from efft_kernels.ops.backends.triton.launch_cache import CallCache
from efft_kernels.ops.backends.triton.thin import launch_tall_grad, launch_thin

# Tried with the shipped candidates. Few, because each is compiled for two directions, with and
# without P in the loop.
_GEMM_BLOCKS = (
    (128, 256, 64, 8, 8, 3),
    (128, 128, 64, 8, 8, 4),
    (128, 128, 64, 8, 4, 3),
    (64, 256, 64, 8, 4, 3),
)
# block_m, block_c, warps, stages
_PASS_BLOCKS = ((64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3), (32, 128, 4, 5))
_TALL_GRAD_BLOCKS = ((64, 128, 4, 5), (128, 64, 4, 4), (64, 64, 4, 5), (128, 128, 8, 3))

Config = GemmConfig | PassConfig | tuple[int]
Rows = dict[str, dict[str, list[int]]]


def gemm_space(dev: device.Device, rank: int, compute_p: bool, form: str) -> Iterator[GemmConfig]:
    """The shipped configs and those above that fit shared memory, each with and without TMA; on
    sm_90 the shipped ones as persistent programs too.
    """
    grid = (GemmConfig(*block) for block in _GEMM_BLOCKS)
    for config in (*configs.gemm_candidates(dev.arch, form, rank), *grid):
        accumulators = config.block_m * (config.block_c + (rank if compute_p else 0))
        registers = accumulators / (32 * config.num_warps)
        if gemm_smem_bytes(config, rank, 2, 2, compute_p) <= dev.smem_bytes and registers <= 160:
            yield config
            if dev.arch >= 90:
                yield config._replace(tma=True)
    if form == "half":
        for config in configs.persistent_candidates(dev.arch, form, rank, compute_p):
            if gemm_smem_bytes(config, rank, 2, 2, compute_p) <= dev.smem_bytes:
                yield config


def pass_space(
    kernel: str, m: int, c: int, rank: int, dev: device.Device, form: str
) -> Iterator[PassConfig]:
    """The shipped config and those above, the number of programs set by shape."""
    blocks = _TALL_GRAD_BLOCKS if kernel == "tall_grad" else _PASS_BLOCKS
    shipped = configs.pass_defaults(kernel, dev.arch, form, rank)
    grid = (PassConfig(rows, columns, 0, *rest) for rows, columns, *rest in blocks)
    for config in (shipped, *grid):
        programs = tuning.pass_programs(kernel, m, c, config, dev.multiprocessors)
        yield config._replace(programs=programs)


class Share(NamedTuple):
    """One of several processes that fill Triton's cache for the one that measures."""

    number: int
    of: int

    def compile(self, candidates: Iterator[Config], run: Callable[[Any], Any]) -> None:
        """Run each of this process's candidates once."""
        for config in list(dict.fromkeys(candidates))[self.number :: self.of]:
            with contextlib.suppress(TritonError, RuntimeError):
                run(config)


def fastest(
    candidates: Iterator[Config],
    run: Callable[[Any], Any],
    result: Callable[[Any], list[Tensor]],
    deadline: float,
    whole: bool = False,
) -> tuple[Config, float] | None:
    """(config, milliseconds) of the fastest whose result agrees with the first one's.

    Args:
        candidates: the configs.
        run: what is timed, with a config.
        result: of what `run` returned, the tensors to compare.
        deadline: no config is begun after it.
        whole: None unless all were tried and the first one ran.
    """
    best: tuple[Config, float] | None = None
    expected: list[Tensor] | None = None
    for config in dict.fromkeys(candidates):
        if time.monotonic() > deadline:
            return None if whole else best
        try:
            found = [t.double() for t in result(run(config))]
            if expected is None and all(t.isfinite().all() for t in found):
                expected = found
            elif expected is None or not all(map(_agree, found, expected)):
                print(f"  {config}: wrong result", file=sys.stderr)
                if whole and expected is None:
                    return None
                continue
            ms = float(do_bench(partial(run, config), warmup=10, rep=40, return_mode="median"))
        except (TritonError, RuntimeError) as error:  # does not fit, or does not compile
            print(f"  {config}: {str(error)[:200]}", file=sys.stderr)
            if whole and expected is None:
                return None
            continue
        if best is None or ms < best[1]:
            best = config, ms
    return best


def _agree(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-2 * expected.norm())


# What each config's launches remember, so that timing does not wait for the host.
_Remembered = dict[Config, CallCache]


def _run_gemm(
    a: Tensor,
    w: Tensor,
    thin_in: Tensor | None,
    core: Tensor | None,
    thin_out: Tensor,
    p: Tensor,
    remembered: _Remembered,
    config: GemmConfig,
) -> Tensor:
    cache = remembered.setdefault(config, {})
    return launch_gemm(
        a,
        w,
        None,
        thin_in,
        core,
        thin_out,
        p,
        ra=p.shape[1],
        config=config,
        cache=cache,
    )


def _run_thin(
    tall: Tensor, thin: Tensor, p: Tensor, remembered: _Remembered, config: PassConfig
) -> Tensor:
    s = torch.empty_like(p)
    launch_thin(tall, thin, None, s, None, config, remembered.setdefault(config, {}))
    return s


def _run_thin_grad(
    tall: Tensor,
    up: Tensor,
    core: Tensor,
    p: Tensor,
    remembered: _Remembered,
    config: PassConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.empty_like(p)
    d_up, d_core = launch_thin(tall, up, core, s, p, config, remembered.setdefault(config, {}))
    assert d_up is not None and d_core is not None
    return s, d_up, d_core


def _of_thin_grad(found: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    s, d_up, d_core = found
    return [s, d_up.sum((0, 1)), d_core.sum(0)]


def _run_tall_grad(tall: Tensor, p: Tensor, remembered: _Remembered, config: PassConfig) -> Tensor:
    return launch_tall_grad(tall, p, config, remembered.setdefault(config, {}))


def _of_tall_grad(partial: Tensor) -> list[Tensor]:
    return [partial.sum(0)]


def _itself(found: Tensor) -> list[Tensor]:
    return [found]


def tune_layer(
    m: int,
    k: int,
    n: int,
    g: int,
    rank: int,
    dtype: torch.dtype,
    deadline: float,
    share: Share | None = None,
) -> Rows:
    """Measured rows {key: {M bucket: config}} of one layer's kernels, forward and backward; with a
    share nothing is measured."""
    dev = device.properties(None)
    form = tuning.operand_form(dtype, False, True)
    x, dy = (torch.randn(m, c, device="cuda", dtype=dtype) for c in (k, n))
    weight = torch.randn(n, k, device="cuda", dtype=dtype) * k**-0.5
    down, b = (torch.randn(c, rank, device="cuda", dtype=dtype) * c**-0.5 for c in (k, n))
    core = torch.randn(g, rank, rank, device="cuda", dtype=dtype) * rank**-0.5
    up = b[: n // g].unsqueeze(0)
    p = torch.randn(m, rank, device="cuda", dtype=dtype)
    rows: Rows = {}

    def keep(
        key: str,
        candidates: Iterator[Config],
        run: Callable[[Any], Any],
        result: Callable[[Any], list[Tensor]] = _itself,
    ) -> None:
        if share is not None:
            share.compile(candidates, run)
            return
        found = fastest(candidates, run, result, deadline)
        if found is not None:
            config, ms = found
            rows[key] = {str(m.bit_length()): [int(value) for value in config]}
            print(f"{key} m={m}: {1e3 * ms:.1f} us {tuple(config)}", flush=True)

    passes = (
        ("thin", k, partial(_run_thin, x, down, p, {}), _itself),
        ("thin", n, partial(_run_thin, dy, b, p, {}), _itself),
        ("thin_grad", n, partial(_run_thin_grad, dy, up, core, p, {}), _of_thin_grad),
        ("tall_grad", k, partial(_run_tall_grad, x, p, {}), _of_tall_grad),
    )
    for kernel, c, run, result in passes:
        space = pass_space(kernel, m, c, rank, dev, form)
        keep(configs.pass_key(kernel, c, rank, form), space, run, result)
    gemms: tuple[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor], ...] = (
        (x, weight.t(), down, core, up),
        (dy, weight, b, None, down),
    )
    for compute_p in (False, True):
        for a, w, thin_in, cores, thin_out in gemms:
            to_p = thin_in if compute_p else None
            keep(
                configs.gemm_key(w.shape[1], w.shape[0], rank, form, compute_p),
                gemm_space(dev, rank, compute_p, form),
                partial(_run_gemm, a, w, to_p, cores, thin_out, p.clone(), {}),
            )
    return rows


def chain_steps(k: int, rank: int) -> dict[tuple[int], TorchSteps]:
    """A chain's steps with those of cuda_chain.CHOSEN in Triton, (0,), and in CUDA C++, (1,); empty
    where there are none in CUDA C++."""
    index = torch.cuda.current_device()
    if not cuda_chain.takes(k, rank, index):
        return {}
    shapes = configs_for(k, rank, index)
    natively = dict.fromkeys(cuda_chain.CHOSEN, True)
    return {(0,): CudaSteps(shapes), (1,): CudaSteps(shapes, **natively)}


def tune_chain(
    m: int,
    k: int,
    hidden: int,
    rank: int,
    dtype: torch.dtype,
    deadline: float,
    share: Share | None = None,
    on: str = "cuda",
) -> Rows:
    """The same for the steps of a chain: [1] where CUDA C++ is the faster.

    Args:
        m, k: rows and columns of the stream.
        hidden: columns of its MLP.
        on: the device.
    """
    steps = chain_steps(k, rank)
    if not steps:
        return {}

    def draw(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, device=on, dtype=of)

    def added(of: TorchSteps, *sums: tuple[Tensor, int]) -> list[Tensor]:
        outs = [torch.empty(columns, rank, device=on) for _, columns in sums]
        of.finish([(found, out) for (found, _), out in zip(sums, outs, strict=True)])
        return outs

    x, dy, (z, residual) = draw(m, k), draw(m, k), draw(2, m, k, of=torch.float32)
    (down, b), (s, p) = draw(2, k, rank), draw(2, m, rank)
    h, da, wide = draw(m, hidden), draw(m, hidden), draw(hidden, rank)
    mean, rstd = z.mean(1), z.var(1, correction=0).rsqrt()
    norm = Norm(torch.ones(k, device=on), torch.zeros(k, device=on), 1e-6)
    scratch = torch.empty_like(da)

    def pair_grad(config: tuple[int]) -> list[Tensor]:
        of = steps[config]
        sum_down, sum_b = of.pair_grad(x, dy, down, b)
        return added(of, (sum_down, k), (sum_b, k))

    def before(config: tuple[int]) -> list[Tensor]:
        of = steps[config]
        got = of.norm_grad(dy, z, mean, rstd, norm, residual, s, (b, p))
        assert got.s is not None and got.sum_b is not None
        return [got.dz, got.dy, got.s, *added(of, (got.sum_down, k), (got.sum_b, k))]

    def gelu(config: tuple[int]) -> list[Tensor]:
        return list(steps[config].gelu(h, wide))

    def gelu_grad(config: tuple[int]) -> list[Tensor]:
        d_b, d_down = torch.empty(2, hidden, rank, device=on)
        dh, s_in = steps[config].gelu_grad(scratch.copy_(da), h, s, wide, p, d_b, d_down, [])
        return [dh, s_in, d_b, d_down]

    rows: Rows = {}
    runs = {run.__name__: run for run in (pair_grad, before, gelu, gelu_grad)}
    for step in cuda_chain.choices(k, hidden):
        run = runs[step]
        if share is not None:
            share.compile(iter(steps), run)
            continue
        found = fastest(iter(steps), run, list, deadline, whole=True)
        if found is not None:
            key = cuda_chain.chosen_key(step, k, rank)
            rows[key] = {str(m.bit_length()): list(found[0])}
            print(f"{key} m={m}: {1e3 * found[1]:.1f} us {found[0]}", flush=True)
    return rows


def write(rows: Rows, path: Path) -> None:
    """Merge rows into the device's file, replaced in one step so that no reader sees half of it."""
    name = device.properties(None).name
    table: dict[str, Any] = {"device": name, "rows": {}}
    if path.is_file():
        old = json.loads(path.read_text())
        if old.get("device") == name:
            table = old
    for key, by_bucket in rows.items():
        table["rows"].setdefault(key, {}).update(by_bucket)
    table["source"] = "measured"
    table["torch"], table["triton"] = torch.__version__, triton.__version__
    table["timestamp"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def compile_all(jobs: int, arguments: list[str], seconds: float) -> None:
    """Fill Triton's cache by `jobs` processes, each with its share, for so long at most."""
    command = [sys.executable, "-m", "tools.tune_triton", *arguments]
    shares = [
        subprocess.Popen([*command, "--share", str(number), str(jobs)], stdout=subprocess.DEVNULL)
        for number in range(jobs)
    ]
    end = time.monotonic() + 0.7 * seconds
    for process in shares:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> None:
    """Tune and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["ViT-B/16"], choices=sorted(models(1)))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument(
        "--rank",
        type=int,
        default=16,
        choices=(16, 32, 64, 128),
        help="a padded rank; its rows serve the ranks that are padded to it",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="stop measuring after this long"
    )
    parser.add_argument("--out", type=Path, help="default: the shipped file of this device")
    parser.add_argument(
        "--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile"
    )
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a CUDA device")
    os.environ.pop(configs.ENVIRONMENT_VARIABLE, None)  # no table is to be read, least the new one
    layers = [layer for model in arguments.models for layer in models(arguments.images)[model]]
    share = None if arguments.share is None else Share(*arguments.share)
    deadline = time.monotonic() + arguments.seconds
    if share is None and arguments.jobs > 1:
        compile_all(arguments.jobs, sys.argv[1:], arguments.seconds)
        print(f"compiled, {deadline - time.monotonic():.0f} s left to measure", flush=True)
    rows: Rows = {}
    dtype = getattr(torch, arguments.dtype)
    for model in arguments.models:
        sizes_of = {name: (m, k) for name, m, k, *_ in models(arguments.images)[model]}
        if "qkv" in sizes_of:  # whose blocks run as a chain
            print(f"{model}, chain", flush=True)
            stream, hidden = sizes_of["qkv"], sizes_of["fc2"][1]
            own = tune_chain(*stream, hidden, arguments.rank, dtype, deadline, share)
            for key, by_bucket in own.items():
                rows.setdefault(key, {}).update(by_bucket)
    for name, m, k, n, g in layers:
        print(name, flush=True)
        sizes = m, k, n, g, arguments.rank
        for key, by_bucket in tune_layer(*sizes, dtype, deadline, share).items():
            rows.setdefault(key, {}).update(by_bucket)
    if share is not None:
        return
    out = arguments.out or configs.FOLDER / f"{device.properties(None).name}.json"
    write(rows, out)
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
