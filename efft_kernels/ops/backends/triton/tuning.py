"""Block shapes: by device, dtype, rank and shape, without ever stopping to measure.

A launcher asks for a config; the answer comes from the first of

    1. a row measured on this very device type by `tune()`: tuned/<device>.json beside this file,
    and the file
       named by EFFT_KERNELS_TUNED, for the nearest row count
    2. the candidates of `tuned/defaults.json` for the device's architecture, those that fit its
    shared memory,
       ranked by how well their tiles fill whole waves of multiprocessors (a model, not a
       measurement)

and is cached, so that a step costs one dictionary look-up per launch and the first step none of
autotuning's minutes. `tune()` runs only when called.
"""

from __future__ import annotations

import json
import logging
import os
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from ...cost_model import TRITON_IN_PLACE_RANK

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "EFFT_KERNELS_TUNED"
FOLDER = Path(__file__).parent / "tuned"
INTERPRETED: bool = triton.knobs.runtime.interpret

# What a block may allocate, in bytes (CUDA C++ programming guide, technical specifications).
SMEM_BYTES = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}

REDUCE_CONFIG = (64, 64, 4)  # elements, parts at a time, warps
FOLD_CONFIG = (32, 16, 4)  # rows, columns of rb at a time, warps
MERGE_CONFIG = (32, 32, 16, 4)  # rows, columns, ranks at a time, warps
_NARROW_MERGE_CONFIG = (32, 16, 16, 4)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up (triton.cdiv is the same, but costs the host microseconds)."""
    return -(-a // b)


class GemmConfig(NamedTuple):
    block_m: int
    block_c: int
    block_i: int
    group_m: int
    num_warps: int
    num_stages: int
    tma: bool = (
        False  # tiles through the copy engine: compute capability 9.0 and later, aligned rows
    )
    persistent: bool = False  # one program per multiprocessor, which walks over the tiles


class PassConfig(NamedTuple):
    """Of `thin` (third field: most programs) and `tall_grad` (third field: splits of the rows)."""

    block_m: int
    block_c: int
    programs: int
    num_warps: int
    num_stages: int


# Several tiles in every direction already at the sizes of the tests, and no two block sizes equal.
_INTERPRETER_GEMM = GemmConfig(32, 64, 16, 2, 4, 1)
_INTERPRETER_PASS = PassConfig(32, 16, 2, 4, 1)


class Device(NamedTuple):
    name: str  # as a file name
    arch: int  # 10 * major + minor
    multiprocessors: int
    smem_bytes: int


@cache
def device(index: int | None) -> Device:
    """The CUDA device's properties, read once."""
    properties = torch.cuda.get_device_properties(
        torch.cuda.current_device() if index is None else index
    )
    arch = 10 * properties.major + properties.minor
    smem_bytes = getattr(
        properties, "shared_memory_per_block_optin", SMEM_BYTES.get(arch, 99 * 1024)
    )
    name = re.sub(r"[^A-Za-z0-9]+", "_", properties.name).strip("_")
    return Device(name, arch, properties.multi_processor_count, smem_bytes)


def multiprocessors(index: int | None) -> int:
    """Programs of a persistent grid; in the interpreter few, so that each has several tiles."""
    return 3 if INTERPRETED else device(index).multiprocessors


def fuses_loops(index: int | None) -> bool:
    """Whether a persistent program's loop over tiles becomes one with the loop inside: Triton 3.6
    fails on it where the accumulator is in tensor memory.
    """
    return not INTERPRETED and family(device(index).arch) < 100


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: TF32 for float32 only where torch's own products may use it."""
    if dtype == torch.float32 and _tf32_allowed():
        return "tf32"
    return "ieee"


def _tf32_allowed() -> bool:
    return not INTERPRETED and torch.backends.cuda.matmul.fp32_precision == "tf32"


def dtype_class(dtype: torch.dtype) -> str:
    """'half', 'tf32' or 'ieee': what the instruction set tells apart."""
    return "half" if dtype.itemsize == 2 else dot_precision(dtype)


