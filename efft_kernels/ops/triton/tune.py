"""Measure block shapes on the GPU at hand and write them where `tuning.py` finds them. Runs only on request.

    python -m efft_kernels.ops.triton.tune [--images 64] [--rank 16] [--models ViT-B/16] [--out FILE]

For every layer and pass the configs below are compiled, compared with the default's result, timed, and the
fastest kept. Rows of an existing file are kept unless measured again; the file is replaced in one step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from .. import cost_model
from . import tuning
from .gemm import launch_gemm
from .thin import launch_tall_grad, launch_thin
from .tuning import GemmConfig, PassConfig

_GEMM_BLOCKS = (
    (128, 256, 64, 8, 8, 3),
    (128, 256, 64, 8, 8, 4),
    (128, 256, 32, 8, 8, 4),
    (256, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 8, 4),
    (128, 128, 64, 8, 4, 3),
    (128, 128, 32, 8, 4, 4),
    (64, 256, 64, 8, 4, 3),
    (64, 128, 64, 8, 4, 4),
)
_PASS_BLOCKS = ((64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 3), (128, 128, 8, 3), (32, 128, 4, 5))
_TALL_GRAD_BLOCKS = ((64, 128, 4, 3), (64, 128, 4, 5), (128, 64, 4, 4), (64, 64, 4, 5), (128, 128, 8, 3), (64, 256, 8, 3))


def gemm_space(
    dev: tuning.Device, rank: int, ride: bool, form: str
) -> Iterator[GemmConfig]:
    """The shipped configs, and those of the grid that fit shared memory and leave registers to spare."""
    yield from tuning.gemm_candidates(dev.arch, form, rank)
    for block in _GEMM_BLOCKS:
        config = GemmConfig(*block)
        accumulators = config.block_m * (config.block_c + (rank if ride else 0))
        registers = accumulators / (32 * config.num_warps)
        if tuning.gemm_smem_bytes(config, rank, 2, 2, ride) <= dev.smem_bytes and registers <= 160:
            yield config
            if dev.arch >= 90:
                yield config._replace(tma=True)


def pass_space(
    kernel: str, m: int, c: int, rank: int, dev: tuning.Device, form: str
) -> Iterator[PassConfig]:
    """The shipped config and the grid's, the number of programs set by shape."""
    blocks = _TALL_GRAD_BLOCKS if kernel == "tall_grad" else _PASS_BLOCKS
    shipped = tuning.pass_defaults(kernel, dev.arch, form, rank)
    for config in (shipped, *(PassConfig(a, b, 0, warps, stages) for a, b, warps, stages in blocks)):
        yield config._replace(programs=tuning.pass_programs(kernel, m, c, config, dev.multiprocessors))


def fastest(
    configs: Iterator[GemmConfig] | Iterator[PassConfig],
    run: Callable[[GemmConfig | PassConfig], Tensor],
    deadline: float,
) -> tuple[GemmConfig | PassConfig, float] | None:
    """(config, milliseconds) of the fastest whose result agrees with the first one's."""
    best: tuple[GemmConfig | PassConfig, float] | None = None
    expected: Tensor | None = None
    for config in dict.fromkeys(configs):
        if time.monotonic() > deadline:
            break
        try:
            result = run(config).double()
            if expected is None:
                expected = result
            elif not (result - expected).norm() <= 1e-2 * expected.norm():
                print(f"  {config}: wrong result", file=sys.stderr)
                continue
            ms = float(do_bench(lambda c=config: run(c), warmup=10, rep=40, return_mode="median"))
        except triton.runtime.errors.OutOfResources as error:
            print(f"  {config}: {error}", file=sys.stderr)
            continue
        if best is None or ms < best[1]:
            best = config, ms
    return best


def tune(
    layers: list[tuple[str, int, int, int, int]],
    rank: int,
    dtype: torch.dtype,
    seconds: float,
) -> dict[str, dict[str, list[int]]]:
    """Measured rows for (layer, M, K, N, G): {key: {M bucket: config}}. Stops after `seconds`."""
    dev = tuning.device(None)
    form = tuning.operand_form(dtype, False, True)
    deadline = time.monotonic() + seconds
    rows: dict[str, dict[str, list[int]]] = {}

    def keep(key: str, m: int, found: tuple[GemmConfig | PassConfig, float] | None) -> None:
        if found is not None:
            rows.setdefault(key, {})[str(m.bit_length())] = list(found[0])
            print(f"{key} m={m}: {found[1] * 1e3:.1f} us {tuple(found[0])}", flush=True)

    for layer, m, k, n, _ in layers:
        print(layer, flush=True)
        x, dy = (torch.randn(m, c, device="cuda", dtype=dtype) for c in (k, n))
        weight = torch.randn(n, k, device="cuda", dtype=dtype) * k**-0.5
        down, b = (torch.randn(c, rank, device="cuda", dtype=dtype) * c**-0.5 for c in (k, n))
        p = torch.randn(m, rank, device="cuda", dtype=dtype)
        for ride in (True, False):
            for a, w, thin_in, thin_out in ((x, weight.t(), down, b), (dy, weight, b, down)):
                buffer = torch.empty_like(p) if ride else p
                keep(
                    tuning.gemm_key(w.shape[1], w.shape[0], rank, form, ride),
                    m,
                    fastest(
                        gemm_space(dev, rank, ride, form),
                        lambda c, a=a, w=w, i=thin_in, o=thin_out, s=buffer, r=ride: launch_gemm(  # type: ignore[misc]
                            a, w, None, i, o, s, width=rank, ride=r, config=c
                        ),
                        deadline,
                    ),
                )
        for tall, thin in ((x, down), (dy, b)):
            c = tall.shape[1]

            def run_thin(config, grad=None, tall=tall, thin=thin):
                s = torch.empty_like(p)
                partial = launch_thin(tall, thin, s, grad, config)
                return s if partial is None else partial.sum(0)

            keep(
                tuning.pass_key("thin", c, rank, form),
                m,
                fastest(pass_space("thin", m, c, rank, dev, form), run_thin, deadline),
            )
            keep(
                tuning.pass_key("tall_grad", c, rank, form),
                m,
                fastest(
                    pass_space("tall_grad", m, c, rank, dev, form),
                    lambda config, tall=tall: launch_tall_grad(tall, p, config).sum(0),  # type: ignore[misc]
                    deadline,
                ),
            )
        keep(
            tuning.pass_key("thin_grad", n, rank, form),
            m,
            fastest(
                pass_space("thin_grad", m, n, rank, dev, form),
                lambda config, run=run_thin: run(config, p),  # type: ignore[misc]
                deadline,
            ),
        )
    return rows


def write(rows: dict[str, dict[str, list[int]]], path: Path) -> None:
    """Merge rows into the device's file, replaced in one step so that no reader sees half of it."""
    name = tuning.device(None).name
    table: dict = {"device": name, "rows": {}}
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
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump(table, file, indent=1, sort_keys=True)
        file.write("\n")
    os.replace(temporary, path)


def main() -> None:
    """Tune and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B/16"], choices=sorted(cost_model.models(1)))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--seconds", type=float, default=240.0, help="stop measuring after this long")
    parser.add_argument("--out", type=Path, help="default: the shipped file of this device")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a CUDA device")
    layers = [layer for model in arguments.models for layer in cost_model.models(arguments.images)[model]]
    rows = tune(layers, arguments.rank, getattr(torch, arguments.dtype), arguments.seconds)
    out = arguments.out or tuning.FOLDER / f"{tuning.device(None).name}.json"
    write(rows, out)
    print(f"{len(rows)} rows in {out}")


if __name__ == "__main__":
    main()
