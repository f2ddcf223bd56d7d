"""The steps between a chain's GEMMs, in plain torch: what each of them computes.

`triton/chain.py` does the same in launches. x, y and the thin matrices are in the dtype of the
GEMMs, the stream z and its gradient in the stream's, d_down and d_B in float32 or the stream's.

A gradient marked as a `Sum` still has to be added up, into the tensor beside it in a list of
`Sums`. `finish` does, and so does every step that is given such a list: it empties it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

Sum = Tensor  # or whatever partial sums the steps make
Sums = list[tuple[Sum, Tensor]]


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


class NormedGrad(NamedTuple):
    """What `norm_grad` makes; the last two only for a linear before it."""

    dz: Tensor  # [M, K], the stream's gradient
    dy: Tensor  # the same in the GEMMs' dtype, the branch's
    sum_down: Sum  # x̂^T·S
    s: Tensor | None  # dy·B [M, r]
    sum_b: Sum | None  # dy^T·P


class TorchSteps:
    """The steps in torch's operators, in any dtype and on any device."""

    def finish(self, sums: Sums) -> None:
        """Add each sum up into its tensor."""
        for found, out in sums:
            out.copy_(found)
        sums.clear()

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
        before: tuple[Tensor, Tensor] | None = None,
    ) -> NormedGrad:
        """The stream's gradient, the same in dout's dtype for the branch, and x̂^T·S.

        Args:
            before: B [K, r] and P [M, r] of the linear whose output the branch is.
        """
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
        dy = dz.to(dout.dtype)
        return self.with_before(dz, dy, self.norm_down_grad(z, mean, rstd, norm, s), before)

    def with_before(
        self, dz: Tensor, dy: Tensor, sum_down: Sum, before: tuple[Tensor, Tensor] | None
    ) -> NormedGrad:
        """The same with S and d_B of the linear before, if there is one, by a pass of its own."""
        s, sum_b = (None, None) if before is None else self.thin_grad(dy, *before)
        return NormedGrad(dz, dy, sum_down, s, sum_b)

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

    def pair_grad(self, x: Tensor, dy: Tensor, down: Tensor, b: Tensor) -> tuple[Sum, Sum]:
        """d_down = x^T·S and d_B = dY^T·P, with S = dY·B and P = x·down."""
        return self.tall_grad(x, dy @ b), self.tall_grad(dy, x @ down)

    def gather_grad(
        self,
        parts: Sequence[Tensor],
        b: Tensor,
        p: Tensor,
        copy: bool,
        d_b: Tensor,
        later: Sums,
    ) -> tuple[Tensor | None, Tensor]:
        """The parts [M, n] side by side if `copy`, and S of that matrix; fills d_B and `later`."""
        whole = torch.cat(list(parts), 1)
        s, sum_b = self.thin_grad(whole, b, p)
        later.append((sum_b, d_b))
        self.finish(later)
        return whole if copy else None, s

    def gelu(self, h: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """a = gelu(h) and P = a·down."""
        a = F.gelu(h)
        return a, self.thin(a, down)

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
        """dh, then S = dh·B of the linear before; fills its d_B = dh^T·P, d_down = gelu(h)^T·s of
        the linear after, and `later`'s. dh may take da's place.
        """
        later.append((self.tall_grad(F.gelu(h), s), d_down))
        dh = aten.gelu_backward(da, h)
        s_in, sum_b = self.thin_grad(dh, b, p)
        later.append((sum_b, d_b))
        self.finish(later)
        return dh, s_in
