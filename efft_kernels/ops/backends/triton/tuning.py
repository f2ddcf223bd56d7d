"""Which config a launch gets: by device, dtype, rank and shape, without ever stopping to measure.

A launcher asks for a config; the answer comes from the first of

    1. a row measured on this very device type, for the nearest number of rows (configs.py)
    2. the candidates of tuned/defaults.json for the device's architecture that fit its shared
       memory, ranked by how well their tiles fill whole waves of multiprocessors: a model, not a
       measurement

and is cached, so a step costs one dictionary look-up per launch, and the first step none of
autotuning's minutes. tools/tune_triton.py measures, and runs only on request.
"""

from __future__ import annotations

import logging
from functools import cache, lru_cache

import torch

from . import configs, device
from .configs import GemmConfig, PassConfig, gemm_candidates, gemm_smem_bytes, pass_defaults
from .device import INTERPRETED, dot_precision
from .limits import TRITON_IN_PLACE_RANK

logger = logging.getLogger(__name__)

FOLD_CONFIG = (32, 16, 4)  # rows, columns of rb at a time, warps
MERGE_CONFIG = (32, 32, 16, 4)  # rows, columns, ranks at a time, warps
_NARROW_MERGE_CONFIG = (32, 16, 16, 4)

# Several tiles in every direction already at the sizes of the tests, and no two block sizes equal.
_INTERPRETER_GEMM = GemmConfig(32, 64, 16, 2, 4, 1)
_INTERPRETER_PASS = PassConfig(32, 16, 2, 4, 1)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up (triton.cdiv is the same, but costs the host microseconds)."""
    return -(-a // b)


# Float32 products outside the tensor cores keep each thread's share of both operands in registers
# for the whole inner length, so there the rank is taken in steps, and a rank beyond the limit
# does not fit into the loop.
_IEEE_RANK_BLOCK = 32
MAX_IEEE_RANK = 32


def rank_block(dtype: torch.dtype, precision: str, rank: int, core: bool) -> int:
    """Ranks per step of the products after the loop.

    With a core there are two products, one after the other, and more than 16 ranks at a time spill
    on sm_80.
    """
    if core:
        return 16
    plain = dtype == torch.float32 and precision == "ieee"
    return min(rank, _IEEE_RANK_BLOCK) if plain else rank


def can_compute_p(dtype: torch.dtype, rank: int) -> bool:
    """Whether P fits in registers together with the main product's accumulator; where not,
    `fused` runs as `split`.
    """
    return dtype != torch.float32 or rank <= MAX_IEEE_RANK or dot_precision(dtype) == "tf32"


def is_aligned(sizes: int, rank: int) -> bool:
    """Whether the configs for aligned operands serve.

    Args:
        sizes: all sizes and strides, or-ed: their product is a multiple of 16 where each is.
        rank: the true one. Above 32 the masks of ranks that are no multiple of 16 take as many
            registers as those of odd sizes.
    """
    return sizes % 16 == 0 and (rank % 16 == 0 or rank <= TRITON_IN_PLACE_RANK)


def operand_form(dtype: torch.dtype, wide: bool, aligned: bool) -> str:
    """The first key of a config: "half", "tf32" or "ieee", and what else changes the loads.

    "half-wide" where w is stored in float32; "...-unaligned" where not `is_aligned`: sizes and
    strides that are not multiples of 16 elements are copied element by element through registers,
    which leaves room for small tiles only.
    """
    kind = "half" if dtype.itemsize == 2 else dot_precision(dtype)
    if not aligned:
        return f"{kind}-unaligned"
    return f"{kind}-wide" if wide else kind


def merge_config(sizes: int, rank: int) -> tuple[int, int, int, int]:
    """Tiles of `merge`: narrow where the masks of odd sizes (or-ed in `sizes`) or ranks spill."""
    wide = sizes % 16 == 0 and (rank % 16 == 0 or rank <= 16)
    return MERGE_CONFIG if wide else _NARROW_MERGE_CONFIG


# Columns of the widest tile that may lie in several slices: the product of such a tile takes
# registers of its own, and wider ones spill.
MOST_CROSSED = 128


def crosses(config: GemmConfig, c: int, slice_c: int) -> bool:
    """Whether tiles of [m, c] lie in several slices of slice_c columns."""
    return slice_c < c and slice_c % config.block_c != 0


def gemm_config(
    m: int,
    c: int,
    i: int,
    rank: int,
    dtype: torch.dtype,
    *,
    wide: bool,
    aligned: bool,
    compute_p: bool,
    slice_c: int,
    index: int | None,
) -> GemmConfig:
    """The config for out [m, c] summed over i.

    Args:
        m, c, i: the sizes.
        rank: padded.
        dtype: of a.
        wide: w is stored wider than it is multiplied.
        aligned: as `is_aligned` says.
        compute_p: P is accumulated in the same loop.
        slice_c: columns of a slice.
        index: the CUDA device's; None is the current device.
    """
    if INTERPRETED:
        return _INTERPRETER_GEMM
    form = operand_form(dtype, wide, aligned)
    return _gemm_config(m, c, i, rank, form, wide, compute_p, slice_c, index)


@lru_cache(maxsize=4096)
def _gemm_config(
    m: int,
    c: int,
    i: int,
    rank: int,
    form: str,
    wide: bool,
    compute_p: bool,
    slice_c: int,
    index: int | None,
) -> GemmConfig:
    dev = device.properties(index)
    if not form.endswith("unaligned"):
        row = configs.measured(dev.name, configs.gemm_key(c, i, rank, form, compute_p), m)
        if row is not None:
            found = GemmConfig(*row)  # type: ignore[arg-type]
            if not (crosses(found, c, slice_c) and found.block_c > MOST_CROSSED):
                return found
    _note_fallback(dev.name, "gemm")
    candidates = [
        config
        for config in gemm_candidates(dev.arch, form, rank)
        if config.block_c <= MOST_CROSSED or not crosses(config, c, slice_c)
    ]
    half = form.startswith("half")
    a_bytes, w_bytes = 2 if half else 4, 2 if half and not wide else 4
    fitting = [
        config
        for config in candidates
        if gemm_smem_bytes(config, rank, a_bytes, w_bytes, compute_p) <= dev.smem_bytes
    ]
    if not fitting:
        return candidates[-1]._replace(num_stages=2)
    return min(fitting, key=lambda config: _gemm_cost(config, m, c, rank, compute_p, dev))


# Share of the matrix units' rate a tile of this many outputs reaches: the larger, the fewer operand
# bytes per product. On paper; a measured row replaces the choice that follows from it.
_TILE_EFFICIENCY = {128 * 256: 1.0, 128 * 128: 0.88, 64 * 128: 0.80, 64 * 64: 0.62}


def _gemm_cost(
    config: GemmConfig, m: int, c: int, rank: int, compute_p: bool, dev: device.Device
) -> float:
    """Time of the whole grid, waves rounded up, in one multiprocessor's multiply-adds per i: of two
    programs that share a multiprocessor each takes twice as long."""
    tiles = cdiv(m, config.block_m) * cdiv(c, config.block_c)
    outputs = config.block_m * config.block_c
    work = config.block_m * (config.block_c + (rank if compute_p else 0))
    tile = work / _TILE_EFFICIENCY.get(outputs, 0.5)
    return cdiv(tiles, dev.multiprocessors) * tile


def pass_config(
    kernel: str, m: int, c: int, rank: int, dtype: torch.dtype, *, aligned: bool, index: int | None
) -> PassConfig:
    """The config of `thin`, `thin_grad` or `tall_grad` over a [m, c] matrix; as `gemm_config`."""
    if INTERPRETED:
        return _INTERPRETER_PASS
    return _pass_config(kernel, m, c, rank, operand_form(dtype, False, aligned), index)


@lru_cache(maxsize=4096)
def _pass_config(
    kernel: str, m: int, c: int, rank: int, form: str, index: int | None
) -> PassConfig:
    dev = device.properties(index)
    row = configs.measured(dev.name, configs.pass_key(kernel, c, rank, form), m)
    if row is not None:
        return PassConfig._make(row)
    _note_fallback(dev.name, kernel)
    config = pass_defaults(kernel, dev.arch, form, rank)
    return config._replace(programs=pass_programs(kernel, m, c, config, dev.multiprocessors))


def pass_programs(kernel: str, m: int, c: int, config: PassConfig, multiprocessors: int) -> int:
    """`programs` of a pass's config.

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


@cache
def _note_fallback(device_name: str, kernel: str) -> None:
    logger.info(
        "no measured %s config for %s here; the choice comes from the model in tuning.py",
        kernel,
        device_name,
    )


def forget() -> None:
    """Choose anew: the device or a measured table is another one."""
    for cached in (_gemm_config, _pass_config, configs.measured_table, _note_fallback):
        cached.cache_clear()
