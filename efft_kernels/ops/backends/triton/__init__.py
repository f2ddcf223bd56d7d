"""The Triton backend: every strategy in fused kernels, on CUDA or in Triton's interpreter.

    forward.py, backward.py    which launches, in which order
    gemm.py         out = a·w + (a·thin_in)·core·thin_out^T: the forward, and dX with the roles
                    swapped; epilogue.py adds the low-rank product after its loop
    thin.py         the tall-and-skinny products tall·thin and tall^T·thin
    reduce.py       the second stage of their partial sums
    fold.py         B = stack_g up[g]·core[g]^T, where the kernels do not read core and up in place
    merge.py        W + ΔW for `merged`
    chain.py        the steps between the GEMMs of a chain of blocks: norm.py, act.py (GELU),
                    gather.py (gradients of q, k and v in one matrix), pair_grad.py (both of proj's
                    thin gradients), merge_stack.py (W + B·down^T of all layers)
    factors.py      how the kernels address down, core and up
    cost.py, limits.py    what a call launches, for the cost model; the ranks that it takes
    launch_cache.py    what a call leaves to the next one of its sizes, which passes pointers only
    tuning.py       which config a launch gets, of those in configs.py, on the GPU of device.py
    tools/tune_triton.py measures configs; tools/compile_triton.py compiles all of them for GPUs
                    that are not here

The interpreter takes CPU tensors when TRITON_INTERPRET=1 was set before this package was imported.
It checks kernels and is thousands of times slower than plain torch, so only an explicit choice
reaches it.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ...cost_model import Problem
from ..fallback import too_old
from .cost import excluded, launches
from .limits import TRITON_MAX_RANK

NAME = "triton"
NATIVE = False
STRATEGIES = ("fused", "split", "merged")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

__all__ = [
    "DTYPES",
    "NAME",
    "NATIVE",
    "STRATEGIES",
    "excluded",
    "launches",
    "out_of_reach",
    "preferred",
    "rejects",
    "unavailable",
]

if find_spec("triton") is not None:
    from .backward import backward
    from .device import INTERPRETED
    from .forward import forward

    __all__ += ["backward", "forward"]


def unavailable() -> str | None:
    """Why this backend cannot run here, and what would change that."""
    if find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (it comes with torch on Linux)"
    if INTERPRETED:
        return None
    if torch.version.hip is not None:
        return "the kernels are written and checked for NVIDIA GPUs; this torch is built for ROCm"
    if not torch.cuda.is_available():
        return (
            "no CUDA device is visible to torch; use backend='torch', or set TRITON_INTERPRET=1"
            " before Python starts to run the kernels on the CPU in Triton's interpreter (slow, for"
            " tests)"
        )
    return too_old(torch.cuda.current_device())


def rejects(x: Tensor) -> str | None:
    """Why x cannot be taken: its dtype or its device."""
    if x.dtype not in DTYPES:
        return f"dtype must be float16, bfloat16 or float32, got {x.dtype}; use backend='torch'"
    if INTERPRETED:
        if x.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 incorrectly; use float16 or float32"
        return None
    if not x.is_cuda:
        return f"x is on {x.device}; move it to a CUDA device or use backend='torch'"
    return None


def out_of_reach(problem: Problem) -> bool:
    """Whether plain torch runs instead: nothing to multiply, or a rank beyond what a tile's
    registers hold.
    """
    return problem.rank > TRITON_MAX_RANK or problem.N == 0 or problem.K == 0


def preferred(problem: Problem) -> bool:
    """Whether `auto` may take this backend: always."""
    return True
