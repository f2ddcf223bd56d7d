"""What one call of the Triton backend launches, with the operations and bytes of each launch.

The tests hold the launchers to it: no launch more, no byte more.
"""

from __future__ import annotations

from typing import NamedTuple

from ...cost_model import Device, Launch, Problem, library_gemm, loses_increments
from .. import torch_backend
from ..fallback import padded_rank
from .limits import TRITON_IN_PLACE_RANK, TRITON_MAX_RANK

# Shares of the device's rates, for the GEMM of the library's: ViT-B's layers with 64 images in
# bfloat16 on an H100. The GEMM's on other GPUs is assumed.
GEMM = {True: 0.56, False: 0.85}  # by Device.sm90
PASS_MEMORY = 0.7
MERGE_MEMORY = 0.19


class Tiling(NamedTuple):
    """How many partial sums the two-stage reductions keep."""

    thin_grad: int
    tall_grad_x: int


def default_tiling(problem: Problem, multiprocessors: int) -> Tiling:
    """As the Triton backend tiles by default: 128-row tiles, 128-column tiles, two programs per
    multiprocessor.
    """
    row_tiles = -(-problem.M // 128)
    splits = min(2 * multiprocessors // -(-problem.K // 128), -(-problem.M // 256))
    return Tiling(min(row_tiles, 2 * multiprocessors), max(1, splits))


def excluded(problem: Problem, strategy: str) -> str | None:
    """Why `auto` must not take the strategy; None where it may."""
    if strategy == "fused" and problem.rank > TRITON_MAX_RANK:
        return f"rank {problem.rank} is above {TRITON_MAX_RANK}; plain torch runs it"
    return loses_increments(problem, strategy)


def launches(
    problem: Problem, strategy: str, device: Device, tiling: Tiling | None = None
) -> list[Launch]:
    """The launches of one call with a core, Ra = Rb, in order; each slice has its own up.

    The backward is the usual one: dX, and the gradients of down, core and up.

    Args:
        problem: what is computed.
        strategy: 'fused', 'split' or 'merged'.
        device: on which.
        tiling: the number of partial sums; that of the default block shapes if None.
    """
    if problem.rank > TRITON_MAX_RANK or 0 in (problem.K, problem.N):
        return torch_backend.launches(problem, strategy, device)
    M, K, N, G, rank, *_ = problem
    b, wb = problem.compute_bytes, problem.weight_bytes
    f = problem.factor_bytes or b
    R = padded_rank(rank)
    in_place = R <= TRITON_IN_PLACE_RANK
    tiling = tiling or default_tiling(problem, device.multiprocessors)
    eff = GEMM[device.sm90]
    if wb > b:
        eff *= 0.8  # the cast of w passes through registers inside the loop (assumed)
    # P in the GEMM's loop, as a share of the main product.
    p_share = max(R, device.thin_columns) / device.tile_columns

    down = K * rank * f if in_place else K * R * b
    up = (N + G * rank) * rank * f if in_place else N * R * b  # with core
    ready = f == b and rank == R
    pad_down = [] if ready else [Launch("fold", 0, K * (rank * f + R * b))]
    fold_up = [] if in_place else [Launch("fold", 0, (N + G * rank) * rank * f + N * R * b)]
    pad_high = [] if in_place else pad_down

    def gemm(inner: int, columns: int, with_p: bool, bias: bool, p: int, thin_out: int) -> Launch:
        flops = 2 * M * inner * columns * (1 + (p_share if with_p else 0)) + 2 * M * columns * R
        moved = (M * inner + M * columns + M * p + (inner * R if with_p else 0)) * b + thin_out
        moved += inner * columns * wb + (columns * b if bias else 0)
        return Launch("gemm", flops, moved, eff, stored=M * columns * b)

    def over_rows(name: str, flops: float, moved: int) -> Launch:
        return Launch(name, flops, moved, memory_efficiency=PASS_MEMORY)

    merged_bytes = N * K * (wb + b) + (N + K) * rank * f + G * rank * rank * f
    merge = Launch("merge", 0, merged_bytes, memory_efficiency=MERGE_MEMORY)
    library = library_gemm(problem)
    if not problem.backward:
        thin = over_rows("thin", 2 * M * K * R, M * (K + rank) * b + down)
        if strategy == "fused":
            saved = rank if problem.training else 0
            return [*pad_down, *fold_up, gemm(K, N, True, True, saved, up)]
        if strategy == "split":
            return [*pad_high, thin, *fold_up, gemm(K, N, False, True, rank, up)]
        if not problem.training:
            return [merge, library]
        return [*pad_high, thin, merge, library]

    columns = (N * R + G * rank * R) if in_place else N * R
    dy_pass = over_rows(
        "thin_grad", 4 * M * N * R, M * (N + 2 * rank) * b + up + tiling.thin_grad * columns * 4
    )
    x_pass = over_rows(
        "tall_grad", 2 * M * K * R, M * (K + rank) * b + tiling.tall_grad_x * K * R * 4
    )
    found = (N + K) * rank + (G * rank * rank if in_place else 0)
    reduce = over_rows(
        "reduce", 0, (tiling.thin_grad * columns + tiling.tall_grad_x * K * R) * 4 + found * f
    )
    unfold = [] if in_place else [Launch("unfold", 0, 2 * N * rank * f)] * 2
    if strategy == "merged":
        return [*fold_up, dy_pass, merge, library, x_pass, reduce, *unfold]
    dx = gemm(N, K, False, False, rank, down)
    return [*fold_up, dy_pass, *pad_high, dx, x_pass, reduce, *unfold]
