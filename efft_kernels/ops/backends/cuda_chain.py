"""A chain's norm and gradients by CUDA C++; the other steps as Triton's launches.

native_norm         z + y, x̂, P and the statistics in one pass     csrc/cuda/chain/norm.cu
native_norm_grad    dz and dy, with x̂^T·S from the same z, and     csrc/cuda/chain/norm_grad.cu
                    S and d_B of the linear before from dy
native_gelu         GELU with P of the linear after it, if chosen  csrc/cuda/chain/gelu.cu
native_gelu_grad    GELU's gradient with S and d_B of the linear   csrc/cuda/chain/gelu_grad.cu
                    before and d_down of that after, if chosen
native_pair_grad    both thin gradients of proj, if chosen         csrc/cuda/chain/pair_grad.cu
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native_library
from .chain_steps import Norm, Normed, NormedGrad, Sums
from .fallback import padded_rank
from .triton import configs, device
from .triton.chain import Configs, TritonSteps

# csrc/cuda/chain/sizes.h
MOST_WIDTH, COLUMNS, MOST_RANK = 1280, 64, 16
MOST_WIDTH_BEFORE, MOST_WIDTH_PAIR, MOST_WIDTH_GELU = 768, 1024, 4096


def takes(k: int, rank: int, index: int) -> bool:
    """Whether the kernels run on a device, for a stream of K columns and ranks up to `rank`.

    They need the shared memory of compute capability 9.0 or 10.0.
    """
    return (
        k % COLUMNS == 0
        and k <= MOST_WIDTH
        and rank <= MOST_RANK
        and torch.cuda.get_device_capability(index)[0] in (9, 10)
        and native_library.cuda_unavailable() is None
        and native_library.device_rejected(index) is None
    )


# What CudaSteps does in CUDA C++ only where it was measured to be faster on the device.
CHOSEN = ("pair_grad", "before", "gelu", "gelu_grad")


def choices(k: int, hidden: int) -> list[str]:
    """Those of CHOSEN that there are in CUDA C++, where `takes` holds.

    Args:
        k: columns of the stream.
        hidden: columns of the MLP.
    """
    even = hidden % COLUMNS == 0
    there = {
        "pair_grad": k <= MOST_WIDTH_PAIR,
        "before": k <= MOST_WIDTH_BEFORE,
        "gelu": even and hidden <= MOST_WIDTH_GELU,
        "gelu_grad": even,
    }
    return [step for step in CHOSEN if there[step]]


def chosen_key(step: str, k: int, rank: int) -> str:
    """The row of a measured table (triton/configs.py) for one of CHOSEN: [1] or [0].

    Args:
        step: one of CHOSEN.
        k: columns of the stream.
        rank: the largest of the chain's linears.
    """
    return f"chain {step}|c{k}|r{padded_rank(rank)}"


def chosen(k: int, rank: int, m: int, index: int) -> dict[str, bool]:
    """Which of CHOSEN a device's measured table names for a stream [m, K]: none without one."""
    name = device.properties(index).name
    rows = {step: configs.measured(name, chosen_key(step, k, rank), m) for step in CHOSEN}
    return {step: bool(row and row[0]) for step, row in rows.items()}


class CudaSteps(TritonSteps):
    """The steps where `takes` says so.

    Args:
        shapes: Triton's blocks, for the other steps.
        pair_grad: that step in CUDA C++ as well, where x and dY are of one width.
        before: the linear before a norm's gradient in the same pass, not in one of its own.
        gelu, gelu_grad: those steps in CUDA C++ as well.
    """

    def __init__(
        self,
        shapes: Configs,
        pair_grad: bool = False,
        before: bool = False,
        gelu: bool = False,
        gelu_grad: bool = False,
    ) -> None:
        super().__init__(shapes)
        self._native_pair = pair_grad
        self._before = before
        self._native_gelu = gelu
        self._native_gelu_grad = gelu_grad

    def norm(
        self, z: Tensor, y: Tensor | None, norm: Norm, down: Tensor, dtype: torch.dtype
    ) -> Normed:
        if not _on_16_bytes(z, y, norm.weight, norm.bias, down):
            return super().norm(z, y, norm, down, dtype)
        z_out, *others = torch.ops.efft_kernels.native_norm(
            z, y, norm.weight, norm.bias, down, norm.eps
        )
        out, p, mean, rstd = others
        return Normed(z if y is None else z_out, out, p, mean, rstd)

    def norm_grad(
        self,
        dout: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm: Norm,
        residual: Tensor,
        s: Tensor,
        before: tuple[Tensor, Tensor] | None = None,
    ) -> NormedGrad:
        operands = dout, z, mean, rstd, norm.weight, norm.bias, residual, s
        if not _on_16_bytes(*operands):
            return super().norm_grad(dout, z, mean, rstd, norm, residual, s, before)
        fits = self._before and z.shape[1] <= MOST_WIDTH_BEFORE
        if before is None or not fits or not _on_16_bytes(*before):
            dz, dy, sum_down, *_ = torch.ops.efft_kernels.native_norm_grad(*operands, None, None)
            return self.with_before(dz, dy, sum_down, before)
        return NormedGrad(*torch.ops.efft_kernels.native_norm_grad(*operands, *before))

    def pair_grad(self, x: Tensor, dy: Tensor, down: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x, dy = x.contiguous(), dy.contiguous()
        fits = x.shape[1] == dy.shape[1] <= MOST_WIDTH_PAIR and _on_16_bytes(x, dy, down, b)
        if not (self._native_pair and fits):
            return super().pair_grad(x, dy, down, b)
        sum_down, sum_b = torch.ops.efft_kernels.native_pair_grad(x, dy, down, b)
        return sum_down, sum_b

    def gelu(self, h: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        c = h.shape[1]
        fits = c % COLUMNS == 0 and c <= MOST_WIDTH_GELU and _on_16_bytes(h, down)
        if not (self._native_gelu and fits):
            return super().gelu(h, down)
        return torch.ops.efft_kernels.native_gelu(h, down)  # type: ignore[no-any-return]

    def gelu_grad(
        self,
        da: Tensor,
        h: Tensor,
        s: Tensor,
        b: Tensor,
        p: Tensor,
        d_b: Tensor,
        d_down: Tensor,
        later: Sums,
    ) -> tuple[Tensor, Tensor]:
        fits = h.shape[1] % COLUMNS == 0 and _on_16_bytes(da, h, s, b, p)
        if not (self._native_gelu_grad and fits):
            return super().gelu_grad(da, h, s, b, p, d_b, d_down, later)
        sum_s, sum_b, sum_down = torch.ops.efft_kernels.native_gelu_grad(da, h, s, b, p)
        s_in = torch.empty_like(p)
        later[:0] = (sum_s, s_in), (sum_b, d_b), (sum_down, d_down)
        self._finish(later, few=1)
        return da, s_in


def _on_16_bytes(*tensors: Tensor | None) -> bool:
    """Whether all start at a multiple of 16 bytes, as torch's own allocations do."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return not addresses & 15
