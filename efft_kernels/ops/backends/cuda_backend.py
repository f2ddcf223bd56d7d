"""The CUDA C++ backend: float16 and bfloat16 on NVIDIA GPUs from compute capability 8.0 on.

    csrc/cuda/gemm_sm90.cuh   the GEMM on Hopper: tiles by the copy engine, wgmma; P may ride
    csrc/cuda/gemm_sm80.cu    the same function on every other GPU, and for rows of any alignment
    csrc/cuda/thin.cu         passes over a tall matrix: tall·thin, tall^T·thin, two-stage sums
    csrc/cuda/factors.cu      the fold of (down, core, up), W + ΔW, and d_core and d_up from d_B
    csrc/cuda/ops.cpp         the order in which they run

`fused` computes P inside the GEMM at ranks up to 16 on Hopper, where x, W and y have rows of a
multiple of 16 bytes and there are enough tiles to fill the chip; elsewhere it runs as `split`.
`merged` leaves the product to the library. float32 and float64 are for the other backends. Ranks
above 128, and problems without rows or columns, run in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost_model import Device, Launch, Problem, library_gemm, loses_increments
from ..schemas import STRATEGY_CODES
from . import native_library, torch_backend
from .fallback import note_rank, padded_rank, rows, too_old, torch_strategy
from .torch_backend import Grads

NAME = "cuda"
NATIVE = True
STRATEGIES = ("fused", "split", "merged")
DTYPES = (torch.float16, torch.bfloat16)
MAX_RANK = 128
# The padded rank whose instructions (144 and 208 columns) the sm_90a GEMM has for P in its loop.
RANK_IN_GEMM = 16


def unavailable() -> str | None:
    """Why this backend cannot run here, and what would change that. Loads the library."""
    return native_library.cuda_unavailable()


def rejects(x: Tensor) -> str | None:
    """Why x cannot be taken: its dtype or its device."""
    if x.dtype not in DTYPES:
        return f"dtype must be float16 or bfloat16, got {x.dtype}; use backend='triton' or 'torch'"
    if not x.is_cuda:
        return f"x is on {x.device}; move it to a CUDA device or use backend='torch'"
    return too_old(x.device.index)


def out_of_reach(problem: Problem) -> bool:
    """Whether plain torch runs instead: nothing to multiply, or a rank beyond what a tile's
    registers hold.
    """
    return _beyond(problem.rank) or problem.N == 0 or problem.K == 0


def preferred(problem: Problem) -> bool:
    """Whether `auto` may take this backend: always."""
    return True


def excluded(problem: Problem, strategy: str) -> str | None:
    """Why `auto` must not take the strategy; None where it may."""
    if strategy == "fused" and problem.rank > MAX_RANK:
        return f"rank {problem.rank} is above {MAX_RANK}; plain torch runs it"
    return loses_increments(problem, strategy)


def launches(problem: Problem, strategy: str, device: Device) -> list[Launch]:
    """The launches of one call, as csrc/cuda/ops.cpp orders them. The factors are always folded,
    and a weight wider than x is cast first. The GEMM is taken to reach the rate of the Triton one,
    until it has been measured.
    """
    if problem.rank > MAX_RANK:
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

    fold = Launch("fold", 0, stored + (K + N) * R * b)
    cast = [] if wb == b else [Launch("cast", 0, N * K * (wb + b))]
    # wgmma takes the R columns of P along with a tile's own.
    share = R / block if p_in_gemm and block else 0
    moved = (M * (inner + columns) + N * K + (columns + (inner if p_in_gemm else 0)) * R) * b
    gemm = Launch(
        "gemm",
        2 * M * N * K * (1 + share) + 2 * M * columns * R,
        moved + saved + (0 if problem.backward else N * b),
        device.gemm_efficiency,
    )
    fold_float = Launch("fold", 0, stored + (K + N) * R * 4)
    merge = Launch("merge", 0, N * K * (wb + b) + (K + N) * R * 4)
    merged = [fold_float, merge, library_gemm(problem)]
    thin = Launch("thin", 2 * M * inner * R, (M * (inner + R) + inner * R) * b)
    if not problem.backward:
        if strategy == "merged":
            fold_down = Launch("fold", 0, K * (rank * f + R * b))
            return [fold_down, thin, *merged] if problem.training else merged
        return [*cast, fold, gemm] if p_in_gemm else [*cast, fold, thin, gemm]

    # d_B's partial sums come from the pass that makes S where that is one pass (passes/sizes.h).
    one_pass = R <= 32 and not p_in_gemm
    programs = min(-(-M // 64), 2 * device.multiprocessors)
    dy_parts = programs if one_pass else _splits(M, N, device.multiprocessors)
    x_parts = _splits(M, K, device.multiprocessors)
    grad_x = Launch("tall_grad", 2 * M * K * R, M * (K + rank) * b + x_parts * K * R * 4)
    grad_dy = Launch("tall_grad", 2 * M * N * R, M * (N + rank) * b + dy_parts * N * R * 4)
    if one_pass:
        thin = Launch(
            "thin_grad", 4 * M * N * R, thin.bytes_moved + M * rank * b + dy_parts * N * R * 4
        )
    reduce = Launch("reduce", 0, (dy_parts * N + x_parts * K) * R * 4 + N * rank * 4 + K * rank * f)
    unfold = Launch("unfold", 0, N * rank * 4 + 2 * (N + G * rank) * rank * f)
    after = [grad_x, *([] if one_pass else [grad_dy]), reduce, unfold]
    if strategy == "merged":
        return [fold, thin, *merged, *after]
    return [*cast, fold, *([] if p_in_gemm else [thin]), gemm, *after]


def _sm90_columns(m: int, columns: int, multiprocessors: int) -> int | None:
    """Columns per tile of the sm_90a GEMM; None where too few tiles leave it to the general one
    (csrc/cuda/gemm/schedule.h)."""
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


def forward(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    *,
    save_p: bool,
    strategy: str,
) -> tuple[Tensor, Tensor | None]:
    """(y [M, N], P [M, Ra] if save_p else None), both in x's dtype."""
    if _in_torch(x.shape[0], weight, bias, down, up):
        return torch_backend.forward(
            x, weight, bias, down, core, up, save_p=save_p, strategy=torch_strategy(strategy)
        )
    y, p = torch.ops.efft_kernels.native_fwd(
        rows(x), rows(weight), bias, down, core, up, save_p, STRATEGY_CODES[strategy]
    )
    return y, p if save_p else None


def backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K]
    weight: Tensor,  # [N, K]
    p: Tensor | None,  # [M, Ra]
    down: Tensor,  # [K, Ra]
    core: Tensor | None,  # [G, Ra, Rb]
    up: Tensor,  # [1 or G, N/G, Rb]
    *,
    needs: tuple[bool, ...],
    strategy: str,
) -> Grads:
    """(dx, d_weight, d_bias, d_down, d_core, d_up); None where `needs` is False."""
    if _in_torch(dy.shape[0], weight, None, down, up):
        return torch_backend.backward(
            dy, x, weight, p, down, core, up, needs=needs, strategy=torch_strategy(strategy)
        )
    return native_library.backward(
        rows(dy),
        None if x is None else rows(x),
        rows(weight),
        None if p is None else rows(p),
        down,
        core,
        up,
        needs,
        strategy,
    )


def _in_torch(m: int, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> bool:
    """Whether plain torch runs instead: a rank beyond the kernels, nothing to launch on, or float64
    tensors under autocast.
    """
    if _beyond(down.shape[1]) or m == 0 or weight.numel() == 0:
        return True
    return any(t is not None and t.dtype == torch.float64 for t in (weight, bias, down, up))


def _beyond(rank: int) -> bool:
    if rank > MAX_RANK:
        note_rank(rank, MAX_RANK, "CUDA")
    return rank > MAX_RANK
