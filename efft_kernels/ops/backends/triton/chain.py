"""The steps of `backends/chain_steps.py` as launches.

GELU's kernels carry the thin products of both its linears along: on an H200, ViT-B, 64 images, 52
and 108 µs for 81 and 204 in torch's activation and passes of their own. Where they would spill
(ranks above 32, hidden widths that 64 does not divide) it is those passes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..chain_steps import Norm, Normed, NormedGrad, Sums, TorchSteps
from ..fallback import padded_rank
from . import tuning
from .act import ActConfig, launch_act_bwd, launch_act_fwd
from .configs import PassConfig
from .device import multiprocessors
from .gather import launch_gather
from .launch_cache import MAX_CALLS, CallCache
from .merge_stack import launch_merge_stack
from .norm import Branch, NormConfig, launch_norm_bwd, launch_norm_down_grad, launch_norm_fwd
from .pair_grad import launch_pair_grad
from .reduce import MOST_SUMS, launch_reduce
from .thin import launch_tall_grad, launch_thin

MAX_WIDTH = 2048  # of the stream: the norm's kernels go over a row in one unrolled loop


class Configs(NamedTuple):
    """Block shapes."""

    norm: NormConfig
    norm_grad: NormConfig
    norm_down_grad: PassConfig
    gather: PassConfig
    pair_grad: PassConfig
    gelu: ActConfig | None  # None: torch's activation and passes of their own
    gelu_grad: ActConfig | None


@cache
def configs_for(k: int, rank: int, index: int | None) -> Configs:
    """The block shapes for a stream of K columns.

    Args:
        k: K.
        rank: the largest of the chain's linears.
        index: the CUDA device.
    """
    padded = padded_rank(rank)
    wide = padded > 32
    ragged = k % 64 != 0  # held, or in wide blocks, such rows would spill

    def parts(columns: int, programs: int = 2) -> int:
        """Of the rows, so that there are so many programs for each multiprocessor."""
        return tuning.cdiv(programs * multiprocessors(index), columns)

    if wide or ragged:
        gather = PassConfig(32, 64, parts(3 * tuning.cdiv(k, 64)), 8, 3)
    elif k % 256 == 0:
        gather = PassConfig(32, 256, parts(3 * k // 256), 4, 3)
    else:
        gather = PassConfig(64, 128, parts(3 * tuning.cdiv(k, 128)), 4, 3)
    pair_m = 32 if padded > 64 else 64
    pair_c = 128 if not wide and k % 128 == 0 else 64
    gelu = ActConfig(32, 128, 1, 8, 3)
    gelu_grad = ActConfig(32, 128, 16, 4, 3) if padded == 16 else ActConfig(32, 128, 11, 8, 3)
    return Configs(
        norm=NormConfig(
            16, 128 if wide or ragged else 256, not ragged, 8 if wide or k > 768 else 4
        ),
        norm_grad=NormConfig(4, 256, True, 4),
        norm_down_grad=PassConfig(
            64 if wide else 32,
            64,
            parts(tuning.cdiv(k, 64), 2 if wide else 4),
            8 if padded > 64 else 4,
            3,
        ),
        gather=gather,
        pair_grad=PassConfig(pair_m, pair_c, 4 * multiprocessors(index), 8, 3),
        gelu=None if wide else gelu,
        gelu_grad=None if wide else gelu_grad,
    )


class TritonSteps(TorchSteps):
    """The steps as launches on the current device, which is the same in all calls, as is whether
    tensors of one size are contiguous.

    Args:
        configs: block shapes.
    """

    def __init__(self, configs: Configs) -> None:
        self.configs = configs
        self._caches: dict[tuple[Hashable, ...], CallCache] = {}

    def _cache(self, name: str, x: Tensor, *others: Hashable) -> CallCache:
        key = name, x.shape, x.stride(), x.dtype, others
        cache = self._caches.get(key)
        if cache is None:
            if len(self._caches) >= MAX_CALLS:
                self._caches.clear()
            cache = self._caches[key] = {}
        return cache

    def finish(self, sums: Sums) -> None:
        self._finish(sums, 0)

    def _finish(self, sums: Sums, few: int) -> None:
        """`few`: the first of them are of few parts."""
        while sums:
            now = sums[:MOST_SUMS]
            del sums[:MOST_SUMS]
            sizes = [(found.shape, out.shape, out.dtype) for found, out in now]
            launch_reduce(now, self._cache("finish", now[0][0], few, *sizes), few)
            few = 0

    def merge(
        self, weights: Sequence[Tensor], b: Tensor, down: Tensor, gamma: Tensor | None = None
    ) -> Tensor:
        weight = weights[0]
        cache = self._cache("merge", b, weight.shape, weight.dtype, gamma is None)
        return launch_merge_stack(weights, b, down, gamma, cache)

    def norm(
        self, z: Tensor, y: Tensor | None, norm: Norm, down: Tensor, dtype: torch.dtype
    ) -> Normed:
        config = self.configs.norm
        # Rows are too few for a product on the tensor cores: P is a pass of its own over x̂, which
        # lies in the L2 cache.
        apart = config.block_m < 16
        got = launch_norm_fwd(
            z,
            None if y is None else Branch(y),
            norm.weight,
            norm.bias,
            None if apart else down,
            eps=norm.eps,
            dtype=dtype,
            config=config,
            cache=self._cache("norm", z, y is None, down.shape[1], norm.eps, dtype),
        )
        p = self.thin(got.out, down) if apart else got.p
        assert got.mean is not None and p is not None
        return Normed(got.z, got.out, p, got.mean, got.rstd)

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
        sum_down = self.norm_down_grad(z, mean, rstd, norm, s)
        got = launch_norm_bwd(
            dout,
            z,
            mean,
            rstd,
            norm.weight,
            norm.bias,
            None,
            None,
            residual,
            branch_grad=True,
            config=self.configs.norm_grad,
            cache=self._cache("norm_grad", dout, z.dtype),
        )
        assert got.dy is not None
        return self.with_before(got.dz, got.dy, sum_down, before)

    def norm_down_grad(
        self, z: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, s: Tensor
    ) -> Tensor:
        partial = launch_norm_down_grad(
            z,
            mean,
            rstd,
            norm.weight,
            norm.bias,
            s,
            config=self.configs.norm_down_grad,
            cache=self._cache("norm_down_grad", z, s.shape[1], s.dtype),
        )
        return partial

    def thin(self, x: Tensor, down: Tensor) -> Tensor:
        p = x.new_empty(x.shape[0], down.shape[1])
        launch_thin(x, down, None, p, None, cache=self._cache("thin", x, down.shape[1]))
        return p

    def thin_grad(self, dy: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.empty_like(p)
        cache = self._cache("thin_grad", dy, b.shape[1])
        partial, _ = launch_thin(dy, b, None, s, p, cache=cache)
        assert partial is not None
        return s, partial

    def tall_grad(self, x: Tensor, s: Tensor) -> Tensor:
        partial = launch_tall_grad(x, s, cache=self._cache("tall_grad", x, s.shape[1]))
        return partial

    def pair_grad(self, x: Tensor, dy: Tensor, down: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        x, dy = x.contiguous(), dy.contiguous()  # as they are; an attention may have other rows
        cache = self._cache("pair_grad", x, dy.shape[1], b.shape[1])
        return launch_pair_grad(x, dy, down, b, config=self.configs.pair_grad, cache=cache)

    def gather_grad(
        self,
        parts: Sequence[Tensor],
        b: Tensor,
        p: Tensor,
        copy: bool,
        d_b: Tensor,
        later: Sums,
    ) -> tuple[Tensor | None, Tensor]:
        first, second, third = parts
        cache = self._cache("gather", first, copy, b.shape[1])
        whole, s_partial, d_b_partial = launch_gather(
            (first, second, third), b, p, copy=copy, config=self.configs.gather, cache=cache
        )
        s = torch.empty_like(p)
        later[:0] = (s_partial, s), (d_b_partial, d_b)
        self._finish(later, few=2)
        return whole, s

    def gelu(self, h: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        config = self.configs.gelu
        if config is None or h.shape[1] % config.block_c:
            return super().gelu(h, down)
        cache = self._cache("gelu", h, down.shape[1])
        got = launch_act_fwd(h, None, None, None, down, config=config, cache=cache)
        assert got.p is not None
        if got.p.dim() == 2:
            return got.a, got.p
        p = h.new_empty(h.shape[0], down.shape[1])
        launch_reduce([(got.p, p)], cache, few=1)
        return got.a, p

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
        config = self.configs.gelu_grad
        if config is None or h.shape[1] % config.block_c:
            return super().gelu_grad(da, h, s, b, p, d_b, d_down, later)
        cache = self._cache("gelu_grad", h, s.shape[1], b.shape[1])
        got = launch_act_bwd(da, h, s, None, p, b, in_place=True, config=config, cache=cache)
        assert got.q is not None and got.d_up is not None and got.d_down is not None
        s_in = torch.empty_like(p)
        later[:0] = (got.q, s_in), (got.d_up, d_b), (got.d_down, d_down)
        self._finish(later, few=3)
        return got.dh, s_in