# Float32 products outside the tensor cores keep each thread's share of both operands in registers
# for the whole inner length, so there the rank is taken in steps, and a rank beyond the limit
# cannot ride in the loop.
_IEEE_RANK_BLOCK = 32
IEEE_RIDE_LIMIT = 32


def rank_block(dtype: torch.dtype, precision: str, rank: int, core: bool) -> int:
    """Ranks per step of the products after the loop; with a core they are two, one after the other,
    and more than 16 at a time spill on sm_80.
    """
    if core:
        return 16
    plain = dtype == torch.float32 and precision == "ieee"
    return min(rank, _IEEE_RANK_BLOCK) if plain else rank


def can_ride(dtype: torch.dtype, rank: int) -> bool:
    """Whether P fits in registers beside the main product; where not, `fused` runs as `split`."""
    return dtype != torch.float32 or rank <= IEEE_RIDE_LIMIT or dot_precision(dtype) == "tf32"


def is_aligned(sizes: int, rank: int) -> bool:
    """Whether the configs for aligned operands serve: `sizes`, sizes and strides or-ed, is a
    multiple of 16, and the rank is a multiple of 16 or at most 32. Above, the masks of odd ranks
    take as many registers as those of odd sizes.
    """
    return sizes % 16 == 0 and (rank % 16 == 0 or rank <= TRITON_IN_PLACE_RANK)


def operand_form(dtype: torch.dtype, wide: bool, aligned: bool) -> str:
    """The dtype class, and what else changes the loads: 'half-wide' (w stored in float32),
    '...-unaligned'.

    Sizes and strides that are not multiples of 16 elements (not `is_aligned`) are copied element by
    element through registers, which leaves room for small tiles only.
    """
    kind = dtype_class(dtype)
    if not aligned:
        return f"{kind}-unaligned"
    return f"{kind}-wide" if wide else kind


def family(arch: int) -> int:
    """The architecture whose defaults serve `arch`: 80, 90 or 100. sm_120 has neither wgmma nor
    tensor memory and as little shared memory as sm_86, so sm_80's serve it as well.
    """
    return 100 if 100 <= arch < 120 else 90 if arch == 90 else 80


def merge_config(sizes: int, rank: int) -> tuple[int, int, int, int]:
    """Tiles of `merge`: narrow where the masks of odd sizes (or-ed in `sizes`) or ranks spill."""
    wide = sizes % 16 == 0 and (rank % 16 == 0 or rank <= 16)
    return MERGE_CONFIG if wide else _NARROW_MERGE_CONFIG


def gemm_smem_bytes(config: GemmConfig, rank: int, a_bytes: int, w_bytes: int, ride: bool) -> int:
    """Shared memory of the pipelined operands, bytes; aot.py's table has what is used in all.

    A persistent program holds the next tile's operands while it stores this one, so the output's
    way through shared memory and the last product's operands come on top (as much as aot.py finds).
    """
    a = config.block_m * config.block_i * a_bytes
    w = config.block_i * config.block_c * w_bytes
    d = config.block_i * rank * a_bytes if ride else 0
    pipelined = config.num_stages * (a + w + d)
    if not config.persistent:
        return pipelined
    last = (config.block_c + (0 if ride else config.block_m)) * rank * a_bytes
    return pipelined + max(32 * 1024, last)


TMEM_COLUMNS = 512  # of tensor memory on sm_100, 128 rows of 4 bytes each


def persistent_candidates(arch: int, form: str, rank: int, ride: bool) -> tuple[GemmConfig, ...]:
    """The shipped configs as persistent programs: for `tune()` to measure, never taken unmeasured.

    Only on sm_90, where the loop over tiles becomes one with the loop inside, and only those that
    fill a multiprocessor alone: where two programs share one, each hides the other's first loads
    and last stores already. Shared memory has to hold one stage less for it.
    """
    if arch != 90:
        return ()
    found = []
    for config in gemm_candidates(arch, form, rank):
        persistent = config._replace(tma=True, persistent=True)
        if config.num_warps < 8:
            continue
        if rank > 16 and config.block_c > 128:  # spills at ranks of 17 to 31 (aot.py)
            continue
        while gemm_smem_bytes(persistent, rank, 2, 2, ride) > SMEM_BYTES[arch]:
            persistent = persistent._replace(num_stages=persistent.num_stages - 1)
        if persistent.num_stages >= 2:
            found.append(persistent)
    return tuple(found)


