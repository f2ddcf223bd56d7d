"""The steps between a chain's GEMMs, in plain torch: what each of them computes.

`triton/chain.py` does the same in launches. x, y and the thin matrices are in the dtype of the
GEMMs, the stream z and its gradient in the stream's, d_down and d_B in float32 or the stream's.

A gradient marked as a `Sum` still has to be added up: `finish` does several in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

Sum = Any


class Norm(NamedTuple):
    """A LayerNorm's frozen parameters."""

    weight: Tensor  # [K]
    bias: Tensor  # [K]
    eps: float


class Normed(NamedTuple):
    """What `norm` makes of the stream z and the branch y."""

    z: Tensor  # [M, K]: z + y
    out: Tensor  # x̂ [M, K]
    p: Tensor  # [M, r]
    mean: Tensor  # [M]
    rstd: Tensor


class TorchSteps:
    """The steps in torch's operators, in any dtype and on any device."""

    def finish(self, *sums: Sum) -> tuple[Tensor, ...]:
        """The gradients of two sums, or of three, the first two of them of equal rank."""
        return sums

    def merge(
        self, weights: Sequence[Tensor], b: Tensor, down: Tensor, gamma: Tensor | None = None
    ) -> Tensor:
        """γ·W + B·down^T [L, N, K] in B's dtype, rounded once, for L weights [N, K] and stacks
        [L, N, r] and [L, K, r]; γ [L, N], or None.
        """
        stack = torch.stack(list(weights))
        stack = stack if gamma is None else stack * gamma.unsqueeze(2)
        return torch.baddbmm(stack, b.to(stack.dtype), down.mT.to(stack.dtype)).to(b.dtype)

    def norm(
        self, z: Tensor, y: Tensor | None, norm: Norm, down: Tensor, dtype: torch.dtype
    ) -> Normed:
        """z + y, its norm x̂ in `dtype`, P = x̂·down and the statistics."""
        z = z if y is None else z + y
        out, mean, rstd = aten.native_layer_norm(z, [z.shape[1]], norm.weight, norm.bias, norm.eps)
        out = out.to(dtype)
        return Normed(z, out, out @ down, mean.view(-1), rstd.view(-1))

    def norm_grad(
        self,
        dout: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm: Norm,
        residual: Tensor,
        s: Tensor,
    ) -> tuple[Tensor, Tensor, Sum]:
        """The stream's gradient, the same in dout's dtype for the branch, and x̂^T·S."""
        dz = aten.native_layer_norm_backward(
            dout.to(z.dtype),
            z,
            [z.shape[1]],
            mean.view(-1, 1),
            rstd.view(-1, 1),
            norm.weight,
            norm.bias,
            [True, False, False],
        )[0]
        dz = dz + residual
        return dz, dz.to(dout.dtype), self.norm_down_grad(z, mean, rstd, norm, s)

    def norm_down_grad(self, z: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, s: Tensor) -> Sum:
        """x̂^T·S alone, with x̂ made again."""
        n = (z - mean.view(-1, 1)) * rstd.view(-1, 1)
        return self.tall_grad((n * norm.weight + norm.bias).to(s.dtype), s)

    def thin(self, x: Tensor, down: Tensor) -> Tensor:
        """P = x·down."""
        return x @ down

    def thin_grad(self, dy: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Sum]:
        """S = dY·B and d_B = dY^T·P."""
        return dy @ b, self.tall_grad(dy, p)

    def tall_grad(self, x: Tensor, s: Tensor) -> Sum:
        """x^T·S."""
        return (x.T @ s).to(torch.promote_types(s.dtype, torch.float32))

    def gather_grad(
        self, parts: Sequence[Tensor], b: Tensor, p: Tensor, copy: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The parts [M, n] side by side if `copy`, and S and d_B of that matrix."""
        whole = torch.cat(list(parts), 1)
        return (whole if copy else None, *self.thin_grad(whole, b, p))

    def gelu(self, h: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """a = gelu(h) and P = a·down."""
        a = F.gelu(h)
        return a, self.thin(a, down)

    def gelu_grad(
        self, da: Tensor, h: Tensor, s: Tensor, b: Tensor, p: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dh, then S = dh·B and d_B = dh^T·P of the linear before, d_down = gelu(h)^T·s of the one
        after. dh may take da's place.
        """
        sum_down = self.tall_grad(F.gelu(h), s)
        dh = aten.gelu_backward(da, h)
        s_in, sum_b = self.thin_grad(dh, b, p)
        d_b, d_down = self.finish(sum_b, sum_down)
        return dh, s_in, d_b, d_down
