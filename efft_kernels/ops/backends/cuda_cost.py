"""What one call of the CUDA backend launches, with the operations and bytes of each launch."""

from __future__ import annotations

from ..cost_model import Device, Launch, Problem, library_gemm, loses_increments
from . import torch_backend
from .fallback import padded_rank

MAX_RANK = 128
# The padded rank whose instructions (144 and 208 columns) the sm_90a GEMM has for P in its loop.
RANK_IN_GEMM = 16
# Shares of the device's rates, for a GEMM of the library's: ViT-B's layers with 64 images in
# bfloat16 on an H100. The general GEMM is assumed: mma.sync has about 0.6 of wgmma's rate.
SM90_GEMM = 0.95
GENERAL_GEMM = {True: 0.55, False: 0.85}  # by Device.sm90
PASS_MEMORY = 0.8
THIN_GRAD_MEMORY = 0.95  # its partial sums stay in the L2 cache
MERGE_MEMORY = 0.56
UNFOLD_S = 4e-6  # loads that wait for each other
# What the loop that computes S as well makes of dX's GEMM: 1.08 to 1.25 in the same layers. In the
# forward the loop takes P along for the share of its columns.
DX_WITH_S = 1.2
# The padded rank at which one pass over dY makes S and the partial sums of d_B (passes/sizes.h).
ONE_PASS_RANK = 16


def excluded(problem: Problem, strategy: str) -> str | None:
    """Why `auto` must not take the strategy; None where it may."""
    if strategy == "fused" and problem.rank > MAX_RANK:
        return f"rank {problem.rank} is above {MAX_RANK}; plain torch runs it"
    return loses_increments(problem, strategy)


def launches(problem: Problem, strategy: str, device: Device) -> list[Launch]:
    """The launches of one call, as csrc/cuda/ops.cpp orders them. The factors are always folded,
    and a weight wider than x is cast first.
    """
    if problem.rank > MAX_RANK or 0 in (problem.M, problem.K, problem.N):
        return torch_backend.launches(problem, strategy, device)
    M, K, N, G, rank, *_ = problem
    b, wb = problem.compute_bytes, problem.weight_bytes
    f = problem.factor_bytes or b
    R = padded_rank(rank)
    inner, columns = (N, K) if problem.backward else (K, N)
    block = _sm90_columns(M, columns, device.multiprocessors)
    p_in_gemm = strategy == "fused" and R == RANK_IN_GEMM and device.sm90 and block is not None
    saved = M * rank * b if problem.training or not p_in_gemm else 0
    stored = (K + N + G * rank) * rank * f

    def over_rows(name: str, flops: float, moved: int, share: float = PASS_MEMORY) -> Launch:
        return Launch(name, flops, moved, memory_efficiency=share)

    fold_both = Launch("fold", 0, stored + (K + N) * R * b)
    cast = [] if wb == b else [Launch("cast", 0, N * K * (wb + b), 1.0, MERGE_MEMORY)]
    # wgmma takes the R columns of P along with a tile's own.
    share = R / block if p_in_gemm and block and not problem.backward else 0
    moved = (M * (inner + columns) + N * K + (columns + (inner if p_in_gemm else 0)) * R) * b
    gemm = Launch(
        "gemm",
        2 * M * N * K * (1 + share) + 2 * M * columns * R,
        moved + saved + (0 if problem.backward else N * b),
        (SM90_GEMM if device.sm90 and block else GENERAL_GEMM[device.sm90])
        / (DX_WITH_S if problem.backward and p_in_gemm else 1),
        stored=M * columns * b,
    )
    fold_float = Launch("fold", 0, stored + (K + N) * R * 4)
    merge = Launch("merge", 0, N * K * (wb + b) + (K + N) * R * 4, 1.0, MERGE_MEMORY)
    merged = [fold_float, merge, library_gemm(problem)]
    thin = over_rows("thin", 2 * M * inner * R, (M * (inner + R) + inner * R) * b)
    if not problem.backward:
        if strategy == "merged":
            fold_down = Launch("fold", 0, K * (rank * f + R * b))
            return [fold_down, thin, *merged] if problem.training else merged
        return [*cast, fold_both, gemm] if p_in_gemm else [*cast, fold_both, thin, gemm]

    # d_B's partial sums come from the pass that makes S where that is one pass.
    one_pass = R == ONE_PASS_RANK and not p_in_gemm
    programs = min(-(-M // 128), 2 * device.multiprocessors)
    dy_parts = programs if one_pass else _splits(M, N, device.multiprocessors)
    x_parts = _splits(M, K, device.multiprocessors)
    grad_x = over_rows("tall_grad", 2 * M * K * R, M * (K + rank) * b + x_parts * K * R * 4)
    grad_dy = over_rows("tall_grad", 2 * M * N * R, M * (N + rank) * b + dy_parts * N * R * 4)
    if one_pass:
        moved = thin.bytes_moved + M * rank * b + dy_parts * N * R * 4
        thin = over_rows("thin_grad", 4 * M * N * R, moved, THIN_GRAD_MEMORY)
    reduce = over_rows(
        "reduce", 0, (dy_parts * N + x_parts * K) * R * 4 + N * rank * 4 + K * rank * f
    )
    unfold = Launch("unfold", 0, N * rank * 4 + 2 * (N + G * rank) * rank * f, latency_s=UNFOLD_S)
    after = [grad_x, *([] if one_pass else [grad_dy]), reduce, unfold]
    if strategy == "merged":
        return [fold_both, thin, *after, *merged]
    return [*cast, fold_both, *([gemm, *after] if p_in_gemm else [thin, *after, gemm])]


def _sm90_columns(m: int, columns: int, multiprocessors: int) -> int | None:
    """Columns per tile of the sm_90a GEMM; None where too few tiles leave it to the general one
    (csrc/cuda/gemm/select.h)."""
    row_tiles = -(-m // 128)
    if 4 * row_tiles * -(-columns // 128) < multiprocessors:
        return None

    def cost(block: int) -> int:
        tiles = row_tiles * -(-columns // block)
        return -(-tiles // multiprocessors) * (block + 32)

    return 192 if cost(192) <= cost(128) else 128


def _splits(m: int, columns: int, multiprocessors: int) -> int:
    """Parts that the rows are summed in (csrc/cuda/passes/sizes.h)."""
    wanted = max(1, min(4 * multiprocessors // -(-columns // 64), -(-m // 256)))
    rows_of_part = -(-m // (64 * wanted)) * 64
    return -(-m // rows_of_part)