def gemm_candidates(arch: int, form: str, rank: int) -> tuple[GemmConfig, ...]:
    """The shipped GEMM configs for an architecture family, operand form and padded rank, best first
    on paper.
    """
    for limit, configs in _defaults()["gemm"][f"sm_{family(arch)}"][form]:
        if rank <= limit:
            return tuple(GemmConfig(*c) for c in configs)
    raise AssertionError(f"defaults.json has no gemm entry for {form} at rank {rank}")


def pass_defaults(kernel: str, arch: int, form: str, rank: int) -> PassConfig:
    """The shipped config of `thin`, `thin_grad` or `tall_grad`; its third field still to be set by
    shape.
    """
    for limit, config in _defaults()[kernel][f"sm_{family(arch)}"][form]:
        if rank <= limit:
            return PassConfig(*config)
    raise AssertionError(f"defaults.json has no {kernel} entry for {form} at rank {rank}")


# Share of the matrix units' rate a tile of this many outputs reaches: the larger, the fewer operand
# bytes per product. On paper; `tune()` replaces the choice that follows from it.
_TILE_EFFICIENCY = {128 * 256: 1.0, 128 * 128: 0.92, 64 * 256: 0.88, 64 * 128: 0.80, 64 * 64: 0.62}


def _gemm_cost(config: GemmConfig, m: int, c: int, rank: int, ride: bool, dev: Device) -> float:
    """Time of the whole grid in units of one multiprocessor's multiply-adds per I, waves rounded
    up.
    """
    tiles = cdiv(m, config.block_m) * cdiv(c, config.block_c)
    smem_bytes = gemm_smem_bytes(config, rank, 2, 2, ride)
    resident = max(1, min(dev.smem_bytes // smem_bytes, 16 // config.num_warps, 2))
    outputs = config.block_m * config.block_c
    work = config.block_m * (config.block_c + (rank if ride else 0))
    tile = work / _TILE_EFFICIENCY.get(outputs, 0.5)
    full, rest = divmod(tiles, dev.multiprocessors * resident)
    waves = full * resident + min(resident, cdiv(rest, dev.multiprocessors))
    return waves * tile


# Columns of the widest tile that may lie in several slices: the product of such a tile takes
# registers of its own, and wider ones spill (aot.py).
MOST_CROSSED = 128


def crosses(config: GemmConfig, c: int, slice_c: int) -> bool:
    """Whether tiles of [m, c] lie in several slices of slice_c columns."""
    return slice_c < c and slice_c % config.block_c != 0


@lru_cache(maxsize=4096)
def _gemm_config(
    m: int,
    c: int,
    i: int,
    rank: int,
    form: str,
    wide: bool,
    ride: bool,
    slice_c: int,
    index: int | None,
) -> GemmConfig:
    dev = device(index)
    aligned = not form.endswith("unaligned")
    measured = _measured(dev.name, gemm_key(c, i, rank, form, ride), m) if aligned else None
    if measured is not None:
        found = GemmConfig(*measured)  # type: ignore[arg-type]
        if not (crosses(found, c, slice_c) and found.block_c > MOST_CROSSED):
            return found
    _note_fallback(dev.name, "gemm")
    candidates = tuple(
        config
        for config in gemm_candidates(dev.arch, form, rank)
        if config.block_c <= MOST_CROSSED or not crosses(config, c, slice_c)
    )
    half = form.startswith("half")
    fitting = [
        config
        for config in candidates
        if gemm_smem_bytes(config, rank, 2 if half else 4, 2 if half and not wide else 4, ride)
        <= dev.smem_bytes
    ]
    if not fitting:
        return candidates[-1]._replace(num_stages=2)
    return min(fitting, key=lambda config: _gemm_cost(config, m, c, rank, ride, dev))


def gemm_key(c: int, i: int, rank: int, form: str, ride: bool) -> str:
    """The row of a measured table that serves a GEMM."""
    return f"gemm|{form}|{'ride' if ride else 'given'}|c{c}|i{i}|r{rank}"


def pass_key(kernel: str, c: int, rank: int, form: str) -> str:
    """The row of a measured table that serves a pass; `kernel` is thin, thin_grad or tall_grad."""
    return f"{kernel}|{form}|c{c}|r{rank}"


def gemm_config(
    m: int,
    c: int,
    i: int,
    rank: int,
    dtype: torch.dtype,
    *,
    wide: bool,
    aligned: bool,
    ride: bool,
    slice_c: int,
    index: int | None,
) -> GemmConfig:
    """The config for out [m, c] over i, in slices of slice_c columns; `wide` where w is stored
    wider than it is multiplied.
    """
    if INTERPRETED:
        return _INTERPRETER_GEMM
    form = operand_form(dtype, wide, aligned)
    return _gemm_config(m, c, i, rank, form, wide, ride, slice_c, index)


@lru_cache(maxsize=4096)
def _pass_config(
    kernel: str, m: int, c: int, rank: int, form: str, index: int | None
) -> PassConfig:
    dev = device(index)
    measured = _measured(dev.name, pass_key(kernel, c, rank, form), m)
    if measured is not None:
        return PassConfig._make(measured)
    _note_fallback(dev.name, kernel)
    config = pass_defaults(kernel, dev.arch, form, rank)
    return config._replace(programs=pass_programs(kernel, m, c, config, dev.multiprocessors))


def pass_programs(kernel: str, m: int, c: int, config: PassConfig, multiprocessors: int) -> int:
    """The third field of a pass's config.

    thin: one program per row tile. thin_grad: at most two per multiprocessor, since each owns
    c·rank floats of partial sums. tall_grad: as many splits of the rows as make two programs per
    multiprocessor, each with at least four row blocks to pipeline.
    """
    row_tiles = cdiv(m, config.block_m)
    if kernel == "thin":
        return row_tiles
    if kernel == "thin_grad":
        return min(row_tiles, 2 * multiprocessors)
    wanted = 2 * multiprocessors // cdiv(c, config.block_c)
    return max(1, min(wanted, cdiv(row_tiles, 4)))


def pass_config(
    kernel: str, m: int, c: int, rank: int, dtype: torch.dtype, *, aligned: bool, index: int | None
) -> PassConfig:
    """The config for a pass over tall [m, c]; `kernel` is thin, thin_grad or tall_grad."""
    if INTERPRETED:
        return _INTERPRETER_PASS
    return _pass_config(kernel, m, c, rank, operand_form(dtype, False, aligned), index)


@cache
def _defaults() -> dict[str, Any]:
    return json.loads((FOLDER / "defaults.json").read_text())


@cache
def _tables(device_name: str) -> dict[str, dict[str, list[int]]]:
    """Measured rows of one device: {"gemm|half|ride|c2304|i768|r16": {"14": [128, 256, ...]}}."""
    rows: dict[str, dict[str, list[int]]] = {}
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    for path in (FOLDER / f"{device_name}.json", *([Path(named)] if named else [])):
        if path.is_file():
            table = json.loads(path.read_text())
            if table.get("device") == device_name:
                rows.update(table["rows"])
            else:
                logger.warning(
                    "%s was measured on %s, not %s; ignored", path, table.get("device"), device_name
                )
    return rows


def _measured(device_name: str, key: str, m: int) -> list[int] | None:
    """The row for `key` whose M bucket (bit length) is nearest, at most one away."""
    by_bucket = _tables(device_name).get(key)
    if not by_bucket:
        return None
    bucket = min(by_bucket, key=lambda b: abs(int(b) - m.bit_length()))
    return by_bucket[bucket] if abs(int(bucket) - m.bit_length()) <= 1 else None


@cache
def _note_fallback(device_name: str, kernel: str) -> None:
    logger.info(
        "no measured %s config for %s here; the choice comes from the model in tuning.py",
        kernel,
        device_name,
    )
