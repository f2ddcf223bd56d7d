"""The steps of `backends/chain_steps.py` as launches.

GELU is torch's own: a kernel that carries the thin products of both linears along is bound by its
arithmetic, 1.6 ms a step slower on an H100 (ViT-B, 64 images) than these passes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..chain_steps import Norm, Normed, TorchSteps
from ..fallback import padded_rank
from . import tuning
from .configs import PassConfig
from .device import multiprocessors
from .gather import launch_gather
from .launch_cache import MAX_CALLS, CallCache
from .merge_stack import launch_merge_stack
from .norm import Branch, NormConfig, launch_norm_bwd, launch_norm_down_grad, launch_norm_fwd
from .reduce import Sum, launch_reduce
from .thin import launch_tall_grad, launch_thin

MAX_WIDTH = 2048  # of the stream: the norm's kernels go over a row in one unrolled loop


class Configs(NamedTuple):
    """Block shapes."""

    norm: NormConfig
    norm_grad: NormConfig
    norm_down_grad: PassConfig
    gather: PassConfig


@cache
def configs_for(k: int, rank: int, index: int | None) -> Configs:
    """The block shapes for a stream of K columns.

    Args:
        k: K.
        rank: the largest of the chain's linears.
        index: the CUDA device.
    """
    wide = padded_rank(rank) > 32
    block_c = 64 if wide else 128

    def parts(columns: int) -> int:
        """Of the rows, so that there are two programs for each multiprocessor."""
        return tuning.cdiv(2 * multiprocessors(index), columns)

    tiles = tuning.cdiv(k, block_c)
    ragged = k % 64 != 0  # held, or in wide blocks, such rows would spill
    return Configs(
        NormConfig(16, 128 if wide or ragged else 256, not ragged, 8 if wide or k > 768 else 4),
        NormConfig(4, 256, True, 4),
        PassConfig(64, block_c, parts(tiles), 4, 3),
        PassConfig(64, block_c, parts(3 * tiles), 4, 3),
    )


class Partial(NamedTuple):
    """A gradient's partial sums, and its size."""

    sums: Tensor  # [parts, rows, padded columns] float32, any number of axes
    rows: int
    columns: int


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

    def finish(self, *sums: Partial) -> tuple[Tensor, ...]:
        """The gradients; a launch's first two of three have equal columns."""
        found = [s.sums.new_empty(s.rows, s.columns) for s in sums]
        pairs: list[Sum] = [(s.sums, out) for s, out in zip(sums, found, strict=True)]
        key = [(s.sums.shape, s.rows, s.columns) for s in sums]
        no_sum: Sum = (None, None)
        first, second, third = pairs if len(pairs) == 3 else (pairs[0], no_sum, pairs[1])
        launch_reduce((first, second, third), self._cache("finish", sums[0].sums, *key))
        return tuple(found)

    def merge(
        self, weights: Sequence[Tensor], b: Tensor, down: Tensor, gamma: Tensor | None = None
    ) -> Tensor:
        weight = weights[0]
        cache = self._cache("merge", b, weight.shape, weight.dtype, gamma is None)
        return launch_merge_stack(weights, b, down, gamma, cache)

    def norm(
        self, z: Tensor, y: Tensor | None, norm: Norm, down: Tensor, dtype: torch.dtype
    ) -> Normed:
        got = launch_norm_fwd(
            z,
            None if y is None else Branch(y),
            norm.weight,
            norm.bias,
            down,
            eps=norm.eps,
            dtype=dtype,
            config=self.configs.norm,
            cache=self._cache("norm", z, y is None, down.shape[1], norm.eps, dtype),
        )
        assert got.mean is not None and got.p is not None
        return Normed(got.z, got.out, got.p, got.mean, got.rstd)

    def norm_grad(
        self, dout: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
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
        return got.dz, got.dy

    def norm_down_grad(
        self, z: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, s: Tensor
    ) -> Partial:
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
        return Partial(partial, z.shape[1], s.shape[1])

    def thin(self, x: Tensor, down: Tensor) -> Tensor:
        p = x.new_empty(x.shape[0], down.shape[1])
        launch_thin(x, down, None, p, None, cache=self._cache("thin", x, down.shape[1]))
        return p

    def thin_grad(self, dy: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Partial]:
        s = torch.empty_like(p)
        cache = self._cache("thin_grad", dy, b.shape[1])
        partial, _ = launch_thin(dy, b, None, s, p, cache=cache)
        assert partial is not None
        return s, Partial(partial, *b.shape)

    def tall_grad(self, x: Tensor, s: Tensor) -> Partial:
        partial = launch_tall_grad(x, s, cache=self._cache("tall_grad", x, s.shape[1]))
        return Partial(partial, x.shape[1], s.shape[1])

    def gather_grad(
        self, parts: Sequence[Tensor], b: Tensor, p: Tensor, copy: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        first, second, third = parts
        cache = self._cache("gather", first, copy, b.shape[1])
        whole, s_partial, d_b_partial = launch_gather(
            (first, second, third), b, p, copy=copy, config=self.configs.gather, cache=cache
        )
        s, d_b = torch.empty_like(p), b.new_empty(b.shape, dtype=torch.float32)
        launch_reduce(((d_b_partial, d_b), (s_partial, s), (None, None)), cache)
        return whole, s, d_b
